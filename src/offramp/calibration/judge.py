"""What a policy costs and scores on the rows of a table."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration.risks import Risk, losses_of
from offramp.errors import TableError
from offramp.metrics import (
    METRICS,
    REGRESSION,
    Metric,
    class_recalls,
    default_metric,
    predictions,
    strayed,
)
from offramp.policies import EvidencePolicy, Policy, has_one_bar
from offramp.table import (
    ExitTable,
    answer_matrix,
    evidence_matrix,
    executed_cost,
    histogram,
    replay,
    sweep,
)
from offramp.table.store import Array

_BARS = 200
_CHUNK = 16384


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one policy did on the rows of a table.

    Attributes:
        cost: share of full-depth FLOPs, sum executed / sum full.
        disagreement: from full depth; see `offramp.metrics.disagreement`.
        exit_histogram: rows that left after layer 1, 2, ..., depth.
        metric, score, full_score: None without labels.
        class_drops: drop of recall by class name, where asked for.
        risk, spread: mean and variance of losses, where a risk is looked at.
    """

    policy: Policy
    cost: float
    disagreement: float
    exit_histogram: tuple[int, ...]
    metric: str | None
    score: float | None
    full_score: float | None
    class_drops: dict[str, float] | None = None
    risk: float | None = None
    spread: float | None = None

    @property
    def cost_reduction(self) -> float:
        return 1 / self.cost

    @property
    def drop(self) -> float | None:
        """Full depth minus early exit: positive is worse."""
        if self.score is None or self.full_score is None:
            return None
        return self.full_score - self.score

    @property
    def loss(self) -> float:
        """What to minimise: minus the score, or the disagreement without labels."""
        return self.disagreement if self.score is None else -self.score

    def to_dict(self) -> dict[str, Any]:
        return {
            "policy": self.policy.to_dict(),
            "cost": self.cost,
            "cost_reduction": self.cost_reduction,
            "metric": self.metric,
            "score": self.score,
            "full_score": self.full_score,
            "drop": self.drop,
            "disagreement": self.disagreement,
            "exit_histogram": list(self.exit_histogram),
        }


