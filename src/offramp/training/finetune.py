"""`train`: fine-tune backbone and exits together."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import PreTrainedModel, set_seed

from offramp.errors import ConfigError, DataError
from offramp.exits import ExitSpec, Pooling
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.model.folder import MANIFEST, POINTS, resolve
from offramp.objectives import FullDepth, Objective
from offramp.registry import nearest
from offramp.storage import whole_folder
from offramp.training.estimate import announce
from offramp.training.options import TRAIN, TrainOptions
from offramp.training.preparing import (
    Columns,
    Data,
    asked_of,
    encoded_rows,
    has_head,
    load_classifier,
    load_tokenizer,
    new_head,
    read_examples,
)
from offramp.training.probe import rehearse
from offramp.training.running import run_stages
from offramp.training.work import WorkFolder, check_output, says_how_to_continue

logger = logging.getLogger("offramp")

OURS = (MANIFEST, POINTS)
"""What a stock checkpoint must not keep of a multi-exit model it replaces."""

PLAIN = "plain"
"""Not a method of early exit: an ordinary fine-tune, saved as an ordinary checkpoint."""


def train(
    source: str | os.PathLike[str],
    data: Data,
    output: str | os.PathLike[str],
    *,
    method: str = "pabee",
    pooling: Pooling | None = None,
    as_released: bool = False,
    options: TrainOptions | None = None,
    problem_type: str | None = None,
    fresh_head: bool = False,
    tokenizer: Any = None,
    max_length: int | None = None,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    label: str | None = None,
    max_rows: int | None = None,
) -> PreTrainedModel:
    """Fine-tune an encoder and its exits on labelled examples, and save the result.

    A killed run that is started again with the same arguments continues from its last
    checkpoint, in `<output>.work`, and ends in the same weights.

    Args:
        source: folder or hub id of a pretrained encoder or a classifier.
        data: examples, see `load_examples`; or a Dataset that is encoded already
            (`input_ids`, `length`, `label`).
        output: folder to write; whole or not at all.
        method: `pabee`, `deebert`, ...; or `plain`, which fine-tunes the stock model alone
            and writes a stock checkpoint, the reference for the others and a start for
            `attach`.
        pooling: of the exits; without it a short rehearsal on the data decides.
        as_released: take the paper's pooling.
        options: see `TrainOptions`; the defaults are `TRAIN`.
        problem_type: as in transformers, where the labels do not tell.
        fresh_head: give a classifier a new head for the labels of `data`.
        tokenizer: without it, the checkpoint's.
        max_length: in tokens, special tokens included.
        split, text, text_pair, label, max_rows: see `load_examples`.

    Returns:
        The trained `MultiExitModel`; with method `plain` the stock model.

    Raises:
        DataError, ModelError, ConfigError, OutputError: before the work starts.
        ConfigError: when the loss is no longer a finite number.
    """
    chosen = (options or TrainOptions()).filled(TRAIN)
    objective, spec = _preset(method)
    target = Path(output)
    check_output(target)
    dataset = read_examples(data, Columns(split, text, text_pair, label, max_rows))
    if "label" not in dataset.column_names:
        raise DataError(
            "The data has no labels, which `train` needs. Name their column with --label, or "
            "use `attach`, which hangs exits on a finished classifier without labels."
        )
    path = resolve(source)
    head = new_head(dataset, problem_type) if fresh_head or not has_head(path) else None
    stock = load_classifier(path, head, chosen.seed).float()
    if tokenizer is None and "input_ids" not in dataset.column_names:
        tokenizer = load_tokenizer(path)
    model = MultiExitModel.from_stock(stock, spec, method)
    _check_problem_type(method, model.problem_type)
    rows = encoded_rows(dataset, model, tokenizer, max_length)

    work = WorkFolder(target)
    asked = "paper" if as_released else pooling or "measured"
    work.open(asked_of(model, rows, chosen, method=method, pooling=asked, head=head is not None))
    with says_how_to_continue(work):
        if method != PLAIN:
            if not as_released:
                pooling = pooling or work.once(
                    "pooling", lambda: rehearse(model, objective, rows, chosen, head is not None)
                )
                spec = spec.model_copy(update={"pooling": pooling})
            set_seed(chosen.seed)
            model = MultiExitModel.from_stock(stock, spec, method)
        announce(model, objective, rows, chosen)
        run_stages(model, objective, rows, chosen, work, head is not None)
    return _finish(model, target, tokenizer, work, plain=method == PLAIN)


def _preset(method: str) -> tuple[Objective, ExitSpec]:
    if method == PLAIN:
        return FullDepth(), ExitSpec()
    if method not in METHODS:
        known = [PLAIN, *METHODS]
        raise ConfigError(
            f"Unknown method '{method}'.{nearest(method, known)} Known: {', '.join(known)}."
        )
    return METHODS[method].objective(), METHODS[method].exits


def _check_problem_type(method: str, problem_type: str) -> None:
    if method != PLAIN and problem_type not in METHODS[method].problem_types:
        fitting = [name for name in METHODS if problem_type in METHODS[name].problem_types]
        raise ConfigError(
            f"Method '{method}' does not do {problem_type}. Methods that do: {', '.join(fitting)}."
        )


def _finish(
    model: MultiExitModel, target: Path, tokenizer: Any, work: WorkFolder, plain: bool
) -> PreTrainedModel:
    """Save on the main process, then drop the work folder."""
    state = PartialState()
    if state.is_main_process:
        if plain:
            with whole_folder(target, keep_others=True, leave_behind=OURS) as staged:
                model.stock.save_pretrained(staged)
                if tokenizer is not None:
                    tokenizer.save_pretrained(staged)
        else:
            model.save_pretrained(target, tokenizer=tokenizer)
        work.remove()
        logger.info("Saved to %s.", target)
    state.wait_for_everyone()
    return model.stock if plain else model
