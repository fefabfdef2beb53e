"""What an exit table says about itself, and the columns that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from offramp import __version__
from offramp.errors import TableError
from offramp.storage import Strict, parse_document

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
Role = Literal["tune", "calibrate", "test"]
ColumnName = Annotated[
    str,
    StringConstraints(
        pattern=r"^(scores|layer_cost|exit_cost|ids|lengths|labels|signals\.[A-Za-z0-9_]{1,64})$"
    ),
]
Layout = dict[str, tuple[str, tuple[int, ...]]]


class Column(Strict):
    """One array of the table: little-endian, row first."""

    dtype: Literal["float32", "float64", "int32", "int64"]
    shape: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1, max_length=3)]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def nbytes(self) -> int:
        """Size of the data as a Python int, so that no claim can overflow it."""
        size = self.numpy_dtype.itemsize
        for length in self.shape:
            size *= length
        return size


class TableHeader(Strict):
    """Header of an exit table: `header.json` in its folder.

    Attributes:
        role: what the rows may be used for: `tune` may choose a policy, `calibrate` may set a
            threshold, `test` may only be read.
        dtype, engine: what computed the scores; they are stored as float32 whatever it was.
        offramp: version that recorded the table.
        content: of a table on the disk, fingerprint of the rest of the header and all columns.
        columns: every array of the table; its file is `<name>.npy`.
    """

    schema_version: Literal[1] = 1
    problem_type: ProblemType
    role: Role
    rows: int = Field(ge=1, le=10**10)
    depth: int = Field(ge=1, le=1000)
    num_scores: int = Field(ge=1, le=1_000_000)
    label_names: tuple[str, ...] = ()
    model_fingerprint: str
    processor_fingerprint: str
    data_fingerprint: str
    dtype: str = "float32"
    engine: str = "torch"
    offramp: str = __version__
    content: str | None = None
    columns: dict[ColumnName, Column]

    @classmethod
    def plan(
        cls,
        *,
        rows: int,
        depth: int,
        num_scores: int,
        problem_type: str,
        labelled: bool,
        signals: Mapping[str, tuple[int, ...]] | None = None,
        **fields: Any,
    ) -> Self:
        """A header whose columns follow from the sizes. Raises TableError.

        Args:
            labelled: whether the table holds labels.
            signals: name to what follows (rows, depth): () for one number, (k,) for k.
            fields: the other fields of the header.
        """
        layout = _layout(rows, depth, num_scores)
        if labelled:
            layout["labels"] = _label_layout(problem_type, rows, num_scores)
        for name, rest in (signals or {}).items():
            layout[f"signals.{name}"] = ("float32", (rows, depth, *rest))
        columns = {name: {"dtype": kind, "shape": shape} for name, (kind, shape) in layout.items()}
        sizes = {"rows": rows, "depth": depth, "num_scores": num_scores}
        data = {"problem_type": problem_type, "columns": columns, **sizes, **fields}
        return parse_document(cls, data, "Exit table", TableError)

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        kind, width = self.problem_type, self.num_scores
        if kind == "single_label_classification" and width < 2:
            raise ValueError("single_label_classification needs at least 2 scores")
        if kind == "regression" and width != 1:
            raise ValueError("regression needs exactly 1 score")
        if self.label_names and len(self.label_names) != width:
            raise ValueError(f"{len(self.label_names)} label_names for {width} scores")
        self._check_columns()
        return self

    def _check_columns(self) -> None:
        layout = _layout(self.rows, self.depth, self.num_scores)
        if "labels" in self.columns:
            layout["labels"] = _label_layout(self.problem_type, self.rows, self.num_scores)
        for name in self.signals:
            rest = self.columns[f"signals.{name}"].shape[2:]
            layout[f"signals.{name}"] = ("float32", (self.rows, self.depth, *rest))
        for name, (dtype, shape) in layout.items():
            column = self.columns.get(name)
            if column is None or (column.dtype, column.shape) != (dtype, shape):
                raise ValueError(f"column '{name}' must be {dtype} {list(shape)}")

    @property
    def signals(self) -> list[str]:
        return [name[8:] for name in self.columns if name.startswith("signals.")]


def _layout(rows: int, depth: int, num_scores: int) -> Layout:
    return {
        "scores": ("float32", (rows, depth, num_scores)),
        "layer_cost": ("float64", (rows, depth)),
        "exit_cost": ("float64", (rows, depth)),
        "ids": ("int64", (rows,)),
        "lengths": ("int32", (rows,)),
    }


def _label_layout(problem_type: str, rows: int, num_scores: int) -> tuple[str, tuple[int, ...]]:
    if problem_type == "multi_label_classification":
        return "float32", (rows, num_scores)
    return ("float32" if problem_type == "regression" else "int64"), (rows,)
