"""All exits and the backbone together, deeper exits weighing more (PABEE, equation 6)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives.base import Objective, Stage, weighted_sum
from offramp.objectives.task import task_loss


class DepthWeighted(Objective):
    """sum(i * loss_i) / sum(i) over exit layers i = 1..L."""

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        losses = [task_loss(output.scores, labels, kind) for output in outputs]
        return {"exits": weighted_sum(losses, range(1, len(losses) + 1))}
