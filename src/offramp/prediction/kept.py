"""Columns of the data that go into the answers beside what was said."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import pyarrow as pa
from datasets import Dataset

from offramp.data.loading import KEEP
from offramp.errors import ConfigError

_GROUP = 1000


class Kept:
    """What `load_examples` took along with its `keep`.

    Args:
        examples: in the order of the answers.
        answer: columns of the answers, with their types.

    Raises ConfigError for a column that is called as one of the answers'.
    """

    def __init__(self, examples: Dataset, answer: dict[str, pa.DataType]) -> None:
        self._examples = examples
        self._columns = [name for name in examples.column_names if name.startswith(KEEP)]
        self._names = [name.removeprefix(KEEP) for name in self._columns]
        if taken := [name for name in self._names if name in answer]:
            raise ConfigError(
                f"--keep {taken[0]}: the answers have a '{taken[0]}' of their own. Rename the "
                "column in the data."
            )
        types = examples.features.arrow_schema
        kept = {n: types.field(c).type for n, c in zip(self._names, self._columns, strict=True)}
        self.fields = {"row": answer["row"], **kept, **answer}

    def beside(self, entries: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """Each entry, from the first row on, with what is kept of its row."""
        if not self._columns:
            yield from entries
            return
        batches = self._examples.select_columns(self._columns).iter(_GROUP)
        rows = chain.from_iterable(zip(*batch.values(), strict=True) for batch in batches)
        for entry, values in zip(entries, rows, strict=True):
            kept = dict(zip(self._names, values, strict=True))
            yield {"row": entry["row"], **kept, **entry}
