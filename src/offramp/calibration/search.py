"""Choosing an operating point on a table: what was asked, at the least cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offramp.calibration import probabilities, sentences
from offramp.calibration.conformal import Sets, parse_coverage
from offramp.calibration.frontier import BASELINE, PolicySpec, applicable, explore
from offramp.calibration.judge import Judge, Outcome, finite_rows
from offramp.calibration.point import OperatingPoint, check_name
from offramp.calibration.risks import RISKS
from offramp.calibration.target import Target
from offramp.errors import ConfigError, PointError, TableError
from offramp.metrics import SINGLE
from offramp.policies import EvidencePolicy
from offramp.storage import parse_document
from offramp.table import ExitTable, require_role

WORTH_IT = 1.05
"""The least cost reduction that is worth a policy."""
_ROUNDING = 1e-9  # .93 - .92 is a drop of 1%, whatever binary fractions say


@dataclass(frozen=True, slots=True)
class Calibration:
    """What a search found.

    Attributes:
        point: the chosen point; full depth where early exit does not pay.
        pays: whether anything better than full depth met the target.
        messages: sentences for the user: the choice, its figures, what to be careful about.
        frontier: every candidate that was tried, the `fixed` baseline among them.
    """

    point: OperatingPoint
    pays: bool
    messages: tuple[str, ...]
    frontier: tuple[Outcome, ...]


def calibrate(
    table: ExitTable,
    *,
    target_speedup: float | None = None,
    max_drop: float | str | None = None,
    max_disagreement: float | str | None = None,
    metric: str | None = None,
    per_class: bool = False,
    policies: Sequence[PolicySpec] | None = None,
    name: str = "default",
    sets: float | str | None = None,
    max_risk: float | str | None = None,
    risk: str | None = None,
    temperatures: bool = False,
    progress: bool = False,
) -> Calibration:
    """Choose a policy and its threshold on a recorded table.

    Give exactly one target. Where none of the candidates meets it, or the cheapest that does
    saves less than 5%, the point is full depth and `pays` is False. This is a choice on the
    rows of the table; it claims nothing about other rows, which `certify` does.

    Args:
        table: role `tune` or `calibrate`.
        target_speedup: cost reduction wanted (2 = half the FLOPs); the best score that has it
            is chosen, or the least disagreement where there are no labels.
        max_drop: the cheapest candidate that loses at most this much of the metric against
            full depth, in the metric's unit (0.01 or '1%'). Needs labels.
        max_disagreement: the cheapest candidate that answers at most this share of rows
            otherwise than full depth. Needs no labels.
        metric: by default accuracy, f1_micro (multi-label) or pearson (regression).
        per_class: the recall of no class may drop by more than max_drop either.
        policies: names to search, or policies with options to try as they are; `fixed` only
            takes part if named here. `all` searches everything that fits, thousands of candidates.
        name: of the operating point.
        sets: also store with the point what makes sets of classes that hold the right one for
            this share of new rows (0.9 or '90%'). Every second row, by a hash of its input, then
            serves these alone. Needs labels, of one class each.
        max_risk, risk: the cheapest candidate whose mean loss is at most this, and what a row
            loses: the name of one of `RISKS`, to which others can be added.
        temperatures: also store with the point a temperature for each exit, which makes scores
            true probabilities. Needs labels; not for a risk of probabilities as they are.
        progress: show a bar while candidates are tried.

    Raises:
        ConfigError: contradictory or meaningless demands.
        TableError: the role forbids it, labels are missing, or no row is usable.
    """
    check_name(name)
    require_role(table, ("tune", "calibrate"), "choose a policy")
    table.check_content()
    share, apart = None if sets is None else parse_coverage(sets), table
    if share is not None:
        table, apart = rows_for_sets(table)
    target = Target.of(target_speedup, max_drop, max_disagreement, per_class, max_risk, risk)
    judge = Judge(table, metric, per_class, None if risk is None else RISKS[risk])
    if temperatures:
        probabilities.check(judge.table, judge.risk)
    _check_target(target, judge)
    specs = applicable(table) if policies is None else policies
    tried = explore(judge, [*specs, "full"], progress)
    baseline = explore(judge, [BASELINE])
    best = _choose(target, tried)
    pays = best is not None and best.cost_reduction >= WORTH_IT
    full = next(outcome for outcome in tried if outcome.policy.name == "full")
    chosen = best if best is not None and pays else full
    point = point_of(name, target, judge, chosen)
    if share is not None:
        point = point.model_copy(
            update={"sets": Sets.fit(apart, chosen.policy, share, judge.table)}
        )
    if temperatures:
        point = tempered(point, judge.table)
    if pays:
        verdict = sentences.choice(target, chosen, baseline)
    else:
        verdict = sentences.refusal(target, best, tried)
    cautions = sentences.cautions(judge.table.rows, judge.excluded, point.sets)
    known = {outcome.policy for outcome in tried}
    rest = [outcome for outcome in baseline if outcome.policy not in known]
    return Calibration(point, pays, (*verdict, *cautions), (*tried, *rest))


def for_sets(table: ExitTable, digit: int = 0) -> npt.NDArray[np.bool_]:
    """Every second row, by a digit of its binary id, counted from the last."""
    return (table.ids >> digit) % 2 == 1


def rows_for_sets(table: ExitTable, digit: int = 0) -> tuple[ExitTable, ExitTable]:
    """The rest, and rows that limits of sets come from and nothing else, see `for_sets`."""
    if table.problem_type != SINGLE:
        raise ConfigError(
            f"Sets hold the one right class as often as asked; this is {table.problem_type}. "
            "Leave --sets out."
        )
    if table.labels is None:
        raise TableError("Sets need labels, but the table has none. Leave --sets out.")
    drawn = for_sets(table, digit)
    apart, rest = drawn & finite_rows(table), ~drawn
    if not apart.any() or not rest.any():
        raise TableError(f"{table.rows} rows are too few to take sets from one half of them.")
    return table.take(rest), table.take(apart)


def _check_target(target: Target, judge: Judge) -> None:
    problem_type = judge.table.problem_type
    if target.per_class and problem_type == "regression":
        raise ConfigError("per_class has no meaning for regression, which has no classes.")
    if target.kind == "max_drop" and judge.metric is None:
        raise TableError(
            "max_drop needs labels, but the table has none. Use max_disagreement, which "
            "compares with full depth, or record rows with labels."
        )
    if target.kind == "max_drop" and judge.correlates_with_nothing:
        raise TableError(
            "max_drop needs labels that differ; all labels of the table are the same number, "
            "with which nothing correlates."
        )
    bounded = {
        "target_speedup": False,
        "max_drop": judge.metric is not None and judge.metric.bounded,
        "max_disagreement": problem_type != "regression",
        "max_risk": True,
    }[target.kind]
    if bounded and target.value >= 1:
        raise ConfigError(
            f"{target.kind}={target.value:g} allows any answer at all. Write 1% or 0.01."
        )


def _choose(target: Target, outcomes: Sequence[Outcome]) -> Outcome | None:
    """The best of the outcomes that meet the target, or None; ties go to the stricter bar."""

    def order(outcome: Outcome) -> tuple[float, float, float]:
        policy = outcome.policy
        bar = policy.bar if isinstance(policy, EvidencePolicy) else 0.0
        if target.kind == "target_speedup":
            return outcome.loss, outcome.cost, -bar
        return outcome.cost, outcome.loss, -bar

    return min((o for o in outcomes if _meets(target, o)), key=order, default=None)


def _meets(target: Target, outcome: Outcome) -> bool:
    if target.kind == "target_speedup":
        return outcome.cost * target.value <= 1 + _ROUNDING
    if target.kind == "max_disagreement":
        return outcome.disagreement <= target.value + _ROUNDING
    if target.kind == "max_risk":
        return outcome.risk is not None and outcome.risk <= target.value + _ROUNDING
    drops = [outcome.drop, *(outcome.class_drops or {}).values()]
    return all(drop is not None and drop <= target.value + _ROUNDING for drop in drops)


def tempered(point: OperatingPoint, table: ExitTable) -> OperatingPoint:
    """The point with temperatures from labelled rows of finite scores."""
    fitted = probabilities.Temperatures.fit(table, point.build_policy())
    return point.model_copy(update={"temperatures": fitted})


def point_of(name: str, target: Target, judge: Judge, chosen: Outcome) -> OperatingPoint:
    """The point of a policy, with the figures it had on the judge's rows."""
    header = judge.table.header.model_dump()
    shared = OperatingPoint.model_fields.keys() & header.keys() - {"schema_version", "offramp"}
    data = {
        **{key: header[key] for key in shared},
        **chosen.to_dict(),
        "name": name,
        "target": target,
        "class_drops": judge.class_drops(chosen.policy),
        "rows_excluded": judge.excluded,
    }
    return parse_document(OperatingPoint, data, "Operating point", PointError)
