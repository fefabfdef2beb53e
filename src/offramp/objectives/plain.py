"""The stock model alone: an ordinary fine-tune, the reference that early exit is held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import task_loss


class FullDepth(Objective):
    """The task loss of the full-depth answer."""

    def stages(self) -> Sequence[Stage]:
        return (Stage("stock", "stock"),)

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        return {"stock": task_loss(outputs[-1].scores, batch["labels"], batch["problem_type"])}
