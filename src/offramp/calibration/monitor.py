"""Does a promise still hold? Some rows also run to full depth, and their losses are bet on.

The bets are against 'the mean loss is at most the limit' (Waudby-Smith and Ramdas, arXiv
2010.09686). What has been won is at most 1 on average while that is true, however long one looks,
so by Ville's inequality it reaches 1 / level with a chance of at most `level` (an e-process). A
part of the money is kept back and bet bit by bit: early luck must not be needed where things turn
bad late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from scipy.optimize import brentq
from scipy.special import betaln, xlog1py, xlogy

from offramp.calibration.bounds import binomial_bound
from offramp.calibration.certificate import Certificate
from offramp.calibration.point import OperatingPoint
from offramp.calibration.risks import RISKS
from offramp.errors import ConfigError, PointError
from offramp.storage import Strict, read_document, write_document

BETS = 16
PATIENCE = 2000
"""Audited rows until half of the money that is kept back is bet."""
WINDOW = 1000
"""Rows of the exit histogram that is compared with that of the point."""
DRIFTED = 0.25
"""Of `Monitor.drift`, from which, by custom, rows are others than those of the point."""
ROUGH = 3
"""Times the mean drift of rows that are like them: few of those make it large by chance."""
Money = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
_RICH = 1e300


class Monitor(Strict):
    """What has been seen of a point's rows so far; a document that survives restarts.

    Attributes:
        point: name of the operating point.
        seal: fingerprint of what the point is for, see `OperatingPoint.seal`.
        risk: of audited rows; one that needs no labels.
        limit: the mean loss that is not to be exceeded.
        promised: whether the point's certificate says so; else its rows leave no more open.
        level: chance of a false alarm, ever.
        expected, rows: share of rows that leave after each layer, on so many of the point's.
        audited, lost: rows that also ran to full depth, and the sum of their losses.
        reserve, bets: money kept back, and on each bet; 1 in all at the start.
        most: the most money there ever was.
        alarm_at: audited rows at the alarm; None while there was none.
        recent: exit layers of the last rows.
    """

    schema_version: Literal[1] = 1
    point: str
    seal: str
    risk: str
    limit: float = Field(gt=0, lt=1)
    level: float = Field(gt=0, lt=1)
    expected: Annotated[tuple[Share, ...], Field(min_length=1)]
    rows: int = Field(default=WINDOW, ge=1)
    promised: bool = True
    audited: int = Field(default=0, ge=0)
    lost: float = Field(default=0.0, ge=0)
    reserve: Money = 1.0
    bets: Annotated[tuple[Money, ...], Field(min_length=BETS, max_length=BETS)] = (0.0,) * BETS
    most: Money = 1.0
    alarm_at: int | None = None
    recent: Annotated[tuple[int, ...], Field(max_length=WINDOW)] = ()

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if not all(1 <= layer <= len(self.expected) for layer in self.recent):
            raise ValueError("recent exit layers do not fit depth")
        money = self.reserve + sum(self.bets)
        alarmed = self.most >= 1 / self.level
        # what is kept back hangs on the count alone
        kept_back = math.isclose(self.reserve, PATIENCE / (PATIENCE + self.audited), rel_tol=1e-6)
        fits = self.lost <= self.audited and kept_back and money <= self.most * 1.001
        if alarmed != self.alarmed or not fits:
            raise ValueError("what was bet, won and lost do not fit each other")
        return self

    @classmethod
    def of(cls, point: OperatingPoint, level: float = 0.05) -> Self:
        """Watch a point: its promise where no labels are needed for it, else its disagreement.

        The latter may then be what the point's rows leave open, with 99% confidence.
        """
        if not 0 < level < 1:
            raise ConfigError(f"A level of {level:g} is no chance. Write 5% or 0.05.")
        risk, limit, promised = _watched(point)
        shares = np.array(point.exit_histogram) / point.rows
        return cls(
            point=point.name,
            seal=point.seal(),
            risk=risk,
            limit=limit,
            level=level,
            expected=tuple(shares.tolist()),
            rows=point.rows,
            promised=promised,
        )

    @classmethod
    def load(cls, path: str | Path, point: OperatingPoint) -> Self:
        """Go on from a file. Raises PointError for one of another point."""
        found = read_document(cls, Path(path), PointError)
        wanted = cls.of(point, found.level)
        fixed = ("seal", "risk", "promised", "expected", "rows")
        same = all(getattr(found, name) == getattr(wanted, name) for name in fixed)
        if not same or not math.isclose(found.limit, wanted.limit, rel_tol=1e-6):
            raise PointError(
                f"{path}: watches another point than '{point.name}' as it is now. Give another "
                "file, or delete this one to begin anew."
            )
        return found

    def save(self, path: str | Path) -> None:
        """Write what has been seen, whole or not at all."""
        write_document(Path(path), self)

    @property
    def alarmed(self) -> bool:
        """Whether the losses of audited rows say that the limit is exceeded."""
        return self.alarm_at is not None

    @property
    def estimate(self) -> float | None:
        """Mean loss of the audited rows; None before the first."""
        return self.lost / self.audited if self.audited else None

    @property
    def interval(self) -> tuple[float, float]:
        """Where the mean loss of rows lies with a chance of 1 - `level`, however often one looks.

        A mean is left out once bets against it, on all other means at once, have won 1 / level:
        the product of (t / m)^loss ((1 - t) / (1 - m))^(1 - loss), uniform over t, is 1 at most on
        average where losses from 0 to 1 have the mean m: a beta-binomial mixture, arXiv 1810.08240.
        It is for one mean all the way: after a change it is that of all audited rows.
        """
        lost, kept = self.lost, self.audited - self.lost
        if not self.audited:
            return 0.0, 1.0

        def won(mean: float) -> float:
            """In logarithms, beyond what leaves a mean out."""
            bets = betaln(lost + 1, kept + 1) - xlogy(lost, mean) - xlog1py(kept, -mean)
            return float(bets + math.log(self.level))

        here = lost / self.audited
        low = brentq(won, 0.0, here) if lost > 0 and won(0.0) > 0 else 0.0
        high = brentq(won, here, 1.0) if kept > 0 and won(1.0) > 0 else 1.0
        return low, high

    @property
    def drift(self) -> float | None:
        """Population stability index of recent exit layers; None while there are few.

        An early warning without a guarantee, see `drifted`.
        """
        if len(self.recent) < WINDOW:
            return None
        seen = np.bincount(self.recent, minlength=len(self.expected) + 1)[1:] + 0.5
        shares = seen / seen.sum()
        expected = np.array(self.expected) + 0.5 / self.rows
        expected /= expected.sum()
        return float(((shares - expected) * np.log(shares / expected)).sum())

    @property
    def drifted(self) -> bool:
        """Whether the drift is more than that of rows like the point's own, of which few make
        their shares rough: a multiple of its mean there, which is that of a chi-square."""
        usual = (len(self.expected) - 1) * (1 / self.rows + 1 / WINDOW)
        return self.drift is not None and self.drift > max(DRIFTED, ROUGH * usual)

    def after(self, losses: Sequence[float] = (), exit_layers: Sequence[int] = ()) -> Self:
        """What is known after some more rows.

        Args:
            losses: of audited rows, in the order they came.
            exit_layers: of all rows, audited or not.
        """
        money, stakes = np.array(self.bets), _stakes(self.limit)
        reserve, most, alarm_at = self.reserve, self.most, self.alarm_at
        for count, loss in enumerate(losses, start=self.audited + 1):
            bet = reserve / (PATIENCE + count)
            money = (money + bet / BETS) * (1 + stakes * (loss - self.limit))
            money = np.minimum(money, _RICH)
            reserve -= bet
            most = max(most, reserve + float(money.sum()))
            if alarm_at is None and most >= 1 / self.level:
                alarm_at = count
        kept = (*self.recent, *exit_layers)[-WINDOW:]
        change = {
            "audited": self.audited + len(losses),
            "lost": self.lost + math.fsum(losses),
            "reserve": reserve,
            "bets": tuple(money.tolist()),
            "most": most,
            "alarm_at": alarm_at,
            "recent": tuple(int(layer) for layer in kept),
        }
        return self.model_copy(update=change)

    def words(self) -> str:
        """One sentence: what was seen, and what it means."""
        if self.estimate is None:
            return f"Point '{self.point}': no row was audited yet."
        what = RISKS[self.risk].words if self.risk in RISKS else self.risk
        low, high = self.interval
        seen = f"{what}: {self.estimate:.2%} of {self.audited:,} audited rows"
        seen += f" ({low:.2%} to {high:.2%})"
        if self.alarmed and not self.promised:
            return (
                f"Point '{self.point}' is no longer what it was: {seen}, and the rows that it was "
                f"chosen on leave at most {self.limit:.2%} open. Calibrate on rows of today."
            )
        if self.alarmed:
            return (
                f"Point '{self.point}' no longer holds: {seen}, and the limit is "
                f"{self.limit:.2%}. Calibrate on rows of today."
            )
        if self.estimate > self.limit:
            return (
                f"Point '{self.point}': {seen}, above the limit of {self.limit:.2%}, which is "
                "not proven yet."
            )
        return f"Point '{self.point}': {seen}, within the limit of {self.limit:.2%}."


def _watched(point: OperatingPoint) -> tuple[str, float, bool]:
    """What can be seen without labels, its limit, and whether that is promised."""
    promised = point.certificate
    if isinstance(promised, Certificate) and promised.confidence is not None:
        if promised.risk not in RISKS:
            raise ConfigError(
                f"Point '{point.name}' promises the risk '{promised.risk}', which nothing here "
                "has registered. Import or install what does."
            )
        risk = RISKS[promised.risk]
        if not risk.labelled and risk.lowest >= 0:  # a gain could cost a bet more than there is
            return risk.name, promised.limit, True
    if point.problem_type == "regression":
        raise ConfigError(
            "Of regression nothing is watched but the promise of a risk that needs no labels, and "
            f"point '{point.name}' makes none. Register such a risk and promise it."
        )
    others = round(point.disagreement * point.rows)
    losses = np.zeros(point.rows)
    losses[:others] = 1
    return "disagreement", min(float(binomial_bound(losses, 0.01)), 0.99), False


def _stakes(limit: float) -> npt.NDArray[np.float64]:
    """The bets that win most if losses of 1 are really 1.5 to 10 times as frequent."""
    rates = np.minimum(limit * np.geomspace(1.5, 10, BETS), 0.99)
    return np.maximum(rates - limit, 0) / (limit * (1 - limit))
