"""`offramp compare` on real data: python benchmarks/compare.py SET [--budget 7200]

Rows, models and learning rates of each set stand below; all else is the command's own. Cut off
and started again, it goes on. The leaderboard goes to docs/results/compare/<set>.json and
docs/results/compare-<set>.md.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
from datasets import Dataset
from first_road import SHARED, STUDIES, model_path

from offramp.comparison import compare
from offramp.comparison.board import Board
from offramp.data import load_examples
from offramp.storage import write_document

DOCS = Path(__file__).parents[1] / "docs" / "results"
CORE = ("pabee", "deebert", "fastbert", "palbert", "cosee", "auto", "truncated", "attach")
IMAGES = (*(name for name in CORE if name != "truncated"), "jei_dnn")
"""Layers of several widths cannot be cut off; JEI-DNN's paper is of images."""


@dataclass(frozen=True)
class Setting:
    """One set.

    Attributes:
        study: of first_road.py, which says where rows and model are and how rows are cleaned.
        rows: to train on; a fixed subset.
        tune: share of the train file to choose on.
    """

    study: str
    rows: int | None
    tune: float
    start_epochs: float
    epochs: float
    methods: Sequence[str] = ("all",)
    rates: tuple[float, ...] = (1e-4, 3e-4)


SETTINGS = {
    "uspto_50k": Setting("uspto_50k", 6_000, 0.05, 3, 1),
    "sst2": Setting("sst2", 10_000, 0.03, 2, 2),
    "sick": Setting("sick", None, 0.2, 4, 2),
    "mrpc": Setting("mrpc", None, 0.2, 4, 2, CORE),
    "stsb": Setting("stsb", None, 0.15, 4, 2),
    "20newsgroups": Setting("20newsgroups", 4_000, 0.1, 2, 2, CORE),
    # of two rates every method took the larger one, so there is a third
    "cifar10": Setting("cifar10-resnet56", 8_000, 0.1, 2, 2, IMAGES, (1e-4, 3e-4, 1e-3)),
}


def rows_of(file: Path, name: str) -> Dataset:
    """Examples of a file, cleaned as the study says."""
    study = STUDIES[name]
    source: Any = cifar.images(file) if file.suffix == ".npz" else str(file)
    rows = load_examples(source, **study.columns)
    clean = study.clean
    if clean is None:
        return rows
    rows = rows.map(lambda row: {"text": clean(row["text"])})
    return rows.filter(lambda row: bool(row["text"]))


def slim(board: Board) -> Board:
    """Without what a repository need not keep: policies of curves, curves of families other than
    the one of the largest area, the paper's and `fixed`, readings of those that serve nowhere."""
    methods = []
    for method in board.methods:
        rows = []
        for row in method.policies:
            shown = row.name in {method.chosen, method.own, "fixed"}
            read = shown or row.name in method.chosen_at.values()
            lines = row.curves if shown else ()
            curves = [[p.model_copy(update={"policy": None}) for p in one] for one in lines]
            readings = [
                one.model_copy(
                    update={
                        "readings": tuple(
                            reading.model_copy(update={"policy": {"name": row.name}})
                            for reading in (one.readings if read else ())
                        )
                    }
                )
                for one in row.at
            ]
            changed = {"curves": tuple(map(tuple, curves)), "at": tuple(readings)}
            rows.append(row.model_copy(update=changed))
        methods.append(method.model_copy(update={"policies": tuple(rows)}))
    return board.model_copy(update={"methods": tuple(methods)})


def command(given: argparse.Namespace) -> str:
    """What makes the same board again, wherever and on however many cores."""
    words = ["python benchmarks/compare.py", given.name]
    for name in ("seeds", "methods", "rates", "plugins", "rows", "epochs"):
        value = getattr(given, name)
        if value:
            values = value if isinstance(value, (list, tuple)) else [value]
            words.append(" ".join([f"--{name}", *(f"{one}" for one in values)]))
    return " ".join([*words, *["--no-bf16"] * given.no_bf16])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--budget", type=float, help="seconds")
    parser.add_argument("--workers", type=int)
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--plugins", nargs="*", default=())
    parser.add_argument("--rows", type=int, help="to train on, for a quick try")
    parser.add_argument("--epochs", type=float, help="after the start, for a board of its own")
    parser.add_argument("--no-bf16", action="store_true", help="where it is slower than fp32")
    parser.add_argument("--work", type=Path, default=Path("runs/compare"))
    parser.add_argument("--docs", type=Path, default=DOCS)
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    setting = SETTINGS[given.name]
    name = given.name if given.epochs is None else f"{given.name}-{given.epochs:g}-epochs"
    study = STUDIES[setting.study]
    folder = SHARED / "data" / setting.study.partition("-")[0]
    done = compare(
        model_path(study.model, given.work),
        rows_of(folder / study.train_file, setting.study),
        given.work / name,
        methods=given.methods or setting.methods,
        seeds=given.seeds,
        budget=given.budget,
        epochs=given.epochs or setting.epochs,
        start_epochs=setting.start_epochs,
        batch_size=study.batch_size,
        rates=given.rates or setting.rates,
        test_data=rows_of(folder / study.dev_file, setting.study),
        tune_share=setting.tune,
        problem_type=study.problem_type,
        max_length=study.max_length,
        max_rows=given.rows or setting.rows,
        title=name,
        workers=given.workers,
        plugins=given.plugins,
        bf16=not given.no_bf16,
    )
    for one in done.missing:
        print(f"missing: {one.method}, seed {one.seed}: {one.why}")
    if done.board is not None:
        (given.docs / "compare").mkdir(parents=True, exist_ok=True)
        write_document(given.docs / "compare" / f"{name}.json", slim(done.board))
        page = (done.folder / "leaderboard.md").read_text(encoding="utf-8")
        made_by = f"Made by `{command(given)}`.\n\n"
        (given.docs / f"compare-{name}.md").write_text(made_by + page, encoding="utf-8")


if __name__ == "__main__":
    main()
