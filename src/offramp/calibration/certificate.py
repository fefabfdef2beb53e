"""What a point promises: a mean loss below a limit, with a confidence, on rows of a population."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from offramp.calibration.risks import RISKS
from offramp.storage import Strict

Procedure = Literal["fixed_sequence", "holm", "bonferroni", "expectation"]
Test = Literal["binomial", "paired", "betting", "mean"]


class Certificate(Strict):
    """A claim on rows like those it was made on, stored with an operating point.

    Attributes:
        risk: name of what a row may lose, see `offramp.calibration.RISKS`.
        limit: the mean loss that is not exceeded.
        confidence: that the claim holds; None where `limit` holds on average over the draws of
            such rows (procedure `expectation`), and not for this one.
        procedure: over the candidates, see `certify`.
        test: of one candidate.
        rows: that it rests on; nothing was chosen on these but by the procedure.
        repeated: of them, those beyond the first of an equal input.
        estimate: mean loss on these rows.
        bound: the mean loss of the population is below this with `confidence`, if this point
            alone had been tested; None without a confidence.
        tested: candidates of the procedure.
        seed: of the order of the rows, on which the test `betting` depends.
        faster_after, withdrawn_after: so many of the rows, had they been planted or mislabelled,
            would have given a faster point, or taken this one away; fewer may do, see `Influence`.
        population: fingerprint of the rows.
        searched: fingerprint of the rows that the policy was searched on.
        seal: fingerprint of all this and of what it is said of, see `OperatingPoint`.
    """

    risk: str
    limit: Annotated[float, Field(gt=0, lt=1)]
    confidence: Annotated[float, Field(gt=0, lt=1)] | None
    procedure: Procedure
    test: Test
    rows: int = Field(ge=1)
    repeated: int = Field(default=0, ge=0)
    estimate: float = Field(ge=-1, le=1)
    bound: Annotated[float, Field(ge=-1, le=1)] | None
    tested: int = Field(ge=1)
    seed: int = Field(ge=0)
    faster_after: int | None = None
    withdrawn_after: int | None = None
    population: str
    searched: str | None = None
    seal: str = ""

    def hangs_on(self) -> str | None:
        """How few rows would have moved the choice, in one sentence."""
        ways = [
            f"{count:,} of these {self.rows:,} rows ({count / self.rows:.1%}) been planted or "
            f"mislabelled to look {how}, {then} have been chosen"
            for count, how, then in (
                (self.faster_after, "harmless", "a faster point would"),
                (self.withdrawn_after, "harmful", "this one would not"),
            )
            if count is not None
        ]
        return f"Had {'; had '.join(ways)}: know where they come from." if ways else None

    def words(self) -> str:
        """The claim in one sentence, with what it rests on."""
        what = RISKS[self.risk].words if self.risk in RISKS else self.risk
        if self.confidence is None:
            return (
                f"On average over draws of {self.rows:,} rows: {what}, at most "
                f"{percent(self.limit)}; nothing is guaranteed for this draw "
                f"({self.estimate:.2%} on these rows)."
            )
        alike = "" if not self.repeated else f" and repeat as often ({self.repeated:,} of them did)"
        return (
            f"Guaranteed with {percent(self.confidence)} confidence: {what}, at most "
            f"{percent(self.limit)}, from {self.rows:,} rows ({self.estimate:.2%} on these), "
            f"while the rows to come are like those{alike}, population {self.population[:8]}."
        )


def percent(share: float) -> str:
    """'5%', '0.125%': all digits, since a promise is not rounded."""
    return f"{100 * share:.10g}%"


def rows_needed(limit: float, confidence: float, estimate: float, spread: float) -> int:
    """About how many rows certify a mean loss of `estimate`.

    Args:
        estimate: mean loss; not below the limit can never be certified, so half of it is taken.
        spread: variance of the losses.
    """
    surely = math.log(1 / (1 - confidence))
    fewest = surely / -math.log1p(-limit)  # where no row loses
    gap = limit - min(estimate, limit / 2)
    return math.ceil(max(fewest, 2 * surely * max(spread, limit * (1 - limit) / 2) / gap**2))


def rows_on_average(limit: float, estimate: float) -> int:
    """About how many rows hold a mean loss of `estimate` below the limit on average over draws.

    There one more row counts as lost, see `prove`; otherwise as `rows_needed`.
    """
    return math.ceil(round((1 - limit) / (limit - min(estimate, limit / 2)), 9))
