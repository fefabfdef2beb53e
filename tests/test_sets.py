"""Claims about sets of classes: chosen with a point, stored with it, given by `predict`."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from cli_support import ROWS, Said

from offramp.calibration import OperatingPoint, calibrate, choose
from offramp.calibration.certifying import proven_on
from offramp.calibration.conformal import Covered
from offramp.errors import ConfigError, OfframpError, PointError, TableError
from offramp.evaluation import evaluate
from offramp.prediction import Predictor, predict, predict_file
from offramp.table import ExitTable
from offramp.testing import tiny_texts

pytest_plugins = ("cli_fixtures",)

SINGLE, MULTI = "single_label_classification", "multi_label_classification"
DEPTH = 6
HOW = {"target_speedup": 1.5, "policies": ["max_probability"]}


def make_table(rows: int, seed: int, role: str = "tune") -> ExitTable:
    """Four classes; exits get better with depth and are far too sure of themselves."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(4, size=rows)
    ease = draw.exponential(size=(rows, 1)) * np.arange(1, DEPTH + 1)
    scores = draw.normal(size=(rows, DEPTH, 4)) + ease[..., None] * np.eye(4)[labels][:, None]
    ids = draw.integers(2**62, size=rows)
    return ExitTable.from_arrays(4 * scores, problem_type=SINGLE, labels=labels, ids=ids, role=role)


# --- choosing -----------------------------------------------------------------------------


def test_sets_of_a_point_hold_the_right_class_of_new_rows_as_often_as_asked() -> None:
    shares, sizes = [], []
    for seed in range(25):
        point = calibrate(make_table(600, seed), sets=0.9, **HOW).point
        found = evaluate(make_table(600, 1000 + seed, "test"), point).sets
        assert found is not None
        shares.append(found.covered)
        sizes.append(found.size)
    assert 0.89 < np.mean(shares) < 0.93
    assert np.mean(sizes) < 3


def test_one_half_of_the_rows_chooses_the_point_and_the_other_makes_the_sets() -> None:
    table = make_table(400, 0)
    even = table.ids % 2 == 0
    asked = calibrate(table, sets="90%", **HOW)
    without = calibrate(table.take(even), **HOW).point
    assert asked.point == without.model_copy(update={"sets": asked.point.sets})
    sets = asked.point.sets
    assert sets is not None
    assert sets.rows == int((~even).sum())
    assert proven_on(table, asked.point).ids.tolist() == table.ids[even].tolist()
    assert proven_on(table, without) is table
    held_out = Covered.measure(sets, table.take(~even), asked.point.build_policy())
    assert held_out.covered >= sets.share == 0.9
    assert held_out.size == pytest.approx(sets.size)
    assert any("of rows: " in line and "classes on average" in line for line in asked.messages)


def test_a_certified_point_keeps_sets_from_rows_that_prove_nothing() -> None:
    promise: dict[str, Any] = {"max_drop": "5%", "confidence": "90%", "policies": ["margin"]}
    shares = []
    for seed in range(20):
        search, proof = make_table(500, seed), make_table(1000, 500 + seed, "calibrate")
        asked = choose(search, proof=proof, sets=0.9, **promise)
        proven, sets = asked.point.certificate, asked.point.sets
        assert proven is not None
        assert sets is not None
        apart = (proof.ids >> 1) % 2 == 1
        assert (proven.rows, sets.rows) == (int((~apart).sum()), int(apart.sum()))
        without = choose(search, proof=proof.take(~apart), **promise).point.certificate
        assert without is not None
        assert proven == without.model_copy(update={"seal": proven.seal})  # of the sets as well
        found = evaluate(make_table(600, 1000 + seed, "test"), asked.point).sets
        assert found is not None
        shares.append(found.covered)
    assert 0.89 < np.mean(shares) < 0.93
    assert any("classes on average" in line for line in asked.messages)


def test_rows_with_broken_scores_make_no_sets() -> None:
    table = make_table(400, 0)
    odd = np.flatnonzero(table.ids % 2)
    scores = table.scores.copy()
    scores[odd[:7]] = np.nan
    broken = ExitTable.from_arrays(scores, problem_type=SINGLE, labels=table.labels, ids=table.ids)
    sets = calibrate(broken, sets=0.9, **HOW).point.sets
    assert sets is not None
    assert sets.rows == len(odd) - 7


def test_few_rows_make_sets_of_all_classes_and_finite_limits() -> None:
    table = make_table(400, 0)
    few = table.take(np.r_[np.flatnonzero(table.ids % 2)[:3], np.flatnonzero(table.ids % 2 == 0)])
    sets = calibrate(few, sets=0.9, **HOW).point.sets
    assert sets is not None
    assert sets.limits == (1.0,) * DEPTH
    assert sets.size == 4


@pytest.mark.parametrize("share", [0, 1, "100%", 90])
def test_a_share_that_no_set_can_have_is_refused(share: float | str) -> None:
    with pytest.raises(ConfigError, match="Write 90% or"):
        calibrate(make_table(50, 0), sets=share, **HOW)


def test_sets_are_refused_without_labels_without_one_right_class_and_without_rows() -> None:
    table = make_table(50, 0)
    unlabelled = ExitTable.from_arrays(table.scores, problem_type=SINGLE)
    with pytest.raises(TableError, match="Sets need labels"):
        calibrate(unlabelled, sets=0.9, **HOW)
    several = ExitTable.from_arrays(table.scores, problem_type=MULTI)
    with pytest.raises(ConfigError, match="this is multi_label_classification"):
        calibrate(several, sets=0.9, **HOW)
    with pytest.raises(TableError, match="too few to take sets"):
        calibrate(table.take(np.flatnonzero(table.ids % 2)), sets=0.9, **HOW)


