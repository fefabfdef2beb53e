"""`offramp compare` from the command line, on tiny models."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from board_support import make_board, make_method
from cli_support import Said, write_csv
from comparison_support import in_this_process
from filelock import FileLock
from test_comparison_grid import plan

import offramp as offramp_package
from offramp.cli.compare import _missing, _table, seconds
from offramp.comparison import cell as cell_module
from offramp.comparison import compare, running, statistics
from offramp.comparison.plan import Cell, Grid
from offramp.errors import ConfigError, OfframpError
from offramp.exits import ExitSpec
from offramp.methods import METHODS
from offramp.testing import save_tiny_stock, tiny_texts

pytest_plugins = ("cli_fixtures", "comparison_fixtures")
Offramp = Callable[..., Said]
Begun = Callable[..., "subprocess.Popen[str]"]
METHODS_RUN = "pabee,attach,truncated"
SHORT = ("--epochs", 0.5, "--rates", "1e-3", "--batch-size", 16, "--quiet")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    save_tiny_stock(folder / "stock")
    texts = tiny_texts(100)
    write_csv(folder / "rows.csv", [(t, f"label-{len(t) % 3}") for t in texts])
    return folder


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 50)


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    with pytest.MonkeyPatch.context() as patched:
        in_this_process(patched)
        done = compare(place / "stock", place / "rows.csv", place / "finished", seeds=2,
                       methods=METHODS_RUN.split(","), epochs=0.5, rates=[1e-3], batch_size=16,
                       quiet=True)  # fmt: skip
    assert done.complete, done.missing
    return done.folder


@pytest.fixture
def done(finished: Path, tmp_path: Path) -> Path:
    """A comparison that is over, to go on with."""
    return Path(shutil.copytree(finished, tmp_path / "which"))


@pytest.fixture
def begun() -> Iterator[Begun]:
    """Begins `offramp` in a process and a group of its own, which a test that fails leaves to us;
    runs end when their comparison does."""
    with contextlib.ExitStack() as stack:

        def begin(*arguments: object) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "offramp", *map(str, arguments)]
            process = subprocess.Popen(
                command, stderr=subprocess.PIPE, text=True, start_new_session=True
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            return process

        yield begin


def command(place: Path, out: Path, methods: str, *more: object) -> list[object]:
    rows = place / "rows.csv"
    return ["compare", place / "stock", "-d", rows, "-o", out, "--methods", methods, *SHORT, *more]


def test_a_leaderboard_of_methods_is_written_as_page_markdown_and_json(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path
) -> None:
    said = offramp(*command(place, done, METHODS_RUN, "--seeds", 2))
    assert said.code == 0, said.err
    names = METHODS_RUN.split(",")
    board = json.loads((done / "leaderboard.json").read_text())
    assert {row["name"] for row in board["methods"]} == set(names)
    assert board["seeds"] == [1, 2]
    assert not board["missing"]
    for text in (
        *((done / f"leaderboard.{kind}").read_text() for kind in ("md", "html")),
        said.out,
    ):
        assert all(name in text for name in names)


def test_the_same_command_does_nothing_twice_and_more_methods_only_add(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path
) -> None:
    assert offramp(*command(place, done, METHODS_RUN, "--seeds", 2)).code == 0
    assert not inline
    said = offramp(*command(place, done, "attach,deebert", "--seeds", 1, "--json"))
    assert inline == [Cell("deebert", 1e-3, 1)]
    assert {row["name"] for row in said.document["board"]["methods"]} == {"attach", "deebert"}


def test_methods_that_differ_in_their_policy_alone_are_trained_once(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(cell_module, "train")
    said = offramp(*command(place, done, "pabee,beem", "--seeds", 2, "--json"))
    assert inline == [Cell("beem", 1e-3, seed) for seed in (1, 2)]
    pabee, beem = said.document["board"]["methods"]
    assert {pabee.pop("name"), beem.pop("name")} == {"pabee", "beem"}
    for shared in ("full_score", "parameters_added", "learning_rate"):
        assert pabee[shared] == beem[shared]
    assert {pabee["own"], beem["own"]} == {"patience", "accumulated"}


def test_a_method_that_has_changed_lends_its_training_to_nobody(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path
) -> None:
    for file in done.glob("cells/pabee*/result.json"):
        kept = json.loads(file.read_text())
        file.write_text(json.dumps({**kept, "recipe": "of before"}))
    assert offramp(*command(place, done, "beem", "--seeds", 1)).code == 0
    cell = Cell("beem", 1e-3, 1)
    assert "tables are taken" not in (done / "cells" / cell.name / "log.txt").read_text()
    assert inline == [cell]
    assert (done / "cells" / cell.name / "seconds.json").is_file()


def test_a_folder_holds_one_comparison_and_says_what_differs(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path
) -> None:
    said = offramp(*command(place, done, "attach", "--epochs", 3))
    assert said.code == 2
    assert "these differ: start_epochs, epochs." in said.err
    assert not inline


def test_a_method_that_has_changed_is_refused_before_anything_runs(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = replace(METHODS["pabee"], exits=ExitSpec(pooling="mean", hidden=True))
    monkeypatch.setitem(METHODS._items, "pabee", changed)
    said = offramp(*command(place, done, METHODS_RUN, "--seeds", 3))
    assert said.code == 2
    assert f"delete {done / 'cells' / 'pabee-0.001-seed1'}, " in said.err
    assert not inline


def test_a_run_that_fails_is_named_and_the_others_are_ranked(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(run: Any) -> None:
        raise OfframpError("The moon is full.")

    shutil.rmtree(done / "cells" / "truncated-0.001-seed1")
    monkeypatch.setattr("offramp.comparison.cell._truncated", fail)
    said = offramp(*command(place, done, "truncated,attach", "--seeds", 1))
    assert said.code == 3
    assert "truncated (seed 1: The moon is full.)" in said.out
    assert "attach" in (done / "leaderboard.md").read_text()


def test_a_learning_rate_that_fails_is_told_and_its_method_is_ranked_with_the_other(
    offramp: Offramp, inline: list[Cell], place: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def options(work: Any) -> Any:
        if work.cell.rate == 0.5:
            raise OfframpError("The loss became nan.")
        return before.fget(work)

    before: Any = cell_module.Work.options
    monkeypatch.setattr(cell_module.Work, "options", property(options))
    out = tmp_path / "which"
    said = offramp(*command(place, out, "pabee", "--seeds", 1, "--rates", "1e-3,0.5"))
    assert said.code == 0, said.err
    board = json.loads((out / "leaderboard.json").read_text())
    assert [row["learning_rate"] for row in board["methods"]] == [1e-3]
    failed = board["facts"]["runs that failed"].split("; ")
    assert set(failed) == {f"{one}-0.5-seed1: The loss became nan." for one in ("plain", "pabee")}


def test_a_leaderboard_says_where_methods_were_not_treated_alike() -> None:
    grid = Grid(plan(epochs=2), ("plain", "attach", "pabee", "jei_dnn"), (1,))
    said = running._facts(grid, {}, {})["each method"]
    assert said.endswith("(but attach with a learning rate of its own)")
    alike = running._facts(Grid(plan(), ("plain", "pabee"), (1,)), {}, {})["each method"]
    assert "but" not in alike


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/there/models--org--small/snapshots/0a1b", "org/small"),
        ("/there/my-classifier", "my-classifier"),
    ],
)
def test_a_model_has_the_name_by_which_people_know_it(path: str, name: str) -> None:
    grid = Grid(plan(model=path), ("plain", "pabee"), (1,))
    assert running._facts(grid, {}, {})["model"] == name


def test_a_run_that_dies_before_its_result_is_written_is_not_trained_again(
    offramp: Offramp, inline: list[Cell], place: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> float:
        raise OfframpError("Killed.")

    again = command(place, done, "attach", "--seeds", 1)
    shutil.rmtree(done / "cells" / "attach-seed1")
    with monkeypatch.context() as patched:
        patched.setattr(cell_module, "_tune_area", die)
        assert offramp(*again).code == 3
    with monkeypatch.context() as patched:
        patched.setattr(cell_module, "attach", die)
        said = offramp(*again)
    assert said.code == 0, said.out
    assert not list(done.glob("cells/attach*/model*"))


def test_seconds_of_training_are_kept_when_a_run_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cell_module, "TICK", 0.01)
    cell = Cell("pabee", 1e-3, 1)
    (tmp_path / "cells" / cell.name).mkdir(parents=True)
    run = cell_module.Work(tmp_path, plan(), cell, tmp_path, None, "cpu")
    with run._clock():
        time.sleep(0.2)
        assert run.seconds > 0.05  # so much a run that is killed now has spent


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--methods", "pabe"), "Did you mean 'pabee'"),
        (("--seeds", "0"), "--seeds is 0"),
        (("--budget", "soon"), "give a time such as 90m"),
        (("--rates", "fast"), "numbers with commas"),
        (("--test-share", "0.9"), "leave rows to train on"),
        (("--plugin", "no_such_module"), "cannot be imported"),
        (("--plugin", "broken_plugin"), "cannot be imported: SyntaxError"),
        (("--metric", "accurac"), "Did you mean 'accuracy'"),
        (("--metric", "pearson"), "pearson"),
        (("--reference", "pabee", "--methods", "attach"), "not among the methods: attach"),
        (("--methods", "plain"), "nothing to compare"),
        (("--methods", ","), "nothing to compare"),
        (("--workers", "0"), "--workers is 0"),
        (("--epochs", "0"), "must be positive"),
        (("--batch-size", "-1"), "must be positive"),
        (("--max-length", "0"), "must be positive"),
        (("--max-length", "1"), "special tokens leave no room"),
        (("--rates", "nan"), "must be positive"),
    ],
)
def test_mistakes_are_told_before_anything_runs(
    offramp: Offramp, inline: list[Cell], place: Path, tmp_path: Path,
    options: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "broken_plugin.py").write_text("def f(:")
    monkeypatch.chdir(tmp_path)
    done = offramp(
        "compare", place / "stock", "-d", place / "rows.csv", "-o", tmp_path / "x", *options
    )
    assert done.code == 2
    assert said in done.err
    assert not inline
    assert not (tmp_path / "x").exists()


def test_an_output_that_cannot_be_written_is_told(
    offramp: Offramp, inline: list[Cell], place: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    done = offramp("compare", place / "stock", "-d", place / "rows.csv", "-o", tmp_path / "file/x")
    assert done.code == 2
    assert "cannot be written" in done.err


def test_a_folder_in_which_another_comparison_works_is_left_alone(
    offramp: Offramp, inline: list[Cell], place: Path, tmp_path: Path
) -> None:
    with FileLock(tmp_path / ".lock"):
        done = offramp("compare", place / "stock", "-d", place / "rows.csv", "-o", tmp_path)
    assert done.code == 2
    assert "Another comparison is at work" in done.err
    assert not inline


def test_a_folder_with_something_else_is_left_alone(
    offramp: Offramp, inline: list[Cell], place: Path, tmp_path: Path
) -> None:
    (tmp_path / "note.txt").write_text("mine")
    done = offramp("compare", place / "stock", "-d", place / "rows.csv", "-o", tmp_path)
    assert done.code == 2
    assert "holds no comparison" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]


def test_a_budget_stops_runs_and_the_same_command_goes_on(
    place: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With processes as users have them, then with runs in this process."""
    out = tmp_path / "which"
    options: dict[str, Any] = {"methods": ["attach"], "seeds": 1, "rates": [1e-3], "epochs": 0.5}
    first = compare(place / "stock", place / "rows.csv", out, budget=1.0, quiet=True, **options)
    assert first.board is None
    assert not first.complete
    assert {one.method for one in first.missing} == {"plain", "attach"}
    assert _missing(first) == "2 runs of plain, attach (not done yet)"
    request.getfixturevalue("inline")
    then = compare(place / "stock", place / "rows.csv", out, quiet=True, **options)
    assert then.complete
    assert then.board is not None


