"""Changed texts, kept in a file as they are found, so that a killed search goes on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from offramp.errors import ConfigError, OutputError
from offramp.storage import whole_file


class Kept:
    """One JSON object a line, by the number of its row; the first line says what they belong to.

    Args:
        path: None keeps them in memory alone.
        head: what was searched for, on which rows, with which model.

    Raises:
        ConfigError: the file is of another search.
    """

    def __init__(self, path: Path | None, head: Mapping[str, Any]) -> None:
        self._path, self._head = path, dict(head)
        self.rows: dict[int, dict[str, Any]] = {}
        if path is None:
            return
        lines = _lines(path)
        if lines and lines[0] != self._head:
            raise ConfigError(
                f"{path} holds an attack with other options, rows or weights. Give the same again "
                "to go on, or another --output."
            )
        if not all(isinstance(line, dict) and type(line.get("row")) is int for line in lines[1:]):
            raise ConfigError(f"{path}: not the texts of an attack: a line that is no row.")
        self.rows = {line["row"]: line for line in lines[1:]}
        self._write()  # without what a kill left of a last line

    def add(self, row: int, found: Mapping[str, Any]) -> None:
        """Keep what was found for a row."""
        self.rows[row] = {"row": row, **found}
        if self._path is None:
            return
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(_line(self.rows[row]))
        except OSError as problem:
            raise OutputError(f"{self._path}: cannot be written: {problem}.") from problem

    def note(self, name: str, values: Iterable[Any]) -> None:
        """Add a fact to all rows, in their order."""
        for row, value in zip(sorted(self.rows), values, strict=True):
            self.rows[row][name] = value
        if self._path is not None:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        lines = [self._head, *(self.rows[row] for row in sorted(self.rows))]
        with whole_file(self._path) as staged:
            staged.write_text("".join(map(_line, lines)), encoding="utf-8")


def _line(data: Mapping[str, Any]) -> str:
    return json.dumps(data, ensure_ascii=False) + "\n"


def _lines(path: Path) -> list[Any]:
    """What a file holds, without a last line that is not whole."""
    try:
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0] if path.exists() else ""
        return [json.loads(line) for line in whole.split("\n") if line]
    except (OSError, ValueError) as problem:
        raise ConfigError(f"{path}: not the texts of an attack: {problem}.") from None
