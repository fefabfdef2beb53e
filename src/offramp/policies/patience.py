"""Leave when successive exits agree (PABEE, arXiv 2006.04152, section 3.2).

The counter belongs to the row, never to the batch. It resets to 0 when the answer changes,
so the earliest exit is after layer patience + 1.
"""

from __future__ import annotations

from typing import Self

import torch
from pydantic import Field
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, Policy, State
from offramp.policies.history import LONGEST, answers, remember, same, unknown


@POLICIES.register("patience")
class Patience(EvidencePolicy):
    """Leave after `patience` agreements in a row of an exit with the one before.

    Args:
        patience: agreements wanted, 1 to 1000.
        tolerance: for regression: two scores agree when they differ by less than this.
            None compares predicted labels (or label sets, with `multi_label`).
    """

    name = "patience"
    patience: int = Field(default=2, ge=1, le=LONGEST)
    tolerance: float | None = Field(default=None, ge=0)
    multi_label: bool = False

    @property
    def bar(self) -> float:
        return self.patience - 0.5 if self.tolerance is None else -self.tolerance

    def with_bar(self, bar: float) -> Self:
        if self.tolerance is None:
            # leaving needs count > bar, so the smallest whole count above it
            return self._with(patience=min(max(1, int(bar // 1) + 1), LONGEST))
        return self._with(tolerance=max(-bar, 0.0))

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        if problem_type == "regression":
            longest = min(4, depth - 1)
            return [cls(patience=count, tolerance=0.0) for count in range(1, longest + 1)]
        return [cls(multi_label=problem_type == "multi_label_classification")]

    def check(self, problem_type: str, depth: int) -> None:
        super().check(problem_type, depth)
        if problem_type == "regression" and self.tolerance is None:
            raise ConfigError(
                "Policy 'patience' needs a 'tolerance' for regression: scores that differ by "
                "less than it agree. A tenth of the scores' standard deviation is a start."
            )

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        if self.tolerance is None:
            return self._agreements(state, output.scores)
        return self._steadiness(state, output.scores)

    def _agreements(self, state: State, scores: Tensor) -> tuple[Tensor, State]:
        label = answers(scores, self.multi_label)
        if not state:
            count = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
        else:
            count = (state["count"] + 1) * same(label, state["label"])
        return count, {"label": label, "count": count}

    def _steadiness(self, state: State, scores: Tensor) -> tuple[Tensor, State]:
        """Minus the largest of the last `patience` changes between successive exits."""
        if not state:
            changes = unknown(scores, self.patience, torch.inf)
        else:
            change = (scores - state["score"]).abs().amax(dim=-1)
            changes = remember(state["changes"], change)
        return -changes.amax(dim=-1), {"score": scores, "changes": changes}
