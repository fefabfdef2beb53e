"""Claims about the README: its example runs, its commands run, and they print what it shows."""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Said
from docs_support import ROOT, blocks, commands, missing_links, names, write_rows

from offramp.testing import save_tiny_stock

pytest_plugins = ("cli_fixtures",)

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_stock("my-classifier")
    write_rows("texts.csv", seed=0)
    (example,) = blocks(README, "python")
    assert len(example.strip().splitlines()) <= 11
    Path("example.py").write_text(example)
    runpy.run_path("example.py")
    out = capsys.readouterr().out
    assert "not a guarantee" in out
    assert len(re.findall(r"^label-\d 0\.\d+ \d$", out, re.MULTILINE)) == 2


def test_the_walk_through_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offramp: Callable[..., Said]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_stock("my-classifier")
    save_tiny_stock("my-encoder")
    for seed, name in enumerate(("reviews.csv", "held-out.csv", "test.csv")):
        write_rows(name, seed, itertools.cycle(f"label-{n}" for n in range(3)))
    write_rows("new.csv", seed=9)
    shown_commands = set()
    for command, shown in commands(README):
        _, *arguments = shlex.split(command)
        shown_commands.add(arguments[0])
        if arguments[0] == "tune":
            # these models know nothing, so early exit pays for a generous target only
            arguments[arguments.index("1%")] = "30%"
        said = offramp(*arguments)
        assert said.code == 0, f"{command}: {said.err}"
        missing = names(shown) - names(said.out)
        assert not missing, f"{command}: {missing}"
    assert shown_commands == {"tune", "evaluate", "calibrate", "info", "predict", "report", "train"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    assert missing_links(ROOT / "README.md") == []
