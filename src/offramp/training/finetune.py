"""`train`: fine-tune backbone and exits together."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, set_seed

from offramp.data import names_source
from offramp.errors import ConfigError, DataError
from offramp.exits import ExitKind, ExitSpec, Pooling
from offramp.methods import METHODS
from offramp.methods.base import Method
from offramp.model import Head, MultiExitModel
from offramp.model.folder import resolve
from offramp.objectives import FullDepth, Objective
from offramp.registry import nearest
from offramp.storage import parse_document
from offramp.training.cache import vectors_type
from offramp.training.estimate import announce, estimate
from offramp.training.options import TRAIN, TrainOptions, check_here
from offramp.training.preparing import (
    Columns,
    Data,
    Material,
    check_depth,
    check_pooling,
    gather,
    head_for,
    read_examples,
    release,
    weights_fingerprint,
)
from offramp.training.probe import rehearse
from offramp.training.running import run_stages
from offramp.training.work import WorkFolder, check_output, says_how_to_continue

PLAIN = "plain"
"""Not a method of early exit: an ordinary fine-tune, saved as an ordinary checkpoint."""


def train(
    source: str | os.PathLike[str],
    data: Data,
    output: str | os.PathLike[str],
    *,
    method: str = "auto",
    pooling: Pooling | None = None,
    as_released: bool = False,
    settings: Mapping[str, Any] | None = None,
    fine_tuned: bool = False,
    options: TrainOptions | None = None,
    problem_type: str | None = None,
    fresh_head: bool = False,
    layers: int | None = None,
    processor: Any = None,
    max_length: int | None = None,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
) -> PreTrainedModel:
    """Fine-tune an encoder and its exits on examples, and save the result.

    They need labels, unless no stage that is left reads any: `fastbert` from a finished classifier.

    A killed run that is started again with the same arguments continues from its last
    checkpoint, in `<output>.work`, and ends in the same weights. Where a method trains exits on
    a frozen model, and they read vectors that can be computed once, these are cached there up
    to `options.cache_limit` bytes; the weights are those of a run without, up to rounding.

    Args:
        source: folder or hub id of a pretrained encoder or a classifier.
        data: examples, see `load_examples`; or a Dataset that is encoded already
            (`input_ids`, `length`, `label`).
        output: folder to write; whole or not at all.
        method: `auto`, `pabee`, `deebert`, ...; or `plain`, which fine-tunes the stock model alone
            and writes a stock checkpoint, the reference for the others and a start for
            `attach`.
        pooling: of the exits; without it a short rehearsal on the data decides, or the method.
        as_released: take the paper's pooling, and where its authors' code trains otherwise than
            the paper says, do as the code.
        settings: other settings than the paper's, see `Method.with_settings`.
        fine_tuned: `source` has learnt these data already, as `plain` leaves it: stages that
            train the stock model alone are left out.
        options: see `TrainOptions`; the defaults are `TRAIN`.
        problem_type: as in transformers, where the labels do not tell.
        fresh_head: give a classifier a new head for the labels of `data`.
        layers: only the first so many of the model; with method `plain` this is the smaller
            model that early exits have to beat.
        processor: a tokenizer or image processor; without it, the checkpoint's.
        max_length: in tokens, special tokens included.
        split, text, text_pair, image, label, max_rows: see `load_examples`.

    Returns:
        The trained `MultiExitModel`; with method `plain` the stock model.

    Raises:
        DataError, ModelError, ConfigError, OutputError: before the work starts.
        NonFiniteError: when the loss is no longer a finite number.
    """
    chosen = (options or TrainOptions()).filled(TRAIN)
    objective, made = _preset(method, as_released, pooling, settings or {})
    spec = ExitSpec() if made is None else made.exits
    objective.fine_tuned = fine_tuned
    _check_work_left(method, objective)
    check_pooling(pooling)
    if pooling is not None and not hasattr(spec, "pooling"):
        raise ConfigError(f"The exits of '{method}' do not pool; leave --pooling out.")
    check_here(chosen)
    path, target = resolve(source), Path(output)
    check_output(target, path, plain=method == PLAIN)
    dataset = read_examples(data, Columns(split, text, text_pair, image, label, max_rows))
    if "label" not in dataset.column_names and any(one.labelled for one in objective.ahead()):
        raise DataError(
            f"The data has no labels, which method '{method}' needs. Name their column with "
            "--label; or start from a classifier that has learnt its task, with `attach`, or where "
            "a method then reads no labels, such as fastbert, with --fine-tuned."
        )
    head = head_for(path, dataset, problem_type, fresh_head)
    if fine_tuned:
        _check_finished(path, head, layers)
    with names_source(data):
        material = gather(path, dataset, head, chosen.seed, processor, max_length, layers)
    objective.reads, objective.spread = material.model.backbone.reads, material.spread
    if made is not None:
        made.check(material.model.problem_type)
        check_depth(material.model)
        spec = made.exits_for(material.model.problem_type)
    own = as_released or (made is not None and not made.measures_pooling)
    wish = pooling or (getattr(spec, "pooling", None) if own else None)
    run = _Run(material, objective, chosen, new_head=head is not None)
    work = WorkFolder(target)
    # where no pooling is asked for, one is measured that is as fixed as the mean
    cached = run.cached(_with_pooling(spec, wish or "mean", method))
    asked = {"method": method, "pooling": wish, "layers": layers, "fine_tuned": fine_tuned}
    asked |= {"as_released": as_released, "settings": dict(settings or {})}
    asked["cache"] = cached and cached.name
    with work.alone():
        work.open({**run.asked(), **asked})
        with says_how_to_continue(work):
            model = run.go(work, method, spec, wish)
        release(model, target, material.processor, work, plain=method == PLAIN)
    return model.stock if method == PLAIN else model


@dataclass(frozen=True)
class _Run:
    """One fine-tune, from material to a trained model."""

    material: Material
    objective: Objective
    options: TrainOptions
    new_head: bool

    def asked(self) -> dict[str, Any]:
        """What decides the weights that the run ends in, but for the exits."""
        return {
            "model": weights_fingerprint(self.material.model.stock),
            "data": self.material.rows.fingerprint(),
            "options": self.options.what_changes_weights(),
            "new_head": self.new_head,
        }

    def go(
        self, work: WorkFolder, method: str, spec: ExitKind, wish: Pooling | None
    ) -> MultiExitModel:
        rows, options = self.material.rows, self.options
        self.objective.prepare(self.material.model.depth)
        exits: ExitKind | None = None  # a plain fine-tune uses none, so the plainest will do
        if method != PLAIN:
            exits = spec
            if hasattr(spec, "pooling"):
                pooling = work.once("pooling", self._rehearse) if wish is None else wish
                exits = _with_pooling(spec, pooling, method)
        set_seed(options.seed)
        model = MultiExitModel.from_stock(self.material.model.stock, exits, method)
        cached = self.cached(exits or spec)
        announce(estimate(model, self.objective, rows, options, cached), work.path)
        run_stages(model, self.objective, rows, options, work, self.new_head, cached)
        return model

    def cached(self, exits: ExitKind) -> np.dtype[Any] | None:
        """See `vectors_type`."""
        material, limit = self.material, self.options.cache_limit
        return vectors_type(exits, self.objective, material.model, material.rows, limit)

    def _rehearse(self) -> Pooling:
        material = self.material
        return rehearse(material.model, self.objective, material.rows, self.options, self.new_head)


def _preset(
    method: str, as_released: bool, pooling: Pooling | None, settings: Mapping[str, Any]
) -> tuple[Objective, Method | None]:
    if method == PLAIN:
        if settings:
            raise ConfigError("Method 'plain' has no settings; leave --set out.")
        if as_released:
            raise ConfigError("Method 'plain' has nothing as released; leave --as-released out.")
        return FullDepth(), None
    if method not in METHODS:
        known = [PLAIN, *METHODS]
        raise ConfigError(
            f"Unknown method '{method}'.{nearest(method, known)} Known: {', '.join(known)}."
        )
    made = METHODS[method]
    if as_released and not made.has_released:
        raise ConfigError(
            f"Method '{method}' has nothing as released: it trains as its paper says, and no "
            "pooling of its exits is measured. Leave as_released (--as-released) out."
        )
    if as_released and pooling and not made.released:
        raise ConfigError(
            f"Method '{method}' has nothing as released but what its exits pool, and that is to be "
            f"'{pooling}'. Leave as_released (--as-released) or pooling (--pooling) out."
        )
    made = made.with_settings({**(made.released if as_released else {}), **settings})
    return made.objective(), made


def _with_pooling(spec: ExitKind, pooling: Pooling, method: str) -> ExitKind:
    """Exits with another pooling, where they have one."""
    if not hasattr(spec, "pooling"):
        return spec
    settings = {**spec.model_dump(), "pooling": pooling}
    return parse_document(type(spec), settings, f"Exits of method '{method}'")


def _check_work_left(method: str, objective: Objective) -> None:
    if not objective.ahead():
        raise ConfigError(
            f"Method '{method}' trains the model alone, and fine_tuned=True (--fine-tuned) says "
            "that this is done. Leave it out, or name a method with exits."
        )


def _check_finished(path: Path, head: Head | None, layers: int | None) -> None:
    """Refuse to call a model fine-tuned whose own answers are no use yet."""
    wrong = "gets a new head" if head is not None else f"is cut to {layers} layers"
    if head is not None or layers is not None:
        raise ConfigError(
            f"{path} {wrong}, so fine_tuned=True (--fine-tuned) cannot hold. Fine-tune it with "
            "method 'plain' first, and name the folder that this writes."
        )
