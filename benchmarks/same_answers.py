"""Do other engines answer as torch does? python benchmarks/same_answers.py SET=FOLDER ...

FOLDER is a trained multi-exit model for a set of first_road.py, such as its
runs/first-road/sst2-seed1/train. On 5,000 of the set's rows, test rows first, every policy runs on
torch and on each other engine; rows that leave elsewhere or are answered otherwise are counted,
and of those the ones that lie within 1e-4 of the bar, where the last bits decide. In int8 scores
move, so there the counts say how far. The page is docs/results/same-answers.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare import rows_of
from datasets import concatenate_datasets
from first_road import SHARED, STUDIES

from offramp.engines import rows_of as places_of
from offramp.policies import EvidencePolicy, MaxProbability, Patience
from offramp.prediction import Predictor

PAGE = Path(__file__).parents[1] / "docs" / "results" / "same-answers.md"
BAND = 1e-4
POLICIES: tuple[EvidencePolicy, ...] = (
    *(MaxProbability(threshold=bar) for bar in (0.7, 0.9, 0.99)),
    *(Patience(patience=count) for count in (1, 2)),
)
ENGINES = (
    ("inductor", "fp32"),
    ("onnx", "fp32"),
    ("openvino", "fp32"),
    ("onnx", "int8"),
    ("openvino", "int8"),
)
HEAD = """# Other engines, the same answers

Rows that leave after another layer, or are answered with another label, than on the torch engine
in float32. *In the band*: of these, rows for which some score or evidence met on the way lies
within 1e-4 of where the decision tips. *Apart*: the largest difference of a score, of rows with the
same exit. In eight bits scores move, and with them the decisions; a point is therefore
[chosen anew](../howto/engines.md) for that engine.

| set | engine | policy | rows | mean exit | other exit | in the band | other answer | apart |
|---|---|---|---|---|---|---|---|---|
"""


def texts(name: str, count: int) -> list[str]:
    """Test rows first, then rows of the train file."""
    study = STUDIES[name]
    folder = SHARED / "data" / name.partition("-")[0]
    files = (folder / study.dev_file, folder / study.train_file)
    rows = concatenate_datasets([rows_of(file, name).select_columns("text") for file in files])
    return rows[: min(count, len(rows))]["text"]


def near(predictor: Predictor, text: str, policy: EvidencePolicy) -> bool:
    """Whether a change of the band could tip a decision on the row's way."""
    rows, _ = predictor.items.read([text])
    batch = predictor.items.batch(rows, torch.device("cpu"))
    state = policy.start(places_of(batch))
    for layer, output in enumerate(predictor.engine.all_exits(batch), start=1):
        evidence, state = policy.evidence(state, layer, output)
        top = output.scores[0].topk(2).values
        if abs(float(evidence) - policy.bar) < BAND or float(top[0] - top[1]) < BAND:
            return True
        if float(evidence) > policy.bar:
            return False
    return False


def compare(
    name: str, rows: Sequence[str], torch_one: Predictor, other: Predictor, policy: EvidencePolicy
) -> list[Any]:
    """One line of the page."""
    ours, theirs = other.answer(rows, policy)[0], torch_one.answer(rows, policy)[0]
    exits = np.array([[a.exit_layer, b.exit_layer] for a, b in zip(ours, theirs, strict=True)])
    labels = np.array(
        [a.scores.argmax() != b.scores.argmax() for a, b in zip(ours, theirs, strict=True)]
    )
    moved = np.flatnonzero((exits[:, 0] != exits[:, 1]) | labels)
    band = sum(near(torch_one, rows[row], policy) for row in moved)
    gaps = [
        np.abs(a.scores - b.scores).max()
        for a, b in zip(ours, theirs, strict=True)
        if a.exit_layer == b.exit_layer
    ]
    options = ", ".join(
        f"{k} {v}" for k, v in policy.to_dict().items() if k in {"threshold", "patience"}
    )
    engine = f"{other.engine.name}, {other.engine.dtype}"
    return [
        *(name, engine, f"{policy.name}, {options}", f"{len(rows):,}", f"{exits[:, 1].mean():.2f}"),
        *(int((exits[:, 0] != exits[:, 1]).sum()), band, int(labels.sum()), f"{max(gaps):.1e}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("models", nargs="+", metavar="SET=FOLDER")
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    lines = []
    for name, _, folder in (model.partition("=") for model in given.models):
        rows = texts(name, given.rows)
        reference = Predictor.load(folder, "full", device="cpu")
        for backend, dtype in ENGINES:
            other = Predictor.load(folder, "full", backend=backend, dtype=dtype)
            for policy in POLICIES:
                line = compare(name, rows, reference, other, policy)
                lines.append(f"| {' | '.join(map(str, line))} |")
                print(lines[-1], flush=True)
    models = " ".join(f"{model.partition('=')[0]}=..." for model in given.models)
    command = f"python benchmarks/same_answers.py {models}"
    given.page.write_text(f"{HEAD}" + "\n".join(lines) + f"\n\nMade by `{command}`.\n")


if __name__ == "__main__":
    main()
