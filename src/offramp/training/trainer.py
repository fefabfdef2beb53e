"""transformers' Trainer, taught one thing: the loss is an objective's, over all exits."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from offramp.errors import NonFiniteError
from offramp.objectives import Clock, Objective, Stage
from offramp.training.batches import LengthGrouped
from offramp.training.gradients import KeptApart

logger = logging.getLogger("offramp")


class Trainee(nn.Module):
    """What one stage trains: a model and its objective, as one module with one set of weights.

    Args:
        model: called with the batch, gives an object whose `exits` is the outputs of all exits.
        objective: its parameters are trained along.
        stage: decides which part learns; the rest is frozen and in evaluation mode.
        problem_type: as in transformers.
    """

    def __init__(
        self, model: nn.Module, objective: Objective, stage: Stage, problem_type: str
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.stage = stage
        self.problem_type = problem_type
        self.clock = Clock()
        for part in self._frozen():
            part.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        """Parts that this stage leaves alone."""
        learns_exits_only = self.stage.trainable == "exits"
        stock = getattr(self.model, "stock", None)
        return [stock] if learns_exits_only and stock is not None else []

    def train(self, mode: bool = True) -> Trainee:
        super().train(mode)
        for part in self._frozen():
            part.eval()
        return self

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Named parts of the loss."""
        context: dict[str, Any] = {"problem_type": self.problem_type, "clock": self.clock}
        if "labels" in batch:
            context["labels"] = batch.pop("labels")
        return self.objective.training_step(self.model, batch, context, self.stage)


class ExitTrainer(Trainer):
    """Trains a `Trainee`.

    Args:
        trainee: model, objective and stage.
        lengths: of the rows of `train_dataset`, to group them by.
        head_learning_rate: of the parameters in `fresh`; None for one rate.
        fresh: names of parameters that start from nothing.
        options: passed on to transformers' Trainer.
    """

    loss_is_scaled_for_ga = False

    def __init__(
        self,
        trainee: Trainee,
        lengths: Tensor,
        head_learning_rate: float | None = None,
        fresh: frozenset[str] = frozenset(),
        **options: Any,
    ) -> None:
        super().__init__(model=trainee, **options)
        self.model_accepts_loss_kwargs = False
        self._head_learning_rate = head_learning_rate
        self._fresh = fresh
        self._order = LengthGrouped(lengths, self._rows_per_update(), self.args.seed)
        self._parts: dict[str, Tensor] = {}
        self._batches = 0
        self._apart = KeptApart()
        self.remove_callback(PrinterCallback)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(_Bar())
        self.add_callback(_SetEpoch(self._order))

    def _rows_per_update(self) -> int:
        return int(self.args.train_batch_size * self.args.world_size)

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        return self._order

    def training_step(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """As transformers', or with gradients of parts apart until the step, where asked for."""
        trainee = self.accelerator.unwrap_model(model)
        if not trainee.objective.apart:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        # several processes share the gradient of each part, not that of the sum
        with self.accelerator.no_sync(model), self.compute_loss_context_manager():
            given = self._prepare_inputs(inputs)
            loss, parts = self.compute_loss(model, given, return_outputs=True)
        share = 1 / self.current_gradient_accumulation_steps
        self._apart.add(trainee, {name: share * part for name, part in parts.items()})
        if self.accelerator.sync_gradients:
            self._apart.meet(trainee, self.accelerator)
        return loss.detach() * share

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        state, trainee = self.state, self.accelerator.unwrap_model(model)
        trainee.clock = Clock(state.global_step, state.max_steps, int(state.epoch or 0))
        parts = model(**inputs)
        loss = torch.stack([part.float() for part in parts.values()]).sum()
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"The loss became {loss.item()} at step {self.state.global_step + 1} of stage "
                f"'{self._stage_name()}'. Lower the learning rate (now "
                f"{self.args.learning_rate:g}), or look for extreme labels in the data and for "
                "NaN in the checkpoint."
            )
        self._note(parts)
        return (loss, parts) if return_outputs else loss

    def _stage_name(self) -> str:
        return str(self.accelerator.unwrap_model(self.model).stage.name)

    def _note(self, parts: Mapping[str, Tensor]) -> None:
        for name, part in parts.items():
            before = self._parts.get(name)
            self._parts[name] = part.detach() if before is None else before + part.detach()
        self._batches += 1

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the mean of each part since the last log."""
        if self._batches and len(self._parts) > 1:
            logs |= {f"loss_{n}": v.item() / self._batches for n, v in self._parts.items()}
        self._parts, self._batches = {}, 0
        super().log(logs, start_time)
        if self.is_world_process_zero() and "loss" in logs:
            place = f"step {self.state.global_step:,} of {self.state.max_steps:,}"
            logger.info("%s: %s, loss %.4f", self._stage_name(), place, float(logs["loss"]))

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """What starts from nothing and the objective's own may have learning rates of their own."""
        optimizer = super().create_optimizer(model)
        trained: Any = self.model if model is None else model
        objective = self.accelerator.unwrap_model(trained).objective
        own = set(objective.parameters()) if objective.learning_rate is not None else set()
        _split(optimizer, own, lr=objective.learning_rate, weight_decay=0.0)
        if self._head_learning_rate is not None:
            fresh = {leaf for name, leaf in trained.named_parameters() if name in self._fresh}
            _split(optimizer, fresh - own, lr=self._head_learning_rate)
        return optimizer


