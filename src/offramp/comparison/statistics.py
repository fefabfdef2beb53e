"""Intervals and paired differences over rows and seeds at once.

Rows and seeds are resampled independently, each with replacement, and a row counts as often for
every method and seed: the pigeonhole bootstrap (Owen, Annals of Applied Statistics 1, 2007),
whose variance is not too small on average where rows and seeds are many. With one seed, rows
alone are resampled, and the interval holds for the models that were trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import norm

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

    def over_seeds(self, values: Floats) -> Floats:
        """The mean of (1 + resamples, seeds) over seeds that are resampled, too."""
        resamples, seeds = values.shape
        random = np.random.default_rng([_SEED, seeds])
        weights = random.multinomial(seeds, np.full(seeds, 1 / seeds), size=len(self.counts))
        weights[0] = 1
        return (weights[:resamples] * values).sum(axis=1) / seeds

    def _sums(self, values: Array) -> Floats:
        return (self.counts @ values.T.astype(np.float32)).astype(np.float64)


def resamples_for(metric: Metric, rows: int) -> Resamples:
    """As many as the metric allows in reasonable time."""
    many = metric.name in WEIGHTED and metric.name != "spearman"
    return Resamples.draw(rows, RESAMPLES if many else FEW_RESAMPLES)


def figure(values: Floats) -> Figure:
    """A number and its 95 % percentile interval, from the number and its resamples."""
    low, high = np.quantile(values[1:], (0.025, 0.975))
    return Figure(value=values[0], low=low, high=high)


def p_value(values: Floats) -> float:
    """Two-sided, that the first is 0, by the standard deviation of the others.

    Never below one of so many resamples: their spread does not tell more.
    """
    error = float(values[1:].std(ddof=1))
    if values[0] == 0:
        return 1.0
    p = float(2 * norm.sf(abs(values[0]) / error)) if error else 0.0
    return max(p, 1 / len(values))


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
        columns: method to the difference and its resamples, (1 + resamples,).
    """
    p = [p_value(values) for values in columns.values()]
    return {
        name: Difference(**figure(values).model_dump(), p=one, p_holm=corrected)
        for (name, values), one, corrected in zip(columns.items(), p, holm(p), strict=True)
    }