def test_a_method_of_ones_own_takes_part_without_a_change_to_the_package(
    place: Path, done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plug-in from outside: one file, imported by every process."""
    (tmp_path / "my_method.py").write_text(
        "from offramp.exits import ExitSpec\n"
        "from offramp.methods import METHODS, Method\n"
        "from offramp.objectives import EqualWeights\n"
        "METHODS.register('mine', Method('mine', 'unpublished', ExitSpec(pooling='mean'),\n"
        "                                EqualWeights, 'margin'))\n"
    )
    monkeypatch.setattr(METHODS, "_items", dict(METHODS._items))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(offramp_package.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    found = compare(place / "stock", place / "rows.csv", done, methods=["mine"], seeds=1,
                    rates=[1e-3], epochs=0.5, batch_size=16, plugins=["my_method"],
                    quiet=True)  # fmt: skip
    assert found.complete, found.missing
    assert found.board is not None
    assert [row.name for row in found.board.methods] == ["mine"]


def test_ctrl_c_in_a_terminal_reaches_runs_once_so_that_they_make_a_checkpoint(
    place: Path, tmp_path: Path, begun: Begun
) -> None:
    out = tmp_path / "which"
    process = begun(*command(place, out, "pabee", "--seeds", 1, "--epochs", 1000, "--workers", 1))
    until = time.monotonic() + 400
    while time.monotonic() < until:
        time.sleep(0.2)
        logs = [log.read_text() for log in out.glob("cells/p*/log.txt")]
        if any("step 50 of" in log for log in logs):
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of the group
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "Traceback" not in said
    assert list(out.glob("cells/p*/model.work/*/checkpoint-*/optimizer.pt"))


def test_runs_end_when_the_comparison_is_killed(place: Path, tmp_path: Path, begun: Begun) -> None:
    process = begun(*command(place, tmp_path / "which", "attach", "--seeds", 1))
    runs: list[psutil.Process] = []
    until = time.monotonic() + 400
    while not runs and time.monotonic() < until:
        time.sleep(0.2)
        runs = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    gone, alive = psutil.wait_procs(runs, timeout=120)
    assert gone
    assert not alive


@pytest.mark.parametrize(("text", "number"), [("90m", 5400), ("2h", 7200), ("1.5h", 5400)])
def test_a_budget_is_a_time(text: str, number: float) -> None:
    assert seconds(text) == number


@pytest.mark.parametrize("text", ["", "2", "h", "-1h", "0s", "2 days"])
def test_a_budget_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--budget"):
        seconds(text)


def test_a_score_by_another_policy_than_the_named_one_is_marked(
    capsys: pytest.CaptureFixture[str],
) -> None:
    board = make_board(["auto", "pabee"])
    other = make_method(1, "pabee", 0.91, 0.4, chosen_at={"2": "energy"})
    _table(board)
    assert "*" not in capsys.readouterr().out
    _table(board.model_copy(update={"methods": (board.methods[0], other)}))
    _, auto, pabee, why = capsys.readouterr().out.splitlines()
    assert "*" not in auto
    assert pabee.split()[5].endswith("*")
    assert pabee.count("*") == 1
    assert why.startswith("* by another policy")