def _split(
    optimizer: torch.optim.Optimizer, chosen: set[nn.Parameter], **options: float | None
) -> None:
    """Move the chosen parameters of each group to a new group with options of their own."""
    for group in list(optimizer.param_groups):
        new = [leaf for leaf in group["params"] if leaf in chosen]
        if new:
            group["params"] = [leaf for leaf in group["params"] if leaf not in chosen]
            optimizer.add_param_group({**group, "params": new, **options})


class _Bar(ProgressCallback):
    """The bar alone; what is logged goes to the log and not to standard output."""

    def on_log(self, *args: Any, **kwargs: Any) -> None:
        pass


class _SetEpoch(TrainerCallback):
    """Tells the row order which epoch it is, also where accelerate's wrappers do not."""

    def __init__(self, order: LengthGrouped) -> None:
        self._order = order

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._order.set_epoch(int(state.epoch or 0))


class SaveByTheClock(TrainerCallback):
    """Asks for a checkpoint every so many minutes, by the clock of the first process."""

    def __init__(self, minutes: float) -> None:
        self._seconds = 60 * minutes
        self._last = time.monotonic()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        due = time.monotonic() - self._last >= self._seconds
        if args.world_size > 1:  # all of them save, or none
            told = torch.tensor(int(due), device=args.device)
            torch.distributed.broadcast(told, src=0)
            due = bool(told.item())
        if due and state.global_step < state.max_steps:
            control.should_save = True
            self._last = time.monotonic()


class _StopAsked(TrainerCallback):
    """After Ctrl-C: a checkpoint at the end of the running step, then the end."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self.asked:
            control.should_save = control.should_training_stop = True


@contextlib.contextmanager
def stops_between_steps(trainer: Trainer) -> Iterator[None]:
    """Ctrl-C ends the block with KeyboardInterrupt, but after a checkpoint; twice, at once.

    In threads and with several processes Ctrl-C stays what it is.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if trainer.args.world_size > 1 or not in_main:
        yield
        return
    stop = _StopAsked()
    trainer.add_callback(stop)
    before = signal.getsignal(signal.SIGINT)

    def note(*_: object) -> None:
        stop.asked = True
        signal.signal(signal.SIGINT, before)
        logger.warning("Stopping after this step; Ctrl-C again stops at once.")

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if stop.asked:
        raise KeyboardInterrupt
