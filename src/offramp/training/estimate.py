"""What a run will take, said before it starts."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import dataclass

import torch

from offramp.model import MultiExitModel
from offramp.objectives import Objective
from offramp.training.options import TrainOptions
from offramp.training.running import Rows, StockAlone
from offramp.training.trainer import Trainee

logger = logging.getLogger("offramp")

TIMED_BATCHES = 3


@dataclass(frozen=True)
class Estimate:
    """Of a whole run on one device.

    Attributes:
        rows: in the data.
        steps: updates over all stages.
        tokens: read over all stages, without padding.
        minutes: of training.
        disk: bytes of checkpoints while it runs.
    """

    rows: int
    steps: int
    tokens: int
    minutes: float
    disk: int

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows, {self.steps:,} steps, {self.tokens:,} tokens; about "
            f"{self.minutes:.1f} minutes and {self.disk / 1e6:,.0f} MB of disk while it runs"
        )


def estimate(
    model: MultiExitModel, objective: Objective, rows: Rows, options: TrainOptions
) -> Estimate:
    """Time a few real batches of every stage; the model is not changed."""
    count, size = len(rows.lengths), options.batch_size or 1
    updates = math.ceil(count / size / options.gradient_accumulation)
    steps, seconds, passes = 0, 0.0, 0.0
    for stage in objective.stages():
        epochs = (options.epochs or 1.0) * stage.share
        planned = options.max_steps or math.ceil(updates * epochs)
        part = StockAlone(model.stock) if stage.trainable == "stock" else model
        part.requires_grad_(True)
        trainee = Trainee(part, objective, stage, model.problem_type)
        steps += planned
        passes += planned / updates
        seconds += planned * options.gradient_accumulation * _seconds_a_batch(trainee, rows, size)
    model.requires_grad_(True)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    tokens = int(rows.lengths.sum() * passes)
    # two checkpoints, each with weights and two moments a weight
    return Estimate(count, steps, tokens, seconds / 60, 6 * weights)


def announce(
    model: MultiExitModel, objective: Objective, rows: Rows, options: TrainOptions
) -> Estimate:
    """Log the estimate."""
    made = estimate(model, objective, rows, options)
    logger.info("Training: %s.", made)
    return made


def _seconds_a_batch(trainee: Trainee, rows: Rows, size: int) -> float:
    """Forward, backward and what an update costs, on batches of typical length."""
    trainee.train()
    order = rows.lengths.argsort()
    places = torch.linspace(0, max(0, len(order) - size), TIMED_BATCHES + 2)[1:-1].long().tolist()
    device = next(trainee.parameters()).device
    seconds = []
    for place in [places[0], *places]:
        batch = rows.batch(order[place : place + size].tolist())
        began = time.perf_counter()
        loss = sum(trainee(**{name: value.to(device) for name, value in batch.items()}).values())
        loss.backward()  # type: ignore[union-attr]
        seconds.append(time.perf_counter() - began)
        trainee.zero_grad(set_to_none=True)
    trainee.eval()
    return sum(seconds[1:]) / TIMED_BATCHES
