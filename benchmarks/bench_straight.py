"""What does a layer cost without the modules around its calls of torch?

    python benchmarks/bench_straight.py [--passes 40] [--only BERT-base]

A layer as a module and as a straight function take turns on the same rows, without padding; the
ratio is the median over turns, with its 95 % interval from their order. Weights are random.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.stats import binom
from transformers import AlbertConfig, AutoModelForSequenceClassification, BertConfig

from offramp.backbones import example_rows, make_backbone
from offramp.engines.straight import Straight

SMALL: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}
BASE: dict[str, Any] = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
MODELS = {
    "MiniLM": BertConfig(num_hidden_layers=1, **SMALL),
    "BERT-base": BertConfig(num_hidden_layers=1, **BASE),
    "ALBERT-base": AlbertConfig(num_hidden_layers=1, **BASE),
}
SHAPES = ((1, 16), (1, 32), (1, 128), (8, 32), (32, 32))


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


@torch.inference_mode()
def line(name: str, rows: int, tokens: int, passes: int) -> str:
    stock = AutoModelForSequenceClassification.from_config(MODELS[name]).eval()
    backbone = make_backbone(stock)
    straight = Straight(backbone)
    straight.find()
    batch = example_rows(backbone, rows, tokens, padded=False)
    ways = [partial(one.layer, 1, one.embed(batch)) for one in (backbone, straight.backbone)]
    times = np.array([[seconds(way) for way in ways] for _ in range(passes + 3)])[3:]
    ratios = np.sort(times[:, 0] / times[:, 1])
    edge = int(binom.ppf(0.025, passes, 0.5)) - 1
    low, high = ratios[max(edge, 0)], ratios[min(passes - 1 - edge, passes - 1)]
    module, ours = 1000 * np.median(times, axis=0)
    ratio = f"{np.median(ratios):.3f} [{low:.3f}, {high:.3f}]"
    return f"| {name} | {rows} | {tokens} | {module:.2f} | {ours:.2f} | {ratio} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=40)
    parser.add_argument("--only", choices=MODELS, help="one model")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| model | rows | tokens | as a module, ms | straight, ms | module / straight [95 %] |")
    print("|---" * 6 + "|")
    for name in [given.only] if given.only else MODELS:
        for rows, tokens in SHAPES:
            print(line(name, rows, tokens, given.passes), flush=True)


if __name__ == "__main__":
    main()
