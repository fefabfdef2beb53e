"""What a user asks of an operating point."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from offramp.errors import ConfigError
from offramp.storage import Strict

TargetKind = Literal["target_speedup", "max_drop", "max_disagreement", "max_risk"]
_WORDS = {
    "target_speedup": "cost reduction of at least {:g}x",
    "max_drop": "drop of at most {:g}",
    "max_disagreement": "disagreement of at most {:g}",
    "max_risk": "{risk} of at most {:g}",
}
_RISKS = {"max_drop": "drop", "max_disagreement": "disagreement"}


class Target(Strict):
    """One demand, in the words of `calibrate` and the command line.

    Attributes:
        value: `target_speedup` is a cost reduction (2 = half the FLOPs); `max_drop` is in the
            metric's own unit; `max_disagreement` is a share of rows; `max_risk` is a mean loss.
        per_class: the drop also holds for the recall of every class.
        risk: what `max_risk` is a mean of, see `offramp.calibration.RISKS`.
    """

    kind: TargetKind
    value: float = Field(ge=0)
    per_class: bool = False
    risk: str | None = None

    @classmethod
    def of(
        cls,
        target_speedup: float | None,
        max_drop: float | str | None,
        max_disagreement: float | str | None,
        per_class: bool,
        max_risk: float | str | None = None,
        risk: str | None = None,
    ) -> Self:
        """Exactly one of the four; shares may be written '1%'. Raises ConfigError."""
        asked = {
            "target_speedup": target_speedup,
            "max_drop": max_drop,
            "max_disagreement": max_disagreement,
            "max_risk": max_risk,
        }
        given = {kind: value for kind, value in asked.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"Give exactly one of {', '.join(asked)}; got {', '.join(given) or 'none'}."
            )
        kind, value = next(iter(given.items()))
        if per_class and kind != "max_drop":
            raise ConfigError(f"per_class needs max_drop; it has no meaning with {kind}.")
        if (risk is not None) != (kind == "max_risk"):
            raise ConfigError("max_risk and risk, the name of what it limits, go together.")
        number = _parse_speedup(value) if kind == "target_speedup" else parse_share(value)
        data = {"kind": kind, "value": number, "per_class": per_class, "risk": risk}
        return cls.model_validate(data)

    @property
    def loss(self) -> str | None:
        """Name of the risk whose mean is limited; None for a cost."""
        return self.risk or _RISKS.get(self.kind)

    def __str__(self) -> str:
        words = _WORDS[self.kind].format(self.value, risk=self.risk)
        return words + (" in every class" if self.per_class else "")


def _parse_speedup(value: str | float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 1 < number < math.inf:
        raise ConfigError(f"target_speedup must be above 1, not {value}; 2 halves the cost.")
    return number


def parse_share(text: str | float) -> float:
    """'1%' and '0.01' and 0.01 are 0.01. Raises ConfigError for anything else or below 0."""
    try:
        percent = isinstance(text, str) and text.strip().endswith("%")
        number = float(text.strip()[:-1]) / 100 if percent else float(text)  # type: ignore[union-attr]
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise ConfigError(f"'{text}' is not a share. Write it as '1%' or 0.01.")
    return number
