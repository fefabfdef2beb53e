"""The exit table: every exit's answer on a split, recorded once.

A folder with `header.json` and one plain `.npy` file per column (`TableHeader.columns`):

    scores      (rows, depth, classes)  raw scores of every exit; the last is the model's own
    signals.*   (rows, depth[, k])      what else a policy may read
    layer_cost  (rows, depth)           FLOPs of embedding and layers 1..i
    exit_cost   (rows, depth)           FLOPs of the exit after layer i alone
    ids         (rows,)                 hash of the input, the same wherever the input appears
    lengths     (rows,)                 tokens
    labels      (rows,) or (rows, classes), if there are any
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch

from offramp.errors import OutputError, TableError
from offramp.exits.base import ExitOutput
from offramp.policies import Rows
from offramp.storage import fingerprint, read_document, recover, whole_folder, write_document
from offramp.table.header import Column, TableHeader

Array = npt.NDArray[Any]
HEADER = "header.json"
_CHUNK = 8192


class ExitTable:
    """A recorded exit table; its columns are memory-mapped when opened from a folder."""

    _recorded: str | None = None  # fingerprint, as long as this is the table of a folder

    def __init__(self, header: TableHeader, columns: Mapping[str, Array]) -> None:
        self.header = header
        self.columns = dict(columns)
        _check_labels(self)

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open a table folder. Raises TableError naming the file that is not right."""
        path = Path(path)
        recover(path)
        if not (path / HEADER).is_file():
            raise TableError(
                f"{path}: no exit table here ({HEADER} is missing). Make one with `offramp record`."
            )
        header = read_document(TableHeader, path / HEADER, TableError)
        columns = {
            name: _map_column(path / f"{name}.npy", column)
            for name, column in header.columns.items()
        }
        table = cls(header.model_copy(update={"content": None}), columns)
        table._recorded = header.content
        return table

    @classmethod
    def from_arrays(
        cls,
        scores: npt.ArrayLike,
        *,
        problem_type: str,
        labels: npt.ArrayLike | None = None,
        signals: Mapping[str, npt.ArrayLike] | None = None,
        layer_cost: npt.ArrayLike | None = None,
        exit_cost: npt.ArrayLike | None = None,
        ids: npt.ArrayLike | None = None,
        lengths: npt.ArrayLike | None = None,
        **fields: Any,
    ) -> Self:
        """A table in memory, from scores (rows, depth, classes).

        Unless given, every layer costs 1, exits cost nothing and rows count from 0. `fields`
        are those of `TableHeader`, by default role `tune` and fingerprints "memory".
        """
        scores = np.asarray(scores, dtype=np.float32)
        if scores.ndim != 3:
            raise TableError(f"scores must be (rows, depth, classes), not {scores.shape}.")
        rows, depth, _ = scores.shape
        extras = {name: np.asarray(values) for name, values in (signals or {}).items()}
        header = _memory_header(scores, problem_type, labels is not None, extras, fields)
        given: dict[str, npt.ArrayLike] = {
            "scores": scores,
            "layer_cost": np.tile(np.arange(1.0, depth + 1), (rows, 1)),
            "exit_cost": np.zeros((rows, depth)),
            "ids": np.arange(rows),
            "lengths": np.ones(rows, dtype=np.int32),
        }
        passed = {"layer_cost": layer_cost, "exit_cost": exit_cost, "ids": ids}
        passed |= {"lengths": lengths, "labels": labels}
        given |= {name: values for name, values in passed.items() if values is not None}
        given |= {f"signals.{name}": values for name, values in extras.items()}
        columns = {
            name: np.ascontiguousarray(_as_column(name, given[name], column, rows))
            for name, column in header.columns.items()
        }
        return cls(header, columns)

    @property
    def rows(self) -> int:
        return self.header.rows

    @property
    def depth(self) -> int:
        return self.header.depth

    @property
    def problem_type(self) -> str:
        return self.header.problem_type

    @property
    def scores(self) -> Array:
        return self.columns["scores"]

    @property
    def labels(self) -> Array | None:
        return self.columns.get("labels")

    @property
    def ids(self) -> Array:
        return self.columns["ids"]

    def start(self, rows: Array) -> Rows:
        """What a policy is started on, for row indices `rows`."""
        lengths = self.columns["lengths"][rows].astype(np.int64)
        return Rows(torch.from_numpy(self.ids[rows]), torch.from_numpy(lengths))

    def output(self, rows: Array, layer: int) -> ExitOutput:
        """What the exit after `layer` (1-based) said about row indices `rows`."""
        signals = {
            name: torch.from_numpy(self.columns[f"signals.{name}"][rows, layer - 1])
            for name in self.header.signals
        }
        return ExitOutput(torch.from_numpy(self.scores[rows, layer - 1]), signals)

    def take(self, rows: npt.ArrayLike) -> ExitTable:
        """The table of these rows (indices or a mask), in that order, in memory."""
        rows = np.asarray(rows)
        index = np.arange(self.rows)[rows] if rows.size else rows
        if not len(index):
            raise TableError("No row is left: a table needs at least one.")
        columns = {name: np.ascontiguousarray(self.columns[name][index]) for name in self.columns}
        return ExitTable(_with_rows(self.header, len(index)), columns)

    def save(self, path: str | Path) -> None:
        """Write the table to a folder."""
        self.check_content()
        with TableWriter(path, self.header) as writer:
            for first in range(0, self.rows, _CHUNK):
                rows = np.arange(first, min(first + _CHUNK, self.rows))
                writer.write(rows, **{n: column[rows] for n, column in self.columns.items()})

    def check_model(self, fingerprint: str) -> None:
        """Refuse a table recorded with another model."""
        if fingerprint != self.header.model_fingerprint:
            raise TableError(
                f"This table was recorded with model {self.header.model_fingerprint}, "
                f"not with {fingerprint}. Record it again with `offramp record`."
            )

    def check_content(self) -> None:
        """Refuse a table that is not as it was recorded, if it was. Raises TableError."""
        if self._recorded is None:
            return
        if self._recorded != _content(self.header, self.columns):
            raise TableError(
                "This table has been changed since it was recorded. Record it again with "
                "`offramp record`."
            )


