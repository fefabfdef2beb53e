"""What a user asks of an operating point."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field

from offramp.errors import ConfigError
from offramp.storage import Strict

TargetKind = Literal["target_speedup", "max_drop", "max_disagreement"]
_WORDS = {
    "target_speedup": "cost reduction of at least {:g}x",
    "max_drop": "drop of at most {:g}",
    "max_disagreement": "disagreement of at most {:g}",
}


class Target(Strict):
    """One demand, in the words of `calibrate` and the command line.

    Attributes:
        value: `target_speedup` is a cost reduction (2 = half the FLOPs); `max_drop` is in the
            metric's own unit; `max_disagreement` is a share of rows.
        per_class: the drop also holds for the recall of every class.
    """

    kind: TargetKind
    value: float = Field(ge=0)
    per_class: bool = False

    @classmethod
    def of(
        cls,
        target_speedup: float | None,
        max_drop: float | str | None,
        max_disagreement: float | str | None,
        per_class: bool,
    ) -> Self:
        """Exactly one of the three; shares may be written '1%'. Raises ConfigError."""
        asked = {
            "target_speedup": target_speedup,
            "max_drop": max_drop,
            "max_disagreement": max_disagreement,
        }
        given = {kind: value for kind, value in asked.items() if value is not None}
        if len(given) != 1:
            raise ConfigError(
                f"Give exactly one of {', '.join(asked)}; got {', '.join(given) or 'none'}."
            )
        kind, value = next(iter(given.items()))
        if per_class and kind != "max_drop":
            raise ConfigError(f"per_class needs max_drop; it has no meaning with {kind}.")
        number = parse_share(value)
        if kind == "target_speedup" and number <= 1:
            raise ConfigError(f"target_speedup must be above 1, not {number:g}; 2 halves the cost.")
        return cls.model_validate({"kind": kind, "value": number, "per_class": per_class})

    def __str__(self) -> str:
        return _WORDS[self.kind].format(self.value) + (" in every class" if self.per_class else "")


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
