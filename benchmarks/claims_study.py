"""What benchmarks/claims.py reads: a study of `offramp compare`, and figures from its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import fmean

import numpy as np
import numpy.typing as npt
from pydantic import Field
from scipy.special import softmax

from offramp.calibration.conformal import busy_exits, conformal_limits, conformal_sets
from offramp.calibration.judge import Judge
from offramp.comparison import curves, families, statistics
from offramp.comparison.board import AREA, Difference, Figure
from offramp.comparison.families import Choice, Reader
from offramp.comparison.leaderboard import Run, choices, ground_of, places
from offramp.comparison.plan import PLAN, START, Grid, Plan, results
from offramp.comparison.running import recorded
from offramp.comparison.statistics import Floats
from offramp.comparison.weighted import quick
from offramp.metrics import METRICS
from offramp.policies import Policy, Sample
from offramp.storage import Strict, read_document
from offramp.table import ExitTable, replay

YES, NO, UNDECIDED = "yes", "no", "undecided"
BINS = 15
ALPHA = 0.1
EQUAL = 1.1
"""How many times as far one cost reduction may go as another that it is held against."""
DRAWS = 8
"""Of a policy that tosses coins, to be averaged."""
Column = dict[int, Floats]
"""Seed to a number and its resamples, (1 + resamples,)."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Rule:
    """When an interval says yes and when no.

    Attributes:
        above: yes if the lower end is above this.
        below: no, if not yes, where the upper end is at or below this.
    """

    above: float
    below: float

    def answer(self, figure: Figure) -> str:
        if figure.low > self.above:
            return YES
        return NO if figure.high <= self.below else UNDECIDED


RULES = {
    "at least level": Rule(-0.005, 0.0),
    "above": Rule(0.0, 0.0),
    "far above": Rule(0.02, 0.02),
    "within 1 point": Rule(-0.01, -0.01),
}
ABOVE_ALL = "above all"


def above_all(differences: Iterable[Difference]) -> str:
    """Yes where all are above 0 after Holm at 0.05, no where one is below."""
    found = [(one.value > 0, one.p_holm < 0.05) for one in differences]
    if all(better and sure for better, sure in found):
        return YES
    return NO if any(sure and not better for better, sure in found) else UNDECIDED


def at_equal_coverage(answer: str, more: Figure) -> str:
    """An answer on the size of sets; undecided where it may come from covering less or more.

    Args:
        more: share of rows covered by the sets that are said to be smaller, minus the others'.
    """
    bought = (answer == YES and more.high < 0) or (answer == NO and more.low > 0)
    return UNDECIDED if bought else answer


def at_equal_cost(answer: str, mine: Sequence[float], theirs: Sequence[float]) -> str:
    """An answer on what two policies say as they leave; undecided where one leaves much earlier.

    Args:
        mine, theirs: cost reductions, one per seed.
    """
    ratio = fmean(mine) / fmean(theirs)
    return answer if 1 / EQUAL <= ratio <= EQUAL else UNDECIDED


def joined(answers: Iterable[str]) -> str:
    """Of a claim, from its parts: yes if all are yes, no if one is no."""
    found = set(answers)
    if NO in found:
        return NO
    return YES if found == {YES} else UNDECIDED


class Part(Strict):
    """A difference that a claim is about.

    Attributes:
        by: whose policy: `paper`, `tune` (the family chosen there), or how gates are trained and
            read; empty where none is in play.
        decides: whether the claim's answer hangs on it.
        unit: `points` are hundredths of the score.
        others: what belongs to it, by name.
    """

    name: str
    by: str
    rule: str
    answer: str
    figure: Figure
    seeds: tuple[int, ...]
    decides: bool = True
    unit: str = "points"
    others: dict[str, Difference | Figure] = Field(default_factory=dict)
    note: str = ""


class Answers(Strict):
    """What one study says of all claims: docs/results/claims/<set>.json.

    Attributes:
        learned: whether the plain fine-tune is clearly above the commonest answer; None where
            it was not run.
        claims: key to its parts.
        missing: key of a claim that has no answer here to why.
    """

    title: str
    metric: str
    depth: int
    test_rows: int
    seeds: tuple[int, ...]
    learned: bool | None
    claims: dict[str, tuple[Part, ...]]
    missing: dict[str, str]


@dataclass(frozen=True)
class Curve:
    """A family of a method on test: seed to costs and scores, each (1 + resamples, points)."""

    places: dict[int, tuple[Floats, Floats]]

    def area(self) -> Column:
        return {seed: curves.area(*place) for seed, place in self.places.items()}

    def at(self, target: float) -> Column:
        """At a cost reduction."""
        return {seed: curves.score_at(*place, 1 / target) for seed, place in self.places.items()}

    def at_costs(self, costs: Column) -> Column:
        """At a cost for each resample; beyond the dearest point, there."""
        found = {}
        for seed in self.places.keys() & costs.keys():
            x, y = self.places[seed]
            each = zip(x, y, np.minimum(costs[seed], x.max(axis=1)), strict=True)
            found[seed] = np.array([float(curves.score_at(*one)) for one in each])
        return found