class TableWriter:
    """Streams an exit table to disk; the folder appears whole when the block ends.

    Rows may come in any order; each must be written at least once.

        with TableWriter(path, TableHeader.plan(rows=..., ...)) as writer:
            writer.write(rows, scores=..., layer_cost=..., exit_cost=..., ids=..., lengths=...)
    """

    def __init__(self, path: str | Path, header: TableHeader) -> None:
        self.path = Path(path)
        self.header = header

    def __enter__(self) -> Self:
        self._context = self._session()
        return self._context.__enter__()

    def __exit__(self, *problem: Any) -> bool | None:
        return self._context.__exit__(*problem)

    @contextmanager
    def _session(self) -> Iterator[Self]:
        if self.path.exists() and not _replaceable(self.path):
            raise OutputError(f"{self.path}: exists and is not an exit table. Give another folder.")
        with whole_folder(self.path) as staged:
            _check_space(staged, self.header)
            self._written = np.zeros(self.header.rows, dtype=bool)
            self._columns = {
                name: np.lib.format.open_memmap(
                    staged / f"{name}.npy", "w+", column.numpy_dtype, column.shape
                )
                for name, column in self.header.columns.items()
            }
            yield self
            write_document(staged / HEADER, self._finish())

    def write(self, rows: npt.ArrayLike, **columns: npt.ArrayLike) -> None:
        """Fill every column for row indices `rows`; a signal is named `signals.<name>`."""
        index = np.asarray(rows, dtype=np.int64)
        if index.ndim != 1 or not ((index >= 0) & (index < self.header.rows)).all():
            raise TableError(f"Row indices must be a list within 0..{self.header.rows - 1}.")
        if set(columns) != set(self._columns):
            wrong = ", ".join(sorted(set(columns) ^ set(self._columns)))
            raise TableError(f"Every column is written at once; missing or unknown: {wrong}.")
        for name, values in columns.items():
            column = self.header.columns[name]
            self._columns[name][index] = _as_column(name, values, column, len(index))
        self._written[index] = True

    def _finish(self) -> TableHeader:
        missing = self.header.rows - int(self._written.sum())
        if missing:
            raise TableError(f"{self.path}: {missing} of {self.header.rows} rows were not written.")
        content = _content(self.header, self._columns)
        for column in self._columns.values():
            column.flush()
        self._columns = {}
        return self.header.model_copy(update={"content": content})


def concatenate(shards: Sequence[ExitTable]) -> ExitTable:
    """One table in memory from shards whose headers agree in all but their rows."""
    if not shards:
        raise TableError("There is no table to concatenate.")
    first = shards[0].header
    for shard in shards[1:]:
        if wrong := _differences(first, shard.header):
            raise TableError(f"Tables of different kinds cannot be joined; they differ in {wrong}.")
    for shard in shards:
        shard.check_content()
    columns = {name: np.concatenate([s.columns[name] for s in shards]) for name in first.columns}
    header = _with_rows(first, sum(shard.rows for shard in shards))
    data = [shard.header.data_fingerprint for shard in shards]
    if len(set(data)) > 1:
        header = header.model_copy(update={"data_fingerprint": fingerprint(*data)})
    return ExitTable(header, columns)


def require_role(table: ExitTable, allowed: Sequence[str], action: str) -> None:
    """Refuse to use a table against its role; `action` is the verb: 'choose a policy'."""
    if table.header.role not in allowed:
        raise TableError(
            f"A table with role '{table.header.role}' may not be used to {action}; "
            f"allowed: {', '.join(allowed)}. Record other rows with that role."
        )


