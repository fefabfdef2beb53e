"""What `compare` finds: the leaderboard, as it is written to `leaderboard.json`."""

from __future__ import annotations

from statistics import fmean
from typing import Any, Literal

from pydantic import Field

from offramp import __version__
from offramp.storage import Strict

CHEAPEST, DEAREST = 0.2, 1.0
"""The share of full-depth cost between which a curve's area is taken."""
TARGETS = (1.5, 2.0, 3.0, 4.0)
"""Cost reductions at which methods are read."""
AREA = "area"
AT = tuple(f"{target:g}" for target in TARGETS)
COLUMNS = (AREA, *AT)
"""What a curve is judged by: its area, and its score at each target."""


class Figure(Strict):
    """A number with its 95 % interval over rows and seeds."""

    value: float
    low: float
    high: float


class Difference(Figure):
    """A paired difference; p as it is, and after Holm over all methods of the board."""

    p: float
    p_holm: float


class Reading(Strict):
    """What a seed's `tune` rows chose for a target, read on its test rows."""

    seed: int
    policy: dict[str, Any]
    score: float
    cost_reduction: float


class AtTarget(Strict):
    """One policy at one cost reduction.

    Attributes:
        score: on the curve at exactly this cost, mean over seeds.
        tune: that on `tune`, by which the family for a target is chosen; None on boards that did
            not keep it.
        readings: one per seed in which a threshold reached the target on `tune`.
    """

    target: float
    score: Figure
    tune: float | None = None
    readings: tuple[Reading, ...]

    @property
    def cost_reduction(self) -> float | None:
        """That of the readings, mean over seeds; None without one."""
        return fmean(one.cost_reduction for one in self.readings) if self.readings else None


class Point(Strict):
    """A policy chosen on `tune`, read on test; no policy is the commonest answer, at no cost."""

    cost: float
    score: float
    policy: dict[str, Any] | None


class PolicyRow(Strict):
    """One family of policies on the exits of one method.

    Attributes:
        area: mean score over costs from CHEAPEST to DEAREST.
        tune_area: that on `tune`, by which a method's family is chosen; mean over seeds.
        auroc: how well its evidence tells right from wrong answers of exits 1..L-1, mean over
            seeds; None where an exit is always right or wrong, or nothing is right or wrong.
        curves: one per seed, by cost.
    """

    name: str
    area: Figure
    tune_area: float
    at: tuple[AtTarget, ...]
    auroc: tuple[float | None, ...]
    curves: tuple[tuple[Point, ...], ...]

    @property
    def mean_auroc(self) -> float | None:
        """Over the exits that have one."""
        known = [value for value in self.auroc if value is not None]
        return fmean(known) if known else None


class MethodRow(Strict):
    """One method.

    Attributes:
        learning_rate: chosen on `tune`; None where there was no choice.
        own: the family of the method's paper.
        chosen: the family of the largest `tune_area`, by which the method is judged.
        chosen_at: that of the best score on `tune` at each target ("2" for 2x), by which it is
            judged there; empty on boards that took `chosen` throughout.
        policies: all families, `chosen` among them.
        full_score: at full depth.
        seconds: of training, mean over seeds.
        times_plain: that, by the seconds of the plain fine-tune; None without one on as many
            threads.
        parameters_added: by the exits.
        against: paired differences from the reference, each with the family chosen there: `area`
            and targets; empty for the reference itself.
        against_plain: paired differences from the plain fine-tune at full depth: `full` and
            targets.
        against_fixed: paired differences from what its own exits score where all rows leave at
            one and the same (`fixed`): `area` and targets, without those where that is what was
            chosen.
    """

    name: str
    paper: str
    learning_rate: float | None
    own: str
    chosen: str
    chosen_at: dict[str, str] = Field(default_factory=dict)
    policies: tuple[PolicyRow, ...]
    full_score: Figure
    seconds: float
    times_plain: float | None
    parameters_added: int
    against: dict[str, Difference]
    against_plain: dict[str, Difference]
    against_fixed: dict[str, Difference] = Field(default_factory=dict)

    @property
    def row(self) -> PolicyRow:
        """Of the chosen family."""
        return self._family(self.chosen)

    def family_at(self, target: float) -> str:
        """The one by which it is judged at a target."""
        return self.chosen_at.get(f"{target:g}", self.chosen)

    @property
    def at(self) -> tuple[AtTarget, ...]:
        """Every target, each by the family that was chosen there."""
        return tuple(
            one
            for target in TARGETS
            for one in self._family(self.family_at(target)).at
            if one.target == target
        )

    def _family(self, name: str) -> PolicyRow:
        return next(row for row in self.policies if row.name == name)

    @property
    def seeds(self) -> int:
        """How many it has been trained with."""
        return len(self.row.curves)


class Missing(Strict):
    """A run that is not there."""

    method: str
    seed: int
    why: str


class Board(Strict):
    """A leaderboard.

    Attributes:
        title: the data's name.
        facts: how it was made, in words: model, rows, epochs, learning rates.
        metric: of all scores, higher is better.
        guess: score of the commonest answer of `tune` for every row.
        plain: score of the plain fine-tune at full depth, None where it was not run.
        reference: the method that others are compared with.
        methods: those of most seeds first, then by area of the chosen family.
    """

    schema_version: Literal[1] = 1
    offramp: str = __version__
    title: str
    facts: dict[str, str]
    metric: str
    depth: int
    seeds: tuple[int, ...]
    test_rows: int
    guess: float
    plain: Figure | None
    reference: str
    methods: tuple[MethodRow, ...]
    missing: tuple[Missing, ...]