@dataclass(frozen=True)
class Answered:
    """What a policy near a target answers on the test rows of a run.

    Attributes:
        confidence: of the answers, (rows,).
        sizes, covered: of conformal sets, (rows,).
    """

    confidence: Array
    right: npt.NDArray[np.bool_]
    sizes: Array
    covered: npt.NDArray[np.bool_]
    cost_reduction: float


def ece(confidence: npt.ArrayLike, right: npt.ArrayLike, counts: npt.ArrayLike) -> Floats:
    """Expected calibration error in bins of equal mass, (resamples,).

    Bins are those of all rows, each once; rows of one confidence may fall into two.

    Args:
        confidence, right: (rows,).
        counts: how often every row counts, (resamples, rows).
    """
    sure, weights = np.asarray(confidence, dtype=np.float64), np.asarray(counts)
    ranks = np.argsort(np.argsort(sure, kind="stable"), kind="stable")
    bins = ranks * BINS // len(sure)
    gaps = np.where(bins[:, None] == np.arange(BINS), (sure - np.asarray(right))[:, None], 0.0)
    return np.abs(weights @ gaps).sum(axis=1) / weights.sum(axis=1)


def apart(one: Column, other: Column) -> Column:
    """Over the seeds that both have."""
    return {seed: one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())}


