"""First the stock model alone, then the exits on the frozen model (DeeBERT, section 3.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import task_loss


class TwoStage(Objective):
    """Stage 1: the full-depth loss. Stage 2: the plain sum of the losses of exits 1..L-1."""

    def stages(self) -> Sequence[Stage]:
        return (Stage("stock", "stock"), Stage("exits", "exits"))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        chosen = outputs[-1:] if stage.name == "stock" else outputs[:-1]
        losses = [task_loss(output.scores, labels, kind) for output in chosen]
        return {stage.name: torch.stack(losses).sum()}
