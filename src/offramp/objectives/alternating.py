"""Full depth and all exits in turn, and exits that learn when they are right (BERxiT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from offramp.exits import ExitOutput
from offramp.objectives.base import Clock, Objective, Stage
from offramp.objectives.task import task_loss


class Alternating(Objective):
    """Even steps: the loss of full depth. Odd steps: the plain sum of all, full depth included.

    Where exits have the signal `correct`, its error is added at every step.

    Args:
        as_released: leave full depth out of the odd steps of exits with `correct`, as the
            released code does.
    """

    def __init__(self, as_released: bool = False) -> None:
        super().__init__()
        self.as_released = as_released

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        judged = [output for output in outputs[:-1] if "correct" in output.signals]
        odd = batch.get("clock", Clock()).step % 2 == 1
        chosen = outputs if odd else outputs[-1:]
        if odd and self.as_released and judged:
            chosen = outputs[:-1]
        losses = [task_loss(output.scores, labels, kind) for output in chosen]
        parts = {"exits": torch.stack(losses).sum()}
        if judged:
            parts["correctness"] = correctness_loss(judged, labels, kind)
        return parts


def correctness_loss(
    outputs: Sequence[ExitOutput], labels: Tensor, problem_type: str, unit: float = 1.0
) -> Tensor:
    """Mean squared error of the signal `correct`, over exits and rows; see `rightness`."""
    said = torch.stack([output.signals["correct"].float() for output in outputs])
    right = [rightness(output.scores, labels, problem_type, unit) for output in outputs]
    truth = torch.stack(right)
    return functional.mse_loss(said, truth)


@torch.no_grad()
def rightness(scores: Tensor, labels: Tensor, problem_type: str, unit: float = 1.0) -> Tensor:
    """How right scores (rows, classes) are, (rows,) in 0..1.

    0 or 1 for a class or a whole set of labels; 1 - |tanh((score - label) / unit)| for regression.
    """
    if problem_type == "regression":
        apart = scores.float().squeeze(-1) - labels.float().view(-1)
        return 1 - torch.tanh(apart / unit).abs()
    if problem_type == "multi_label_classification":
        return ((scores > 0) == (labels > 0.5)).all(dim=-1).float()
    return (scores.argmax(dim=-1) == labels).float()
