"""A fine-tune, then all exits together, each row weighing most where it would leave.

The objective of the method `auto`: the weights of COSEE without its calibration, for every task.
Of images, exits learn alone first and last (measured: docs/results/auto.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.alternating import correctness_loss
from offramp.objectives.base import Clock, Stage
from offramp.objectives.distillation import SelfDistillation
from offramp.objectives.simulated import SimulatedExits, doubt
from offramp.objectives.task import row_losses


class Auto(SimulatedExits):
    """`SimulatedExits` from a fine-tuned start, with entropy for doubt.

    A set of labels is as doubtful as its least sure label. A number is as doubtful as its exit
    says that it is, by the signal `correct`, whose error is added (see `Alternating`; how wrong is
    measured in spreads of the labels); exits without one weigh by their depth, as PABEE's do.

    Args:
        warm_up: share of the epochs that fine-tune the stock model first, unless it is
            fine-tuned already.
        exits_first: share of the epochs after that in which the exits of a model that reads
            images learn alone, ten times as fast, from labels and from full depth.
        exits_last: the same at the end, from a model that has learnt what exits need.
        rate: of the exits, times the rate that new heads have, see `Stage`.
        thresholds, sharpness: see `SimulatedExits`.
    """

    def __init__(
        self,
        warm_up: float = 0.5,
        exits_first: float = 0.25,
        exits_last: float = 0.25,
        rate: float = 3.0,
        thresholds: int = 5,
        sharpness: float = 1.0,
    ) -> None:
        super().__init__("entropy", thresholds, sharpness, calibration=0.0)
        alone = min(exits_first, exits_last) >= 0 and exits_first + exits_last < 1
        if not (0 <= warm_up < 1 and alone and rate > 0):
            raise ConfigError(
                f"warm_up is {warm_up}, exits_first {exits_first}, exits_last {exits_last} and "
                f"rate {rate}. Give shares of at least 0 that leave some for exits and model "
                "together, and a rate above 0."
            )
        self.warm_up, self.rate = warm_up, rate
        self.exits_first, self.exits_last = exits_first, exits_last
        self._alone = SelfDistillation()

    def stages(self) -> Sequence[Stage]:
        warm_up = 0.0 if self.fine_tuned else self.warm_up
        alone = 1 - warm_up if self.reads == "image" else 0.0
        first, last = alone * self.exits_first, alone * self.exits_last
        stages = (
            Stage("stock", "stock", warm_up),
            Stage("exits", "exits", first, rate=10.0, standardised=True),
            Stage("joint", "all", 1 - warm_up - first - last, rate=self.rate),
            Stage("last", "exits", last, rate=10.0, standardised=True),
        )
        return tuple(stage for stage in stages if stage.share)

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        if stage.trainable == "exits":
            return self._alone.losses(outputs, batch, stage)
        labels, kind = batch["labels"], batch["problem_type"]
        losses = torch.stack([row_losses(o.scores, labels, kind) for o in outputs], dim=1)
        if len(outputs) == 1 or stage.trainable == "stock":
            return {"exits": losses[:, -1].mean()}
        early = outputs[:-1]
        judged = kind == "regression" and all("correct" in output.signals for output in early)
        if kind == "regression" and not judged:
            weights = by_depth(len(outputs), losses.device)
        else:
            doubts = torch.stack([_doubt(output, kind) for output in early], dim=1).detach()
            weights = self.weights(doubts, batch.get("clock", Clock()))
        parts = {"exits": (weights * losses).sum(dim=-1).mean()}
        if judged:
            parts["correctness"] = correctness_loss(early, labels, kind, self.spread)
        return parts


def by_depth(depth: int, device: torch.device) -> Tensor:
    """1, 2, ..., L over their sum, (L,)."""
    layers = torch.arange(1, depth + 1, device=device).float()
    return layers / layers.sum()


def _doubt(output: ExitOutput, kind: str) -> Tensor:
    """Of an exit, (rows,)."""
    scores = output.scores
    if kind == "regression":
        return 1 - output.signals["correct"].float()
    if kind != "multi_label_classification":
        return doubt(scores, "entropy")
    asked = torch.stack((torch.zeros_like(scores), scores), dim=-1)
    return doubt(asked, "entropy").amax(dim=-1)
