"""What the tests of the model card and its picture share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import ModelCard

from offramp.calibration import Calibration, calibrate
from offramp.calibration.listing import PICTURE
from offramp.card import README
from offramp.engines import processor_fingerprint
from offramp.model import MultiExitModel
from offramp.table import ExitTable
from offramp.testing import PROBLEM_TYPES, tiny_tokenizer

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
ROWS, LAYERS = 60, 6


def make_table(folder: Path, labelled: bool = True, seed: int = 0) -> ExitTable:
    """Later exits are mostly better; of the model in the folder."""
    model = MultiExitModel.from_pretrained(folder)
    kind, draw = model.problem_type, np.random.default_rng(seed)
    trust = np.linspace(0.5, 3, LAYERS)[:, None]
    if kind == REGRESSION:
        labels: Any = draw.normal(size=ROWS).astype(np.float32)
        truth = labels[:, None]
    elif kind == MULTI:
        labels = draw.integers(0, 2, (ROWS, 3)).astype(np.float32)
        truth = labels - 0.5
    else:
        labels = draw.integers(0, 3, ROWS)
        truth = np.eye(3)[labels]
    scores = truth[:, None, :] * trust + draw.normal(size=(ROWS, LAYERS, truth.shape[1]))
    return ExitTable.from_arrays(
        scores,
        problem_type=kind,
        labels=labels if labelled else None,
        role="tune",
        model_fingerprint=model.fingerprint(),
        processor_fingerprint=processor_fingerprint(tiny_tokenizer()),
        data_fingerprint=f"{seed:032}",
    )


def choose(folder: Path, name: str = "default", speed: float = 1.5, **how: Any) -> Calibration:
    table = make_table(folder, how.pop("labelled", True), how.pop("seed", 0))
    found = calibrate(table, target_speedup=speed, name=name, **how)
    found.point.save(folder)
    return found


def card(folder: Path) -> ModelCard:
    return ModelCard((folder / README).read_text(encoding="utf-8"))


def rows_of(folder: Path) -> dict[str, list[str]]:
    """The table of points by name."""
    lines = [line for line in card(folder).text.splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


def shows_picture(folder: Path) -> bool:
    return f"]({PICTURE})" in card(folder).text
