"""What a run will take, said before it starts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from offramp.engines.batching import MAX_ROWS
from offramp.model import MultiExitModel
from offramp.objectives import Objective
from offramp.training.cache import cache_bytes, pooled_vectors
from offramp.training.gradients import gradients_apart
from offramp.training.options import TrainOptions
from offramp.training.running import Rows, move, trainee_for
from offramp.training.trainer import Trainee
from offramp.training.work import check_space

logger = logging.getLogger("offramp")

TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """Of a whole run.

    Attributes:
        rows: in the data.
        steps: updates over all stages; 0 where only vectors are computed.
        units: tokens (without padding) or images, read over all stages.
        minutes: on this machine, by the time of a few batches.
        disk: bytes that the run takes until it is done.
    """

    rows: int
    steps: int
    units: int
    minutes: float
    disk: int
    unit: str = "tokens"

    def __str__(self) -> str:
        steps = f"{self.steps:,} steps, " if self.steps else ""
        return (
            f"{self.rows:,} rows, {steps}{self.units:,} {self.unit}; about "
            f"{max(self.minutes, 0.1):.1f} minutes and {self.disk / 1e6:,.0f} MB of disk"
        )


def announce(made: Estimate, place: Path) -> None:
    """Log the estimate; raise OutputError if the disk is too full for it."""
    if PartialState().is_main_process:
        logger.info("Ahead: %s until done.", made)
    check_space(place, made.disk, "Give fewer rows, a lower cache limit, or another output.")


def estimate(
    model: MultiExitModel, objective: Objective, rows: Rows, options: TrainOptions
) -> Estimate:
    """Of training: times a few batches of every stage; the weights stay as they are."""
    state = PartialState()
    move(model, state.device)
    count = len(rows.lengths)
    size = options.batch_size or 1
    batches = math.ceil(count / size / state.num_processes)
    updates = math.ceil(batches / options.gradient_accumulation)
    steps, passes, seconds = 0, 0.0, 0.0
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    for stage in objective.ahead():
        planned = options.max_steps or math.ceil(updates * (options.epochs or 1.0) * stage.share)
        trainee = trainee_for(model, objective, stage)
        each = _seconds(partial(_train_on, trainee), rows, size, state.device)
        steps += planned
        passes += planned / updates
        seconds += each * batches * planned / updates
    for name, buffer in model.named_buffers():  # batch norms count the batches they see
        buffer.copy_(statistics[name])
    model.requires_grad_(True)
    model.eval()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    units = int(rows.lengths.sum() * passes)
    # two checkpoints of weights and two moments each, the weights of a stage, the result
    return Estimate(count, steps, units, seconds / 60, 8 * weights, _unit(model))


def estimate_vectors(model: MultiExitModel, rows: Rows, kind: np.dtype[Any]) -> Estimate:
    """Of computing the vectors of all rows; fitting exits to them takes little beside it."""
    state = PartialState()
    count = len(rows.lengths)
    each = _seconds(partial(pooled_vectors, [model]), rows, MAX_ROWS, state.device)
    batches = math.ceil(count / MAX_ROWS / state.num_processes)
    disk = cache_bytes(count, model, kind)
    units = int(rows.lengths.sum())
    return Estimate(count, 0, units, each * batches / 60, disk, _unit(model))


def _unit(model: MultiExitModel) -> str:
    return "tokens" if model.backbone.reads == "text" else "images"


def _train_on(trainee: Trainee, batch: dict[str, Tensor]) -> None:
    """Forward and backward, without an update."""
    trainee.train()
    gradients_apart(trainee, trainee(**batch))


def _seconds(
    run: Callable[[dict[str, Tensor]], object], rows: Rows, size: int, device: torch.device
) -> float:
    """Mean seconds of a batch, over batches of typical lengths, after one that is not timed."""
    order = rows.lengths.argsort()
    last = max(0, len(order) - size)
    places = torch.linspace(0, last, TIMED_BATCHES + 2)[1:-1].long().tolist()
    total = 0.0
    for number, place in enumerate([places[-1], *places]):
        batch = rows.batch(order[place : place + size].tolist())
        batch = {name: value.to(device) for name, value in batch.items()}
        began = time.perf_counter()
        run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        total += time.perf_counter() - began if number else 0.0
    return total / TIMED_BATCHES
