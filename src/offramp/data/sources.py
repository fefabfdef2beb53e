"""Readers: a file, a hub dataset or a Dataset becomes named columns, or one clear DataError.

Files are parsed here and kept in memory, never through a cache folder: a changed file is
read anew, and a home folder that cannot be written is no obstacle.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image

from offramp.errors import DataError
from offramp.registry import nearest


@dataclass(frozen=True)
class Source:
    """Columns that can be read one by one.

    Attributes:
        name: what errors call it.
        columns: the column names, in order.
        rows: how many there are.
        read: column name -> values, an Arrow column or a list of Python values.
        place: row number (from 0) -> how errors name it.
        untyped: True where every cell is text (CSV, TSV), so numbers are still to be read.
        class_names: for columns that hold numbers of named classes, the names.
        images: columns that hold images.
        folder: what paths in it are relative to.
    """

    name: str
    columns: tuple[str, ...]
    rows: int
    read: Callable[[str], pa.ChunkedArray | list[Any]]
    place: Callable[[int], str] = "row {}".format
    untyped: bool = False
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)
    images: tuple[str, ...] = ()
    folder: Path = Path()


def open_source(source: str | Path | Dataset | DatasetDict, split: str | None) -> Source:
    """Open a file, a folder of images, a hub id (`name:config`), a Dataset or a DatasetDict."""
    if isinstance(source, DatasetDict):
        return _dataset(_one_split(source, split), "the given DatasetDict")
    if isinstance(source, Dataset):
        _refuse_split("the given Dataset", split)
        return _dataset(source, "the given Dataset")
    if not isinstance(source, str | Path):
        raise DataError(
            f"Cannot read examples from a {type(source).__name__}. Give a file, a hub id, "
            "a datasets.Dataset or DatasetDict (a streaming dataset is not supported)."
        )
    path = Path(os.path.expanduser(source))
    if os.path.isdir(path):  # unlike Path.is_dir it bears any name
        return _folder(path, split)
    if os.path.exists(path) or isinstance(source, Path) or _looks_like_a_file(source):
        _refuse_split(str(path), split)
        return _file(path)
    return _hub(source, split)


# --- hub and Dataset ------------------------------------------------------------------


def _hub(name: str, split: str | None) -> Source:
    repository, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(repository, config or None)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as problem:
        raise DataError(
            f"'{name}' is neither a file nor a dataset that can be loaded from the hub: "
            f"{' '.join(str(problem).split())}. Give a path, 'docstrings', or a hub id "
            "('owner/name', 'owner/name:config'); without a network only hub sets that "
            "were downloaded before can be read."
        ) from None
    return _dataset(_one_split(loaded, split), f"'{name}'")


def _one_split(found: DatasetDict, split: str | None) -> Dataset:
    names = [str(name) for name in found]
    if split is None and len(names) == 1:
        split = names[0]
    if split not in names:
        given = "no split was given" if split is None else f"there is no split '{split}'"
        hint = nearest(split, names) if split else ""
        raise DataError(
            f"The data has the splits {', '.join(names)} and {given}.{hint} "
            "Name one with --split (split=...)."
        )
    return found[split]


def _refuse_split(name: str, split: str | None) -> None:
    if split is not None:
        raise DataError(f"{name} has no splits, but split '{split}' was asked for; leave it out.")


def _dataset(dataset: Dataset, name: str) -> Source:
    def read(column: str) -> pa.ChunkedArray:
        return dataset.select_columns([column]).with_format("arrow")[:].column(column)

    return Source(
        name=name,
        columns=tuple(dataset.column_names),
        rows=len(dataset),
        read=read,
        class_names=_class_names(dataset.features),
        images=_images(dataset.features),
    )


def _class_names(features: Features) -> dict[str, list[str]]:
    inner = {column: getattr(kind, "feature", kind) for column, kind in features.items()}
    return {column: kind.names for column, kind in inner.items() if isinstance(kind, ClassLabel)}


def _images(features: Features) -> tuple[str, ...]:
    return tuple(column for column, kind in features.items() if isinstance(kind, Image))


# --- a folder of images ---------------------------------------------------------------

SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test"}
IMAGE_FILES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


def _folder(path: Path, split: str | None) -> Source:
    """FOLDER/CLASS/file, FOLDER/SPLIT/CLASS/file, or files without classes."""
    root = path if split is None else path / split
    found = (file for file in root.rglob("*") if file.suffix.lower() in IMAGE_FILES)
    inside = (file.relative_to(root) for file in found)
    files = sorted(file for file in inside if not any(p.startswith(".") for p in file.parts))
    if not files:
        there = sorted(part.name for part in path.iterdir() if part.is_dir())
        if split is not None and there:
            raise DataError(
                f"{path} has no split '{split}'.{nearest(split, there)} It has: {', '.join(there)}."
            )
        raise DataError(
            f"{root}: holds no images ({', '.join(IMAGE_FILES)}). Data is a file, a hub id, or a "
            "folder of images with one subfolder per class."
        )
    depths = {len(file.parts) for file in files}
    names = sorted({file.parts[0] for file in files})
    unsplit = depths == {3} or (depths == {2} and SPLITS.issuperset(names))
    if unsplit and split is None:
        raise DataError(
            f"{path} has the splits {', '.join(names)} and no split was given. "
            "Name one with --split (split=...)."
        )
    if depths not in ({1}, {2}):
        raise DataError(
            f"{root}: images lie at different depths ({files[0]}, {files[-1]}). Give every "
            "class one subfolder, or lay all images into one folder."
        )
    columns = {"image": [str(file) for file in files]}
    if depths == {2}:
        columns["label"] = [file.parts[0] for file in files]
    return Source(
        name=str(root),
        columns=tuple(columns),
        rows=len(files),
        read=lambda column: list(columns[column]),
        place=lambda row: f"row {row} ({files[row]})",
        folder=root,
    )


# --- files ----------------------------------------------------------------------------

_SUFFIX = re.compile(r"\.(csv|tsv|jsonl|json|parquet|txt|xlsx?|gz|zip)$", re.IGNORECASE)


def _looks_like_a_file(source: str) -> bool:
    return bool(_SUFFIX.search(source)) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:.+)?", source)


def _file(path: Path) -> Source:
    name = path.name.lower().removesuffix(".gz")
    reader = _READERS.get(Path(name).suffix)
    if not os.path.exists(path):
        siblings = [file.name for file in path.parent.glob("*") if file.is_file()]
        raise DataError(f"{path}: no such file.{nearest(path.name, siblings)}")
    if reader is None or not path.is_file():
        raise DataError(
            f"{path}: not a file of examples. Allowed: {', '.join(_READERS)}, plain or .gz "
            "(JSON must have one object per line and be named .jsonl)."
        )
    data = _bytes(path)
    if not data:
        raise DataError(f"{path}: the file is empty.")
    return reader(path, data)


def _bytes(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.suffix.lower() == ".gz" else data
    except (OSError, EOFError, zlib.error) as problem:
        raise DataError(f"{path}: cannot be read: {problem}.") from None


def _text(path: Path, data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        line = data.count(b"\n", 0, problem.start) + 1
        raise DataError(
            f"{path}: line {line} is not UTF-8 (byte {problem.start}). Save the file as UTF-8."
        ) from None


def _tsv(path: Path, data: bytes) -> Source:
    """Tabs and no quoting: a line is a row, whatever quotes it holds.

    Only LF ends a line; the CR before it belongs to the line end where the header has one.
    """
    *lines, rest = _text(path, data).split("\n")
    if lines and lines[0].endswith("\r"):
        lines = [line.removesuffix("\r") for line in lines]
    if rest:  # a last line without an end
        lines.append(rest)
    if not lines:
        raise DataError(f"{path}: the file is empty.")
    header, *rows = [line.split("\t") for line in lines]
    return _delimited(path, header, rows, list(range(2, len(lines) + 1)))


def _csv(path: Path, data: bytes) -> Source:
    """Commas and quotes as in RFC 4180; blank lines are skipped."""
    text = _text(path, data)
    # The module's limit on a field is global and smaller than a long document.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows, lines = [], []
    start = 1
    try:
        for row in reader:
            if row:
                rows.append(row)
                lines.append(start)
            start = reader.line_num + 1
    except csv.Error as problem:
        raise DataError(f"{path}: line {start}: not valid CSV: {problem}.") from None
    if not rows:
        raise DataError(f"{path}: the file is empty.")
    return _delimited(path, rows[0], rows[1:], lines[1:])


def _delimited(path: Path, header: list[str], rows: list[list[str]], lines: list[int]) -> Source:
    wrong = [number for number, row in enumerate(rows) if len(row) != len(header)]
    if wrong:
        first = wrong[0]
        raise DataError(
            f"{path}: line {lines[first]} has {len(rows[first])} fields where the header has "
            f"{len(header)} ({len(wrong)} such lines)."
        )
    twice = [name for name in header if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: the header names column '{twice[0]}' twice.")

    def read(column: str) -> pa.ChunkedArray:
        index = header.index(column)
        return pa.chunked_array([pa.array([row[index] for row in rows], pa.string())])

    return Source(
        name=str(path),
        columns=tuple(header),
        rows=len(rows),
        read=read,
        place=lambda row: f"row {row} (line {lines[row]})",
        untyped=True,
        folder=path.parent,
    )


def _jsonl(path: Path, data: bytes) -> Source:
    """One JSON object per line; blank lines are skipped, a missing key is a missing value."""
    records, lines = [], []
    for number, line in enumerate(_text(path, data).split("\n"), start=1):
        if line.strip():
            records.append(_record(path, number, line))
            lines.append(number)
    return Source(
        name=str(path),
        columns=tuple({name: None for record in records for name in record}),
        rows=len(records),
        read=lambda column: [record.get(column) for record in records],
        place=lambda row: f"row {row} (line {lines[row]})",
        folder=path.parent,
    )


def _record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise DataError(f"{path}: line {number} is not JSON: {problem}.") from None
    if not isinstance(record, dict):
        raise DataError(
            f"{path}: line {number} holds a {type(record).__name__}, not an object such as "
            '{"text": "...", "label": 1}.'
        )
    return record


def _parquet(path: Path, data: bytes) -> Source:
    try:
        table = pq.ParquetFile(pa.BufferReader(data))
        schema = table.schema_arrow
        features = Features.from_arrow_schema(schema)
    except (pa.ArrowException, OSError, ValueError) as problem:
        raise DataError(f"{path}: not a readable Parquet file: {problem}.") from None

    def read(column: str) -> pa.ChunkedArray:
        try:
            return table.read(columns=[column]).column(column)
        except (pa.ArrowException, OSError, KeyError) as problem:
            raise DataError(f"{path}: column '{column}' cannot be read: {problem}.") from None

    return Source(
        name=str(path),
        columns=tuple(schema.names),
        rows=table.metadata.num_rows,
        read=read,
        class_names=_class_names(features),
        images=_images(features),
        folder=path.parent,
    )


_READERS: dict[str, Callable[[Path, bytes], Source]] = {
    ".csv": _csv,
    ".tsv": _tsv,
    ".jsonl": _jsonl,
    ".parquet": _parquet,
}


# --- values ---------------------------------------------------------------------------


def as_arrow(source: Source, column: str) -> pa.ChunkedArray:
    """A column of one Arrow type; a value of another kind is named with its row."""
    values = source.read(column)
    if isinstance(values, list):
        return pa.chunked_array([_typed(source, column, values)])
    if pa.types.is_dictionary(values.type):
        return values.cast(values.type.value_type)
    return values


def _typed(source: Source, column: str, values: list[Any]) -> pa.Array:
    """Python values as one Arrow type; a value of another kind is named with its row."""
    kinds = [_kind(value) for value in values]
    counts = Counter(kind for kind in kinds if kind is not None)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        row = next(row for row, kind in enumerate(kinds) if kind not in (None, usual))
        raise DataError(
            f"{source.name}: {source.place(row)}: '{column}' is {kinds[row]} where other rows "
            f"hold {usual}."
        )
    try:
        return pa.array(values)
    except _ARROW_REFUSES as problem:
        bad = next((row for row, value in enumerate(values) if not _convertible(value)), 0)
        raise DataError(f"{source.name}: {source.place(bad)}: '{column}': {problem}.") from None


_ARROW_REFUSES = (pa.ArrowException, OverflowError, UnicodeEncodeError)


def _kind(value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, list):
        inner = {str(_kind(item)) for item in value}
        return f"a list of {' and '.join(sorted(inner))}" if inner else None
    kinds = {str: "text", int: "a number", float: "a number", bool: "true/false"}
    return kinds.get(type(value), "an object")


def _convertible(value: Any) -> bool:
    try:
        pa.array([value])
    except _ARROW_REFUSES:
        return False
    return True
