"""Claims about the command `offramp bench`: what it prints, writes and refuses."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Said, tree

from offramp.benchmark import Bench
from offramp.storage import read_document
from offramp.testing import save_tiny

pytest_plugins = ("cli_fixtures",)

OPTIONS = ("--backends", "torch", "--precisions", "fp32", "--batch-sizes", "1,4", "--rows", "12",
           "--passes", "2", "--no-memory", "--quiet")  # fmt: skip


def test_the_command_says_which_number_of_threads_is_fastest(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    given_to = ("bench", place / "exits", "-d", place / "rows.csv", "-o", tmp_path / "out")
    said = offramp(*given_to, "--depths", "50", "--threads", "1,2", *OPTIONS)
    assert said.code == 0, said.err
    assert "Fastest number of threads" in said.out
    assert re.search(r"Of 1, 2 threads, [12] did best", said.out)


def test_the_command_prints_tables_and_writes_the_page(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    given_to = ("bench", place / "exits", "-d", place / "rows.csv", "-o", tmp_path / "out")
    said = offramp(*given_to, "--depths", "25,50%", *OPTIONS)
    assert said.code == 0, said.err
    assert "Speed-up by early exit, of the ideal" in said.out
    assert "offramp torch fp32, forced 50% depth" in said.out
    assert "Where rows leave is forced" in said.out
    assert str(tmp_path / "out" / "bench.html") in said.out
    assert said.err == ""
    assert tree(tmp_path / "out") == ["bench.html", "bench.json"]


def test_the_command_gives_one_document(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    output = tmp_path / "out"
    given = ("bench", place / "stock", "-d", place / "rows.csv", "-o", output, "--json")
    said = offramp(*given, *OPTIONS)
    assert Bench.model_validate(said.document) == read_document(Bench, output / "bench.json")
    assert said.document["source"].startswith("a stock model with new exits")


def test_the_command_leaves_a_cell_empty_where_nothing_was_timed(
    tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    model = save_tiny(tmp_path / "albert", "albert")
    said = offramp("bench", model, "-o", tmp_path / "out", "--depths", "50", *OPTIONS)
    assert said.code == 0, said.err
    (line,) = (line for line in said.out.splitlines() if "depth pool  " in line and " of " in line)
    assert len(re.findall(r"x of ", line)) == 1
    assert "A depth pool takes the rows of the stream one by one" in said.out


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--batch-sizes", "1,many"),
        ("--depths", "half"),
        ("--backends", ","),
        ("--threads", "two"),
        ("--threads", ","),
    ],
)
def test_the_command_says_what_is_wrong_with_a_list(
    option: str, value: str, place: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("bench", place / "exits", option, value)
    assert said.code == 2
    assert option in said.err
