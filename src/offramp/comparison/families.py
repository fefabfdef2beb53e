"""Families of policies on one run: chosen on `tune`, then read on test, row by row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np
import torch
from scipy.stats import rankdata

from offramp.calibration.fitting import FITS
from offramp.calibration.frontier import BASELINE
from offramp.calibration.judge import Judge, Outcome
from offramp.comparison import curves
from offramp.comparison.board import AREA, COLUMNS, TARGETS
from offramp.methods import METHODS
from offramp.metrics import MULTI, REGRESSION, Metric, predictions
from offramp.policies import (
    POLICIES,
    Averaged,
    Binned,
    EvidencePolicy,
    Fixed,
    Full,
    Gated,
    MaxProbability,
    Patience,
    PerExit,
    Policy,
    Sample,
    has_one_bar,
)
from offramp.table import ExitTable, answer_matrix, executed_cost, replay, sweep
from offramp.table.store import Array

MOST = 16
"""Policies of a family that are read on test, beside those that a target chose."""
FEWEST = 100
"""Rows from which many numbers are taken for a family: fewer are learnt by heart."""
_ROUNDING = 1e-9
_NOT_A_FAMILY = (Full.name, Averaged.name, PerExit.name)

Family = list[Policy]
"""Where its search starts."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What one family chose on the `tune` rows of one run.

    Attributes:
        tune: area and score at each target ("2" for 2x) of the upper hull on `tune`, without what
            a fit there flatters them.
        start: where most corners of the hull come from.
        corners: the policies there between the guess and full depth, each with its start.
        reached: target to the best policy that reaches it, with its start.
    """

    tune: dict[str, float]
    start: Policy
    corners: tuple[tuple[Policy, Policy], ...]
    reached: dict[float, tuple[Policy, Policy]]

    @property
    def tune_area(self) -> float:
        return self.tune[AREA]


def own_family(method: str, problem_type: str) -> str:
    """The family of a method's paper; of one without, the commonest rule for the task."""
    if method in METHODS:
        return METHODS[method].policy_for(problem_type)
    return Patience.name if problem_type == REGRESSION else MaxProbability.name


def families(tune: ExitTable, own: str) -> dict[str, Family]:
    """Every family that fits a table's task and signals.

    Args:
        tune: what some families take numbers from.
        own: the family that is also averaged. `sample` has no bar to choose and is there only as
            a method's own.
    """
    left_out = {*_NOT_A_FAMILY, Sample.name} - {own}
    names = [name for name in POLICIES if name not in left_out]
    found = {name: starts for name in names if (starts := _starts(name, tune))}
    if Gated.name in found:
        by_masses = {one.masses: one for one in found[Gated.name] if isinstance(one, Gated)}
        found[Gated.name] = [by_masses["cut"]]
        found[f"{Gated.name} simplex"] = [by_masses["simplex"]]
    common = own_family("", tune.problem_type)
    for name in dict.fromkeys((common, own)):
        # an average of numbers from these very rows would be flattered as they are
        alone = name == BASELINE or name in FITS
        if not alone and (averages := _averages(found.get(name, []), tune.problem_type)):
            found[f"{Averaged.name} {name}"] = averages
    return found


def _starts(name: str, tune: ExitTable) -> Family:
    kind = POLICIES[name]
    if not set(tune.header.signals).issuperset(kind.signals):
        return []
    if name == Binned.name and tune.rows < FEWEST:
        return []
    starts = kind.variants(tune.problem_type, tune.depth)
    return [FITS[name](tune)] if starts and name in FITS else starts


def _averages(starts: Family, problem_type: str) -> Family:
    multi_label = problem_type == MULTI
    return [
        Averaged(policy=start, multi_label=multi_label)
        for start in starts
        if isinstance(start, EvidencePolicy)
    ]


