"""Is a layer saved time saved? The torch engine against the stock model, on real lengths.

    python benchmarks/bench_engine.py [--passes 9] [--rows 64] [--device cuda] [--only BERT-base]

Two questions, at batch 1 and 32, on the pretrained rxn-albert (reactions) and on ALBERT-base and
BERT-base sized models (random weights, docstrings):

- forced: rows of every batch leave at layers 1..L-1 in equal shares, so the mean depth is half;
  exits and policy run at every layer and only the decision is overridden. How much of the ideal
  speed-up is realised?
- never: a finite threshold that no row meets. How much slower than the stock model is that?

Full depth is the faster of ours and the stock model's, and the stock model's for `never`
(inference mode, sdpa, same batches, no mask where nothing is padded); passes are interleaved and
intervals are over passes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    PreTrainedModel,
)

from offramp.backbones import Batch
from offramp.data import encode, load_examples
from offramp.engines import Answers, Engine, collate, make_engine, rows_of
from offramp.evaluation import Speed, measure_speed
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Policy, Rows
from offramp.testing import Scripted

SHARED = Path(os.environ.get("OFFRAMP_SHARED", "../shared"))
CONFIDENCE = MaxProbability(threshold=1.0)  # finite, and no probability is above it


class Numbered:
    """An engine whose rows are numbered over all batches, so a script can tell them apart."""

    def __init__(self, engine: Engine, batches: Sequence[Batch]) -> None:
        self.engine = engine
        self.rows: dict[int, Rows] = {}
        first = 0
        for batch in batches:
            rows = rows_of(batch)
            self.rows[id(batch)] = Rows(rows.ids + first, rows.lengths)
            first += len(rows.ids)

    def run(self, batch: Batch, policy: Policy, rows: Rows | None = None) -> Answers:
        return self.engine.run(batch, policy, self.rows[id(batch)])


def cases(rows: int) -> Iterator[tuple[str, PreTrainedModel, Dataset]]:
    """Name, stock model and encoded rows."""
    make = AutoModelForSequenceClassification.from_config
    folder = SHARED / "weights" / "rxn-albert"
    if folder.is_dir():
        data = SHARED / "data" / "uspto_50k" / "dev.tsv.gz"
        examples = load_examples(str(data), text="reaction", max_rows=rows)
        stock = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=10)
        yield "rxn-albert", stock, encode(examples, AutoTokenizer.from_pretrained(folder), 512)[0]
    else:
        print(f"rxn-albert is left out: {folder} is missing.")
    folder = SHARED / "weights" / "albert-base-v2-tokenizer"
    if not folder.is_dir():
        print(f"ALBERT-base and BERT-base are left out: {folder} is missing.")
        return
    examples = load_examples("docstrings", split="test", max_rows=rows)
    encoded = encode(examples, AutoTokenizer.from_pretrained(folder), 512)[0]
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    yield "ALBERT-base", make(AlbertConfig(**base)), encoded
    yield "BERT-base", make(BertConfig(vocab_size=30_000)), encoded


def make_batches(encoded: Dataset, size: int, device: str) -> list[Batch]:
    """All rows, in batches of neighbouring lengths."""
    names = [name for name in ("input_ids", "token_type_ids") if name in encoded.column_names]
    order = np.argsort(encoded["length"][:], kind="stable")
    tokens = encoded.select_columns(names)
    return [
        collate(tokens[order[first : first + size].tolist()], 0, device)
        for first in range(0, len(order), size)
    ]


def half_depth(depth: int, rows: int) -> Scripted:
    """Rows leave after layers 1..depth-1 in turn, shuffled: half the depth on average."""
    layers = np.tile(np.arange(1, depth), rows // (depth - 1) + 1)[:rows]
    np.random.default_rng(0).shuffle(layers)
    return Scripted(layers=tuple(layers.tolist()), inner=CONFIDENCE)


def line(name: str, size: int, question: str, speed: Speed) -> str:
    low, high = speed.interval
    cells: list[Any] = [name, size, question, f"{speed.mean_exit_layer:.2f}"]
    cells += [f"{1 / speed.cost:.2f}", f"{speed.speed_up:.3f} [{low:.3f}, {high:.3f}]"]
    cells += [f"{speed.ideal:.3f}", f"{speed.realised_share:.3f}", speed.full_is]
    cells.append(f"{1000 * speed.full_seconds / speed.rows:.2f}")
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="torch", help="torch or inductor")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 32], help="rows of a batch")
    parser.add_argument("--only", help="one model, such as BERT-base")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {given.device}, {torch.get_num_threads()} threads\n")
    heads = "model, batch, question, mean exit layer, cost reduction, speed-up [95 %], ideal"
    heads += ", realised share, full depth is, ms a row at full depth"
    print("| " + heads.replace(", ", " | ") + " |\n" + "|---" * 10 + "|")
    for name, stock, encoded in cases(given.rows):
        if given.only not in (None, name):
            continue
        model = MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval().to(given.device)
        for size in given.sizes:
            batches = make_batches(encoded, size, given.device)
            engine = Numbered(make_engine(model, given.backend), batches)
            forced = half_depth(model.depth, len(encoded))
            for question, policy in (("forced", forced), ("never", CONFIDENCE)):
                against: Any = "stock" if question == "never" else None
                speed = measure_speed(engine, model, batches, policy, given.passes, against)
                print(line(name, size, question, speed), flush=True)


if __name__ == "__main__":
    main()
