"""Claims about probabilities: a temperature for each exit makes them true, and moves nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from test_everything import table_of

from offramp.calibration import OperatingPoint, calibrate, certify
from offramp.calibration.probabilities import Temperatures, calibration_errors, ece
from offramp.cli.main import main
from offramp.data import encode
from offramp.engines import record
from offramp.errors import ConfigError, TableError
from offramp.evaluation import evaluate
from offramp.metrics import MULTI, REGRESSION, SINGLE, predictions
from offramp.policies import Averaged, Full, MaxProbability
from offramp.prediction import Predictor, predict
from offramp.table import ExitTable
from offramp.testing import save_tiny, tiny_model, tiny_texts, tiny_tokenizer


def overconfident(problem_type: str = SINGLE, rows: int = 3000, seed: int = 0) -> ExitTable:
    """The same scores as are right, but three to eight times too large."""
    table = table_of(problem_type, rows=rows, seed=seed)
    scores = table.scores * np.linspace(3, 8, table.depth)[None, :, None]
    return ExitTable.from_arrays(scores, problem_type=problem_type, labels=table.labels)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
@pytest.mark.parametrize("average", [False, True])
def test_temperatures_make_probabilities_truer_on_other_rows(
    problem_type: str, average: bool
) -> None:
    multi_label = problem_type == MULTI
    policy: Any = MaxProbability(multi_label=multi_label)
    policy = Averaged(policy=policy, multi_label=multi_label) if average else policy
    found = Temperatures.fit(overconfident(problem_type), policy)
    fresh = overconfident(problem_type, seed=1)
    before = calibration_errors(fresh, policy)
    after = calibration_errors(fresh, policy, found)
    assert before is not None
    assert after is not None
    assert max(after) < 0.06
    assert np.mean(after) < np.mean(before) / 2


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_where_every_answer_is_right_nobody_gets_surer(problem_type: str) -> None:
    table = table_of(problem_type, rows=1)
    labels = predictions(table.scores[:, -1], problem_type)
    easy = ExitTable.from_arrays(table.scores, problem_type=problem_type, labels=labels)
    assert Temperatures.fit(easy, Full()).values[-1] == 1


@given(
    answers=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    turned=st.randoms(),
)
def test_a_calibration_error_is_a_share_and_knows_no_order(answers: Any, turned: Any) -> None:
    sure, right = zip(*answers, strict=True)
    found = ece(sure, right)
    assert 0 <= found <= 1
    turned.shuffle(answers)
    assert ece(*zip(*answers, strict=True)) == pytest.approx(found)


def test_an_exit_that_is_as_sure_as_it_is_right_has_no_error() -> None:
    for right in (np.arange(1000) % 5 > 0, np.arange(1000) < 800):
        assert ece(np.full(1000, 0.8), right) == pytest.approx(0)
    assert ece(np.ones(10), np.zeros(10)) == 1


def test_a_point_keeps_them_with_or_without_a_certificate(tmp_path: Path) -> None:
    table = overconfident()
    for found in (
        calibrate(table, max_drop=0.05, temperatures=True),
        certify(table, max_drop=0.1, temperatures=True),
    ):
        assert found.point.temperatures is not None
        found.point.save(tmp_path)
        assert OperatingPoint.load(tmp_path) == found.point


def test_figures_show_both_errors_of_each_exit() -> None:
    point = calibrate(overconfident(), max_drop=0.05, temperatures=True).point
    done = evaluate(overconfident(seed=2), point)
    assert done.calibration_errors is not None
    assert done.calibrated_errors is not None
    assert len(done.calibrated_errors) == len(done.exits)
    assert np.mean(done.calibrated_errors) < np.mean(done.calibration_errors)
    assert evaluate(table_of(REGRESSION), Full()).calibration_errors is None


def test_what_has_no_probabilities_or_no_labels_is_refused() -> None:
    with pytest.raises(ConfigError, match="regression has none"):
        calibrate(table_of(REGRESSION), max_disagreement=0.5, temperatures=True)
    scores = table_of().scores
    bare = ExitTable.from_arrays(scores, problem_type=SINGLE, labels=None)
    with pytest.raises(TableError, match="need labels"):
        calibrate(bare, max_disagreement=0.1, temperatures=True)


@pytest.mark.parametrize("risk", ["brier", "hellinger"])
@pytest.mark.parametrize("choose", [calibrate, certify])
def test_what_is_promised_of_probabilities_is_not_said_of_others(choose: Any, risk: str) -> None:
    with pytest.raises(ConfigError, match="temperatures change"):
        choose(table_of(), max_risk=0.1, risk=risk, temperatures=True)


def test_answers_are_given_with_them_and_name_the_same_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = save_tiny(tmp_path / "tiny")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    texts = tiny_texts(200, seed=1)
    rows = Dataset.from_dict({"text": texts, "label": [n % 3 for n in range(200)]})
    dataset, _ = encode(rows, tokenizer)
    record(model, dataset, tmp_path / "table", "tune", processor=tokenizer)
    options = ["--model", str(folder), "--max-disagreement", "30%", "-q"]
    for name, more in (("plain", []), ("true", ["--temperatures"])):
        main(["calibrate", str(tmp_path / "table"), *options, "--name", name, *more])
    capsys.readouterr()
    predictor = Predictor.load(folder, "true")
    point = OperatingPoint.load(folder, "true")
    assert point.temperatures is not None
    true = list(predict(predictor, texts[:20], point="true", scores=True))
    plain = list(predict(predictor, texts[:20], point="plain", scores=True))
    raw, _ = predictor.answer(texts[:20])
    for one, other, answer in zip(plain, true, raw, strict=True):
        assert (one["label"], one["exit_layer"]) == (other["label"], other["exit_layer"])
        for entry, value in ((one, 1), (other, point.temperatures.values[answer.exit_layer - 1])):
            wanted = softmax(answer.scores.astype(np.float64) / value)
            assert list(entry["scores"].values()) == pytest.approx(wanted.tolist(), abs=1e-5)
    table = str(tmp_path / "rows.jsonl")
    Path(table).write_text("".join(json.dumps(row) + "\n" for row in rows.to_list()))
    assert main(["evaluate", str(folder), "-d", table, "--point", "true", "--no-speed"]) == 0
    assert "with temperatures" in capsys.readouterr().out
