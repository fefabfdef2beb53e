"""From any source to the one shape that everything else reads: input, label, row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value

from offramp.data import digits, docstrings
from offramp.data.columns import (
    Chosen,
    choose_columns,
    read_kept,
    read_label,
    read_names,
    read_text,
)
from offramp.data.hashing import dataset_ids, draws
from offramp.data.images import image_feature, read_images
from offramp.data.memory import take
from offramp.data.sources import Source, open_source
from offramp.errors import ConfigError, DataError

BUILT_IN = {"docstrings": docstrings.load, "digits": digits.load}
KEEP = "keep/"
"""Before the name of a column that is only taken along."""


def load_examples(
    source: str | Path | Dataset | DatasetDict,
    *,
    split: str | None = None,
    text: str | None = None,
    text_pair: str | None = None,
    image: str | None = None,
    label: str | None = None,
    points: str | None = None,
    keep: Sequence[str] | None = None,
    max_rows: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Load examples, with the columns text (and text_pair) or image, row and, where there, label.

    Args:
        source: a CSV, TSV, JSONL or Parquet file (plain or .gz), a hub id (`owner/name` or
            `owner/name:config`), a Dataset or DatasetDict, a folder of images with one
            subfolder per class, or a built-in set: `docstrings` (texts) or `digits` (images).
            TSV means tabs and no quoting: every line is a row.
        split: which split, where the source has several.
        text, text_pair, image, label: column names; without them they are found by convention
            (text, sentence1 + sentence2, image, label, score, ...), and two candidates are an
            error. In files, images are paths, relative to the file they stand in.
        points: column of the operating point that each row asks for, if some do.
        keep: columns to take along as they are, such as an id.
        max_rows: keep this many rows, drawn by a hash of the input and `seed`: not the head
            of the file, and the same rows wherever they stand. Duplicates count as rows.

    Returns:
        `text` and `text_pair` as str, `image` as a PIL image, `label` as it stands in the
        source (str, int, float or a list; numbers are read from CSV and TSV cells), `point` as
        str or None, `keep/<name>` for what is kept, `row` = number in the source, from 0.

    Raises:
        DataError: what is wrong with the file, column or row, and what to do.
    """
    if max_rows is not None and max_rows < 1:
        raise ConfigError(f"--max-rows is {max_rows}; it must be at least 1.")
    built_in = BUILT_IN.get(source) if isinstance(source, str) else None
    opened = open_source(built_in() if built_in else source, split)
    if not opened.rows:
        raise DataError(f"{opened.name}: there are no rows, only column names.")
    chosen = choose_columns(opened, text, text_pair, label, image, points)
    dataset = _examples(opened, chosen, keep or ())
    if max_rows is None or len(dataset) <= max_rows:
        return dataset
    order = np.argsort(draws(dataset_ids(dataset), seed, "sample"), kind="stable")
    return take(dataset, np.sort(order[:max_rows]))


def _examples(source: Source, chosen: Chosen, keep: Sequence[str]) -> Dataset:
    columns: dict[str, pa.ChunkedArray] = {}
    features: dict[str, Any] = {}
    for name, column in (("text", chosen.text), ("text_pair", chosen.text_pair)):
        if column is not None:
            columns[name], features[name] = read_text(source, column), Value("string")
    if chosen.image is not None:
        columns["image"], features["image"] = read_images(source, chosen.image), image_feature()
    if chosen.label is not None:
        labels = read_label(source, chosen.label)
        if labels is not None:
            columns["label"] = labels
            features["label"] = _label_feature(labels.type, source.class_names.get(chosen.label))
    if chosen.point is not None:
        columns["point"], features["point"] = read_names(source, chosen.point), Value("string")
    for name in keep:
        kept = read_kept(source, name)
        columns[KEEP + name], features[KEEP + name] = kept, Value(str(kept.type))
    columns["row"] = pa.array(np.arange(source.rows))
    features["row"] = Value("int64")
    return Dataset.from_dict(columns, features=Features(features))


def _label_feature(kind: pa.DataType, names: Sequence[str] | None) -> Value | ClassLabel | List:
    if pa.types.is_list(kind):
        return List(_label_feature(kind.value_type, names))
    return ClassLabel(names=list(names)) if names else Value(str(kind))
