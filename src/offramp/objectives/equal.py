"""All exits and the backbone together, each exit weighing the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage
from offramp.objectives.task import task_loss


class EqualWeights(Objective):
    """The mean of the losses of exit layers 1..L."""

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        losses = [task_loss(output.scores, labels, kind) for output in outputs]
        return {"exits": torch.stack(losses).mean()}