def test_a_point_whose_sets_are_of_another_depth_is_refused(tmp_path: Path) -> None:
    point = calibrate(make_table(100, 0), sets=0.9, **HOW).point
    document = json.loads(point.model_dump_json())
    document["sets"]["limits"].pop()
    (tmp_path / "points").mkdir()
    (tmp_path / "points" / "default.json").write_text(json.dumps(document))
    with pytest.raises(PointError, match="sets do not fit depth"):
        OperatingPoint.load(tmp_path)


# --- answering ----------------------------------------------------------------------------


@pytest.fixture
def chosen(place: Path, exits: Path, offramp: Callable[..., Said]) -> Path:
    """A model with a point that has sets, and one, `bare`, that has none."""
    calibrated = ["calibrate", place / "tune.table", "--model", exits, "--target-speedup", 1.3]
    assert offramp(*calibrated, "--sets", "80%").code == 0
    assert offramp(*calibrated, "--name", "bare").code == 0
    return exits


def test_predict_gives_the_classes_that_may_be_right_the_likeliest_first(
    place: Path, chosen: Path, tmp_path: Path
) -> None:
    predictor = Predictor.load(chosen)
    texts = tiny_texts(ROWS)
    said = list(predict(predictor, texts, sets=True, scores=True))
    limits = predictor.sets_of().limits
    assert len({len(entry["set"]) for entry in said}) > 1
    for entry in said:
        limit = limits[entry["exit_layer"] - 1]
        for name, share in entry["scores"].items():
            # one of these rows made the limit, and may be on either side of it by the last bits
            if abs(1 - share - limit) > 1e-5:
                assert (name in entry["set"]) == (1 - share < limit)
        shares = [entry["scores"][name] for name in entry["set"]]
        assert shares == sorted(shares, reverse=True)
        assert entry["set"][:1] in ([entry["label"]], [])
    assert all("set" not in entry for entry in predict(predictor, texts[:3]))
    predict_file(predictor, place / "texts.csv", tmp_path / "a.parquet", sets=True, progress=False)
    column = pq.read_table(tmp_path / "a.parquet")["set"].to_pylist()
    assert column == [entry["set"] for entry in said]


@pytest.mark.parametrize("point", ["bare", "full"])
def test_sets_are_refused_where_the_point_was_chosen_without(
    chosen: Path, place: Path, tmp_path: Path, point: str, offramp: Callable[..., Said]
) -> None:
    with pytest.raises(PointError, match="chosen without sets"):
        predict(chosen, ["a"], point=point, sets=True)
    output = tmp_path / "answers.csv"
    said = offramp("predict", chosen, "-d", place / "texts.csv", "-o", output, "--sets",
                   "--point", point)  # fmt: skip
    assert said.code == 2
    assert "with --sets 90%" in said.err
    assert not output.exists()


def test_a_run_without_sets_is_not_gone_on_with_by_one_that_has_them(
    chosen: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, predictor = tmp_path / "a.jsonl", Predictor.load(chosen)
    monkeypatch.setattr("offramp.prediction.files.writer_for", lambda _: _fail)
    with pytest.raises(OfframpError, match="on purpose"):
        predict_file(predictor, place / "texts.csv", output, progress=False)
    monkeypatch.undo()
    done = predict_file(predictor, place / "texts.csv", output, sets=True, progress=False)
    assert done.resumed == 0
    assert all("set" in json.loads(line) for line in output.read_text().splitlines())


def _fail(*_: object) -> None:
    raise OfframpError("on purpose")


# --- the command line ---------------------------------------------------------------------


def test_the_command_line_goes_from_tune_to_sets(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("tune", exits, "-d", place / "rows.csv", "--target-speedup", 1.3, "--sets",
                   "80%", "--no-speed", "--quiet")  # fmt: skip
    assert said.code == 0, said.err
    assert "to hold the right class for 0.8 of rows" in said.out
    judged = offramp("evaluate", exits, "-d", place / "rows.csv", "--no-speed")
    assert "'default' was made with these very rows" in judged.err
    assert re.search(r"sets +hold the right class for [\d.]+% of rows \(asked: 0.8\)", judged.out)
    document = offramp("evaluate", exits, "-d", place / "rows.csv", "--no-speed", "--json").document
    assert set(document["sets"]) == {"asked", "covered", "size"}
    answers = tmp_path / "answers.csv"
    said = offramp("predict", exits, "-d", place / "texts.csv", "-o", answers, "--sets")
    assert said.code == 0, said.err
    with open(answers, encoding="utf-8") as handle:
        sets = [json.loads(row["set"]) for row in csv.DictReader(handle)]
    assert len(sets) == ROWS
    assert {len(one) for one in sets} <= {0, 1, 2, 3}


def test_tune_refuses_sets_before_it_trains(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("tune", place / "stock", "-d", place / "texts.csv", "-o", tmp_path / "made",
                   "--max-disagreement", "5%", "--sets", "90%")  # fmt: skip
    assert said.code == 2
    assert "Sets need labels" in said.err
    assert not (tmp_path / "made").exists()
