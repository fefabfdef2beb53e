"""Rows that come as lines, from a program that writes them: answered as they arrive."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from offramp.data.columns import Chosen, choose_columns
from offramp.data.sources import Source
from offramp.engines import UNLIMITED, Budget
from offramp.errors import ConfigError, DataError
from offramp.prediction.predictor import Point, Predictor
from offramp.prediction.stream import Numbered, blocks, labels_of, opened

_MOST = 1 << 16
"""Bytes read at once: what a pipe holds."""


def predict_lines(
    model: Predictor | str | os.PathLike[str],
    handle: int,
    *,
    point: Point | None = None,
    scores: bool = False,
    sets: bool = False,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
    budget: Budget = UNLIMITED,
    **columns: Any,
) -> Iterator[list[dict[str, Any]]]:
    """Answers to lines as they arrive: all that are there are one batch, or a few.

    Where the first line is a JSON object, all must be, with columns as in a .jsonl file; else a
    line is a text, or the path of an image. Blank lines are skipped and not counted.

    Args:
        model, point, scores, sets, budget: see `predict`.
        handle: of an open file; 0 is stdin.
        columns: `text`, `text_pair`, `image` or `points`, of JSON objects.

    Raises DataError for a line that is none of these, after the answers to those before it. What is
    only found when it is read, as a broken image or the name of no point, takes along the lines
    that arrived with it.
    """
    predictor, ready = opened(model, point, device=device, dtype=dtype, backend=backend)
    labels = labels_of(predictor, ready, scores, sets, budget)
    return blocks(predictor, _Rows(**columns).of(_arriving(handle)), ready, labels, budget)


def _arriving(handle: int) -> Iterator[Sequence[bytes]]:
    """Whole lines: those that are there, as soon as there is one."""
    begun: list[bytes] = []  # parts of a line whose end has not come yet
    while data := _read(handle):
        first, *others = data.split(b"\n")
        begun.append(first)
        if others:
            yield [b"".join(begun), *others[:-1]]
            begun = others[-1:]
    yield [b"".join(begun)]


def _read(handle: int) -> bytes:
    try:
        return os.read(handle, _MOST)
    except OSError as problem:
        raise DataError(f"stdin cannot be read: {problem}.") from None


class _Rows:
    """Makes rows of lines."""

    def __init__(
        self,
        text: str | None = None,
        text_pair: str | None = None,
        image: str | None = None,
        points: str | None = None,
    ) -> None:
        self._named = {"text": text, "text_pair": text_pair, "image": image, "point": points}
        self._chosen: Chosen | None = None  # of JSON objects
        self._lines = 0
        self._rows = 0

    def of(self, arriving: Iterable[Sequence[bytes]]) -> Iterator[list[Numbered]]:
        """Rows of the lines of each arrival; those before a bad line come before its error."""
        for lines in arriving:
            rows: list[Numbered] = []
            problem: Exception | None = None
            try:
                rows.extend(self._numbered(lines))
            except (DataError, ConfigError) as met:
                problem = met
            if rows:
                yield rows
            if problem is not None:
                raise problem

    def _numbered(self, lines: Sequence[bytes]) -> Iterator[Numbered]:
        for line in lines:
            self._lines += 1
            try:
                text = line.decode("utf-8-sig" if self._lines == 1 else "utf-8").rstrip("\r")
            except UnicodeDecodeError:
                raise DataError(f"stdin: line {self._lines} is not UTF-8.") from None
            if text.strip():
                yield self._rows, self._item(text)
                self._rows += 1

    def _item(self, line: str) -> Any:
        if self._rows == 0:
            self._chosen = self._columns(_record(line))
        if self._chosen is None:
            return line
        record = _record(line)
        if record is None:
            raise DataError(f"stdin: line {self._lines} is no JSON object, and the first one is.")
        named = self._chosen._asdict().items()
        item = {name: record.get(column) for name, column in named if column and name != "label"}
        return {name: self._text(value, name) for name, value in item.items()}

    def _columns(self, first: dict[str, Any] | None) -> Chosen | None:
        if first is not None:
            source = Source("stdin", tuple(first), rows=1, read=lambda column: [first[column]])
            return choose_columns(source, label=None, **self._named)
        if any(self._named.values()):
            raise ConfigError(
                "--text, --image and --point-column name columns, but the lines are no JSON "
                "objects."
            )
        return None

    def _text(self, value: Any, name: str) -> str | None:
        if name == "point" and value in (None, ""):
            return None  # as an empty cell of a file
        if isinstance(value, str):
            return value
        raise DataError(f"stdin: line {self._lines} has no {name}: {repr(value)[:80]}.")


def _record(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