def choose(judge: Judge, family: Family, guess: float, most: int = MOST) -> Choice:
    """Search a family on the rows of a judge.

    Args:
        judge: of a table that may choose a policy.
        guess: the score of the commonest answer there, at no cost.
        most: corners that are kept.
    """
    tried = [(start, outcome) for start in family for outcome in judge.search(start)]
    choice = _choice(judge, tried, guess, most)
    gained = flattery(judge, family[0].name, guess)
    return replace(choice, tune={key: one - gained[key] for key, one in choice.tune.items()})


def flattery(judge: Judge, name: str, guess: float) -> dict[str, float]:
    """How much of `Choice.tune` a family gains by numbers from the rows that it is judged on.

    A fit gains on its own rows about what it loses elsewhere, and half as much of both on twice
    as many rows. So it is half of what numbers of one half of the rows are better there than
    those of the other half, mean over both; too little where few rows are learnt by heart. A
    temperature an exit gains nothing that can be seen.
    """
    metric = judge.metric
    if name != Binned.name or metric is None:
        return dict.fromkeys(COLUMNS, 0.0)

    def read(rows: ExitTable, others: ExitTable) -> dict[str, float]:
        there, policy = Judge(rows, metric.name), FITS[name](others)
        there.metric = metric
        tried = [(policy, outcome) for outcome in there.search(policy)]
        return _choice(there, tried, guess, MOST).tune

    odd = np.arange(judge.table.rows) % 2 == 1
    one, other = judge.table.take(odd), judge.table.take(~odd)
    at_home, elsewhere = (read(one, one), read(other, other)), (read(one, other), read(other, one))
    return {
        key: max(0.0, sum(found[key] for found in at_home) - sum(found[key] for found in elsewhere))
        / 4
        for key in COLUMNS
    }


def choose_layers(judge: Judge, layers: Sequence[int], guess: float, most: int = MOST) -> Choice:
    """As `choose`, among these exits for everyone and nothing between."""
    policies = [Fixed(layer=layer) for layer in layers]
    return _choice(judge, [(one, judge.measure(one)) for one in policies], guess, most)


def _choice(
    judge: Judge, tried: Sequence[tuple[Policy, Outcome]], guess: float, most: int
) -> Choice:
    cheap = [(start, outcome) for start, outcome in tried if outcome.cost < 1]
    inner = [(outcome.cost, -outcome.loss) for _, outcome in cheap]
    places = [*inner, (0.0, guess), (1.0, judge.full_score or 0.0)]
    corners = curves.hull(places)
    kept = curves.thinned(places, corners, most + 2)[1:-1]
    reached = {}
    for target in TARGETS:
        enough = [one for one in cheap if one[1].cost * target <= 1 + _ROUNDING]
        if enough:
            start, best = min(enough, key=lambda one: (one[1].loss, one[1].cost))
            reached[target] = start, best.policy
    on_tune = zip(*(places[one] for one in corners), strict=True)
    starts = Counter(cheap[one][0] for one in kept) or Counter([tried[0][0]])
    return Choice(
        tune={key: float(one) for key, one in curves.columns(*on_tune).items()},
        start=starts.most_common(1)[0][0],
        corners=tuple((cheap[one][0], cheap[one][1].policy) for one in kept),
        reached=reached,
    )


def tune_scores(chosen: Sequence[Mapping[str, Choice]]) -> dict[str, dict[str, float]]:
    """What the families that all seeds have reach on `tune`, mean over seeds."""
    names = [one for one in chosen[0] if all(one in made for made in chosen)]
    return {
        one: {key: fmean(made[one].tune[key] for made in chosen) for key in COLUMNS}
        for one in names
    }


def best_family(on_tune: Mapping[str, Mapping[str, float]], column: str) -> str:
    """The one to take for a column of a curve; of equals that of the larger area."""
    return max(on_tune, key=lambda one: (on_tune[one][column], on_tune[one][AREA]))


