"""What an attack did to policies, at equal clean savings, without and within a budget."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import Field

from offramp.calibration import Outcome
from offramp.calibration.fitting import FITS
from offramp.calibration.frontier import ALL, PolicySpec, explore, fitting_policy
from offramp.calibration.judge import Judge
from offramp.errors import ConfigError
from offramp.metrics import METRICS, Metric, default_metric, predictions
from offramp.policies import Fixed, Policy
from offramp.storage import Strict
from offramp.table import ExitTable, executed_cost, replay

Array = npt.NDArray[np.float64]
_NEAR = 0.01
"""Of the cost of full depth. Half of the layers cost half of it but for a head or an exit."""


class Reading(Strict):
    """A policy on some rows.

    Attributes:
        efficacy: 1 where all leave at the first exit, 0 where all run to the last, see `efficacy`.
        exit_layer: the mean.
        cost: share of the FLOPs of full depth.
        score: by the metric of the document; None without labels.
        forced: share of rows that the budget made leave.
    """

    efficacy: float
    exit_layer: float
    cost: float
    score: float | None
    forced: float = Field(default=0.0, ge=0, le=1)


class Budgeted(Strict):
    """A policy within a depth budget.

    Attributes:
        most: cost if every attacked row took the whole budget; `attacked.cost` is never above.
    """

    most: float
    clean: Reading
    attacked: Reading


class Attacked(Strict):
    """What one attack did to one policy.

    Attributes:
        point: name of the operating point; None where the policy was set to the savings asked for.
        within: the same rows with the depth budget on.
    """

    attack: str
    policy: dict[str, Any]
    point: str | None
    clean: Reading
    attacked: Reading
    within: Budgeted


def efficacy(costs: npt.ArrayLike, lowest: npt.ArrayLike, highest: npt.ArrayLike) -> float:
    """1 / (c_max - c_min) times the integral over cost of the share of rows that have left.

    The area is 1 if all rows leave at once and 0 if all run through (DeepSloth, 2010.02432).

    Args:
        costs: of each row, (rows,).
        lowest, highest: of a row that leaves first and last, (rows,) or numbers, not equal.
    """
    costs, lowest, highest = np.broadcast_arrays(
        np.asarray(costs, dtype=float), np.asarray(lowest), np.asarray(highest)
    )
    # each row's part of the integral is what is left of its range when it has gone
    return float(np.mean((highest - costs) / (highest - lowest)))


def refuse_fitted(specs: Sequence[PolicySpec]) -> None:
    """Raise ConfigError for a policy whose options are taken from rows, not only its bar."""
    fitted = [spec for spec in specs if isinstance(spec, str) and spec in (ALL, *FITS)]
    if fitted:
        raise ConfigError(
            f"Policy '{fitted[0]}' takes numbers from rows that may choose, which the attacked "
            "ones may not. Calibrate a point with it and give that as --point."
        )


def at_savings(clean: ExitTable, names: Sequence[PolicySpec], target: float) -> list[Policy]:
    """Each policy with the bar whose cost on clean rows is nearest to 1 / `target`.

    Costs choose and nothing else, so that labels favour no policy; of the two rules for gates they
    would choose by chance, so it is the paper's.
    """
    refuse_fitted(names)
    judge = Judge(clean)

    def distance(outcome: Outcome) -> tuple[float, float]:
        return abs(math.log(outcome.cost * target)), outcome.cost

    def fits(outcome: Outcome) -> bool:
        return getattr(outcome.policy, "masses", "cut") == "cut"

    return [min(filter(fits, explore(judge, [name])), key=distance).policy for name in names]


def budget_for(clean: ExitTable, target: float) -> int:
    """The least depth at which leaving costs 1 / `target` of full depth, to 1 %, or more."""
    for depth in range(1, clean.depth):
        if _cost_of_all(clean, Fixed(layer=depth), depth) >= 1 / target - _NEAR:
            return depth
    return clean.depth


def compare(
    attack: str,
    clean: ExitTable,
    attacked: ExitTable,
    spec: PolicySpec,
    max_depth: int,
    point: str | None = None,
    metric: str | None = None,
) -> Attacked:
    """One policy on the same rows before and after an attack."""
    policy = fitting_policy(spec, clean)
    within = Budgeted(
        most=_cost_of_all(attacked, policy, max_depth),
        clean=read(clean, policy, metric, max_depth),
        attacked=read(attacked, policy, metric, max_depth),
    )
    return Attacked(
        attack=attack,
        policy=policy.to_dict(),
        point=point,
        clean=read(clean, policy, metric),
        attacked=read(attacked, policy, metric),
        within=within,
    )


def read(
    table: ExitTable, policy: Policy, metric: str | None = None, max_depth: int | None = None
) -> Reading:
    """What a policy does on a table, perhaps within a depth budget."""
    done = replay(table, policy, max_depth)
    executed, full = executed_cost(table, policy)
    shares = executed / full[:, None]
    return Reading(
        efficacy=efficacy(done.cost / full, shares[:, 0], shares[:, -1]),
        exit_layer=float(done.exit_layers.mean()),
        cost=done.share,
        score=score_of(table, done.answers, metric),
        forced=float(done.forced.mean()),
    )


def score_of(table: ExitTable, answers: npt.ArrayLike, metric: str | None = None) -> float | None:
    """The score of raw answers, (rows, classes); None without labels."""
    if table.labels is None:
        return None
    answered = predictions(np.asarray(answers), table.problem_type)
    return metric_of(table, metric).compare(answered, np.asarray(table.labels))


def metric_of(table: ExitTable, name: str | None) -> Metric:
    """By default the task's own. Raises ConfigError for one of another task."""
    metric = METRICS[name] if name is not None else default_metric(table.problem_type)
    metric.check(table.problem_type)
    return metric


def _cost_of_all(table: ExitTable, policy: Policy, depth: int) -> float:
    """Cost if all rows leave after `depth`, with all exits on the way that the policy reads."""
    executed, full = executed_cost(table, policy, depth)
    return float(executed[:, depth - 1].sum() / full.sum())
