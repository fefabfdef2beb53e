"""Reads the examples of the README and of the pages in docs/."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from cli_support import write_csv

from offramp.testing import tiny_texts

ROOT = Path(__file__).resolve().parents[1]
ROWS = 250


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[tuple[str, str]]:
    """(command, the output shown below it) of all console blocks, in order."""
    found = []
    for block in blocks(text, "console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            whole = part.replace("\\\n", " ")
            command, _, output = whole.partition("\n")
            found.append((command, output))
    return found


def names(output: str) -> set[str]:
    """What a line is about: its words up to the first figure or gap."""
    heads = (re.split(r"  |\d|:|\(", line.strip())[0].strip() for line in output.splitlines())
    return {head for head in heads if re.fullmatch(r"[a-z][a-z -]+", head)}


def missing_links(page: Path) -> list[str]:
    """Links to files that are not there."""
    links = re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8"))
    local = (link for link in links if "://" not in link)
    return [link for link in local if not (page.parent / link).exists()]


def write_rows(name: str, seed: int, labels: Iterable[object] | None = None) -> None:
    """A CSV of random texts, with a label each where labels are given."""
    texts = tiny_texts(ROWS, seed)
    if labels is None:
        write_csv(Path(name), [(text,) for text in texts], ("text",))
    else:
        write_csv(Path(name), list(zip(texts, labels, strict=False)))