def commonest(labels: Array, problem_type: str) -> Array:
    """The answer that is right most often, or the mean number; shape of one label."""
    if problem_type == REGRESSION:
        return np.asarray(labels, dtype=np.float64).mean()
    values, counts = np.unique(labels, axis=0, return_counts=True)
    best = values[counts.argmax()]
    return best > 0 if problem_type == MULTI else best


def guessed(answer: Array, rows: int) -> Array:
    """One answer for all rows, (rows, ...)."""
    return np.broadcast_to(answer, (rows, *np.shape(answer)))


def score_of_guess(metric: Metric, answer: Array, labels: Array) -> float:
    return metric.compare(guessed(answer, len(labels)), labels)


class Reader:
    """Reads policies on the rows of a table; nothing is chosen here."""

    def __init__(self, table: ExitTable) -> None:
        self.table = table
        self.labels: Array = np.asarray(table.labels)
        self.predicted = predictions(table.scores, table.problem_type)
        self._rows = np.arange(table.rows)

    @property
    def full(self) -> Array:
        """Predictions at full depth, (rows, ...)."""
        return self.predicted[:, -1]

    @property
    def full_cost(self) -> Array:
        """FLOPs of full depth, (rows,)."""
        return executed_cost(self.table, Full())[1]

    def read(self, chosen: Iterable[tuple[Policy, Policy]]) -> dict[Policy, tuple[Array, Array]]:
        """Predictions (rows, ...) and executed FLOPs (rows,) of policies, each with its start."""
        by_start: dict[Policy, dict[Policy, None]] = {}
        for start, policy in chosen:
            by_start.setdefault(start, {})[policy] = None
        return {
            policy: done
            for start, policies in by_start.items()
            for policy, done in zip(policies, self._read(start, list(policies)), strict=True)
        }

    def _read(self, start: Policy, policies: Sequence[Policy]) -> Iterator[tuple[Array, Array]]:
        if not has_one_bar(start):
            for policy in policies:
                done = replay(self.table, policy)
                yield predictions(done.answers, self.table.problem_type), done.cost
            return
        under = self._under(start)
        bars = [policy.bar for policy in policies if isinstance(policy, EvidencePolicy)]
        for policy, layers in zip(policies, sweep(self.table, start, bars), strict=True):
            executed, _ = executed_cost(self.table, policy)
            yield under[self._rows, layers - 1], executed[self._rows, layers - 1]

    def auroc(self, start: Policy) -> tuple[float | None, ...]:
        """How well the evidence of exits before the last tells right from wrong answers."""
        depth, kind = self.table.depth, self.table.problem_type
        if kind == REGRESSION or not isinstance(start, EvidencePolicy) or start.name == BASELINE:
            return (None,) * (depth - 1)
        right = self._under(start)[:, :-1] == self.labels[:, None]
        if kind == MULTI:
            right = right.all(axis=-1)
        ranks = rankdata(self._evidence(start), axis=0)
        rights = right.sum(axis=0)
        pairs = rights * (len(right) - rights)
        won = (ranks * right).sum(axis=0) - rights * (rights + 1) / 2
        return tuple(
            float(one / all_) if all_ else None for one, all_ in zip(won, pairs, strict=True)
        )

    def _under(self, start: EvidencePolicy) -> Array:
        """Predictions of a row that leaves after layer i, (rows, depth, ...)."""
        if type(start).answer is EvidencePolicy.answer:
            return self.predicted
        return predictions(answer_matrix(self.table, start), self.table.problem_type)

    @torch.inference_mode()
    def _evidence(self, policy: EvidencePolicy) -> Array:
        """Of every exit before the last, (rows, depth - 1)."""
        state = policy.start(self.table.start(self._rows))
        found = []
        for layer in range(1, self.table.depth):
            output = self.table.output(self._rows, layer)
            evidence, state = policy.evidence(state, layer, output)
            found.append(evidence.float().nan_to_num(-torch.inf, torch.inf, -torch.inf).numpy())
        return np.stack(found, axis=1)
