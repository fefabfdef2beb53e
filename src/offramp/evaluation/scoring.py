"""Score and cost of a policy on a recorded table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from offramp.calibration import RISKS, OperatingPoint, Outcome, PolicySpec
from offramp.calibration.certificate import Certificate
from offramp.calibration.conformal import Covered, Sets
from offramp.calibration.frontier import fitting_policy
from offramp.calibration.judge import Judge
from offramp.calibration.probabilities import Temperatures, calibration_errors
from offramp.calibration.proving import losses_under
from offramp.policies import Fixed, Full, Policy
from offramp.table import ExitTable


@dataclass(frozen=True, slots=True)
class Promised:
    """What a point's certificate says, and what the rows given lose.

    Attributes:
        claim: the certificate in words.
        limit: the mean loss that it promises.
        loss: the mean loss of these rows; None where it takes labels and there are none.
    """

    claim: str
    limit: float
    loss: float | None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A policy's outcome on a table, beside every exit alone.

    Attributes:
        outcome: score, full-depth score, cost, disagreement and exit histogram of the policy.
        exits: what answering every row after layer 1, 2, ..., depth would give.
        role: of the table.
        sets: how often sets of classes hold the right one; None without such sets or labels.
        calibration_errors: of the probabilities after layer 1, 2, ..., depth, see `ece`; None
            without labels and for regression.
        calibrated_errors: the same with the temperatures of the point; None without these.
        promised: for a point with a certificate.
        rows, rows_excluded: those the figures are of, and those with NaN or infinite scores.
    """

    outcome: Outcome
    exits: tuple[Outcome, ...]
    role: str
    rows: int
    rows_excluded: int = 0
    sets: Covered | None = None
    calibration_errors: tuple[float, ...] | None = None
    calibrated_errors: tuple[float, ...] | None = None
    promised: Promised | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        exits = [
            {
                "layer": layer,
                "score": exit.score,
                "disagreement": exit.disagreement,
                "cost": exit.cost,
                "calibration_error": _of(self.calibration_errors, layer),
                "calibrated_error": _of(self.calibrated_errors, layer),
            }
            for layer, exit in enumerate(self.exits, start=1)
        ]
        return {
            **self.outcome.to_dict(),
            "class_drops": self.outcome.class_drops,
            "exits": exits,
            "role": self.role,
            "rows": self.rows,
            "rows_excluded": self.rows_excluded,
            "sets": self.sets and asdict(self.sets),
            "promised": self.promised and asdict(self.promised),
        }


def _of(errors: tuple[float, ...] | None, layer: int) -> float | None:
    return None if errors is None else errors[layer - 1]


def evaluate(
    table: ExitTable,
    policy: PolicySpec | OperatingPoint,
    metric: str | None = None,
    sets: Sets | None = None,
    temperatures: Temperatures | None = None,
    certificate: Certificate | None = None,
) -> Evaluation:
    """What a policy or operating point does on the rows of a table; nothing is chosen here.

    Rows with scores that are not finite are left out of every figure.

    Args:
        table: of any role; labels are optional.
        policy: a point, a policy, its name, or {"name": ..., its options}.
        metric: a name, see `offramp.metrics.METRICS`; by default the task's own.
        sets, temperatures, certificate: made for this policy; a point has its own.

    Raises:
        PointError: a point that was chosen for another model or way to compute.
    """
    if isinstance(policy, OperatingPoint):
        policy.check(table.header.model_fingerprint, table.header.processor_fingerprint)
        policy.check_engine(table.header.engine, table.header.dtype)
        metric = metric or (policy.metric if table.labels is not None else None)
        sets, temperatures = policy.sets, policy.temperatures
        certificate = policy.certificate
        policy = policy.build_policy()
    policy = fitting_policy(policy, table)
    judge = Judge(table, metric, per_class=table.labels is not None)
    covered = None
    if sets is not None and table.labels is not None:
        covered = Covered.measure(sets, judge.table, policy)
    calibrated = None
    if temperatures is not None:
        calibrated = calibration_errors(judge.table, policy, temperatures)
    return Evaluation(
        outcome=judge.measure(policy),
        exits=tuple(judge.measure(Fixed(layer=layer)) for layer in range(1, table.depth + 1)),
        role=table.header.role,
        rows=judge.table.rows,
        rows_excluded=judge.excluded,
        sets=covered,
        calibration_errors=calibration_errors(judge.table, policy),
        calibrated_errors=calibrated,
        promised=None if certificate is None else _promised(certificate, judge.table, policy),
    )


def _promised(certificate: Certificate, table: ExitTable, policy: Policy) -> Promised:
    """A risk of another program's own is promised here, but not measured."""
    loss = None
    if certificate.risk in RISKS:
        risk = RISKS[certificate.risk]
        if table.labels is not None or not risk.labelled:
            loss = float(losses_under(table, policy, risk).mean())
    claim = certificate.words() if not isinstance(policy, Full) else "Full depth loses nothing."
    return Promised(claim, certificate.limit, loss)
