"""`attach`: hang exits on a finished classifier, which stays as it is."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import set_seed

from offramp.exits import ExitSpec, Pooling
from offramp.model import MultiExitModel
from offramp.model.folder import resolve
from offramp.objectives import SelfDistillation
from offramp.training.cache import CachedExits, VectorCache, cache_bytes, cache_type
from offramp.training.options import ATTACH, ATTACH_TOKENS, TrainOptions
from offramp.training.preparing import (
    Columns,
    Data,
    asked_of,
    encoded_rows,
    load_classifier,
    load_tokenizer,
    read_examples,
)
from offramp.training.probe import choose_pooling
from offramp.training.running import Rows, run_stage, run_stages
from offramp.training.trainer import Trainee
from offramp.training.work import WorkFolder, check_output, says_how_to_continue

logger = logging.getLogger("offramp")

ATTACHED = "attach"


def attach(
    source: str | os.PathLike[str],
    data: Data,
    output: str | os.PathLike[str],
    *,
    pooling: Pooling | None = None,
    exits: ExitSpec | None = None,
    options: TrainOptions | None = None,
    tokenizer: Any = None,
    max_length: int | None = None,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
) -> MultiExitModel:
    """Train exits for a fine-tuned classifier from its own answers, and save the result.

    The classifier stays frozen: its full-depth answers are unchanged bit for bit. The text
    needs no labels; where there are some, they are used as well. Pooled vectors of all layers
    are computed once and cached in `<output>.work`, up to `options.cache_limit` bytes; above
    that, and with pooling `attention`, the classifier runs again for every batch. A killed
    run continues when it is started again with the same arguments.

    Args:
        source: folder or hub id of a classifier.
        data: text like that the model will see, see `load_examples`; or a Dataset that is
            encoded already (`input_ids`, `length`, perhaps `label`).
        output: folder to write; whole or not at all.
        pooling: of the exits; without it a probe of the model decides.
        exits: the exits in full, instead of `pooling`.
        options: see `TrainOptions`; the defaults are `ATTACH` and, where vectors are not
            cached, `ATTACH_TOKENS`.
        tokenizer: without it, the checkpoint's.
        max_length: in tokens, special tokens included.
        split, text, text_pair, label, max_rows: see `load_examples`.

    Raises:
        DataError, ModelError, ConfigError, OutputError: before the work starts.
    """
    given = options or TrainOptions()
    target = Path(output)
    check_output(target)
    dataset = read_examples(data, Columns(split, text, text_pair, label, max_rows))
    path = resolve(source)
    stock = load_classifier(path, None, given.seed)
    if tokenizer is None and "input_ids" not in dataset.column_names:
        tokenizer = load_tokenizer(path)
    released_type = stock.dtype
    stock.float().eval()
    model = MultiExitModel.from_stock(stock, exits or ExitSpec(), ATTACHED)
    rows = encoded_rows(dataset, model, tokenizer, max_length)

    work = WorkFolder(target)
    wish = exits.model_dump() if exits else pooling or "measured"
    work.open(asked_of(model, rows, given, what="attach", exits=wish))
    with says_how_to_continue(work):
        if exits is None:
            measure = lambda: choose_pooling(model, rows, given.seed)  # noqa: E731
            exits = ExitSpec(pooling=pooling or work.once("pooling", measure))
        set_seed(given.seed)
        model = MultiExitModel.from_stock(stock, exits, ATTACHED)
        _fit(model, rows, given, work)
    model.to(released_type)
    model.requires_grad_(True).eval()
    state = PartialState()
    if state.is_main_process:
        model.save_pretrained(target, tokenizer=tokenizer)
        work.remove()
        logger.info("Saved to %s.", target)
    state.wait_for_everyone()
    return model


def _fit(model: MultiExitModel, rows: Rows, given: TrainOptions, work: WorkFolder) -> None:
    """Train the exits, on cached vectors where they can be had."""
    kind = cache_type(len(rows.lengths), model, given.cache_limit)
    if kind is None or model.config.exit_spec().pooling == "attention":
        why = "attention pooling needs the tokens" if kind else "the vectors exceed the cache limit"
        logger.info("%s: the classifier runs again for every batch.", why.capitalize())
        run_stages(model, SelfDistillation(), rows, given.filled(ATTACH_TOKENS), work)
        return
    state = PartialState()
    model.to(state.device)
    size = cache_bytes(len(rows.lengths), model, kind)
    logger.info("Pooled vectors of %d rows take %.0f MB.", len(rows.lengths), size / 1e6)
    with state.main_process_first():
        cache = VectorCache(work.path / "vectors", model, rows, kind)
    cache.fill(given.quiet, state.process_index, state.num_processes)
    state.wait_for_everyone()
    objective = SelfDistillation()
    (stage,) = objective.stages()
    exits = CachedExits(model, *(moment.to(state.device) for moment in cache.moments()))
    trainee = Trainee(exits, objective, stage, model.problem_type)
    run_stage(trainee, cache.rows(), given.filled(ATTACH), work)
    exits.fold()
