"""Claims about the README: its example runs, its commands run, and they print what it shows."""

from __future__ import annotations

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_support import Said, write_csv

from offramp.testing import save_tiny_stock, tiny_texts

pytest_plugins = ("cli_fixtures",)

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
ROWS = 250


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_the_python_example_runs_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_stock("my-classifier")
    Path("texts.csv").write_text("text\n" + "\n".join(tiny_texts(ROWS)) + "\n")
    (example,) = blocks("python")
    assert len(example.strip().splitlines()) <= 11
    Path("example.py").write_text(example)
    runpy.run_path("example.py")
    out = capsys.readouterr().out
    assert "not a guarantee" in out
    assert len(re.findall(r"^label-\d 0\.\d+ \d$", out, re.MULTILINE)) == 2


def commands() -> list[tuple[str, str]]:
    """(command, the output the README shows) of all console blocks, in order."""
    found = []
    for block in blocks("console"):
        for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
            whole = part.replace("\\\n", " ")
            command, _, output = whole.partition("\n")
            found.append((command, output))
    return found


def names(output: str) -> set[str]:
    """What a line is about: its words up to the first figure or gap."""
    heads = (re.split(r"  |\d|:|\(", line.strip())[0].strip() for line in output.splitlines())
    return {head for head in heads if re.fullmatch(r"[a-z][a-z -]+", head)}


def write_rows(name: str, seed: int, labelled: bool = True) -> None:
    texts = tiny_texts(ROWS, seed)
    rows = [[text, f"label-{n % 3}"][: 1 + labelled] for n, text in enumerate(texts)]
    write_csv(Path(name), rows, ("text", "label")[: 1 + labelled])


def test_the_walk_through_runs_and_prints_what_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offramp: Callable[..., Said]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_tiny_stock("my-classifier")
    save_tiny_stock("my-encoder")
    for seed, name in enumerate(("reviews.csv", "held-out.csv", "test.csv")):
        write_rows(name, seed)
    write_rows("new.csv", seed=9, labelled=False)
    shown_commands = set()
    for command, shown in commands():
        _, *arguments = shlex.split(command)
        shown_commands.add(arguments[0])
        if arguments[0] == "tune":
            # these models know nothing, so early exit pays for a generous target only
            arguments[arguments.index("1%")] = "30%"
        said = offramp(*arguments)
        assert said.code == 0, f"{command}: {said.err}"
        missing = names(shown) - names(said.out)
        assert not missing, f"{command}: {missing}"
    assert shown_commands == {"tune", "evaluate", "calibrate", "info", "predict", "train"}


def test_the_two_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link
