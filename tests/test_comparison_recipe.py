"""Every method of a comparison has equal epochs, and one that has been changed is not done."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from test_comparison_grid import plan, result

from offramp.comparison.cell import Work, cuts
from offramp.comparison.plan import RESULT, Cell, Grid, results
from offramp.comparison.recipe import recipe, share_of, trained_alike
from offramp.comparison.running import _check_recipes, _exceptions
from offramp.errors import ConfigError
from offramp.exits import ExitSpec
from offramp.methods import METHODS, Method
from offramp.metrics import REGRESSION, SINGLE
from offramp.objectives import EqualWeights, SimulatedExits, Stage
from offramp.storage import write_document

MINE = Method("mine", "", ExitSpec(pooling="cls"), partial(SimulatedExits, sharpness=1.0), "margin")


@pytest.fixture(autouse=True)
def mine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that tests may change."""
    monkeypatch.setitem(METHODS._items, "mine", MINE)


@pytest.mark.parametrize("method", [*METHODS, "plain", "truncated"])
def test_all_methods_have_equal_epochs_whatever_their_stages_take(
    tmp_path: Path, method: str
) -> None:
    work = Work(tmp_path, plan(epochs=3), Cell(method, 1e-4, 1), tmp_path, None, "cpu")
    share = share_of(method) if method in METHODS else 1.0
    assert work.options.epochs * share == pytest.approx(3)


def test_stages_that_take_more_than_the_epochs_asked_for_are_there_to_be_made_up_for() -> None:
    assert share_of("fastbert") > 1.5 > share_of("pabee")


def test_a_method_that_is_trained_for_less_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(EqualWeights):
        def stages(self) -> tuple[Stage, ...]:
            return (Stage("stock", "stock", 0.75), Stage("exits", "exits", 0.25))

    monkeypatch.setitem(METHODS._items, "mine", replace(MINE, objective=Short))
    said = _exceptions(Grid(plan(epochs=2), ("plain", "mine", "jei_dnn"), (1,)))
    assert said == " (but mine 0.5 epochs)"


@pytest.mark.parametrize(
    "change",
    [
        {"exits": ExitSpec(pooling="mean")},
        {"objective": partial(SimulatedExits, sharpness=2.0)},
        {"objective": EqualWeights},
        {"policy": "entropy"},
    ],
)
def test_a_changed_method_has_another_recipe(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    before = recipe("mine", SINGLE)
    assert before == recipe("mine", SINGLE)
    monkeypatch.setitem(METHODS._items, "mine", replace(MINE, **change))
    assert recipe("mine", SINGLE) != before


def test_other_exits_for_numbers_are_another_recipe_for_numbers_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = {kind: recipe("mine", kind) for kind in (SINGLE, REGRESSION)}
    changed = replace(MINE, name="theirs", number_exits=ExitSpec(pooling="mean"))
    monkeypatch.setitem(METHODS._items, "theirs", changed)
    assert recipe("theirs", SINGLE) == before[SINGLE]
    assert recipe("theirs", REGRESSION) != before[REGRESSION]
    assert not trained_alike("mine", "theirs")


def test_a_name_and_a_paper_make_no_other_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    before = recipe("mine", SINGLE)
    monkeypatch.setitem(METHODS._items, "mine", replace(MINE, name="other", paper="published"))
    assert recipe("mine", SINGLE) == before


def test_methods_that_differ_in_their_policy_alone_are_trained_alike() -> None:
    same = ("pabee", "pcee", "pcee_bert", "f_pabee", "beem")
    for one, other in combinations(METHODS, 2):
        assert trained_alike(one, other) == (one in same and other in same), (one, other)


@pytest.mark.parametrize(
    "change",
    [
        {"exits": ExitSpec(pooling="mean")},
        {"objective": EqualWeights},
        {"measures_pooling": False},
    ],
)
def test_another_training_is_not_alike(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setitem(METHODS._items, "theirs", replace(MINE, name="theirs", policy="entropy"))
    assert trained_alike("mine", "theirs")
    monkeypatch.setitem(METHODS._items, "theirs", replace(MINE, **change))
    assert not trained_alike("mine", "theirs")


def test_of_runs_that_are_trained_alike_the_others_wait_for_the_first() -> None:
    grid = Grid(plan(fine_tunes=False), ("plain", "pabee", "cosee", "beem"), (1,))
    start = result(Cell("start", None, 1))
    done = {start.cell: start}
    assert {cell.method for cell in grid.next(done)} == {"plain", "pabee", "cosee"}
    first, other = Cell("pabee", 1e-4, 1), Cell("pabee", 3e-4, 1)
    done[first] = result(first)
    waiting = [cell for cell in grid.next(done) if cell.method == "beem"]
    assert waiting == [Cell("beem", 1e-4, 1)]
    failed = [cell for cell in grid.next(done, [other]) if cell.method == "beem"]
    assert failed == [Cell("beem", 1e-4, 1), Cell("beem", 3e-4, 1)]


@pytest.mark.parametrize(
    ("depth", "layers"), [(2, (1,)), (6, (1, 2, 3, 4)), (10, (2, 3, 5, 6)), (12, (3, 4, 6, 8))]
)
def test_smaller_models_have_no_more_than_their_share_of_the_layers(
    depth: int, layers: tuple[int, ...]
) -> None:
    assert cuts(depth) == layers


def test_what_is_no_method_has_no_recipe() -> None:
    assert recipe("truncated", SINGLE) is None


def test_runs_of_a_method_that_has_changed_are_refused_by_the_names_of_their_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept(tmp_path, recipe("mine", SINGLE))
    _check_recipes(tmp_path, ("plain", "mine"), SINGLE)
    monkeypatch.setitem(METHODS._items, "mine", replace(MINE, policy="entropy"))
    with pytest.raises(ConfigError, match=r"delete \S+/cells/mine-0.0001-seed1 to train it anew"):
        _check_recipes(tmp_path, ("plain", "mine"), SINGLE)
    _check_recipes(tmp_path, ("plain",), SINGLE)  # it does not take part


def test_runs_from_before_recipes_were_kept_are_accepted(tmp_path: Path) -> None:
    file = kept(tmp_path, None)
    file.write_text(file.read_text().replace(',\n  "recipe": null', ""))
    assert len(results(tmp_path)) == 1
    _check_recipes(tmp_path, ("mine",), SINGLE)


def kept(folder: Path, recipe: str | None) -> Path:
    """The result of a run of `mine`."""
    cell = Cell("mine", 1e-4, 1)
    file = folder / "cells" / cell.name / RESULT
    write_document(file, result(cell).model_copy(update={"recipe": recipe}))
    return file
