"""The figures of a report, from an exit table: nothing here knows of HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration import OperatingPoint, Outcome, PolicySpec
from offramp.calibration.frontier import BASELINE, applicable, explore
from offramp.calibration.judge import Judge
from offramp.evaluation import Evaluation, evaluate
from offramp.metrics import MULTI, REGRESSION, class_recalls, predictions
from offramp.policies import EvidencePolicy, Policy
from offramp.policies.confidence import MaxProbability
from offramp.report.words import series_names
from offramp.table import ExitTable, Replay, replay

CURVE_POINTS = 120
BUDGETS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class Curve:
    """One policy at every setting that was tried, cheapest first."""

    name: str
    baseline: bool
    outcomes: tuple[Outcome, ...]

    def best_within(self, budget: float) -> Outcome | None:
        """The best that costs at most this share."""
        affordable = [one for one in self.outcomes if one.cost <= budget + _ROUNDING]
        return min(affordable, key=lambda one: one.loss, default=None)


@dataclass(frozen=True, slots=True)
class Exit:
    """What answering every row at one exit would give.

    Attributes:
        auroc: of the exit's right answers against its wrong ones, by largest probability;
            without labels of those that agree with full depth. None where only one kind is
            there, and for regression.
        better, worse: rows right here and wrong at full depth, and the other way round; for
            regression, rows closer to their label and farther from it. None without labels.
    """

    layer: int
    outcome: Outcome
    auroc: float | None
    better: int | None
    worse: int | None


@dataclass(frozen=True, slots=True)
class ClassRow:
    """Recall of one class; `rows` that have it."""

    name: str
    rows: int
    full: float
    early: float

    @property
    def drop(self) -> float:
        return self.full - self.early


@dataclass(frozen=True, slots=True)
class Overthinking:
    """How many rows were better off earlier, and what leaving at the policy's layer made of it.

    Attributes:
        ever: rows that some exit before the last answers better than full depth.
        gained, lost: rows answered better and worse by the policy than by full depth.
    """

    ever: int
    gained: int
    lost: int


class Figures:
    """All figures of one policy on one table; rows with broken scores are left out."""

    def __init__(
        self,
        table: ExitTable,
        point: PolicySpec | OperatingPoint,
        metric: str | None = None,
    ) -> None:
        self.evaluation: Evaluation = evaluate(table, point, metric)
        self.judge = Judge(table, self.evaluation.outcome.metric)
        self.table = self.judge.table
        self.regression = table.problem_type == REGRESSION
        self.labelled = table.labels is not None

    @property
    def policy(self) -> Policy:
        return self.evaluation.outcome.policy

    @cached_property
    def done(self) -> Replay:
        return replay(self.table, self.policy)

    @cached_property
    def predicted(self) -> npt.NDArray[Any]:
        """(rows, depth) or, for label sets, (rows, depth, classes)."""
        return predictions(self.table.scores, self.table.problem_type)

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        """Names of the classes, or their numbers where names are missing or stand twice."""
        names, count = self.table.header.label_names, self.table.header.num_scores
        return names if len(set(names)) == count else tuple(map(str, range(count)))

    @cached_property
    def right(self) -> npt.NDArray[np.bool_]:
        """Where an exit's answer is the label, without labels that of full depth; (rows, depth)."""
        labels = self.table.labels
        truth = self.predicted[:, -1] if labels is None else labels
        if self.table.problem_type == MULTI:
            return (self.predicted == (truth > 0)[:, None]).all(axis=-1)
        return self.predicted == truth[:, None]

    @cached_property
    def better_worse(self) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Where an exit is better, and worse, than full depth; (rows, depth) each."""
        if self.regression and self.table.labels is not None:
            error = np.abs(self.predicted - self.table.labels[:, None])
            return error < error[:, -1:], error > error[:, -1:]
        full = self.right[:, -1:]
        return self.right & ~full, ~self.right & full

    def curves(self) -> list[Curve]:
        """Every policy that fits the task, and the `fixed` baseline."""
        names = [BASELINE, *(name for name in applicable(self.table) if name != "full")]
        return curves_of(explore(self.judge, names))

    def exits(self) -> list[Exit]:
        return [
            Exit(layer, outcome, self._auroc(layer), *self._against_full(layer))
            for layer, outcome in enumerate(self.evaluation.exits, start=1)
        ]

    def _auroc(self, layer: int) -> float | None:
        if self.regression:
            return None
        right = self.right[:, layer - 1]
        if right.all() or not right.any():
            return None
        from sklearn.metrics import roc_auc_score

        return float(roc_auc_score(right, self.sureness(np.arange(self.table.rows), layer)))

    def sureness(self, rows: npt.NDArray[np.int64], layer: int) -> npt.NDArray[np.float32]:
        """Largest probability of each row at an exit; of label sets, that of the least sure."""
        rule = MaxProbability(multi_label=self.table.problem_type == MULTI)
        evidence, _ = rule.evidence({}, layer, self.table.output(rows, layer))
        return evidence.numpy()

    def _against_full(self, layer: int) -> tuple[int | None, int | None]:
        if not self.labelled:
            return None, None
        better, worse = self.better_worse
        return int(better[:, layer - 1].sum()), int(worse[:, layer - 1].sum())

    def overthinking(self) -> Overthinking | None:
        """None without labels."""
        if not self.labelled:
            return None
        better, worse = self.better_worse
        here = np.arange(self.table.rows), self.done.exit_layers - 1
        ever = better[:, :-1].any(axis=1)
        return Overthinking(int(ever.sum()), int(better[here].sum()), int(worse[here].sum()))

    def classes(self) -> list[ClassRow]:
        """Recall by class, largest drop first; nothing for regression or without labels."""
        labels = self.table.labels
        if labels is None or self.regression:
            return []
        count = self.table.header.num_scores
        early = predictions(self.done.answers, self.table.problem_type)
        rows = (
            (labels > 0).sum(axis=0) if labels.ndim == 2 else np.bincount(labels, minlength=count)
        )
        full = class_recalls(self.predicted[:, -1], labels, count)
        recalls = class_recalls(early, labels, count)
        found = [
            ClassRow(self.label_names[n], int(rows[n]), float(full[n]), float(recalls[n]))
            for n in np.flatnonzero(rows)
        ]
        return sorted(found, key=lambda one: -one.drop)


def curves_of(outcomes: Iterable[Outcome]) -> list[Curve]:
    """A curve of each kind of policy, `full` left out."""
    groups: dict[Policy, list[Outcome]] = {}
    for outcome in outcomes:
        policy = outcome.policy
        kind = policy.without_bars() if isinstance(policy, EvidencePolicy) else policy
        groups.setdefault(kind, []).append(outcome)
    kinds = [kind for kind in groups if kind.name != "full"]
    return [
        Curve(name, kind.name == BASELINE, _thinned(groups[kind]))
        for name, kind in zip(series_names(kinds), kinds, strict=True)
    ]


def _thinned(outcomes: Sequence[Outcome]) -> tuple[Outcome, ...]:
    """At most CURVE_POINTS of them, cheapest first, the ends among them."""
    ordered = sorted(outcomes, key=lambda one: (one.cost, one.loss))
    if len(ordered) > CURVE_POINTS:
        places = np.linspace(0, len(ordered) - 1, CURVE_POINTS).round().astype(int)
        ordered = [ordered[place] for place in places]
    return tuple(ordered)


def by_budget(curves: Sequence[Curve]) -> list[tuple[float, list[Outcome | None]]]:
    """What each policy reaches within a share of full depth: the curves as a table."""
    rows = [(budget, [curve.best_within(budget) for curve in curves]) for budget in BUDGETS]
    return [(budget, found) for budget, found in rows if any(found)]