def overlap(first: ExitTable, second: ExitTable) -> int:
    """How many distinct inputs two tables share."""
    return len(np.intersect1d(first.ids, second.ids))


def refuse_overlap(first: ExitTable, second: ExitTable) -> None:
    """Refuse two tables that share an input: one of them would flatter the other."""
    if shared := overlap(first, second):
        raise TableError(
            f"{shared} inputs are in both the '{first.header.role}' and the "
            f"'{second.header.role}' table. Drop them from one of the two and record it again."
        )


def _memory_header(
    scores: Array, problem_type: str, labelled: bool, signals: Mapping[str, Array], fields: Any
) -> TableHeader:
    rows, depth, num_scores = scores.shape
    names = ("model_fingerprint", "processor_fingerprint", "data_fingerprint")
    defaults = {"role": "tune", **dict.fromkeys(names, "memory")}
    return TableHeader.plan(
        rows=rows,
        depth=depth,
        num_scores=num_scores,
        problem_type=problem_type,
        labelled=labelled,
        signals={name: values.shape[2:] for name, values in signals.items()},
        **(defaults | fields),
    )


def _with_rows(header: TableHeader, rows: int) -> TableHeader:
    columns = {
        name: Column(dtype=column.dtype, shape=(rows, *column.shape[1:]))
        for name, column in header.columns.items()
    }
    return header.model_copy(update={"rows": rows, "columns": columns})


def _content(header: TableHeader, columns: Mapping[str, Array]) -> str:
    """Fingerprint of all that a table holds."""
    said = header.model_dump_json()
    flat = (np.ascontiguousarray(columns[name]).reshape(-1) for name in sorted(columns))
    return fingerprint(said, *(column.view(np.uint8).data for column in flat))


def _differences(first: TableHeader, second: TableHeader) -> str:
    """Fields that differ and do not follow from the rows."""
    one, other = _with_rows(first, 1).model_dump(), _with_rows(second, 1).model_dump()
    return ", ".join(key for key in one if one[key] != other[key] and key != "data_fingerprint")


def _as_column(name: str, values: npt.ArrayLike, column: Column, rows: int) -> Array:
    """`values` as the column wants them for `rows` rows. Raises TableError."""
    array = np.asarray(values)
    shape = (rows, *column.shape[1:])
    if array.shape != shape:
        raise TableError(f"Column '{name}' needs shape {shape}, got {array.shape}.")
    if not np.can_cast(array.dtype, column.numpy_dtype, casting="same_kind"):
        raise TableError(f"Column '{name}' needs {column.dtype}, got {array.dtype}.")
    return array.astype(column.numpy_dtype)


def _map_column(path: Path, column: Column) -> Array:
    """Map a column file whose type, shape and size are what the header claims."""
    try:
        with open(path, "rb") as handle:
            claim = _read_npy_header(handle)
            offset = handle.tell()
        size = path.stat().st_size
    except OSError as problem:
        raise TableError(f"{path}: cannot be read: {problem}.") from None
    if claim != (column.shape, False, column.numpy_dtype):
        raise TableError(
            f"{path}: does not hold {column.dtype} {list(column.shape)} as its header says. "
            "Record the table again."
        )
    if size != offset + column.nbytes:
        raise TableError(
            f"{path}: has {size} bytes where {offset + column.nbytes} are expected. "
            "It is truncated or changed; record the table again."
        )
    return np.asarray(np.memmap(path, column.numpy_dtype, "r", offset, column.shape))


def _read_npy_header(handle: Any) -> tuple[Any, ...] | None:
    """Shape, order and type that an .npy file claims; None if it is not one of ours."""
    try:
        if np.lib.format.read_magic(handle) != (1, 0):
            return None
        return np.lib.format.read_array_header_1_0(handle)
    except OSError:
        raise
    except Exception:
        # numpy parses the claim as a Python literal, which can fail in many ways
        return None


def _check_space(folder: Path, header: TableHeader) -> None:
    """Refuse before the disk is full: a full disk under a memory map kills the process."""
    needed = sum(column.nbytes for column in header.columns.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OutputError(
            f"{folder.parent}: the exit table needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB "
            "are free. Make room, or record fewer rows."
        )


def _replaceable(path: Path) -> bool:
    return path.is_dir() and ((path / HEADER).is_file() or not any(path.iterdir()))


def _check_labels(table: ExitTable) -> None:
    labels, width = table.labels, table.header.num_scores
    if labels is None:
        return
    if table.problem_type == "single_label_classification":
        fine = labels.min() >= 0 and labels.max() < width
        wanted = f"whole numbers from 0 to {width - 1}"
    elif table.problem_type == "regression":
        fine, wanted = bool(np.isfinite(labels).all()), "finite numbers"
    else:
        fine, wanted = bool(np.isin(labels, (0, 1)).all()), "0 or 1"
    if not fine:
        raise TableError(f"Labels of a {table.problem_type} table must be {wanted}.")
