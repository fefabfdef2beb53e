"""Claims about docs/results: a page of `benchmarks/compare.py` says what its JSON file says."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.comparison.board import Board
from offramp.comparison.markdown import to_markdown
from offramp.storage import read_document

RESULTS = Path(__file__).parents[1] / "docs" / "results"
BEFORE = {"uspto_50k"}
"""Written when methods were read by one family of policies at every cost."""
BOARDS = sorted(file.stem for file in (RESULTS / "compare").glob("*.json"))


@pytest.mark.parametrize("name", [one for one in BOARDS if one not in BEFORE])
def test_a_board_as_a_page_is_that_of_its_json(name: str) -> None:
    board = read_document(Board, RESULTS / "compare" / f"{name}.json")
    page = (RESULTS / f"compare-{name}.md").read_text(encoding="utf-8")
    _, _, said = page.partition("\n\n")  # after the command that made it
    # families that serve nowhere are in the folded tables alone, and their readings not kept
    assert _unfolded(said) == _unfolded(to_markdown(board))


def test_a_page_says_how_it_was_made() -> None:
    for name in BOARDS:
        page = (RESULTS / f"compare-{name}.md").read_text(encoding="utf-8")
        assert page.startswith(f"Made by `python benchmarks/compare.py {name.split('-')[0]}")


def _unfolded(page: str) -> str:
    return page.strip().partition("<details>")[0]
