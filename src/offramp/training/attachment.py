"""`attach`: hang exits on a finished classifier, which stays as it is."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import set_seed

from offramp.data import names_source
from offramp.engines import label_names, plan_batches, warn_below_majority
from offramp.errors import ConfigError
from offramp.exits import ExitKind, ExitSpec, Pooling
from offramp.model import MultiExitModel
from offramp.model.folder import resolve
from offramp.objectives import SelfDistillation
from offramp.training.batches import Rows
from offramp.training.cache import filled_cache, sampled_vectors, vectors_type
from offramp.training.estimate import announce, estimate
from offramp.training.options import (
    ATTACH,
    ATTACH_TOKENS,
    FEWEST_UPDATES,
    TrainOptions,
    check_here,
)
from offramp.training.preparing import (
    Columns,
    Data,
    Material,
    check_depth,
    check_pooling,
    gather,
    read_examples,
    release,
    weights_fingerprint,
)
from offramp.training.running import fresh_parameters, move, run_stage, trainee_for
from offramp.training.standard import moments, standardised
from offramp.training.work import WorkFolder, check_output, says_how_to_continue

logger = logging.getLogger("offramp")

ATTACHED = "attach"
COMPARED = 500
"""Rows whose labels are held against the classifier's answers before the work starts."""


def attach(
    source: str | os.PathLike[str],
    data: Data,
    output: str | os.PathLike[str],
    *,
    pooling: Pooling | None = None,
    exits: ExitKind | None = None,
    options: TrainOptions | None = None,
    processor: Any = None,
    max_length: int | None = None,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
) -> MultiExitModel:
    """Train exits for a fine-tuned classifier from its own answers, and save the result.

    The classifier stays frozen: its full-depth answers are unchanged bit for bit. The text
    needs no labels; where there are some, they are used as well. With pooling `attention` the
    classifier runs again for every batch; with the others, vectors of all layers are computed
    once and cached in `<output>.work`, up to `options.cache_limit` bytes. A killed run
    continues when it is started again with the same arguments.

    Args:
        source: folder or hub id of a classifier.
        data: text like that the model will see, see `load_examples`; or a Dataset that is
            encoded already (`input_ids`, `length`, perhaps `label`).
        output: folder to write; whole or not at all.
        pooling: of the exits; without it `attention`, which learns where to look.
        exits: the exits in full, instead of `pooling`.
        options: see `TrainOptions`; the defaults are `ATTACH_TOKENS` and, where vectors are
            cached, `ATTACH`.
        processor: a tokenizer or image processor; without it, the checkpoint's.
        max_length: in tokens, special tokens included.
        split, text, text_pair, image, label, max_rows: see `load_examples`.

    Raises:
        DataError, ModelError, ConfigError, OutputError: before the work starts.
    """
    given = options or TrainOptions()
    check_pooling(pooling)
    check_here(given)
    path, target = resolve(source), Path(output)
    check_output(target, path)
    dataset = read_examples(data, Columns(split, text, text_pair, image, label, max_rows))
    with names_source(data):
        material = gather(path, dataset, None, given.seed, processor, max_length)
    spec = exits or (ExitSpec() if pooling is None else ExitSpec(pooling=pooling))
    _check_exits(spec, material.model)
    run = _Run(material, given, spec)
    work = WorkFolder(target)
    with work.alone():
        work.open(run.asked())
        with says_how_to_continue(work):
            model = run.go(work)
        move(model, material.released_type)
        release(model, target, material.processor, work)
    return model


def _check_exits(exits: ExitKind, model: MultiExitModel) -> None:
    """Refuse exits that do not fit the model, or that have nothing to learn."""
    check_depth(model)
    exits.build(model.backbone, cast(int, model.config.num_labels))
    if not exits.own_answers:
        raise ConfigError(
            f"Exits '{exits.kind}' answer with the model's own head, so there is nothing to "
            "attach. Use `train`, which teaches the model to answer through them."
        )


@torch.inference_mode()
def _compare_labels(model: MultiExitModel, rows: Rows, seed: int) -> None:
    """Warn where the labels of some rows, if there are any, seem to be those of other classes."""
    some = rows.part(rows.shuffled(seed)[:COMPARED])
    scores, labels = [], []
    for block in plan_batches(some.lengths.numpy()):
        batch = {name: leaf.to(model.device) for name, leaf in some.batch(block).items()}
        given = batch.pop("labels", None)
        if given is None:
            return
        labels.append(given.cpu().numpy())
        scores.append(model.stock(**batch).logits.float().cpu().numpy())
    names = label_names(model)
    warn_below_majority(np.concatenate(scores), np.concatenate(labels), model.problem_type, names)


@dataclass(frozen=True)
class _Run:
    """One fit of exits, from material to a model."""

    material: Material
    given: TrainOptions
    exits: ExitKind

    @property
    def cached(self) -> np.dtype[Any] | None:
        """In what the vectors are cached; None where the classifier runs again instead."""
        material, limit = self.material, self.given.cache_limit
        return vectors_type(self.exits, SelfDistillation(), material.model, material.rows, limit)

    @property
    def options(self) -> TrainOptions:
        if self.cached is not None:
            return self.given.filled(ATTACH)
        options = self.given.filled(ATTACH_TOKENS)
        if self.given.epochs is None:
            size = (options.batch_size or 1) * options.gradient_accumulation
            fewest = FEWEST_UPDATES * size / len(self.material.rows.lengths)
            options = options.model_copy(update={"epochs": max(options.epochs or 1, fewest)})
        return options

    def asked(self) -> dict[str, Any]:
        """What decides the weights that the run ends in."""
        return {
            "model": weights_fingerprint(self.material.model.stock),
            "data": self.material.rows.fingerprint(),
            "options": self.options.what_changes_weights(),
            "exits": self.exits.to_dict(),
            "cache": self.cached and self.cached.name,
        }

    def go(self, work: WorkFolder) -> MultiExitModel:
        set_seed(self.given.seed)
        model = MultiExitModel.from_stock(self.material.model.stock, self.exits, ATTACHED)
        model.eval()
        move(model, PartialState().device)
        objective, rows, quiet = SelfDistillation(), self.material.rows, self.given.quiet
        _compare_labels(model, rows, self.given.seed)
        if self.cached is None:
            logger.info("Vectors are not cached: the classifier runs again for every batch.")
        announce(estimate(model, objective, rows, self.options, self.cached), work.path)
        (stage,) = objective.stages()
        trainee = trainee_for(model, objective, stage, self.cached is not None)
        parts: Iterable[Sequence[Tensor]]
        if self.cached is None:
            parts = sampled_vectors(model, rows, self.given.seed)
        else:
            cache = filled_cache(work.path / "vectors", model, rows, self.cached, quiet)
            rows, parts = cache.rows(), cache.parts()
        fresh = fresh_parameters(trainee, model.stock, new_head=False)
        move_in = standardised(model, moments(parts)) if self.exits.rescalable else nullcontext()
        with move_in:
            run_stage(trainee, rows, self.options, work, fresh)
        model.requires_grad_(True)
        model.eval()
        return model
