"""How many tokens should one step hold, and what does padding cost?

    python benchmarks/bench_batches.py [--threads 1] [--passes 5] [--backend onnx] [--dtype int8]
        [--data rows.csv] [--rows 512]

Two questions, on a MiniLM-L6 and the first four layers of a BERT-base (random weights), at full
depth and with rows that leave at half the depth on average:

- steps: 4,096 tokens in rows of one length, run as steps of ever more tokens.
- padding: rows of real lengths in batches of 32, as they arrive or sorted over 16 batches as
  `predict` does, whole or cut where padding adds up.

On one thread CPU time is measured, which other programs disturb little, else wall clock. Ways take
turns; figures are medians over passes, microseconds a token without its padding.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from offramp.backbones import Batch
from offramp.benchmark.subject import Subject, open_rows
from offramp.benchmark.workloads import forced_policies
from offramp.engines import make_engine, plan_batches, windows
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import Full, Policy, Rows

MODELS: dict[str, dict[str, Any]] = {
    "MiniLM-L6": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6},
    "BERT-base, 4 layers": {"num_hidden_layers": 4},
}
TOKENS, SMALLEST = 4096, 128
SIZE, AHEAD = 32, 16
CUTS = (None, 32, 64, 128, 256)
"""Tokens of padding in a batch."""
Part = tuple[Batch, Rows]


def make_model(name: str) -> MultiExitModel:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=3000, **MODELS[name])
    stock = AutoModelForSequenceClassification.from_config(config)
    return MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval()


def steps() -> Iterator[tuple[str, dict[str, list[Part]]]]:
    """For each length: the same rows in steps of ever more tokens."""
    for length in (32, 128):
        ids = torch.randint(5, 300, (TOKENS // length, length))
        sizes = [2**n for n in range(8) if SMALLEST <= 2**n * length <= TOKENS]
        yield (
            f"{length} a row, in steps of",
            {str(size * length): list(_split(ids, size)) for size in sizes},
        )


def _split(ids: torch.Tensor, size: int) -> Iterator[Part]:
    for places in torch.arange(len(ids)).split(size):
        yield {"input_ids": ids[places]}, Rows(places, torch.full_like(places, ids.shape[1]))


def padding(model: MultiExitModel, data: Any, count: int) -> dict[str, dict[str, list[Part]]]:
    """The same rows in batches as they arrive and sorted, cut at so much padding."""
    rows, _ = open_rows(Subject("", "", model, None, None), data, count, None)

    def cut(window: int, most: int | None) -> list[Part]:
        planned = [
            np.array(places)[part]
            for places in windows(range(count), window)
            for part in plan_batches(rows.lengths[list(places)], SIZE, max_padding=most)
        ]
        ids = [torch.from_numpy(part) for part in planned]
        lengths = [torch.from_numpy(rows.lengths[part]) for part in planned]
        return [
            (rows.batch(part.tolist()), Rows(*at))
            for part, *at in zip(planned, ids, lengths, strict=True)
        ]

    return {
        said: {f"cut at {most}" if most else "whole": cut(window, most) for most in CUTS}
        for said, window in (("as they arrive", SIZE), ("sorted", SIZE * AHEAD))
    }


def in_turns(
    jobs: Mapping[str, Callable[[], object]], passes: int, clock: Callable[[], float]
) -> dict[str, float]:
    """Median seconds of every job; the first pass does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for lap in range(passes + 1):
        first = lap % len(names)
        for name in names[first:] + names[:first]:
            start = clock()
            jobs[name]()
            seconds[name].append(clock() - start)
    return {name: median(laps[1:]) for name, laps in seconds.items()}


def tell(said: str, engine: Any, ways: Mapping[str, Sequence[Part]], given: Any) -> None:
    """Lines of a table: each way at full depth and at half of it."""
    count = sum(len(rows.ids) for _, rows in next(iter(ways.values())))
    tokens = sum(int(rows.lengths.sum()) for _, rows in next(iter(ways.values())))
    clock = time.thread_time if given.threads == 1 else time.perf_counter
    for depth, policy in (
        ("full", Full()),
        ("half", forced_policies(engine.model, [0.5], count)[0]),
    ):
        jobs = {name: partial(_run, engine, parts, policy) for name, parts in ways.items()}
        found = in_turns(jobs, given.passes, clock)
        cells = [f"{name}: {1e6 * seconds / tokens:.1f}" for name, seconds in found.items()]
        print("| " + " | ".join([said, depth, *cells]) + " |", flush=True)


def _run(engine: Any, parts: Sequence[Part], policy: Policy) -> None:
    for batch, rows in parts:
        engine.run(batch, policy, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--backend", default="torch")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--data", help="real lengths; else the built-in docstrings")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--only", help="one model, such as MiniLM-L6")
    parser.add_argument("--question", choices=("steps", "padding"))
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    for name in MODELS:
        if given.only not in (None, name):
            continue
        model = make_model(name)
        how = {"threads": given.threads, "progress": False}
        engine: Any = make_engine(model, given.backend, given.dtype, **how)
        print(f"\n{name}, {given.backend} {given.dtype}, {given.threads} threads")
        if given.question != "padding":
            engine.widest, kept = 0, engine.widest  # the engine must not cut what is cut here
            for said, ways in steps():
                tell(said, engine, ways, given)
            engine.widest = kept
        if given.question != "steps":
            for said, ways in padding(model, given.data, given.rows).items():
                tell(said, engine, ways, given)


if __name__ == "__main__":
    main()
