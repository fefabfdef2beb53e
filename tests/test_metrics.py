"""Claims about the metrics: they are the known ones, higher is better, and never NaN."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from offramp.errors import ConfigError, DataError, NonFiniteError
from offramp.metrics import (
    METRICS,
    class_recalls,
    default_metric,
    disagreement,
    predictions,
)
from offramp.testing import PROBLEM_TYPES

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
FITTING = [(name, kind) for name in METRICS for kind in METRICS[name].problem_types]


def sample(kind: str, rows: int = 200, seed: int = 0):
    """Scores that are right more often than not, and labels."""
    random = np.random.default_rng(seed)
    if kind == REGRESSION:
        labels = random.normal(size=rows)
        return (labels + random.normal(size=rows))[:, None], labels
    if kind == MULTI:
        labels = random.integers(0, 2, (rows, 4)).astype(np.float32)
        return random.normal(size=(rows, 4)) + labels - 0.5, labels
    labels = random.integers(0, 4, rows)
    return random.normal(size=(rows, 4)) + np.eye(4)[labels], labels


def perfect(kind: str, labels):
    if kind == REGRESSION:
        return labels[:, None]
    return labels * 20 - 10 if kind == MULTI else np.eye(4)[labels]


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_classification_metrics_are_scikit_learns(kind):
    scores, labels = sample(kind)
    answers = predictions(scores, kind)
    truth = labels > 0 if kind == MULTI else labels
    expected = {
        "accuracy": sk.accuracy_score(truth, answers),
        "f1": sk.f1_score(truth, answers, average="macro"),
    }
    if kind == MULTI:
        expected["f1_micro"] = sk.f1_score(truth, answers, average="micro")
    else:
        expected["matthews"] = sk.matthews_corrcoef(truth, answers)
    found = {name: METRICS[name].score(scores, labels) for name in expected}
    assert found == pytest.approx(expected)


def test_regression_metrics_are_scipys_and_scikit_learns():
    scores, labels = sample(REGRESSION)
    expected = {
        "pearson": stats.pearsonr(scores[:, 0], labels).statistic,
        "spearman": stats.spearmanr(scores[:, 0], labels).statistic,
        "neg_mse": -sk.mean_squared_error(labels, scores[:, 0]),
        "neg_mae": -sk.mean_absolute_error(labels, scores[:, 0]),
    }
    found = {name: METRICS[name].score(scores, labels) for name in expected}
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_a_perfect_answer_scores_best_and_higher_is_better(name, kind):
    scores, labels = sample(kind)
    best = METRICS[name].score(perfect(kind, labels), labels)
    assert best == pytest.approx(1 if METRICS[name].bounded else 0)
    worst = METRICS[name].score(-perfect(kind, labels), labels)
    assert worst < METRICS[name].score(scores, labels) < best


@pytest.mark.parametrize(("name", "kind"), FITTING)
@pytest.mark.parametrize("constant", ["answers", "labels", "both", "one row"])
def test_a_degenerate_set_has_a_finite_score_and_no_warning(name, kind, constant):
    scores, labels = sample(kind)
    if constant in ("answers", "both"):
        scores = np.zeros_like(scores) + 0.1
    if constant in ("labels", "both"):
        labels = np.zeros_like(labels)
    if constant == "one row":
        scores, labels = scores[:1], labels[:1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert math.isfinite(METRICS[name].score(scores, labels))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_a_constant_answer_has_no_correlation(name):
    assert METRICS[name].score(np.ones((9, 1)), np.arange(9.0)) == 0.0


@pytest.mark.parametrize(("name", "kind"), FITTING)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_no_number_is_an_error_not_a_class(name, kind, value):
    scores, labels = sample(kind)
    scores[3, 0] = value
    with pytest.raises(NonFiniteError, match=name):
        METRICS[name].score(scores, labels)


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_scores_and_labels_that_do_not_fit_are_refused(name, kind):
    scores, labels = sample(kind)
    for few_scores, few_labels in ((scores[:5], labels), (scores[:0], labels[:0])):
        with pytest.raises(DataError, match="do not fit"):
            METRICS[name].score(few_scores, few_labels)


def test_a_metric_of_another_task_is_refused_with_those_that_fit():
    with pytest.raises(ConfigError, match="neg_mae, neg_mse, pearson, spearman"):
        METRICS["accuracy"].check(REGRESSION)
    with pytest.raises(ConfigError, match="Did you mean 'matthews'"):
        METRICS["mathews"]


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
def test_every_task_has_a_default_metric_that_fits(kind):
    default_metric(kind).check(kind)


def test_disagreement_counts_rows_with_another_label():
    full = np.eye(3)[[0, 1, 2, 0]]
    early = np.eye(3)[[0, 1, 1, 2]]
    assert disagreement(early, full, SINGLE) == 0.5


def test_multi_label_disagreement_counts_rows_with_any_other_label():
    full = np.array([[1.0, -1.0], [1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]])
    early = np.array([[9.0, -0.1], [1.0, -1.0], [-1.0, -1.0], [1.0, -1.0]])
    assert disagreement(early, full, MULTI) == 0.25


def test_regression_disagreement_is_relative_to_the_spread_of_the_answers():
    full = np.array([[-2.0], [2.0]])
    assert disagreement(full + 1, full, REGRESSION) == 0.5
    assert disagreement(100 * (full + 1), 100 * full, REGRESSION) == 0.5
    assert disagreement([[4.0], [3.0]], [[3.0], [3.0]], REGRESSION) == 0.5


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
@given(seed=st.integers(0, 2**16))
@settings(deadline=None)
def test_full_depth_never_disagrees_with_itself(kind, seed):
    scores, _ = sample(kind, rows=20, seed=seed)
    assert disagreement(scores, scores, kind) == 0.0


@pytest.mark.parametrize("kind", [SINGLE, MULTI])
def test_class_recalls_are_scikit_learns_and_nan_for_a_class_without_rows(kind):
    scores, labels = sample(kind)
    answers = predictions(scores, kind)
    expected = sk.recall_score(labels > 0 if kind == MULTI else labels, answers, average=None)
    np.testing.assert_allclose(class_recalls(answers, labels, 4), expected)
    gone = np.where(labels == 2, 1, labels) if kind == SINGLE else labels * [1, 1, 0, 1]
    assert np.isnan(class_recalls(answers, gone, 4)).tolist() == [False, False, True, False]
