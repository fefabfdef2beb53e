"""Early exits that gain weight as training goes on (Shallow-Deep Networks, arXiv 1810.07052)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Clock, Objective, Stage
from offramp.objectives.task import task_loss


class GrowingWeights(Objective):
    """loss_L + sum_i tau_i loss_i over exits i = 1..L-1.

    tau_i = min(c_i, start + progress * c_i), where progress goes from 0 to 1 and c_i is what exit
    i costs of full depth: i / L, as all layers are taken to be alike.

    Args:
        start: the weight of every exit at first, until c_i holds it down.

    Raises:
        ConfigError: start is not between 0 and 1.
    """

    def __init__(self, start: float = 0.01) -> None:
        super().__init__()
        if not 0 <= start <= 1:
            raise ConfigError(f"start is {start}. Give a weight from 0 to 1.")
        self.start = start

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        *early, full = [task_loss(output.scores, labels, kind) for output in outputs]
        weights = self.weights(len(outputs), batch.get("clock", Clock()).progress)
        exits = [weight * loss for weight, loss in zip(weights, early, strict=True)]
        return {"full": full, "exits": torch.stack(exits).sum()}

    def weights(self, depth: int, progress: float) -> list[float]:
        """tau_1 .. tau_(L-1)."""
        costs = [layer / depth for layer in range(1, depth)]
        return [min(cost, self.start + progress * cost) for cost in costs]
