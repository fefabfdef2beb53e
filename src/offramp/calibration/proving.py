"""Which of many policies are proven to lose little, by rows that they were not chosen on.

Learn then Test (arXiv 2110.01052) along a path that is fixed before the rows of the test are
looked at (Pareto testing, arXiv 2210.07913): the policies that no other beats in both cost and
loss on the rows of the search, safest first. What is not proven is not returned.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from offramp.calibration.bounds import betting, betting_bound, binomial, binomial_bound
from offramp.calibration.certificate import Procedure, Test
from offramp.calibration.judge import Outcome
from offramp.calibration.paired import paired, paired_bound
from offramp.calibration.risks import Risk, losses_of
from offramp.policies import Policy
from offramp.table import ExitTable, replay

Floats = npt.NDArray[np.float64]
STEP = 0.01
P_VALUES = {"binomial": binomial, "paired": paired, "betting": betting}
_BOUNDS = {"binomial": binomial_bound, "paired": paired_bound, "betting": betting_bound}
_FWER = {"fixed_sequence": "fixed_sequence", "holm": "bonferroni_holm", "bonferroni": "bonferroni"}


@dataclass(frozen=True, slots=True)
class Proven:
    """What a test found of the candidates of a path.

    Attributes:
        place: of the fastest candidate that is proven; None where none is.
        estimates: mean loss of each, (candidates,).
        p_values: (candidates,); of the procedure `expectation`, none.
    """

    place: int | None
    estimates: Floats
    p_values: Floats | None


def losses_under(table: ExitTable, policy: Policy, risk: Risk) -> Floats:
    """What each row of a table loses, (rows,)."""
    return losses_of(risk, table, replay(table, policy).answers)


def prove(
    losses: Floats,
    limit: float,
    confidence: float = 0.95,
    procedure: Procedure = "fixed_sequence",
    test: Test = "betting",
) -> Proven:
    """The fastest candidate whose mean loss is proven to be at most `limit`.

    With a chance of at most 1 - confidence, over draws of the rows, a candidate is called proven
    that is not; `expectation` claims less: that the mean over draws is at most `limit`.

    Args:
        losses: (rows, candidates), at most 1, rows in random order, candidates from the safest
            to the fastest; chosen and ordered on other rows.
        confidence: plays no part in `expectation`.
        procedure: `fixed_sequence` tests one after the other, as long as they pass; `holm` and
            `bonferroni` all of them, each more strictly; `expectation` is conformal risk control
            (arXiv 2208.02814) of the most that a row loses up to a candidate, since it is for
            losses that grow from one candidate to the next; gains do not count.
        test: `binomial`, exact for losses of 0 and 1; `paired`, exact for those of -1, 0 and 1; or
            `betting`, for any; `expectation` has none.
    """
    estimates = losses.mean(axis=0)
    if procedure == "expectation":
        passed = _in_expectation(losses, limit)
        return Proven(_last(passed), estimates, None)
    from mapie.risk_control import control_fwer  # takes a second, which few need

    alpha = 1 - confidence
    p_values = P_VALUES[test](losses, limit, alpha)
    return Proven(_last(control_fwer(p_values, alpha, _FWER[procedure])), estimates, p_values)


def bound(losses: Floats, confidence: float, test: Test) -> float:
    """The mean loss of the population is below this with that confidence, for one candidate."""
    return float(_BOUNDS[test](losses, 1 - confidence))


def path_of(outcomes: Sequence[Outcome], limit: float) -> list[Outcome]:
    """Those that no other beats in both cost and safety, from the safest to the fastest.

    Safe is what a test would tell from the limit with few rows: far below it, and alike in all.
    Each saves at least 1% more of full depth than the one before.
    """

    def danger(outcome: Outcome) -> float:
        assert outcome.risk is not None
        assert outcome.spread is not None
        rows = sum(outcome.exit_histogram)
        return (outcome.risk - limit) / math.sqrt(outcome.spread + limit / rows)

    path: list[Outcome] = []
    for outcome in sorted(outcomes, key=lambda one: (danger(one), one.cost)):
        if not path or outcome.cost <= path[-1].cost - STEP:
            path.append(outcome)
    return path


def _in_expectation(losses: Floats, limit: float) -> npt.NDArray[np.intp]:
    """Candidates up to the last whose mean, with one more row of loss 1, is within the limit."""
    # row by row from full depth, which loses 0: a running maximum of the means proves nothing
    most = np.maximum.accumulate(np.maximum(losses, 0), axis=1).sum(axis=0)
    return np.flatnonzero((most + 1) / (len(losses) + 1) <= limit)


def _last(passed: npt.NDArray[np.intp]) -> int | None:
    return int(passed[-1]) if len(passed) else None
