"""Runs the stages of an objective, each resumable."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.exits import ExitOutput
from offramp.model import MultiExitModel, MultiExitOutput
from offramp.objectives import Objective, Stage
from offramp.training.batches import Rows
from offramp.training.cache import CachedExits, filled_cache, sampled_vectors
from offramp.training.options import TRAIN, TrainOptions, training_arguments
from offramp.training.standard import moments, standardised
from offramp.training.trainer import ExitTrainer, SaveByTheClock, Trainee, stops_between_steps
from offramp.training.work import WorkFolder, says_disk_is_full

logger = logging.getLogger("offramp")


class StockAlone(nn.Module):
    """A stock classifier as a model with one exit, at full depth."""

    def __init__(self, stock: PreTrainedModel) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, **batch: Tensor) -> MultiExitOutput:
        return MultiExitOutput(exits=(ExitOutput(self.stock(**batch).logits),))


def move(model: nn.Module, where: torch.device | torch.dtype) -> None:
    """`model.to(...)`, in place."""
    nn.Module.to(model, where)


def trainee_for(
    model: MultiExitModel, objective: Objective, stage: Stage, cached: bool = False
) -> Trainee:
    """The part of a model that a stage runs: with `cached` vectors, of a frozen one the exits."""
    part: nn.Module = model
    if stage.trainable == "stock":
        part = StockAlone(model.stock)
    elif stage.trainable == "exits" and cached:
        part = CachedExits(model)
    part.requires_grad_(True)
    return Trainee(part, objective, stage, model.problem_type)


def run_stages(
    model: MultiExitModel,
    objective: Objective,
    rows: Rows,
    options: TrainOptions,
    work: WorkFolder,
    new_head: bool = False,
    cached: np.dtype[Any] | None = None,
) -> None:
    """Train `model` in place through the stages that `objective` has ahead.

    Args:
        new_head: the model's own head starts from nothing.
        cached: see `vectors_type`; stages of the exits alone then read vectors of this type. Rows
            come in the order, and dropout falls where it would, without the cache, so float32
            gives the same weights but for rounding; float16 rounds the vectors too.
    """
    vectors, learnt = work.path / "vectors", False
    for stage in objective.ahead():
        trainee, seen = trainee_for(model, objective, stage, cached is not None), rows
        if cached is not None and isinstance(trainee.model, CachedExits):
            cache = filled_cache(vectors, model, rows, cached, options.quiet)
            seen = cache.rows(rows.lengths)
        fresh = fresh_parameters(trainee, model.stock, new_head)
        with _standard(model, stage, rows, options.seed, learnt):
            run_stage(trainee, seen, options, work, fresh)
        learnt = learnt or stage.trainable != "stock"
        if stage.trainable != "exits":  # those of the model before are no longer right
            vectors = work.path / f"vectors-after-{stage.name}"
    model.requires_grad_(True)
    model.eval()


def _standard(
    model: MultiExitModel, stage: Stage, rows: Rows, seed: int, learnt: bool
) -> contextlib.AbstractContextManager[None]:
    """Exits read standardised vectors meanwhile, where the stage wants it and they can."""
    if not (stage.standardised and model.config.exit_kind().rescalable):
        return contextlib.nullcontext()
    return standardised(model, moments(sampled_vectors(model, rows, seed)), learnt)


def fresh_parameters(trainee: Trainee, stock: PreTrainedModel, new_head: bool) -> frozenset[str]:
    """Names of the parameters that start from nothing: most exits, and the head if it is new."""
    trained = {f"model.stock.{stock.base_model_prefix}."}
    if not new_head:
        trained = {"model.stock."}
    model = trainee.model
    if isinstance(model, MultiExitModel) and not model.config.exit_kind().from_nothing:
        trained.add("model.exits.")
    names = (name for name, _ in trainee.named_parameters())
    # what makes vectors wider is new, whatever it belongs to
    return frozenset(n for n in names if ".widened." in n or not n.startswith(tuple(trained)))


def run_stage(
    trainee: Trainee,
    rows: Rows,
    options: TrainOptions,
    work: WorkFolder,
    fresh: Iterable[str] = (),
) -> None:
    """Train one stage, from its last checkpoint if there is one; skip it if it is finished."""
    name = trainee.stage.name
    finished = work.finished(name)
    if finished is not None:
        trainee.load_state_dict(finished)
        logger.info("Stage '%s' was finished before.", name)
        return
    trainer = make_trainer(trainee, rows, options, work.stage(name), fresh)
    with trainer.args.main_process_first(local=False):
        last = work.last_checkpoint(name, trainer.args.world_size)
    if last is not None:
        logger.info("Stage '%s' continues from %s.", name, last.name)
    began = time.monotonic()
    with says_disk_is_full(work.path), stops_between_steps(trainer):
        trainer.train(resume_from_checkpoint=str(last) if last else None)
    if trainer.is_world_process_zero():
        seconds = time.monotonic() - began
        logger.info("Stage '%s': %d steps in %.0f s.", name, trainer.state.global_step, seconds)
        with says_disk_is_full(work.path):
            work.finish(name, trainee)
    trainer.accelerator.wait_for_everyone()


def _head_rate(options: TrainOptions, stage: Stage) -> float | None:
    """Of what starts from nothing; None where it is that of all."""
    asked = options.head_learning_rate
    if stage.rate != 1:
        asked = stage.rate * (asked or options.filled(TRAIN).learning_rate or 0.0)
    return asked


def make_trainer(
    trainee: Trainee,
    rows: Rows,
    options: TrainOptions,
    folder: Path,
    fresh: Iterable[str] = (),
    decay: bool = True,
) -> ExitTrainer:
    """A Trainer for one stage.

    Args:
        folder: for checkpoints.
        fresh: names of parameters that take `head_learning_rate`.
        decay: of the learning rate, to 0 at the end.
    """
    stage = trainee.stage
    epochs = (options.epochs or 1.0) * stage.share
    arguments = training_arguments(options, folder, epochs, decay)
    return ExitTrainer(
        trainee,
        rows.lengths,
        _head_rate(options, stage),
        frozenset(fresh),
        args=arguments,
        train_dataset=rows.dataset,
        data_collator=rows.collate,
        callbacks=[] if options.save_steps else [SaveByTheClock(options.checkpoint_minutes)],
    )
