"""All exits together, and imitations of layers that were not run yet (GPFEE)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Clock, Stage
from offramp.objectives.joint import DepthWeighted


class Imitating(DepthWeighted):
    """(sum(i * loss_i) / sum(i) + imitation) / 2, see `imitation_loss`.

    Without the signals of exits of kind `imitating` only the first half is left.

    Args:
        detached: gradients stop below each of the first so many layers, each time with
            probability 1 - progress of training; 0 for never.
    """

    def __init__(self, detached: int = 0) -> None:
        super().__init__()
        if detached < 0:
            raise ConfigError(f"detached is {detached}. Give a number of layers from 0.")
        self.detached = detached

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        parts = {"exits": super().losses(outputs, batch, stage)["exits"] / 2}
        if all("state" in output.signals for output in outputs):
            parts["imitation"] = imitation_loss(outputs) / 2
        return parts

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Tensor], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        if not self.detached:
            return super().training_step(model, inputs, batch, stage)
        kept = 1 - batch.get("clock", Clock()).progress
        cut = (torch.rand(self.detached) < kept).tolist()
        return self.losses(_all_exits(model, inputs, cut), batch, stage)


def _all_exits(model: Any, inputs: Mapping[str, Tensor], cut: Sequence[bool]) -> list[ExitOutput]:
    """`model.all_exits` with no gradient below the layers that are cut."""
    outputs: list[ExitOutput] = []
    carry, flow = None, model.backbone.embed(inputs)
    for layer in range(1, model.depth + 1):
        flow = model.backbone.layer(layer, flow)
        if layer <= len(cut) and cut[layer - 1]:
            flow = flow._replace(hidden=flow.hidden.detach())
        output, carry = model.exit_at(layer)(flow.hidden, flow.mask, carry)
        outputs.append(output)
    return outputs


def imitation_loss(outputs: Sequence[ExitOutput]) -> Tensor:
    """1 - cosine of imitated and true states, the mean over k and rows, then over exits.

    The true states get no gradient.
    """
    states = torch.stack([output.signals["state"].detach() for output in outputs], dim=1).float()
    losses = [
        1 - functional.cosine_similarity(o.signals["imitated"].float(), states[:, i:], dim=-1)
        for i, o in enumerate(outputs[:-1], start=1)
    ]
    return torch.stack([loss.mean() for loss in losses]).mean()
