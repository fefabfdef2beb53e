"""What the command line tests share."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import NamedTuple

ROWS = 160


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        return json.loads(self.out)


def write_csv(path: Path, rows: list[tuple], head: tuple[str, ...] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *rows])
    return path


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))
