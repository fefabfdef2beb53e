"""Leave when successive exits agree (PABEE, arXiv 2006.04152, section 3.2).

The counter belongs to the row, never to the batch. It resets to 0 when the answer changes,
so the earliest exit is after layer patience + 1.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from offramp.exits.base import ExitOutput
from offramp.policies.base import POLICIES, EvidencePolicy, State


@POLICIES.register("patience")
class Patience(EvidencePolicy):
    """Leave after `patience` agreements in a row of an exit with the one before.

    Args:
        patience: agreements wanted, at least 1.
        tolerance: for regression: two scores agree when they differ by less than this.
            None compares predicted labels (or label sets, with `multi_label`).
    """

    name = "patience"
    patience: int = Field(default=2, ge=1)
    tolerance: float | None = Field(default=None, ge=0)
    multi_label: bool = False

    @property
    def bar(self) -> float:
        return self.patience - 0.5 if self.tolerance is None else -self.tolerance

    def with_bar(self, bar: float) -> Patience:
        if self.tolerance is None:
            # leaving needs count > bar, so the smallest whole count above it
            return self.model_copy(update={"patience": max(1, int(bar // 1) + 1)})
        return self.model_copy(update={"tolerance": -bar})

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        if self.tolerance is None:
            return self._agreements(state, output.scores)
        return self._steadiness(state, output.scores)

    def _agreements(self, state: State, scores: Tensor) -> tuple[Tensor, State]:
        label = scores > 0 if self.multi_label else scores.argmax(dim=-1)
        if not state:
            count = torch.zeros(scores.shape[0], dtype=torch.int32, device=scores.device)
        else:
            same = label == state["label"]
            same = same.all(dim=-1) if self.multi_label else same
            count = (state["count"] + 1) * same
        return count, {"label": label, "count": count}

    def _steadiness(self, state: State, scores: Tensor) -> tuple[Tensor, State]:
        """Minus the largest of the last `patience` changes between successive exits."""
        if not state:
            shape = (scores.shape[0], self.patience)
            changes = torch.full(shape, torch.inf, device=scores.device)
        else:
            change = (scores - state["score"]).abs().amax(dim=-1, keepdim=True)
            changes = torch.cat((state["changes"][:, 1:], change), dim=1)
        return -changes.amax(dim=-1), {"score": scores, "changes": changes}
