"""Does it pay to take leaving rows out of a batch, or should they run along?

    python benchmarks/bench_compaction.py [--passes 15]

One row leaves a batch. Taking it out copies all the others; letting it run along costs its share of
every layer to come. Copy and one layer take turns; the ratio says how many rows must leave for the
copy to be paid back by the very next layer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch
from transformers import AutoModelForSequenceClassification, BertConfig

from offramp.backbones import make_backbone

SIZES = {
    "tiny": {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128},
    "MiniLM": {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072},
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def line(name: str, rows: int, tokens: int, passes: int) -> str:
    config = BertConfig(num_hidden_layers=1, **SIZES[name])
    stock = AutoModelForSequenceClassification.from_config(config).eval()
    backbone = make_backbone(stock)
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[:, -1] = 0
    flow = backbone.embed({"input_ids": torch.randint(5, 300, mask.shape), "attention_mask": mask})
    stay = torch.arange(rows - 1)
    layers, copies = [], []
    for _ in range(passes + 2):
        layers.append(seconds(lambda: backbone.layer(1, flow)))
        copies.append(seconds(lambda: backbone.take(flow, stay)))
    layer, copy = median(layers[2:]), median(copies[2:])
    cells = [name, rows, tokens, f"{1e6 * layer / rows:.0f}", f"{1e6 * copy:.0f}"]
    return "| " + " | ".join(map(str, [*cells, f"{copy * rows / layer:.2f}"])) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=15)
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| model | rows | tokens | a row of a layer, us | the copy, us | rows that must leave |")
    print("|---" * 6 + "|")
    for name in SIZES:
        for rows, tokens in ((2, 16), (8, 16), (32, 16), (8, 64), (32, 64), (64, 64)):
            print(line(name, rows, tokens, given.passes), flush=True)


if __name__ == "__main__":
    main()
