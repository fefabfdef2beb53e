"""How much longer does `auto` train than a plain fine-tune of as many epochs?

    OMP_NUM_THREADS=4 python benchmarks/bench_training.py [--rows 2000] [--passes 3] [--bf16]

Both train from the pretrained weights, in turns, on the same rows: MiniLM-L6 on SST-2 and
rxn-albert on uspto_50k, of the shared folder. Timed is the whole of `offramp.train`, from reading
the rows to the saved folder. `joint` is `auto` without its fine-tune, as `train --fine-tuned` runs
it from a model that has learnt the rows already: all of its epochs train exits.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from compare import SETTINGS, rows_of
from datasets import Dataset
from first_road import SHARED, STUDIES, model_path
from transformers.utils import logging

from offramp import train
from offramp.training import TrainOptions


def seconds_of(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_pass(source: Path, rows: Dataset, options: TrainOptions, folder: Path) -> dict[str, float]:
    """Seconds of each way, trained one after the other."""
    plain = folder / "plain"
    return {
        "plain": seconds_of(lambda: train(source, rows, plain, method="plain", options=options)),
        "auto": seconds_of(lambda: train(source, rows, folder / "auto", options=options)),
        "joint": seconds_of(
            lambda: train(plain, rows, folder / "joint", fine_tuned=True, options=options)
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--epochs", type=float, default=2.0)
    parser.add_argument("--bf16", action="store_true")
    given = parser.parse_args()
    logging.set_verbosity_error()
    print(f"{given.rows:,} rows, {given.epochs:g} epochs, {torch.get_num_threads()} threads")
    for name in ("sst2", "uspto_50k"):
        study = STUDIES[SETTINGS[name].study]
        rows = rows_of(SHARED / "data" / name / study.train_file, name).select(range(given.rows))
        options = TrainOptions(
            epochs=given.epochs, batch_size=study.batch_size, bf16=given.bf16, quiet=True
        )
        passes = []
        for _ in range(given.passes):
            with tempfile.TemporaryDirectory() as folder:
                passes.append(one_pass(model_path(study.model), rows, options, Path(folder)))
        for way in ("auto", "joint"):
            ratios = sorted(one[way] / one["plain"] for one in passes)
            print(
                f"{name} {way}: {median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}] of plain"
            )


if __name__ == "__main__":
    main()
