"""Runs of a comparison in this process, for tests that cannot wait for others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, ClassVar

import pytest

from offramp.comparison.cell import run_cell
from offramp.comparison.plan import Cell
from offramp.errors import OfframpError


class Inline:
    """A run in this process instead of one of its own."""

    begun: ClassVar[list[Cell]] = []

    def __init__(self, command: list[str], **_: Any) -> None:
        cell = Cell(**json.loads(command[4]))
        self.begun.append(cell)
        self.returncode = 0
        try:
            run_cell(Path(command[3]), cell)
        except OfframpError as problem:
            _["stdout"].write(f"Error: {problem}\n".encode())
            self.returncode = 2

    def poll(self) -> int:
        return self.returncode


def in_this_process(monkeypatch: pytest.MonkeyPatch) -> list[Cell]:
    """Begin runs here from now on; gives those that were begun, in order."""
    monkeypatch.setattr("offramp.comparison.workers.subprocess.Popen", Inline)
    monkeypatch.setattr("offramp.comparison.workers.POLL_SECONDS", 0.0)
    monkeypatch.setattr(Inline, "begun", [])
    return Inline.begun
