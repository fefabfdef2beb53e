"""Which runs a comparison wants, and in which order they can be done."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from offramp.comparison.plan import Cell, Grid, Plan, Result, open_plan, results
from offramp.comparison.rows import check_labels
from offramp.comparison.workers import Workers, _free
from offramp.errors import ConfigError, DataError
from offramp.storage import write_document

RATES = (1e-4, 3e-4)


def plan(**changed: object) -> Plan:
    settings = {
        "model": "m",
        "title": "t",
        "model_fingerprint": "f",
        "rows": {},
        "counts": {},
        "problem_type": "single_label_classification",
        "max_length": None,
        "fresh_head": False,
        "fine_tunes": True,
        "start_epochs": 1,
        "epochs": 1,
        "batch_size": 8,
        "rates": RATES,
        "bf16": "auto",
        "pooling": None,
    }
    return Plan.model_validate(settings | changed)


def result(cell: Cell, quality: float = 0.5) -> Result:
    facts = {"seconds": 1.0, "threads": 1, "memory": 1, "parameters_added": 0, "pooling": None}
    return Result(**cell._asdict(), quality=quality, **facts)


def all_done(grid: Grid, quality: Mapping[Cell, float] | None = None) -> list[list[Cell]]:
    """Do whatever can be done until nothing is left; the waves."""
    done: dict[Cell, Result] = {}
    waves = []
    while wave := grid.next(done):
        waves.append(wave)
        done |= {cell: result(cell, (quality or {}).get(cell, 0.5)) for cell in wave}
    return waves


def test_starts_come_first_and_all_rates_run_on_the_first_seed() -> None:
    waves = all_done(Grid(plan(), ("plain", "pabee"), (1, 2)))
    assert waves[0] == [Cell("start", rate, 1) for rate in RATES]
    assert set(waves[1]) >= {Cell("pabee", rate, 1) for rate in RATES}


def test_other_seeds_take_the_rate_that_was_best_on_the_first() -> None:
    best = {Cell("start", 1e-4, 1): 0.9, Cell("pabee", 3e-4, 1): 0.9, Cell("plain", 1e-4, 1): 0.7}
    cells = [
        cell for wave in all_done(Grid(plan(), ("plain", "pabee"), (1, 2)), best) for cell in wave
    ]
    assert {cell for cell in cells if cell.seed == 2} == {
        Cell("start", 1e-4, 2),
        Cell("pabee", 3e-4, 2),
        Cell("plain", 1e-4, 2),
    }


def test_a_smaller_model_waits_for_the_plain_fine_tune_and_takes_its_rate() -> None:
    best = {Cell("plain", 3e-4, 1): 0.9}
    waves = all_done(Grid(plan(), ("plain", "truncated"), (1,)), best)
    assert waves[-1] == [Cell("truncated", 3e-4, 1)]
    assert Cell("plain", 3e-4, 1) in waves[-2]


def test_a_classifier_is_the_one_start_of_all_seeds() -> None:
    grid = Grid(plan(fine_tunes=False), ("plain", "attach"), (1, 2, 3))
    waves = all_done(grid)
    assert waves[0] == [Cell("start", None, 1)]
    assert {Cell("attach", None, seed) for seed in (1, 2, 3)} <= set(waves[1])


@given(
    st.lists(st.sampled_from(["pabee", "deebert", "truncated", "attach"]), unique=True),
    st.integers(1, 4),
    st.lists(st.sampled_from([1e-5, 1e-4, 3e-4]), min_size=1, unique=True),
    st.booleans(),
)
def test_every_run_is_wanted_once_and_as_many_as_were_said(
    methods: list[str], seeds: int, rates: list[float], fine_tunes: bool
) -> None:
    grid = Grid(
        plan(rates=tuple(rates), fine_tunes=fine_tunes),
        ("plain", *methods),
        tuple(range(1, seeds + 1)),
    )
    cells = [cell for wave in all_done(grid) for cell in wave]
    assert len(cells) == len(set(cells)) == grid.count()


def test_runs_of_other_methods_are_none_of_a_grid() -> None:
    grid = Grid(plan(fine_tunes=False, rates=(1e-4,)), ("plain", "pabee"), (1,))
    cells = [Cell("start", None, 1), *(Cell(one, 1e-4, 1) for one in ("plain", "pabee"))]
    done = {cell: result(cell) for cell in (*cells, Cell("deebert", 1e-4, 1))}
    assert grid.wanted(done) == cells
    assert len(cells) == grid.count()


def test_a_rate_that_failed_does_not_stand_in_the_way_of_the_other() -> None:
    grid = Grid(plan(fine_tunes=False), ("pabee",), (1, 2))
    done = {c: result(c) for c in (Cell("start", None, 1), Cell("pabee", 1e-4, 1))}
    failed = [Cell("pabee", 3e-4, 1)]
    assert grid.next(done, failed) == [Cell("pabee", 1e-4, 2)]


def test_a_method_of_which_one_rate_failed_counts_with_the_other() -> None:
    grid = Grid(plan(fine_tunes=False), ("pabee",), (1, 2))
    cells = Cell("pabee", 1e-4, 1), Cell("pabee", 1e-4, 2)
    done = {c: result(c) for c in (Cell("start", None, 1), *cells)}
    failed = [Cell("pabee", 3e-4, 1)]
    assert grid.chosen("pabee", done, failed) == {1: done[cells[0]], 2: done[cells[1]]}
    assert not grid.chosen("pabee", done)  # the other rate is still to be tried


def test_a_start_of_which_one_rate_failed_is_the_one_of_the_other() -> None:
    grid = Grid(plan(), ("pabee",), (1,))
    start = Cell("start", 1e-4, 1)
    done, failed = {start: result(start)}, [Cell("start", 3e-4, 1)]
    assert grid.start_of(1, done) is None
    assert grid.start_of(1, done, failed) == done[start]
    assert set(grid.next(done, failed)) == {Cell("pabee", rate, 1) for rate in RATES}


def test_a_start_that_failed_is_not_tried_again_when_methods_have_begun_without_it() -> None:
    grid = Grid(plan(), ("pabee",), (1,))
    done = {c: result(c) for c in (Cell("start", 1e-4, 1), Cell("pabee", 1e-4, 1))}
    assert grid.next(done) == [Cell("pabee", 3e-4, 1)]
    assert grid.start_of(1, done) == done[Cell("start", 1e-4, 1)]


def test_a_method_that_failed_is_not_tried_again_and_holds_up_nobody() -> None:
    grid = Grid(plan(fine_tunes=False, rates=(1e-4,)), ("pabee", "deebert"), (1,))
    done = {c: result(c) for c in (Cell("start", None, 1), Cell("deebert", 1e-4, 1))}
    assert grid.next(done, [Cell("pabee", 1e-4, 1)]) == []


def test_runs_that_have_just_begun_count_with_the_memory_they_will_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = SimpleNamespace(available=2.5 * 2**30)
    monkeypatch.setattr("offramp.comparison.workers.psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("offramp.comparison.workers.torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("offramp.comparison.workers._cores", lambda: 8)
    monkeypatch.setattr("offramp.comparison.workers._held", lambda _: 0)
    cells = [Cell("pabee", rate, 1) for rate in RATES]
    done = {cells[0]: result(cells[0]).model_copy(update={"memory": 2**30})}
    crew = Workers(tmp_path)
    assert crew._room(done) == 2
    crew._running = dict.fromkeys(cells)
    assert crew._room(done) == 0


@pytest.mark.parametrize(
    ("limit", "free"), [("1000", 1000 - 700 + 200), ("400", 0), ("max", 5000), ("99999", 5000)]
)
def test_memory_is_that_of_the_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, free: int
) -> None:
    machine = SimpleNamespace(available=5000)
    monkeypatch.setattr("offramp.comparison.workers.psutil.virtual_memory", lambda: machine)
    assert _free(tmp_path) == 5000
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\n")
    assert _free(tmp_path) == free


def test_a_folder_belongs_to_one_plan(tmp_path: Path) -> None:
    open_plan(tmp_path, plan())
    open_plan(tmp_path, plan())
    with pytest.raises(ConfigError, match="these differ: epochs, rates"):
        open_plan(tmp_path, plan(epochs=2, rates=(1e-3,)))


def test_results_are_found_by_their_run(tmp_path: Path) -> None:
    cell = Cell("pabee", 3e-4, 2)
    write_document(tmp_path / "cells" / cell.name / "result.json", result(cell))
    assert results(tmp_path) == {cell: result(cell)}


def test_a_label_that_would_be_another_class_among_other_rows_is_refused(tmp_path: Path) -> None:
    config = {"model_type": "bert", "id2label": {"0": "1", "1": "2", "2": "3"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    train = Dataset.from_dict({"text": ["a", "b", "c"], "label": [0, 1, 2]})  # by number
    tune = Dataset.from_dict({"text": ["d", "e"], "label": [1, 2]})  # by name
    assert check_labels({"train": train}, tmp_path, None).num_labels == 3
    with pytest.raises(DataError, match="Label 1 is a class's name among some rows"):
        check_labels({"train": train, "tune": tune}, tmp_path, None)
