"""What an attack came to: `attack.json`."""

from __future__ import annotations

from typing import Any, Literal

from offramp.attacks.figures import Attacked
from offramp.storage import Strict


class Tried(Strict):
    """One attack.

    Attributes:
        queries: inputs run through all layers, for each row; a gradient counts as one.
        words_changed: mean number; None where no words are.
        full_score: of full depth on the changed rows.
    """

    name: str
    options: dict[str, Any]
    queries: float
    words_changed: float | None
    full_score: float | None


class AttackReport(Strict):
    """Attacks and what they did to policies.

    Attributes:
        target_speedup: cost reduction of each policy on the rows as they are, as near as its bars
            allow.
        max_depth: the budget in layers.
        full_score: of full depth on the rows as they are.
        policies: each policy under each attack.
    """

    schema_version: Literal[1] = 1
    model_fingerprint: str
    data_fingerprint: str
    depth: int
    rows: int
    target_speedup: float
    max_depth: int
    metric: str | None
    full_score: float | None
    attacks: tuple[Tried, ...]
    policies: tuple[Attacked, ...]
