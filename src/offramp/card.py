"""The model card: the README.md of a released folder, of which only marked parts are ours.

It begins with YAML for the hub. There, keys of ours are kept true and all others are the owner's,
and so is the text outside the marks. A README.md without our marks is the owner's own.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from offramp.storage import whole_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

logger = logging.getLogger("offramp")

README = "README.md"
LONGEST = 80
_EMPTY = "---\n{}\n---\n"
# punctuation that may mean something to Markdown or HTML; a point in a number does not
_SIGN = re.compile(r"[!-+/:-@\[-`{-~]|(?<!\d)\.|\.(?!\d)")
_DIRECTIONS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def escaped(text: object) -> str:
    """Anything as plain text on one line of Markdown, in a table, too; long text is cut."""
    said = " ".join("".join(" " if _unseen(sign) else sign for sign in str(text)).split())
    if len(said) > LONGEST:
        said = said[: LONGEST - 1] + "…"
    return _SIGN.sub(r"\\\g<0>", said)


def _unseen(sign: str) -> bool:
    """Controls, lone surrogates, and signs that turn the direction of what follows."""
    category = unicodedata.category(sign)
    return category in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(sign) in _DIRECTIONS


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells that are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def part(name: str, text: str) -> str:
    """Text between the marks that `with_part` finds again."""
    begin, end = _marks(name)
    return f"{begin}\n{text.strip()}\n{end}"


def with_part(text: str, name: str, new: str) -> str | None:
    """The text with another part of that name; None unless its marks stand there just once."""
    begin, end = _marks(name)
    before, *middle = text.split(begin)
    if len(middle) != 1 or middle[0].count(end) != 1 or end in before:
        return None
    ours = part(name, new)
    if "\r\n" in text:
        ours = ours.replace("\n", "\r\n")
    return before + ours + middle[0].partition(end)[2]


def _marks(name: str) -> tuple[str, str]:
    return f"<!-- offramp:{name} -->", f"<!-- /offramp:{name} -->"


def without_part(text: str, name: str) -> str | None:
    """The text without the part of that name; None where `with_part` gives None."""
    emptied = with_part(text, name, "")
    if emptied is None:
        return None
    begin, end = _marks(name)
    return emptied.partition(begin)[0] + emptied.partition(end)[2].lstrip()


def with_front(text: str, change: Callable[[ModelCardData], None]) -> str:
    """The text with its YAML changed; as it is where the YAML there cannot be read."""
    from huggingface_hub.repocard import REGEX_YAML_BLOCK, ModelCard

    if not REGEX_YAML_BLOCK.search(text):
        text = f"{_EMPTY}\n{text}"
    try:
        card: Any = ModelCard(text)
        before = card.data.to_dict()
        change(card.data)
        return text if card.data.to_dict() == before else str(card)
    # whatever is wrong with YAML of others, it is theirs
    except Exception as problem:
        logger.info("The YAML of the model card cannot be read and stays as it is: %s", problem)
        return text


def read_card(path: Path) -> str | None:
    """The text of a README.md; None where there is none, or none that is text."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except (OSError, UnicodeDecodeError):
        return None


def write_card(path: Path, text: str) -> None:
    """Write a README.md whole or not at all, its line ends as they are."""
    with whole_file(path) as staged:
        staged.write_bytes(text.encode("utf-8", "replace"))


def say_untouched(path: Path) -> None:
    """Log that a README.md is the owner's own."""
    logger.info("%s is your own and stays as it is: it has no part that is marked as ours.", path)
