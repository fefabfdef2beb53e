"""What do questions and launches cost a GPU? Segments of several lengths, with graphs and without.

    python benchmarks/bench_gpu.py [--passes 9] [--tokens 64] [--dtype bf16] [--only MiniLM]

Rows of every batch leave after layers 1..L-1 in equal shares while exits and policy run at every
layer. The stock model and the engine take turns: `every k` asks who has left after k layers, and
`graphs` replays these k layers. Weights are random. Each way has run three times before the clock
starts, so that graphs are captured by then; the last column says how long that took.

- *speed-up*: of the stock model's time, geometric mean over passes with its 95 % interval;
- *of L / mean depth*: its share of what the layers alone would allow. Long segments lose by rows
  that run along, short ones by waiting.

Without a GPU it runs on the CPU and leaves graphs out, which tells nothing about a GPU.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

from offramp.backbones import Batch
from offramp.engines import TorchEngine, as_dtype, rows_of
from offramp.evaluation.speed import laps
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability
from offramp.testing import Scripted

CONFIDENCE = MaxProbability(threshold=1.0)  # finite, and no probability is above it
LENGTHS = (1, 2, 3, 4, 6)
ROWS = (1, 8, 32, 128)


def cases() -> Iterator[tuple[str, PreTrainedModel]]:
    make = AutoModelForSequenceClassification.from_config
    small = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    yield "MiniLM", make(BertConfig(**small))
    yield "ALBERT-base", make(AlbertConfig(**base))
    yield "BERT-base", make(BertConfig())


def spread(depth: int, rows: int) -> Scripted:
    """Rows leave after layers 1..depth-1 in turn; one row leaves in the middle."""
    layers = np.arange(rows) % (depth - 1) + 1 if rows > 1 else np.array([depth // 2])
    np.random.default_rng(0).shuffle(layers)
    return Scripted(layers=tuple(layers.tolist()), inner=CONFIDENCE)


def contenders(
    model: MultiExitModel, batch: Batch, policy: Scripted
) -> Iterator[tuple[str, Callable[[], Any]]]:
    rows = rows_of(batch)
    yield "stock", partial(model.stock, **batch)
    for graphs in (False, True)[: 1 + rows.ids.is_cuda]:
        for every in LENGTHS:
            engine = TorchEngine(model, sync_every=every, cuda_graphs=graphs)
            name = f"graphs, every {every}" if graphs else f"every {every}"
            yield name, partial(engine.run, batch, policy, rows)


@torch.inference_mode()
def prepared(work: Callable[[], Any]) -> float:
    """Seconds until a contender is warm."""
    start = time.perf_counter()
    for _ in range(3):
        work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def race(name: str, model: MultiExitModel, rows: int, tokens: int, passes: int) -> None:
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 300, (rows, tokens), generator=draw).to(model.device)
    policy = spread(model.depth, rows)
    works = dict(contenders(model, {"input_ids": ids}, policy))
    warm = {way: prepared(work) for way, work in works.items()}
    # a lap of small batches is long enough for the clock
    jobs = {way: [work] * 5 for way, work in works.items()}
    timed = list(islice(laps(jobs, ids.is_cuda), 1, passes + 1))
    seconds = {way: np.array([lap[way] for lap in timed]) / 5 for way in works}
    possible = model.depth / np.mean(policy.layers)
    for way, took in seconds.items():
        logs = np.log(seconds["stock"] / took)
        mean, half = logs.mean(), 1.96 * logs.std(ddof=1) / np.sqrt(len(logs))
        low, high = np.exp(mean - half), np.exp(mean + half)
        cells = [name, rows, way, f"{1e3 * np.median(took):.2f}"]
        cells += [f"{np.exp(mean):.2f} [{low:.2f}, {high:.2f}]"]
        cells += [f"{np.exp(mean) / possible:.2f}", f"{warm[way]:.1f}"]
        print("| " + " | ".join(map(str, cells)) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--only", help="one model, such as BERT-base")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    print(f"torch {torch.__version__}, {where}, {given.dtype}, {given.tokens} tokens\n")
    print("| model | rows | way | ms | speed-up [95 %] | of L / mean depth | s until warm |")
    print("|---" * 7 + "|")
    for name, stock in cases():
        if given.only not in (None, name):
            continue
        model = MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval()
        torch.nn.Module.to(model, device=device, dtype=as_dtype(given.dtype))
        for rows in given.rows:
            race(name, model, rows, given.tokens, given.passes)


if __name__ == "__main__":
    main()
