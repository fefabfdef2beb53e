"""What a folder of runs comes to, from tables that are made up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset, load_from_disk
from test_comparison_grid import plan, result
from test_comparison_statistics import labels_of, table

from offramp.comparison import running, statistics
from offramp.comparison.cell import Work, _full_score
from offramp.comparison.plan import RESULT, ROLES, Cell, Grid
from offramp.comparison.rows import cut, keep
from offramp.comparison.running import Compared
from offramp.comparison.workers import Workers
from offramp.errors import ConfigError, NonFiniteError, OutputError
from offramp.methods import METHODS
from offramp.metrics import SINGLE
from offramp.storage import write_document
from offramp.table import ExitTable

ROWS = 60
GRID = Grid(plan(fine_tunes=False, rates=(1e-4,)), ("plain", "pabee", "deebert"), (1, 2))


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(statistics, "RESAMPLES", 100)


def kept(
    folder: Path,
    cell: Cell,
    nan: tuple[str, int] = ("", 0),
    quality: float = 0.5,
    right: bool = False,
) -> None:
    """A finished run.

    Args:
        nan: a role, and how many of its first rows have scores that are not finite.
        right: all answers on test rows.
    """
    for number, role in enumerate(ROLES):
        labels = labels_of(SINGLE, ROWS, cell.seed if role == "tune" else 0)
        made = table(labels, seed=10 * cell.seed + number + len(cell.method), role=role)
        scores = np.array(made.scores)
        scores[: nan[1] if nan[0] == role else 0, 1, 0] = np.nan
        if right and role == "test":
            scores[np.arange(ROWS), :, labels] = 50
        columns = {**made.columns, "scores": scores}
        ExitTable(made.header, columns).save(folder / "cells" / cell.name / role)
    write_document(folder / "cells" / cell.name / RESULT, result(cell, quality))


def concluded(folder: Path, grid: Grid = GRID, **options: Any) -> Compared:
    """As `compare` when all runs are over."""
    crew = Workers(folder, failed=running._broken(folder, grid.methods))
    given = {"told": {}, "reference": None, "metric": None, **options}
    return running._conclude(folder, grid, crew, **given)


def every(grid: Grid = GRID) -> list[Cell]:
    return [Cell(method, 1e-4, seed) for method in grid.methods for seed in grid.seeds]


def test_learning_rates_are_chosen_without_a_look_at_test_rows(tmp_path: Path) -> None:
    grid = Grid(plan(fine_tunes=False), ("plain", "pabee"), (1,))
    best, other = grid.plan.rates
    write_document(tmp_path / "cells" / "start-seed1" / RESULT, result(Cell("start", None, 1)))
    for method in grid.methods:
        kept(tmp_path, Cell(method, best, 1), quality=0.7)
        kept(tmp_path, Cell(method, other, 1), quality=0.6, right=True)
    board = concluded(tmp_path, grid).board
    assert board is not None
    assert [row.learning_rate for row in board.methods] == [best]
    assert board.methods[0].full_score.value < 1


def test_markdown_says_once_which_seeds_there_are(tmp_path: Path) -> None:
    write_document(tmp_path / "cells" / "start-seed1" / RESULT, result(Cell("start", None, 1)))
    for cell in every():
        kept(tmp_path, cell)
    concluded(tmp_path)
    assert (tmp_path / "leaderboard.md").read_text().count("- seeds: 1, 2\n") == 1


@pytest.mark.parametrize(
    ("metric", "said"),
    [("f1", "chosen by accuracy, the task's own metric, and not by f1"), ("accuracy", None)],
)
def test_it_is_told_where_learning_rates_are_chosen_by_another_metric_than_ranks(
    metric: str, said: str | None
) -> None:
    assert running._told([], metric, SINGLE).get("learning rates") == said
    assert not running._told([], None, SINGLE)


def test_rows_that_are_dropped_since_another_role_has_their_input_are_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole, tune, test = rows_of("abcdefgh"), rows_of("hijk"), rows_of("kghl")
    parts, left_out = cut(whole, {"tune": tune, "test": test}, {}, None)
    assert {role: len(part) for role, part in parts.items()} == {"train": 6, "tune": 2, "test": 4}
    said = "2 of the data that are also in tune or test, 2 of tune that are also in test"
    assert running._told(left_out, None, SINGLE) == {"rows left out": said}
    assert [one.message for one in caplog.records] == [
        f"Rows left out: {one}." for one in said.split(", ")
    ]


def rows_of(texts: str) -> Dataset:
    return Dataset.from_dict({"text": list(texts), "label": [0] * len(texts)})


@pytest.mark.parametrize("name", ["start", "plain", "attach", "truncated", "all"])
def test_a_method_that_has_the_name_of_something_else_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    running._plug_in(())
    monkeypatch.setitem(METHODS._items, name, METHODS["pabee"])
    with pytest.raises(ConfigError, match=f"A method is named '{name}'"):
        running._plug_in(())


def test_rows_are_kept_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {"train": rows_of("abc")}

    def half(self: Dataset, path: str) -> None:
        (Path(path) / "state.json").write_text("{}")
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(Dataset, "save_to_disk", half)
        with pytest.raises(OutputError, match="disk full"):
            keep(tmp_path, parts)
    assert not list((tmp_path / "rows").iterdir())
    keep(tmp_path, parts)
    assert load_from_disk(str(tmp_path / "rows" / "train"))["text"][:] == ["a", "b", "c"]


@pytest.mark.parametrize("role", ROLES)
def test_scores_that_are_not_finite_make_a_run_fail_and_take_no_rows_from_the_others(
    tmp_path: Path, role: str
) -> None:
    write_document(tmp_path / "cells" / "start-seed1" / RESULT, result(Cell("start", None, 1)))
    for cell in every():
        kept(tmp_path, cell, (role, 3 if cell == Cell("pabee", 1e-4, 2) else 0))
    done = concluded(tmp_path)
    said = f"3 of 60 {role} rows have scores that are not finite."
    assert [(one.method, one.seed, one.why) for one in done.missing] == [("pabee", 2, said)]
    assert not done.complete
    assert done.board is not None
    assert done.board.test_rows == ROWS


def test_a_run_that_records_scores_that_are_not_finite_has_failed(tmp_path: Path) -> None:
    cell = Cell("pabee", 1e-4, 1)
    kept(tmp_path, cell, ("test", 60))
    work = Work(tmp_path, GRID.plan, cell, tmp_path, None, "cpu")
    model: Any = None  # it has been recorded already
    assert work.record(model, "tune").rows == ROWS
    with pytest.raises(NonFiniteError, match=r"60 of 60 test rows"):
        work.record(model, "test")


def test_a_score_of_nan_is_no_class() -> None:
    labels = np.zeros(4, dtype=int)
    broken = ExitTable.from_arrays(np.full((4, 2, 3), np.nan), problem_type=SINGLE, labels=labels)
    with pytest.raises(NonFiniteError):
        _full_score(broken)
