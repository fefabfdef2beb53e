"""Scores of a set of answers, higher always better, and how far early answers stray.

A metric looks at predictions: class numbers (rows,), label sets (rows, classes) of bool, or
numbers (rows,). Where a metric is undefined (a constant prediction has no correlation) it is
0.0, never NaN. Sources: scikit-learn for F1 and Matthews, SciPy for the correlations.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.errors import ConfigError, DataError, NonFiniteError
from offramp.registry import Registry

Array = npt.NDArray[Any]
SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
REGRESSION = "regression"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric.

    Attributes:
        compare: (predictions, labels) to a number, higher is better.
        bounded: whether 1 is the best value, so that a loss of 1 or more means nothing.
    """

    name: str
    problem_types: tuple[str, ...]
    compare: Callable[[Array, Array], float]
    bounded: bool = True

    def score(self, scores: npt.ArrayLike, labels: npt.ArrayLike) -> float:
        """The metric of raw scores (rows, classes) against labels (rows,) or (rows, classes).

        Raises DataError for shapes that do not fit, NonFiniteError for NaN or infinity.
        """
        scores, labels = np.asarray(scores), np.asarray(labels)
        problem_type = self._problem_type(labels)
        if not scores.size or labels.shape != _label_shape(scores, problem_type):
            raise DataError(
                f"Metric '{self.name}': scores {scores.shape} and labels {labels.shape} do not "
                "fit; it needs (rows, classes) and (rows,), or (rows, classes) for label sets."
            )
        if not np.isfinite(scores).all():
            raise NonFiniteError(f"Metric '{self.name}': some scores are NaN or infinite.")
        return self.compare(predictions(scores, problem_type), labels)

    def _problem_type(self, labels: Array) -> str:
        if self.problem_types == (REGRESSION,):
            return REGRESSION
        problem_type = MULTI if labels.ndim == 2 else SINGLE
        self.check(problem_type)
        return problem_type

    def check(self, problem_type: str) -> None:
        """Refuse a metric that does not fit the task. Raises ConfigError."""
        if problem_type not in self.problem_types:
            fitting = [name for name in METRICS if problem_type in METRICS[name].problem_types]
            raise ConfigError(
                f"Metric '{self.name}' is not for {problem_type}. Use: {', '.join(fitting)}."
            )


METRICS: Registry[Metric] = Registry("metric")


def default_metric(problem_type: str) -> Metric:
    """Accuracy, micro F1 for label sets, Pearson correlation for regression."""
    return METRICS[{SINGLE: "accuracy", MULTI: "f1_micro", REGRESSION: "pearson"}[problem_type]]


def predictions(scores: Array, problem_type: str) -> Array:
    """What raw scores (..., classes) answer: class numbers, label sets or numbers."""
    if problem_type == SINGLE:
        return scores.argmax(axis=-1)
    if problem_type == MULTI:
        return scores > 0
    return scores[..., 0].astype(np.float64)


def disagreement(answers: npt.ArrayLike, full_answers: npt.ArrayLike, problem_type: str) -> float:
    """How far answers stray from full depth; both are raw scores (rows, classes).

    Classification: share of rows with another label (or label set). Regression: mean absolute
    difference as a share of the standard deviation of the full-depth answers, in their own
    unit where these are all the same.
    """
    early = predictions(np.asarray(answers), problem_type)
    return strayed(early, predictions(np.asarray(full_answers), problem_type))


def strayed(early: Array, full: Array) -> float:
    """`disagreement` of predictions."""
    if full.dtype == np.float64:
        return float(np.abs(early - full).mean() / (full.std() or 1.0))
    different = early != full
    return float(np.mean(different.any(axis=-1) if different.ndim == 2 else different))


def class_recalls(predicted: Array, labels: Array, num_classes: int) -> Array:
    """Recall of each class or label, (classes,); NaN where the labels hold none."""
    if labels.ndim == 2:
        found = np.sum(predicted & (labels > 0), axis=0)
        total = np.sum(labels > 0, axis=0)
    else:
        found = np.bincount(labels[predicted == labels], minlength=num_classes)
        total = np.bincount(labels, minlength=num_classes)
    return np.where(total > 0, found / np.maximum(total, 1), np.nan)


def _label_shape(scores: Array, problem_type: str) -> tuple[int, ...]:
    return scores.shape if problem_type == MULTI else scores.shape[:1]


def _accuracy(predicted: Array, labels: Array) -> float:
    same = predicted == labels
    return float(np.mean(same.all(axis=-1) if same.ndim == 2 else same))


def _f1(predicted: Array, labels: Array) -> float:
    from sklearn.metrics import f1_score

    truth = labels > 0 if labels.ndim == 2 else labels
    return float(f1_score(truth, predicted, average="macro", zero_division=0.0))


def _f1_micro(predicted: Array, labels: Array) -> float:
    """Written out: a search asks for it ten thousand times, and scikit-learn takes milliseconds."""
    truth = labels > 0
    claimed = np.count_nonzero(predicted) + np.count_nonzero(truth)
    return 2 * np.count_nonzero(predicted & truth) / claimed if claimed else 0.0


def _matthews(predicted: Array, labels: Array) -> float:
    from sklearn.metrics import matthews_corrcoef

    if _is_constant(predicted) or _is_constant(labels):
        return 0.0
    return float(matthews_corrcoef(labels, predicted))


def _is_constant(values: Array) -> bool:
    return bool(np.ptp(values) == 0)


def _correlation(name: str) -> Callable[[Array, Array], float]:
    def compare(predicted: Array, labels: Array) -> float:
        from scipy import stats

        if _is_constant(predicted) or _is_constant(labels):
            return 0.0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", stats.DegenerateDataWarning)
            value = getattr(stats, name)(predicted, labels.astype(np.float64)).statistic
        return float(np.nan_to_num(value))

    return compare


def _mse(predicted: Array, labels: Array) -> float:
    return -float(np.mean((predicted - labels) ** 2))


def _mae(predicted: Array, labels: Array) -> float:
    return -float(np.mean(np.abs(predicted - labels)))


for _metric in (
    Metric("accuracy", (SINGLE, MULTI), _accuracy),
    Metric("f1", (SINGLE, MULTI), _f1),
    Metric("f1_micro", (MULTI,), _f1_micro),
    Metric("matthews", (SINGLE,), _matthews),
    Metric("pearson", (REGRESSION,), _correlation("pearsonr")),
    Metric("spearman", (REGRESSION,), _correlation("spearmanr")),
    Metric("neg_mse", (REGRESSION,), _mse, bounded=False),
    Metric("neg_mae", (REGRESSION,), _mae, bounded=False),
):
    METRICS.register(_metric.name, _metric)
