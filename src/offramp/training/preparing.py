"""From what the user names to what is trained: a classifier, a tokenizer, encoded rows."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, set_seed

from offramp.data import Task, encode, encode_labels, infer_task, load_examples
from offramp.errors import DataError, ModelError
from offramp.model import Head, MultiExitModel, load_stock
from offramp.model.folder import is_ours, resolve
from offramp.storage import fingerprint
from offramp.training.options import TrainOptions
from offramp.training.running import Rows
from offramp.training.work import dataset_fingerprint

logger = logging.getLogger("offramp")

Data = str | Path | Dataset


@dataclass(frozen=True)
class Columns:
    """How to read examples, as `load_examples` takes it."""

    split: str | None = None
    text: str | None = None
    text_pair: str | None = None
    label: str | None = None
    max_rows: int | None = None


def read_examples(data: Data, columns: Columns) -> Dataset:
    """Examples with a `text` column, or a dataset that is encoded already, as it is."""
    if isinstance(data, Dataset) and "input_ids" in data.column_names:
        dataset = data if columns.max_rows is None else data.take(min(columns.max_rows, len(data)))
    else:
        dataset = load_examples(
            data,
            split=columns.split,
            text=columns.text,
            text_pair=columns.text_pair,
            label=columns.label,
            max_rows=columns.max_rows,
        )
    if not len(dataset):
        raise DataError("The data has no rows; training needs some.")
    return dataset


def has_head(source: Path) -> bool:
    """Whether a checkpoint is a classifier already."""
    if is_ours(source):
        return True
    names = AutoConfig.from_pretrained(source).architectures or []
    return any("ForSequenceClassification" in name for name in names)


def load_classifier(
    source: str | os.PathLike[str], head: Head | None, seed: int, **hub: Any
) -> PreTrainedModel:
    """The stock classifier of a folder or hub id, ours or not; `seed` decides a new head."""
    set_seed(seed)
    path = resolve(source, **hub)
    if is_ours(path):
        return MultiExitModel.from_pretrained(path).stock
    return load_stock(path, head)


def load_tokenizer(path: Path) -> Any:
    """The checkpoint's own tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as problem:
        raise ModelError(
            f"{path} holds no usable tokenizer ({str(problem).strip().splitlines()[0]}). "
            "Give one: tokenizer=AutoTokenizer.from_pretrained(...)."
        ) from problem


def task_of(model: MultiExitModel) -> Task:
    """The task a classifier answers."""
    regression = model.problem_type == "regression"
    names = model.stock.config.id2label
    labels = () if regression else tuple(str(names[key]) for key in sorted(names))
    return Task(problem_type=model.problem_type, labels=labels)  # type: ignore[arg-type]


def encoded_rows(
    dataset: Dataset, model: MultiExitModel, tokenizer: Any, max_length: int | None
) -> Rows:
    """Rows as numbers: tokens and, where there, labels of the model's task."""
    if "input_ids" not in dataset.column_names:
        limits = [limit for limit in (max_length, model.max_length) if limit is not None]
        dataset, _ = encode(dataset, tokenizer, min(limits, default=None))
    if "label" in dataset.column_names:
        dataset = encode_labels(dataset, task_of(model))
    pad_id = model.stock.config.pad_token_id
    return Rows.of(dataset, pad_id if tokenizer is None else tokenizer.pad_token_id)


def new_head(dataset: Dataset, problem_type: str | None) -> Head:
    """The head that a dataset's labels ask for."""
    task = infer_task(dataset, problem_type)
    return Head(problem_type=task.problem_type, labels=task.labels)


def asked_of(
    model: MultiExitModel, rows: Rows, options: TrainOptions, **more: Any
) -> dict[str, Any]:
    """What decides the weights that a run ends in."""
    return {
        "model": weights_fingerprint(model.stock),
        "data": dataset_fingerprint(rows.dataset),
        "options": options.what_changes_weights(),
        **more,
    }


def weights_fingerprint(module: torch.nn.Module) -> str:
    """A name for the weights a run starts from."""
    parts: list[bytes | str] = []
    for name, tensor in sorted(module.state_dict().items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        parts += [name, np.ascontiguousarray(raw).tobytes()]
    return fingerprint(*parts)
