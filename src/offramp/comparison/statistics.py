"""Intervals and paired differences over rows and seeds at once.

Rows are resampled with replacement, and a row counts as often for every method and seed. Seeds are
few: their spread is that of a mean by Student's t. Half an interval is the root of the sum of both
parts, each the square of its own quantile times its own standard error, which covers no less often
than it says (Banerjee, Sankhya 22, 1960). With one seed it is that of rows, and holds for the
models that were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.special import ndtri, stdtrit

from offramp.comparison.board import Difference, Figure
from offramp.comparison.weighted import WEIGHTED
from offramp.metrics import Array, Metric

Floats = npt.NDArray[np.float64]
RESAMPLES = 1000
"""For metrics that many resamples can be put to at once."""
FEW_RESAMPLES = 400
"""For the others: the least p, times the number of all methods, is still below 0.05."""
_SEED = 20070607


@dataclass(frozen=True, slots=True)
class Resamples:
    """How often every row counts; the first resample is the data itself.

    Attributes:
        counts: (1 + resamples, rows) float32.
    """

    counts: npt.NDArray[np.float32]

    @classmethod
    def draw(cls, rows: int, resamples: int) -> Resamples:
        """Always the same for the same numbers."""
        random = np.random.default_rng([_SEED, rows])
        counts = np.ones((1 + resamples, rows), dtype=np.float32)
        for count in counts[1:]:
            count[:] = np.bincount(random.integers(rows, size=rows), minlength=rows)
        return cls(counts)

    def first(self, resamples: int) -> Resamples:
        """So many of them."""
        return Resamples(self.counts[: 1 + resamples])

    def scores(self, metric: Metric, predicted: Array, labels: Array) -> Floats:
        """Predictions (points, rows, ...) to their metric, (1 + resamples, points)."""
        if metric.name in WEIGHTED:
            scores = WEIGHTED[metric.name](predicted, labels, self.counts)
            scores[0] = [metric.compare(one, labels) for one in predicted]
            return scores
        every = np.arange(len(labels))
        drawn = (np.repeat(every, count.astype(np.int64)) for count in self.counts)
        return np.array(
            [[metric.compare(one[rows], labels[rows]) for one in predicted] for rows in drawn]
        )

    def costs(self, executed: Array, full: Array) -> Floats:
        """FLOPs (points, rows) as a share of full depth (rows,), (1 + resamples, points)."""
        unit = full.mean()
        return self._sums(executed / unit) / self._sums(full[None] / unit)

    def _sums(self, values: Array) -> Floats:
        return (self.counts @ values.T.astype(np.float32)).astype(np.float64)


def resamples_for(metric: Metric, rows: int) -> Resamples:
    """As many as the metric allows in reasonable time."""
    many = metric.name in WEIGHTED and metric.name != "spearman"
    return Resamples.draw(rows, RESAMPLES if many else FEW_RESAMPLES)


def figure(values: Floats) -> Figure:
    """The mean over seeds and its 95 % interval.

    Args:
        values: the number on the data and on its resamples, (1 + resamples, seeds).
    """
    mean, half = float(values[0].mean()), _half(*_variances(values), 0.05)
    return Figure(value=mean, low=mean - half, high=mean + half)


def p_value(values: Floats) -> float:
    """Two-sided, that the mean over seeds is 0: 1 minus the coverage of the interval that ends
    there. Values are as for `figure`.

    Never below one of so many resamples: their spread does not tell more.
    """
    mean, least, parts = abs(float(values[0].mean())), 1 / len(values), _variances(values)
    if _half(*parts, least) <= mean:
        return least if mean else 1.0
    return float(brentq(lambda p: _half(*parts, p) - mean, least, 1))


def _variances(values: Floats) -> tuple[float, float, int]:
    """Of the mean over seeds: by the rows, by the seeds, and the freedom of the latter."""
    rows, seeds = float(values[1:].mean(axis=1).var(ddof=1)), values.shape[1]
    return rows, float(values[0].var(ddof=1)) / seeds if seeds > 1 else 0.0, max(1, seeds - 1)


def _half(rows: float, seeds: float, freedom: int, p: float) -> float:
    """Half of an interval that covers with a chance of at least 1 - p."""
    return float(rows * ndtri(p / 2) ** 2 + seeds * stdtrit(freedom, p / 2) ** 2) ** 0.5


def holm(p: Sequence[float]) -> list[float]:
    """p after Holm's step-down correction for their number (1979), in the given order."""
    corrected, largest = [0.0] * len(p), 0.0
    for place, one in enumerate(sorted(range(len(p)), key=lambda one: p[one])):
        largest = max(largest, min(1.0, (len(p) - place) * p[one]))
        corrected[one] = largest
    return corrected


def differences(columns: Mapping[str, Floats]) -> dict[str, Difference]:
    """Paired differences of several methods in one column, corrected for their number.

    Args:
        columns: method to its difference, values as for `figure`.
    """
    p = [p_value(values) for values in columns.values()]
    return {
        name: Difference(**figure(values).model_dump(), p=one, p_holm=corrected)
        for (name, values), one, corrected in zip(columns.items(), p, holm(p), strict=True)
    }
