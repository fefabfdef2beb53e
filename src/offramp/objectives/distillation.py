"""Exits learn the frozen model's own answers; no labels needed, used when there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage, weighted_sum
from offramp.objectives.task import distillation_loss, task_loss


class SelfDistillation(Objective):
    """Depth-weighted divergence of each exit from full depth, plus the task loss.

    Args:
        label_weight: weight of the task loss against labels, where a batch has them.
    """

    def __init__(self, label_weight: float = 0.5) -> None:
        super().__init__()
        self.label_weight = label_weight

    def stages(self) -> Sequence[Stage]:
        return (Stage("exits", "exits"),)

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        *early, full = outputs
        kind, labels = batch["problem_type"], batch.get("labels")
        weights = range(1, len(early) + 1)
        soft = [distillation_loss(output.scores, full.scores, kind) for output in early]
        parts = {"distillation": weighted_sum(soft, weights)}
        if labels is not None:
            hard = [task_loss(output.scores, labels, kind) for output in early]
            parts["task"] = self.label_weight * weighted_sum(hard, weights)
        return parts
