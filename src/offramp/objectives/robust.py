"""Everything at once, early exits learning from the last without pulling against it (RomeBERT)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Gradients, Objective, Stage, added
from offramp.objectives.task import distillation_loss, task_loss

LAST = "last"


class RobustExits(Objective):
    """The full-depth loss, and for each exit labels and full depth's answers (arXiv 2101.09755).

    loss_L + sum over i < L of (1 - gamma) * loss_i + gamma * T^2 * KL(full depth || exit i), both
    softened by T. Where the gradients of the two sums point against each other over the weight
    matrices of the layers, one is projected on the plane across the other before they are added.

    Args:
        temperature: T.
        gamma: the share of distillation.
        reduction: `batchmean` sums the divergence over classes, as the formula does; `mean`
            averages it over them, as the released code does.
        reference: whose gradient stays as it is: that of the `exits`, as in the paper and for
            most of its tasks, or that of the `last` layer, as released for MNLI and QQP. None
            adds them as they are.
    """

    def __init__(
        self,
        temperature: float = 3.0,
        gamma: float = 0.9,
        reduction: Literal["batchmean", "mean"] = "batchmean",
        reference: Literal["exits", "last"] | None = "exits",
    ) -> None:
        super().__init__()
        if not (temperature > 0 and 0 <= gamma <= 1):
            raise ConfigError(
                f"temperature is {temperature} and gamma is {gamma}. Give a temperature above 0, "
                "and a gamma from 0 to 1."
            )
        self.temperature = temperature
        self.gamma = gamma
        self.reduction = reduction
        self.reference = reference
        self.apart = () if reference is None else (LAST,)

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        *early, full = outputs
        labels, kind = batch["labels"], batch["problem_type"]
        hard = torch.stack([task_loss(output.scores, labels, kind) for output in early])
        soft = torch.stack([self._divergence(o.scores, full.scores, kind) for o in early])
        return {
            LAST: task_loss(full.scores, labels, kind),
            "labels": (1 - self.gamma) * hard.sum(),
            "distillation": self.gamma * soft.sum(),
        }

    def _divergence(self, scores: Tensor, teacher: Tensor, kind: str) -> Tensor:
        softness = self.temperature
        loss = softness**2 * distillation_loss(scores / softness, teacher / softness, kind)
        by_class = self.reduction == "mean" and kind == "single_label_classification"
        return loss / scores.shape[-1] if by_class else loss

    def combine(
        self, apart: Mapping[str, Gradients], rest: Gradients, model: nn.Module
    ) -> Gradients:
        last, exits = apart[LAST], rest
        matrices: Any = model.backbone.layers  # type: ignore[union-attr]
        # layer L drops out: only the last loss reaches it
        met = [p for p in matrices.parameters() if p.ndim > 1 and p in last and p in exits]
        if self.reference == "exits":
            return added(exits, _across(last, exits, met))
        return added(last, _across(exits, last, met))


def _across(
    gradient: Gradients, reference: Gradients, parameters: Sequence[nn.Parameter]
) -> Gradients:
    """`gradient` without its part against `reference`, both seen over `parameters` alone."""
    product = inner(gradient, reference, parameters)
    if product >= 0:
        return gradient
    factor = product / inner(reference, reference, parameters)
    return {**gradient, **{p: gradient[p] - factor * reference[p] for p in parameters}}


def inner(one: Gradients, other: Gradients, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Inner product of two gradients over `parameters`."""
    products = ((one[p] * other[p]).sum(dtype=torch.float64) for p in parameters)
    return sum(products, torch.zeros((), dtype=torch.float64))
