"""First the stock model alone, then exits that learn its answers (FastBERT, section 3.3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import distillation_loss, task_loss


class TeachStudents(Objective):
    """Stage 1: the full-depth loss. Stage 2: the plain sum of the divergences of exits 1..L-1.

    Stage 2 reads no labels. The teacher is in evaluation mode there.

    Args:
        reverse: KL(student || teacher) instead of KL(teacher || student).
    """

    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        self.reverse = reverse

    def stages(self) -> Sequence[Stage]:
        return (Stage("stock", "stock"), Stage("exits", "exits", share=5 / 3, labelled=False))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        *early, full = outputs
        kind = batch["problem_type"]
        if stage.name == "stock":
            return {"stock": task_loss(full.scores, batch["labels"], kind)}
        soft = [distillation_loss(o.scores, full.scores, kind, self.reverse) for o in early]
        return {"exits": torch.stack(soft).sum()}
