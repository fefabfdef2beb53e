"""Does an answer depend on its neighbours? python benchmarks/needle.py MODEL [--data FILE]

200 texts, alone and in 50 random crowds each: of 1 to 65 rows, in any order, padded to the
longest. By default the texts are of the built-in docstrings, and MODEL is what `make demo` leaves
in runs/demo/model. The figures go to docs/results/needle.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from offramp import __version__
from offramp.data import load_examples
from offramp.policies import EvidencePolicy, Policy, Rows
from offramp.prediction import Predictor
from offramp.storage import whole_file

PAGE = Path(__file__).parents[1] / "docs" / "results" / "needle.md"
TEXTS, CROWDS, MOST = 200, 50, 65
BAND = 1e-5
CASES = (("torch", "fp32"), ("torch", "bf16"), ("onnx", "fp32"), ("onnx", "int8"))
ASKED = {"fp32": "0 answers; 1 in 10,000 exits, each in the band", "bf16": "1 in 1,000 exits"}
WORDS = f"""# Does an answer depend on its neighbours?

`python benchmarks/needle.py runs/demo/model`, after `make demo`: {TEXTS} texts of the built-in
docstrings, alone and then each in {CROWDS} random crowds of 1 to {MOST} rows, in any order, padded
to the longest. *In the band*: alone, the text leaves elsewhere if the bar is {BAND:g} higher or
lower. Not one bit differs in the mode `determinism="shape"`: see [speed.md](speed.md#determinism).
"""


@dataclass(frozen=True, slots=True)
class Found:
    """Answers and exit layers of texts, (texts,)."""

    labels: np.ndarray[Any, Any]
    layers: np.ndarray[Any, Any]


class Crowds:
    """Runs texts in the batches that it is told, whatever their lengths."""

    def __init__(self, predictor: Predictor, texts: list[str]) -> None:
        self._predictor, (self._rows, _) = predictor, predictor.items.read(texts)
        self.texts = len(texts)

    def run(self, places: np.ndarray[Any, Any], policy: Policy) -> Found:
        rows = [self._rows[place] for place in places]
        known = Rows(
            torch.tensor([row.id for row in rows]), torch.tensor([row.length for row in rows])
        )
        batch = self._predictor.items.batch(rows, torch.device("cpu"), False)
        answers = self._predictor.engine.run(batch, policy, known)
        return Found(answers.scores.argmax(dim=1).numpy(), answers.exit_layers.numpy())

    def alone(self, policy: Policy) -> Found:
        found = [self.run(np.array([place]), policy) for place in range(self.texts)]
        return Found(
            *(np.concatenate([getattr(f, n) for f in found]) for n in ("labels", "layers"))
        )


def crowds(texts: int) -> Iterator[np.ndarray[Any, Any]]:
    """Every text once in each of the rounds."""
    draw = np.random.default_rng(0)
    for _ in range(CROWDS):
        left = draw.permutation(texts)
        while len(left):
            size = int(draw.integers(1, MOST + 1))
            yield left[:size]
            left = left[size:]


def line(model: str, data: list[str], backend: str, dtype: str) -> str:
    predictor = Predictor.load(model, "full", backend=backend, dtype=dtype)
    policy = Predictor.load(model).policy
    runs = Crowds(predictor, data)
    alone = runs.alone(policy)
    near = np.zeros(runs.texts, dtype=bool)
    if isinstance(policy, EvidencePolicy):
        low, high = (runs.alone(policy.with_bar(policy.bar + by)) for by in (-BAND, BAND))
        near = low.layers != high.layers
    placed = other = moved = inside = 0
    for places in crowds(runs.texts):
        found = runs.run(places, policy)
        elsewhere = found.layers != alone.layers[places]
        placed += len(places)
        other += int((found.labels != alone.labels[places]).sum())
        moved += int(elsewhere.sum())
        inside += int((elsewhere & near[places]).sum())
    left = len(np.unique(alone.layers))
    cells = [f"{backend}, {dtype}", f"{placed:,}", left, other, moved, inside, ASKED.get(dtype, "")]
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--data", default="docstrings")
    parser.add_argument("--split", default="test")
    given = parser.parse_args()
    rows = load_examples(given.data, split=given.split, max_rows=TEXTS)
    heads = "engine, runs, exits in use, other answers, other exits, of these in the band, asked"
    table = ["| " + heads.replace(", ", " | ") + " |", "|---" * 7 + "|"]
    table += [line(given.model, list(rows["text"]), *case) for case in CASES]
    machine = (
        f"offramp {__version__}, torch {torch.__version__}, threads: {torch.get_num_threads()}."
    )
    with whole_file(PAGE) as staged:
        staged.write_text("\n".join([WORDS, *table, "", machine, ""]), encoding="utf-8")
    print(*table, sep="\n")


if __name__ == "__main__":
    main()