class Study:
    """One folder of `offramp compare`, whatever is done there.

    Args:
        methods: those that are looked at.
    """

    def __init__(self, folder: Path, methods: Iterable[str]) -> None:
        plan, done = read_document(Plan, folder / PLAN), results(folder)
        there = {cell.method for cell in done} - {START}
        grid = Grid(plan, tuple(sorted(there)), tuple(sorted({cell.seed for cell in done})))
        found = {one: recorded(folder, grid, one, done) for one in methods if one in there}
        self.runs = {one: runs for one, runs in found.items() if runs}
        self.problem_type = plan.problem_type
        if self.runs:
            self.ground = ground_of([run for runs in self.runs.values() for run in runs])
            self.counts = self.ground.resamples.counts
            self.depth = next(iter(self.runs.values()))[0].test.depth
        self.choices = cache(self._choices)
        self.curve = cache(self._curve)
        self.reader = cache(self._reader)
        self.answered = cache(self._answered)

    def family(self, method: str, by: str) -> str:
        """By name: that of the paper, or that of the largest area on `tune`."""
        if by == "paper":
            return families.own_family(method, self.problem_type)
        return families.best_family(families.tune_scores(list(self.choices(method).values())), AREA)

    def tune_area(self, method: str, family: str) -> float:
        return float(np.mean([self.choice(run, family).tune_area for run in self.runs[method]]))

    def choice(self, run: Run, family: str) -> Choice:
        """What a family chose; drawing is a family of one point here."""
        if family != Sample.name:
            return self.choices(run.method)[run.seed][family]
        judge = Judge(run.tune, self.ground.metric.name)
        labels = np.asarray(judge.table.labels)
        answer = families.commonest(labels, self.problem_type)
        guess = families.score_of_guess(self.ground.metric, answer, labels)
        return families.choose(judge, [Sample()], guess)

    def _choices(self, method: str) -> dict[int, dict[str, Choice]]:
        return {run.seed: choices(run, self.ground.metric) for run in self.runs[method]}

    def _reader(self, method: str, seed: int) -> Reader:
        return self.ground.reader(next(run for run in self.runs[method] if run.seed == seed))

    def _curve(self, method: str, family: str) -> Curve:
        found = {}
        for run in self.runs[method]:
            reader, corners = self.reader(method, run.seed), self.choice(run, family).corners
            done = reader.read(corners)
            read = [done[policy] for _, policy in corners]
            ground = self.ground
            found[run.seed] = places(run, reader, read, ground.metric, ground.resamples)
        return Curve(found)

    def exits(self, method: str) -> dict[int, Floats]:
        """Seed to the score of every exit alone, (1 + resamples, depth)."""
        return {
            run.seed: self._scores(np.moveaxis(self.reader(method, run.seed).predicted, 1, 0))
            for run in self.runs[method]
        }

    def full(self, method: str) -> Column:
        """Score of full depth."""
        return {
            run.seed: self._scores(self.reader(method, run.seed).full[None])[:, 0]
            for run in self.runs[method]
        }

    def learned(self, method: str) -> bool:
        """Whether full depth is clearly above always giving the commonest answer."""
        ahead = {}
        for run in self.runs[method]:
            reader, ground = self.reader(method, run.seed), self.ground
            _, ends = places(run, reader, [], ground.metric, ground.resamples)
            ahead[run.seed] = ends[:, 1] - ends[:, 0]
        return self.figure(ahead).low > 0

    def reached(self, method: str, family: str, target: float) -> tuple[Column, list[float]]:
        """Scores and cost reductions of the thresholds that reached a target on `tune`."""
        scores: Column = {}
        reductions = []
        for run in self.runs[method]:
            chosen = self.choice(run, family).reached.get(target)
            if chosen is not None:
                reader = self.reader(method, run.seed)
                predicted, executed = reader.read([chosen])[chosen[1]]
                scores[run.seed] = self._scores(predicted[None])[:, 0]
                reductions.append(float(reader.full_cost.sum() / executed.sum()))
        return scores, reductions

    def drawn(self, method: str) -> tuple[Column, Column]:
        """Costs and scores of drawing where to leave, mean over draws."""
        costs, scores = {}, {}
        for run in self.runs[method]:
            reader = self.reader(method, run.seed)
            draws: list[tuple[Policy, Policy]] = [(one, one) for one in map(_draw, range(DRAWS))]
            done = list(reader.read(draws).values())
            executed = np.stack([cost for _, cost in done])
            resamples = self.ground.resamples
            costs[run.seed] = resamples.costs(executed, reader.full_cost).mean(axis=1)
            scores[run.seed] = self._scores(np.stack([one for one, _ in done])).mean(axis=1)
        return costs, scores

    def _answered(self, method: str, family: str, target: float) -> dict[int, Answered]:
        """Seed to what the policy near a target answers.

        It is chosen on one half of `tune`; limits of conformal sets come from the other.
        """
        found = {}
        for run in self.runs[method]:
            odd = np.arange(run.tune.rows) % 2 == 1
            policy = self._near(run.tune.take(~odd), method, family, target)
            table = self.reader(method, run.seed).table
            own = busy_exits(replay(run.tune.take(~odd), policy).exit_layers, table.depth)
            found[run.seed] = answered(policy, run.tune.take(odd), own, table)
        return found

    def _near(self, tune: ExitTable, method: str, family: str, target: float) -> Policy:
        judge = Judge(tune, self.ground.metric.name)
        judge.metric = quick(METRICS[self.ground.metric.name])
        starts = families.families(tune, families.own_family(method, self.problem_type))[family]
        tried = [outcome for start in starts for outcome in judge.search(start)]
        return min(tried, key=lambda one: (abs(one.cost - 1 / target), one.loss)).policy

    def mean(self, values: Mapping[int, npt.ArrayLike]) -> Column:
        """Of numbers by row, seed by seed."""
        total = self.counts.sum(axis=1)
        return {
            seed: self.counts @ np.asarray(one, dtype=np.float64) / total
            for seed, one in values.items()
        }

    def pooled(self, column: Column) -> Floats:
        """Seed by seed, (1 + resamples, seeds)."""
        return np.stack(list(column.values()), axis=1)

    def figure(self, column: Column) -> Figure:
        return statistics.figure(self.pooled(column))

    def part(self, name: str, by: str, rule: str, column: Column, **more: object) -> Part:
        """A part whose answer its interval gives."""
        figure = self.figure(column)
        answer = RULES[rule].answer(figure)
        seeds = tuple(column)
        return Part.model_validate(
            {"name": name, "by": by, "rule": rule, "answer": answer, "figure": figure}
            | {"seeds": seeds, **more}
        )

    def _scores(self, predicted: npt.NDArray[np.generic]) -> Floats:
        return self.ground.resamples.scores(self.ground.metric, predicted, self.ground.labels)


def answered(
    policy: Policy, held_out: ExitTable, own: npt.NDArray[np.bool_], test: ExitTable
) -> Answered:
    """A policy on test rows, with conformal sets whose limits come from other rows."""
    before, done = replay(held_out, policy), replay(test, policy)
    limits = conformal_limits(
        before.answers, np.asarray(held_out.labels), before.exit_layers, own, ALPHA
    )
    sets = conformal_sets(done.answers, done.exit_layers, limits)
    labels = np.asarray(test.labels)
    probabilities = softmax(done.answers.astype(np.float64), axis=-1)
    return Answered(
        confidence=probabilities.max(axis=-1),
        right=done.answers.argmax(axis=-1) == labels,
        sizes=sets.sum(axis=1).astype(np.float64),
        covered=sets[np.arange(len(labels)), labels],
        cost_reduction=1 / done.share,
    )


def _draw(seed: int) -> Sample:
    return Sample(seed=seed)
