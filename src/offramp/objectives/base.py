"""What a training loss is: stages, and a loss per stage from the outputs of all exits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from offramp.exits import ExitOutput

Part = Literal["all", "stock", "exits"]


@dataclass(frozen=True, slots=True)
class Stage:
    """One stretch of training.

    Attributes:
        name: unique within the objective; names the checkpoints of the stage.
        trainable: `all`; the `stock` model alone (exits are then not run, the full-depth
            output is the only one); or the `exits` alone (the stock model is then frozen and
            in evaluation mode).
        share: of the epochs asked for; stages may add up to more than 1.
        rate: times the learning rate asked for of what starts from nothing, such as exits.
        standardised: of the `exits` alone: those that can read what they pool less its mean and
            by its spread, as they learn faster so; these move into their weights afterwards.
        labelled: its loss reads labels.
    """

    name: str
    trainable: Part
    share: float = 1.0
    rate: float = 1.0
    standardised: bool = False
    labelled: bool = True


class Clock(NamedTuple):
    """How far a stage has come; `batch["clock"]` in training, the start elsewhere."""

    step: int = 0
    steps: int = 1
    epoch: int = 0

    @property
    def progress(self) -> float:
        """From 0 to 1."""
        return self.step / max(1, self.steps)


Gradients = Mapping[nn.Parameter, Tensor]
"""Of the parameters that a loss reaches."""


class Objective(nn.Module):
    """A training loss; it may own parameters, which are trained along and not released.

    Attributes:
        learning_rate: of its own parameters, which then have no weight decay; None for the
            rate of what starts from nothing.
        apart: names of the parts of the loss whose gradients `combine` gets by themselves.
        fine_tuned: the stock model has learnt the task already, see `ahead`.
        reads: what the model reads, `text` or `image`.
        spread: of labels that are numbers, their standard deviation over the training rows.
    """

    learning_rate: float | None = None
    apart: tuple[str, ...] = ()
    fine_tuned: bool = False
    reads: str = "text"
    spread: float = 1.0

    def prepare(self, depth: int) -> None:
        """Make what depends on the number of layers; called once, before training."""

    def stages(self) -> Sequence[Stage]:
        return (Stage("joint", "all"),)

    def ahead(self) -> Sequence[Stage]:
        """The stages to run: not those of the stock model alone, where it is fine-tuned."""
        done = self.fine_tuned
        return tuple(stage for stage in self.stages() if not (done and stage.trainable == "stock"))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        """Named parts that add up to the loss.

        Args:
            outputs: one per layer, the last at full depth.
            batch: may hold `labels` and, in a Trainer, a `Clock` as `clock`; `problem_type` is
                always there.
            stage: the running one.
        """
        raise NotImplementedError

    def training_step(
        self, model: nn.Module, inputs: Mapping[str, Tensor], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        """One forward and its losses; objectives with several forwards override this."""
        return self.losses(model(**inputs).exits, batch, stage)

    def combine(
        self, apart: Mapping[str, Gradients], rest: Gradients, model: nn.Module
    ) -> Gradients:
        """The gradient of a step; called only where parts of the loss are `apart`.

        Args:
            apart: the gradients of these parts, by name, over all batches of the step.
            rest: the gradient of the sum of the other parts.
            model: what is trained.
        """
        return added(rest, *apart.values())


def added(*gradients: Gradients) -> Gradients:
    """Their sum; a parameter that a loss does not reach counts as 0 there."""
    total: dict[nn.Parameter, Tensor] = {}
    for found in gradients:
        for parameter, gradient in found.items():
            before = total.get(parameter)
            total[parameter] = gradient if before is None else before + gradient
    return total


def weighted_sum(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Sum of w_i * l_i over sum of w_i."""
    total = sum(w * loss for w, loss in zip(weights, losses, strict=True))
    return total / sum(weights)  # type: ignore[return-value]
