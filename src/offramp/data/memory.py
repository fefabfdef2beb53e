"""Datasets that live in memory: no cache file is written and no progress bar drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from datasets import Dataset, Features


def take(dataset: Dataset, rows: np.ndarray) -> Dataset:
    """The given rows, in that order."""
    table = dataset.with_format("arrow")[:].take(pa.array(rows))
    return Dataset.from_dict(_columns(table), features=dataset.features)


def with_columns(dataset: Dataset, added: Mapping[str, tuple[Any, Any]]) -> Dataset:
    """The dataset with columns added or replaced: name -> (values, feature)."""
    columns = _columns(dataset.with_format("arrow")[:])
    columns.update({name: values for name, (values, _) in added.items()})
    kinds = {**dataset.features, **{name: feature for name, (_, feature) in added.items()}}
    return Dataset.from_dict(columns, features=Features(kinds))


def _columns(table: pa.Table) -> dict[str, Any]:
    return {name: table.column(name) for name in table.column_names}
