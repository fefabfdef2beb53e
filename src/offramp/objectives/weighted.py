"""All exits together, with weights that are learned along (ELBERT, arXiv 2107.00175)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import task_loss


class LearnedWeights(Objective):
    """sum(w_i * loss_i) with w_i = sigmoid(t_i) for exits 1..L-1 and w_L = L - sum of the others.

    Exits that do worse than full depth lose weight to it; the weights always add up to L.

    Args:
        equal: all weights stay 1.
        start: every t_i at first.
        learning_rate: of t.
    """

    def __init__(
        self, equal: bool = False, start: float = 4.0, learning_rate: float = 1e-2
    ) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise ConfigError(f"learning_rate is {learning_rate}. Give one above 0.")
        self.equal = equal
        self.start = start
        self.learning_rate = learning_rate
        self.raw: nn.Parameter | None = None

    def prepare(self, depth: int) -> None:
        if not self.equal:
            self.raw = nn.Parameter(torch.full((depth - 1,), self.start))

    def weights(self, depth: int) -> Tensor:
        """Of exits 1..L, (L,). Raises ConfigError unless `prepare` was called for this depth."""
        if self.equal:
            return torch.ones(depth)
        if self.raw is None or len(self.raw) != depth - 1:
            raise ConfigError(f"Call prepare({depth}) on LearnedWeights before it is used.")
        early = torch.sigmoid(self.raw)
        return torch.cat((early, depth - early.sum(dim=0, keepdim=True)))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        losses = torch.stack([task_loss(output.scores, labels, kind) for output in outputs])
        return {"exits": self.weights(len(outputs)).to(losses.device) @ losses}
