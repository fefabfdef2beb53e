"""From what the user names to what is trained: a classifier, a processor, encoded rows."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, PreTrainedModel, set_seed

from offramp.data import Task, check_problem_type, encode_labels, infer_task, load_examples
from offramp.engines import collate, inputs_of, load_processor
from offramp.errors import ConfigError, DataError, ModelError
from offramp.exits import POOLINGS
from offramp.metrics import REGRESSION
from offramp.model import Head, MultiExitModel, load_stock
from offramp.model.folder import is_ours, save_stock
from offramp.model.truncation import truncated
from offramp.registry import nearest
from offramp.storage import fingerprint
from offramp.training.batches import Rows
from offramp.training.work import WorkFolder

logger = logging.getLogger("offramp")

Data: TypeAlias = str | Path | Dataset


@dataclass(frozen=True)
class Columns:
    """How to read examples, as `load_examples` takes it."""

    split: str | None = None
    text: str | None = None
    text_pair: str | None = None
    image: str | None = None
    label: str | None = None
    max_rows: int | None = None


@dataclass(frozen=True)
class Material:
    """What a run works on.

    Attributes:
        model: fp32, in evaluation mode, with untrained exits.
        rows: encoded.
        processor: None where the rows came encoded and the checkpoint has none.
        released_type: the dtype of the checkpoint.
    """

    model: MultiExitModel
    rows: Rows
    processor: Any
    released_type: torch.dtype

    @property
    def spread(self) -> float:
        """Standard deviation of labels that are numbers; 1 without any, or where all are equal."""
        labelled = "label" in self.rows.dataset.column_names
        if self.model.problem_type != REGRESSION or not labelled:
            return 1.0
        labels = np.asarray(self.rows.dataset["label"][:], dtype=np.float64)
        return float(labels.std()) if np.ptp(labels) > 0 else 1.0


def check_pooling(pooling: str | None) -> None:
    """Refuse an unknown pooling."""
    if pooling is not None and pooling not in POOLINGS:
        known = [str(name) for name in POOLINGS]
        raise ConfigError(
            f"Unknown pooling '{pooling}'.{nearest(pooling, known)} Known: {', '.join(known)}."
        )


def check_depth(model: MultiExitModel) -> None:
    """Refuse a model that no exit fits into."""
    if model.depth < 2:
        raise ConfigError(
            "A model of one layer has no exit before its last. Give one of two layers or more."
        )


def read_examples(data: Data, columns: Columns) -> Dataset:
    """Examples with a `text` or `image` column, or a dataset that is encoded already, as it is."""
    if isinstance(data, Dataset) and "input_ids" in data.column_names:
        dataset = data if columns.max_rows is None else data.take(min(columns.max_rows, len(data)))
    else:
        dataset = load_examples(
            data,
            split=columns.split,
            text=columns.text,
            text_pair=columns.text_pair,
            image=columns.image,
            label=columns.label,
            max_rows=columns.max_rows,
        )
    if not len(dataset):
        raise DataError("The data has no rows; training needs some.")
    return dataset


def gather(
    path: Path,
    dataset: Dataset,
    head: Head | None,
    seed: int,
    processor: Any,
    longest: int | None,
    layers: int | None = None,
) -> Material:
    """Load the classifier in `path` and encode the rows for it.

    Args:
        head: a new one; None keeps the checkpoint's.
        seed: of the weights of a new head.
        processor: None for the checkpoint's.
        longest: tokens per row; the model's own limit holds as well.
        layers: only the first so many.
    """
    set_seed(seed)
    stock = _stock(path, head)
    if layers is not None:
        stock = truncated(stock, layers)
    if head is not None:
        _start_head_anew(stock)
    released_type = stock.dtype
    model = MultiExitModel.from_stock(stock.float())
    model.eval()
    if processor is None:
        needed = "input_ids" not in dataset.column_names
        processor = _processor(path, model.backbone.reads, needed)
    rows = encoded_rows(dataset, model, processor, longest)
    return Material(model, rows, processor, released_type)


def _stock(path: Path, head: Head | None) -> PreTrainedModel:
    return MultiExitModel.from_pretrained(path).stock if is_ours(path) else load_stock(path, head)


def _start_head_anew(stock: PreTrainedModel) -> None:
    """Redraw the task head, which may have come with weights for another task."""
    spread = getattr(stock.config, "initializer_range", 0.02)
    for name, part in stock.named_modules():
        of_backbone = name.partition(".")[0] == stock.base_model_prefix
        if isinstance(part, torch.nn.Linear) and not of_backbone:
            torch.nn.init.normal_(part.weight, std=spread)
            torch.nn.init.zeros_(part.bias)


def _processor(path: Path, reads: str, needed: bool) -> Any:
    """The checkpoint's own processor."""
    try:
        return load_processor(path, reads)
    except ModelError:
        if needed:
            raise
        logger.warning("%s holds no processor, so none is saved with the result.", path)
        return None


def encoded_rows(
    dataset: Dataset, model: MultiExitModel, processor: Any, longest: int | None
) -> Rows:
    """Rows as the model reads them and, where there, labels of its task."""
    dataset = encode_labels(dataset, task_of(model))
    if processor is None:  # the rows came encoded
        config: Any = model.stock.config
        return Rows.of(dataset, partial(collate, pad_id=config.pad_token_id))
    inputs = inputs_of(processor)
    limits = [limit for limit in (longest, model.max_length) if limit is not None]
    encoded = inputs.encode(dataset, min(limits, default=None))
    made_by = inputs.fingerprint() if model.backbone.reads == "image" else ""
    return Rows.of(encoded, inputs.collate, made_by)


def task_of(model: MultiExitModel) -> Task:
    """The task a classifier answers."""
    kind: Any = model.problem_type
    names: Any = model.stock.config.id2label
    labels = () if kind == "regression" else tuple(str(names[key]) for key in sorted(names))
    return Task(problem_type=kind, labels=labels)


def head_for(path: Path, dataset: Dataset, problem_type: str | None, fresh: bool) -> Head | None:
    """The new head that a checkpoint needs for a dataset's labels, or None if it has its own."""
    check_problem_type(problem_type)
    if is_ours(path):
        if fresh:
            raise ConfigError(
                f"{path} has exits for its own task already. For a new head start from a stock "
                "classifier or a pretrained encoder."
            )
        return None
    config = AutoConfig.from_pretrained(path)
    heads = ("ForSequenceClassification", "ForImageClassification")
    has_head = any(name.endswith(heads) for name in config.architectures or [])
    if has_head and not fresh:
        kind = "regression" if config.num_labels == 1 else "single_label_classification"
        given = config.problem_type or kind
        if problem_type is not None and problem_type != given:
            raise ConfigError(
                f"{path} is a classifier for {given}; problem type {problem_type} needs a new "
                "head (fresh_head=True, --fresh-head)."
            )
        return None
    task = infer_task(dataset, problem_type)
    return Head(problem_type=task.problem_type, labels=task.labels)


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A name for the weights a run starts from."""
    parts: list[bytes | str] = []
    for name, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [name, np.ascontiguousarray(raw).tobytes()]
    return fingerprint(*parts)


def release(
    model: MultiExitModel, output: Path, processor: Any, work: WorkFolder, plain: bool = False
) -> None:
    """Save on the main process, whole or not at all, then drop the work folder."""
    state = PartialState()
    if state.is_main_process:
        if plain:
            save_stock(model, output, processor)
        else:
            model.save_pretrained(output, processor=processor)
        work.remove()
        logger.info("Saved to %s.", output)
    state.wait_for_everyone()
