"""What a run will take, said before it starts."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor, nn

from offramp.engines.batching import MAX_ROWS
from offramp.model import MultiExitModel
from offramp.objectives import Objective
from offramp.training.batches import Rows
from offramp.training.cache import CachedExits, cache_bytes, pooled_vectors
from offramp.training.gradients import gradients_apart
from offramp.training.options import TrainOptions
from offramp.training.running import move, trainee_for
from offramp.training.trainer import Trainee
from offramp.training.work import check_space

logger = logging.getLogger("offramp")

TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """Of a whole run.

    Attributes:
        rows: in the data.
        steps: updates over all stages.
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
        return (
            f"{self.rows:,} rows, {self.steps:,} steps, {self.units:,} {self.unit}; about "
            f"{max(self.minutes, 0.1):.1f} minutes and {self.disk / 1e6:,.0f} MB of disk"
        )


def announce(made: Estimate, place: Path) -> None:
    """Log the estimate; raise OutputError if the disk is too full for it."""
    if PartialState().is_main_process:
        logger.info("Ahead: %s until done.", made)
    check_space(place, made.disk, "Give fewer rows, a lower cache limit, or another output.")


def estimate(
    model: MultiExitModel,
    objective: Objective,
    rows: Rows,
    options: TrainOptions,
    cached: np.dtype[Any] | None = None,
) -> Estimate:
    """Of training: times a few batches of every stage; the weights stay as they are.

    `cached` as for `run_stages`.
    """
    move(model, PartialState().device)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stages = [
        _of_stage(trainee_for(model, objective, stage, cached is not None), model, rows, options)
        for stage in objective.ahead()
    ]
    vectors = _Part() if cached is None else _of_vectors(model, rows, cached)
    for name, buffer in model.named_buffers():  # batch norms count the batches they see
        buffer.copy_(statistics[name])
    model.requires_grad_(True)
    model.eval()
    parts = (*stages, vectors)
    return Estimate(
        rows=len(rows.lengths),
        steps=sum(part.steps for part in parts),
        units=int(rows.lengths.sum() * sum(part.passes for part in parts)),
        minutes=sum(part.seconds for part in parts) / 60,
        # the result comes to that
        disk=max(part.disk for part in stages) + vectors.disk + _bytes(model),
        unit="tokens" if model.backbone.reads == "text" else "images",
    )


class _Part(NamedTuple):
    """What a stage, or computing the vectors, takes; `passes` of the model over all rows."""

    steps: int = 0
    passes: float = 0.0
    seconds: float = 0.0
    disk: int = 0


def _of_stage(trainee: Trainee, model: MultiExitModel, rows: Rows, options: TrainOptions) -> _Part:
    state, size = PartialState(), options.batch_size or 1
    batches = math.ceil(len(rows.lengths) / size / state.num_processes)
    updates = math.ceil(batches / options.gradient_accumulation)
    share = trainee.stage.share
    planned = options.max_steps or math.ceil(updates * (options.epochs or 1.0) * share)
    fed = isinstance(trainee.model, CachedExits)
    given = partial(_vectors, model) if fed else dict
    each = _seconds(partial(_train_on, trainee), rows, size, state.device, given)
    passes = planned / updates
    # three checkpoints of weights and two moments each, since the oldest goes when the newest is
    # there, and the weights after the stage
    disk = 10 * _bytes(trainee)
    return _Part(planned, 0.0 if fed else passes, each * batches * passes, disk)


def _of_vectors(model: MultiExitModel, rows: Rows, kind: np.dtype[Any]) -> _Part:
    state, count = PartialState(), len(rows.lengths)
    model.eval()
    each = _seconds(partial(pooled_vectors, [model]), rows, MAX_ROWS, state.device)
    batches = math.ceil(count / MAX_ROWS / state.num_processes)
    return _Part(0, 1.0, each * batches, cache_bytes(count, model, kind))


def _vectors(model: MultiExitModel, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch of tokens or images as the cache would give it."""
    (vectors,), scores = pooled_vectors([model], batch)
    labels = {name: batch[name] for name in batch if name == "labels"}
    return {"pooled": torch.cat(vectors, dim=1), "teacher": scores.clone(), **labels}


def _bytes(module: nn.Module) -> int:
    return sum(leaf.numel() * leaf.element_size() for leaf in module.parameters())


def _train_on(trainee: Trainee, batch: dict[str, Tensor]) -> None:
    """Forward and backward, without an update."""
    trainee.train()
    gradients_apart(trainee, trainee(**batch))


def _seconds(
    run: Callable[[dict[str, Tensor]], object],
    rows: Rows,
    size: int,
    device: torch.device,
    given: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict,
) -> float:
    """Mean seconds of a batch, over batches of typical lengths, after one that is not timed.

    What makes of a batch what is `given` to `run` is not timed.
    """
    order = rows.lengths.argsort()
    last = max(0, len(order) - size)
    places = torch.linspace(0, last, TIMED_BATCHES + 2)[1:-1].long().tolist()
    total = 0.0
    for number, place in enumerate([places[-1], *places]):
        batch = rows.batch(order[place : place + size].tolist())
        batch = given({name: value.to(device) for name, value in batch.items()})
        began = time.perf_counter()
        run(batch)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        total += time.perf_counter() - began if number else 0.0
    return total / TIMED_BATCHES
