"""Other words of the same meaning, from a list that the user gives (WAFFLE, arXiv 2310.19152)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp.attacks.base import ATTACKS
from offramp.attacks.search import TextAttack
from offramp.errors import ConfigError, DataError
from offramp.model import MultiExitModel
from offramp.storage import fingerprint_of_files, read_json


@ATTACKS.register("words")
class Words(TextAttack):
    """Words are replaced by synonyms.

    Args:
        synonyms: a JSON file {"word": ["other", ...]}, or lines of word, tab, synonym. Words are
            looked up in lower case.
    """

    name = "words"
    synonyms: Path | None = None

    def check(self, model: MultiExitModel) -> None:
        super().check(model)
        if self.synonyms is None:
            raise ConfigError(
                "Attack 'words' needs synonyms: give --synonyms FILE, JSON such as "
                '{"good": ["fine", "nice"]} or lines of word, tab, synonym; or take the attack '
                "'characters', which needs none."
            )
        _ = self._table  # a file that is not right is found now

    def identity(self) -> dict[str, Any]:
        known = None if self.synonyms is None else fingerprint_of_files(self.synonyms)
        return {**super().identity(), "synonyms": known}

    def candidates(self, word: str) -> Sequence[str]:
        return [like(word, other) for other in self._table.get(word.lower(), ())]

    @cached_property
    def _table(self) -> Mapping[str, tuple[str, ...]]:
        return {} if self.synonyms is None else read_synonyms(self.synonyms)


def like(word: str, other: str) -> str:
    """`other` in the case of `word`."""
    if len(word) > 1 and word.isupper():
        return other.upper()
    return other[:1].upper() + other[1:] if word[:1].isupper() else other


def read_synonyms(path: Path) -> dict[str, tuple[str, ...]]:
    """Synonyms by word in lower case, none of them the word itself. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such file of synonyms.")
    pairs = _of_json(path) if path.suffix.lower() == ".json" else _of_lines(path)
    found: dict[str, dict[str, None]] = {}
    for word, other in pairs:
        if other.lower() != word.lower():
            found.setdefault(word.lower(), {})[other] = None
    if not found:
        raise DataError(f"{path}: there is no word with a synonym.")
    return {word: tuple(others) for word, others in found.items()}


def _of_json(path: Path) -> list[tuple[str, str]]:
    data = read_json(path, DataError)
    wrong = not isinstance(data, dict) or any(
        not isinstance(others, list) or not all(isinstance(one, str) and one for one in others)
        for others in data.values()
    )
    if wrong:
        raise DataError(f'{path}: synonyms look like {{"good": ["fine", "nice"], ...}}.')
    return [(word, other) for word, others in data.items() for other in others]


def _of_lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"{path}: cannot be read: {problem}.") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in line.split("\t")]
        if not any(cells):
            continue
        if len(cells) != 2 or not all(cells):
            raise DataError(f"{path}, line {number}: not a word, a tab and a synonym.")
        pairs.append((cells[0], cells[1]))
    return pairs
