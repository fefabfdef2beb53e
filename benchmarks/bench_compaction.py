"""Does it pay to take leaving rows out of a batch, or should they run along?

    python benchmarks/bench_compaction.py [--passes 15]

One row leaves a batch after the first of two layers. Taking it out copies all the others; letting
it run along costs its share of every layer to come. The ratio says how many rows must leave for
the copy to be paid back by the very next layer. Torch is timed around its functions, ONNX Runtime
by its own profiler, which gives a node's time in whole microseconds.
"""

from __future__ import annotations

import argparse
from functools import partial
from itertools import product
from statistics import median
from typing import Any

import torch
from speed_stages import ProfiledOnnx, ProfiledTorch
from transformers import AutoModelForSequenceClassification, BertConfig

from offramp.model import MultiExitModel
from offramp.policies import Patience
from offramp.testing import Scripted

ENGINES = {"torch": ProfiledTorch, "onnx": ProfiledOnnx}
SIZES = {
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
    "MiniLM": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}
BATCHES = ((2, 16), (8, 16), (32, 16), (8, 64), (32, 64), (64, 64))
ONE_LEAVES = Scripted(layers=(1, *[2] * 63), inner=Patience())


def model(name: str) -> MultiExitModel:
    config = BertConfig(num_hidden_layers=2, vocab_size=300, **SIZES[name])
    stock = AutoModelForSequenceClassification.from_config(config)
    return MultiExitModel.from_stock(stock).eval()


def line(engine: Any, rows: int, tokens: int, passes: int) -> list[str]:
    """What a row of a layer takes and what the copy does, in microseconds, and their ratio."""
    engine.widest = 0  # all rows in one step
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[:, -1] = 0
    batch = {"input_ids": torch.randint(5, 300, mask.shape), "attention_mask": mask}
    found = engine.spent([partial(engine.run, batch, ONE_LEAVES)], passes)
    row = median(one["layer"] for one in found) / (2 * rows - 1)
    copy = median(one["compaction"] for one in found)
    return [f"{row:.0f}", f"{copy:.0f}", f"{copy / row:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=15)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = "model, engine, rows, tokens, a row of a layer us, the copy us, rows that must leave"
    print("| " + heads.replace(", ", " | ") + " |\n" + "|---" * 7 + "|")
    for name, (kind, make) in product(SIZES, ENGINES.items()):
        one = model(name)
        for rows, tokens in BATCHES:
            cells = line(make(one), rows, tokens, given.passes)
            print(f"| {name} | {kind} | {rows} | {tokens} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
