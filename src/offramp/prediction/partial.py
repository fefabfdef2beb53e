"""Answers on their way to a file: a run that was killed goes on where it stopped.

`<output>.part.jsonl` holds a header line that names model, point, data and settings, then a
line per row, in order. Lines are appended in blocks and reach the disk before the next block
starts, so after a kill at most the last line is torn; it is cut and that row done again.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from offramp.errors import OutputError

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger("offramp")


class PartialFile:
    """The unfinished output of a run.

    Args:
        output: the file that will be there in the end.
        settings: all that decides what the rows say; a part of other settings is discarded.
    """

    def __init__(self, output: Path, settings: dict[str, Any]) -> None:
        self.path = output.with_name(f"{output.name}.part.jsonl")
        self._settings = settings
        self.rows = 0

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handle: BinaryIO = open(self.path, "a+b")
        except OSError as problem:
            raise OutputError(f"{self.path}: cannot be written: {problem}.") from None
        try:
            self._lock()
            self._resume()
        except BaseException:
            self._handle.close()
            raise
        return self

    def _lock(self) -> None:
        """The lock ends with the process, however that ends."""
        if sys.platform == "win32":
            return
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise OutputError(f"{self.path}: another run is writing it right now.") from None

    def _resume(self) -> None:
        """Keep the whole lines of a run with these settings; otherwise start anew."""
        self._handle.seek(0)
        end, lines = 0, 0
        for number, line in enumerate(self._handle):
            if not line.endswith(b"\n"):
                break
            if number == 0 and line != _line(self._settings):
                logger.warning(
                    "%s is from a run with another model, point, data or setting; "
                    "it is discarded and all rows are done anew.",
                    self.path,
                )
                break
            end, lines = end + len(line), lines + 1
        self._handle.truncate(end)
        self.rows = max(0, lines - 1)
        if lines == 0:
            self._append([self._settings])

    def append(self, entries: Sequence[dict[str, Any]]) -> None:
        """Add rows and wait until they are on the disk."""
        self._append(entries)
        self.rows += len(entries)

    def _append(self, entries: Sequence[dict[str, Any]]) -> None:
        try:
            self._handle.write(b"".join(map(_line, entries)))
            self._handle.flush()
            os.fsync(self._handle.fileno())
        except OSError as problem:
            raise OutputError(f"{self.path}: cannot be written: {problem}.") from problem

    def entries(self) -> Iterator[dict[str, Any]]:
        """All rows so far. Raises OutputError where a line is not one of ours."""
        self._handle.seek(0)
        self._handle.readline()
        for number, line in enumerate(self._handle):
            try:
                entry = json.loads(line)
                whole = isinstance(entry, dict) and "row" in entry
            except ValueError:
                whole = False
            if not whole:
                raise OutputError(
                    f"{self.path}: line {number + 2} is broken. Delete the file and run again."
                )
            yield entry

    def discard(self) -> None:
        """Remove the file: its rows have reached the output."""
        with contextlib.suppress(OSError):
            self.path.unlink()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._handle.close()


def _line(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False, allow_nan=False).encode("utf-8") + b"\n"
