"""Writers of finished answers: JSONL, CSV, Parquet."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from offramp.engines import windows
from offramp.errors import OutputError
from offramp.prediction.labels import Labels
from offramp.registry import nearest

Entries = Iterable[dict[str, Any]]
_GROUP = 10_000


def columns(labels: Labels) -> dict[str, pa.DataType]:
    """Columns of the output and their types."""
    several = labels.problem_type == "multi_label_classification"
    fields = {"row": pa.int64()}
    if labels.problem_type != "regression":
        fields["label"] = pa.list_(pa.string()) if several else pa.string()
    fields["score"] = pa.list_(pa.float64()) if several else pa.float64()
    fields["exit_layer"] = pa.int64()
    if labels.forced:
        fields["forced"] = pa.bool_()
    if labels.sets is not None:
        fields["set"] = pa.list_(pa.string())
    if labels.scores and labels.problem_type != "regression":
        fields["scores"] = pa.struct([(name, pa.float64()) for name in labels.names])
    return {**fields, "error": pa.string()}


def writer_for(output: Path) -> Callable[[Path, dict[str, pa.DataType], Entries, bool], None]:
    """The writer for a file's name; its last argument says whether to compress."""
    name = output.name.lower().removesuffix(".gz")
    suffix = Path(name).suffix
    if suffix not in WRITERS or (suffix == ".parquet" and output.suffix.lower() == ".gz"):
        known = list(WRITERS)
        raise OutputError(
            f"{output}: unknown format '{output.suffix}'.{nearest(suffix, known)} "
            f"Known: {', '.join(known)}; text also as .gz."
        )
    if output.is_dir():
        raise OutputError(f"{output} is a folder. Name a file.")
    return WRITERS[suffix]


def _open(path: Path, compress: bool) -> TextIO:
    if compress:
        return gzip.open(path, "wt", encoding="utf-8", newline="")
    return open(path, "w", encoding="utf-8", newline="")


def _jsonl(path: Path, fields: dict[str, pa.DataType], entries: Entries, compress: bool) -> None:
    with _open(path, compress) as handle:
        for entry in entries:
            handle.write(json.dumps(entry, ensure_ascii=False, allow_nan=False) + "\n")


def _csv(path: Path, fields: dict[str, pa.DataType], entries: Entries, compress: bool) -> None:
    """Lists and scores stand in their cell as JSON."""
    with _open(path, compress) as handle:
        writer = csv.DictWriter(handle, list(fields), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _cell(value) for name, value in e.items()} for e in entries)


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else value


def _parquet(path: Path, fields: dict[str, pa.DataType], entries: Entries, compress: bool) -> None:
    schema = pa.schema(fields)
    with pq.ParquetWriter(path, schema) as writer:
        for group in windows(entries, _GROUP):
            writer.write_table(pa.Table.from_pylist(group, schema))


WRITERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