class Judge:
    """Measures policies on the rows of a table whose scores are all finite.

    Args:
        metric: a name; by default the task's own. Needs labels.
        per_class: also measure the drop of recall of each class.
        risk: also measure what rows lose by it on average.
    """

    def __init__(
        self,
        table: ExitTable,
        metric: str | None = None,
        per_class: bool = False,
        risk: Risk | None = None,
    ) -> None:
        self.metric = _metric(table, metric)
        self.per_class = per_class
        self.risk = risk
        fine = finite_rows(table)
        self.excluded = int(table.rows - fine.sum())
        self.table = table.take(fine) if self.excluded else table
        self._predicted = predictions(self.table.scores, table.problem_type)  # (rows, depth, ...)
        self._full = self._predicted[:, -1]
        self._rows = np.arange(self.table.rows)
        self._costs: dict[tuple[bool, ...], tuple[Array, float]] = {}
        self.full_score = self._score(self._full)

    @property
    def correlates_with_nothing(self) -> bool:
        """Whether the metric is a correlation and all labels are the same number."""
        labels, metric = self.table.labels, self.metric
        if labels is None or metric is None or metric.problem_types != (REGRESSION,):
            return False
        return metric.bounded and bool((labels == labels[0]).all())

    def measure(self, policy: Policy) -> Outcome:
        """What this policy does, by replay."""
        done = replay(self.table, policy)
        early = predictions(done.answers, self.table.problem_type)
        return self._outcome(policy, done.exit_layers, early, self._losses(done.answers))

    def class_drops(self, policy: Policy) -> dict[str, float] | None:
        """Drop of recall by class name, for classification with labels."""
        answers = replay(self.table, policy).answers
        return self._class_drops(predictions(answers, self.table.problem_type))

    def search(self, start: Policy, bars: bool = True) -> Iterator[Outcome]:
        """The policy as it is, and with `bars` at every other bar worth trying, if it has one."""
        if bars and has_one_bar(start):
            evidence = evidence_matrix(self.table, start)
            tried = np.append(_bars(evidence), np.float32(start.bar))
            yield from self.sweep(start, tried, evidence)
        else:
            yield self.measure(start)

    def sweep(
        self, policy: EvidencePolicy, bars: npt.ArrayLike, evidence: Array | None = None
    ) -> Iterator[Outcome]:
        """The policy at each of these bars, each resulting policy once."""
        bars = np.asarray(bars)
        variants = (policy.with_bar(float(bar)) for bar in bars)
        places = sweep(self.table, policy, bars, evidence)
        yield from self.outcomes(policy, zip(variants, places, strict=True))

    def outcomes(
        self, answering: EvidencePolicy, found: Iterable[tuple[Policy, Array]]
    ) -> Iterator[Outcome]:
        """Of policies and their exit layers (rows,), each policy once.

        Args:
            answering: as which all of them answer a row that leaves.
        """
        predicted, lost = self._predicted_under(answering), self._losses_under(answering)
        seen: set[Policy] = set()
        for policy, exit_layers in found:
            if policy not in seen:
                seen.add(policy)
                left = (self._rows, exit_layers - 1)
                losses = None if lost is None else lost[left]
                yield self._outcome(policy, exit_layers, predicted[left], losses)

    def losses_by_exit(self, policy: EvidencePolicy) -> Array:
        """What rows lose that leave after layer i, (rows, depth): by the risk, where one is looked
        at; else whether they are wrong, or without labels, other than full depth; for regression
        the squared error."""
        lost = self._losses_under(policy)
        if lost is not None:
            return lost
        early, labels = self._predicted_under(policy), self.table.labels
        truth = (self._full if labels is None else labels)[:, None]
        if self.table.problem_type == REGRESSION:
            return (early - truth.reshape(-1, 1)) ** 2
        other = early != truth
        return (other.any(axis=-1) if other.ndim == 3 else other).astype(np.float64)

    def costs_by_exit(self, policy: Policy) -> Array:
        """FLOPs of rows that leave after layer i, (rows, depth)."""
        return self._cost(policy)[0]

    def _predicted_under(self, policy: EvidencePolicy) -> Array:
        """Predictions of a row that leaves after layer i, (rows, depth, ...)."""
        if type(policy).answer is EvidencePolicy.answer:
            return self._predicted
        return predictions(answer_matrix(self.table, policy), self.table.problem_type)

    def _losses_under(self, policy: EvidencePolicy) -> Array | None:
        """What a row loses that leaves after layer i, (rows, depth)."""
        if self.risk is None:
            return None
        answers, table = answer_matrix(self.table, policy), self.table
        losses = [losses_of(self.risk, table, answers[:, i]) for i in range(table.depth)]
        return np.stack(losses, axis=1)

    def _losses(self, answers: Array) -> Array | None:
        """What rows lose that get these answers, (rows,)."""
        return None if self.risk is None else losses_of(self.risk, self.table, answers)

    def _outcome(
        self, policy: Policy, exit_layers: Array, early: Array, losses: Array | None
    ) -> Outcome:
        executed, full = self._cost(policy)
        return Outcome(
            policy=policy,
            cost=float(executed[self._rows, exit_layers - 1].sum()) / full,
            disagreement=strayed(early, self._full),
            exit_histogram=histogram(exit_layers, self.table.depth),
            metric=self.metric.name if self.metric else None,
            score=self._score(early),
            full_score=self.full_score,
            class_drops=self._class_drops(early) if self.per_class else None,
            risk=None if losses is None else float(losses.mean()),
            spread=None if losses is None else float(losses.var()),
        )

    def _cost(self, policy: Policy) -> tuple[Array, float]:
        """FLOPs by exit layer (rows, depth), and of full depth in all."""
        read = tuple(policy.reads(layer) for layer in range(1, self.table.depth))
        if read not in self._costs:
            executed, full = executed_cost(self.table, policy)
            self._costs = {read: (executed, float(full.sum()))}
        return self._costs[read]

    def _score(self, predicted: Array) -> float | None:
        if self.metric is None or self.table.labels is None:
            return None
        return self.metric.compare(predicted, self.table.labels)

    def _class_drops(self, early: Array) -> dict[str, float] | None:
        labels, header = self.table.labels, self.table.header
        if labels is None or header.problem_type == "regression":
            return None
        names = header.label_names
        if len(set(names)) < header.num_scores:
            names = tuple(map(str, range(header.num_scores)))
        full = class_recalls(self._full, labels, header.num_scores)
        drops = full - class_recalls(early, labels, header.num_scores)
        return {
            name: float(drop) for name, drop in zip(names, drops, strict=True) if not np.isnan(drop)
        }


def _bars(evidence: Array) -> Array:
    """Bars that tell rows apart: between all values of the evidence, or some of many."""
    known = evidence[:, :-1]  # whoever is not past the bar by the last layer leaves there anyway
    known = known[np.isfinite(known)]
    return bars_at(known, np.linspace(0, 1, _BARS))


def bars_at(values: Array, shares: Array) -> Array:
    """Bars that about these shares of the values do not pass, each once, rising.

    They stand halfway to the next value, the last as far above the highest, so that the last bits
    of another engine or batch move no row, where values are farther apart than these. They are
    float32, as evidence is, so that every engine compares the same numbers.
    """
    known = np.unique(values).astype(np.float64)
    steps = np.diff(known)
    with np.errstate(over="ignore"):
        halfway = (known + np.append(steps, steps[-1:].sum()) / 2).astype(np.float32)
    # between neighbours in float32 there is no number: the lower one tells them apart
    bars = np.where(halfway < np.append(known[1:], np.inf), halfway, known).astype(np.float32)
    if len(bars) > len(shares):
        bars = bars[np.searchsorted(known, np.quantile(values, shares, method="lower"))]
    return np.unique(bars)


def _metric(table: ExitTable, name: str | None) -> Metric | None:
    if table.labels is None:
        if name is not None:
            raise TableError(f"Metric '{name}' needs labels, but the table has none.")
        return None
    metric = METRICS[name] if name is not None else default_metric(table.problem_type)
    metric.check(table.problem_type)
    return metric


def finite_rows(table: ExitTable) -> Array:
    """Mask of rows whose every score is finite. Raises TableError if there is none."""
    fine = np.empty(table.rows, dtype=bool)
    for first in range(0, table.rows, _CHUNK):
        part = slice(first, first + _CHUNK)
        fine[part] = np.isfinite(table.scores[part]).all(axis=(1, 2))
    if not fine.any():
        raise TableError(f"All {table.rows} rows have NaN or infinite scores; check the model.")
    return fine
