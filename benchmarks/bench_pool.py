"""Does a pool of rows at different depths keep the layers saved? A saturated stream.

    python benchmarks/bench_pool.py [--passes 9] [--rows 256] [--slots 32] [--tokens 96]

An endless stream of rows of one length; they leave after layers 1..L-1 in equal shares while exits
and policy run at every layer. Three take turns: full depth in batches (the faster of ours and the
stock model), early exit in batches that shrink (`run`), and early exit in a pool (`stream`). After
the first passes the stream is in its steady state: all slots are taken, and refilled as rows leave.

- *of L / mean depth*: rows a second, as a share of L / mean exit layer x those of full depth;
- *realised share*: the same of the ideal, where embedding and exits are counted as well.

Answers of a stream come in bursts, so a pass needs many more rows than there are slots.
rxn-albert is read from the shared folder; the others have random weights.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from statistics import median

import numpy as np
import torch
from transformers import (
    AlbertConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    PreTrainedModel,
)

from offramp.backbones import Batch
from offramp.engines import TorchEngine, cost_model
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import Full, MaxProbability, Rows
from offramp.testing import Scripted

SHARED = Path(os.environ.get("OFFRAMP_SHARED", "../shared"))
CONFIDENCE = MaxProbability(threshold=1.0)  # finite, and no probability is above it
MINILM = {"hidden_size": 384, "num_attention_heads": 12, "intermediate_size": 1536}


def cases() -> Iterator[tuple[str, PreTrainedModel]]:
    make = AutoModelForSequenceClassification.from_config
    folder = SHARED / "weights" / "rxn-albert"
    if folder.is_dir():
        yield "rxn-albert", AutoModelForSequenceClassification.from_pretrained(folder)
    base = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}
    yield "ALBERT-base", make(AlbertConfig(**base))
    yield "MiniLM-6", make(BertConfig(num_hidden_layers=6, **MINILM))
    yield "BERT-base", make(BertConfig())


class Race:
    """Runs the same rows in all three ways; every call of a way answers `rows` rows."""

    def __init__(self, model: MultiExitModel, tokens: int, rows: int, slots: int) -> None:
        self.model, self.engine, self.slots = model, TorchEngine(model), slots
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(5, 300, (rows, tokens), generator=draw)
        self.rows = [{"input_ids": row.unsqueeze(0)} for row in ids]
        self.batches: list[tuple[Batch, Rows]] = []
        for places in torch.arange(rows).split(slots):
            lengths = torch.full_like(places, tokens)
            self.batches.append(({"input_ids": ids[places]}, Rows(places, lengths)))
        layers = np.arange(rows) % (model.depth - 1) + 1
        np.random.default_rng(0).shuffle(layers)
        self.layers = layers
        self.policy = Scripted(layers=tuple(layers.tolist()), inner=CONFIDENCE)
        self.answers = self.engine.stream(self._endless(), self.policy, slots=slots)

    def _endless(self) -> Iterator[tuple[int, Batch]]:
        return ((n % len(self.rows), self.rows[n % len(self.rows)]) for n in count())

    def full(self) -> None:
        for batch, rows in self.batches:
            self.engine.run(batch, Full(), rows)

    @torch.inference_mode()
    def stock(self) -> None:
        for batch, _ in self.batches:
            self.model.stock(**batch)

    def shrinking(self) -> None:
        for batch, rows in self.batches:
            self.engine.run(batch, self.policy, rows)

    def pool(self) -> None:
        for _ in islice(self.answers, len(self.rows)):
            pass

    @torch.inference_mode()
    def embed(self) -> None:
        for batch, _ in self.batches:
            self.model.backbone.embed(batch)

    def ideal(self, full: float, fixed: float) -> float:
        """Seconds if time went only by the fixed part and by what is executed."""
        lengths = np.full(len(self.rows), self.rows[0]["input_ids"].shape[1])
        share = cost_model(self.model).share(lengths, self.layers, self.policy)
        return fixed + share * (full - fixed)


def timed(ways: dict[str, Callable[[], None]], passes: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(passes + 2):
        names = list(ways)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            start = time.perf_counter()
            ways[name]()
            if turn >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def line(name: str, race: Race, passes: int) -> str:
    ways = {"full": race.full, "stock": race.stock, "run": race.shrinking, "pool": race.pool}
    seconds = timed(ways | {"embed": race.embed}, passes)
    deep = min("full", "stock", key=lambda way: median(seconds[way]))
    mean = float(race.layers.mean())
    cells = [name, str(race.slots), str(race.rows[0]["input_ids"].shape[1]), f"{mean:.2f}"]
    cells.append(f"{1000 * median(seconds[deep]) / len(race.rows):.2f}")
    for way in ("run", "pool"):
        rounds = list(zip(seconds[deep], seconds[way], seconds["embed"], strict=True))
        plain = [full / time * mean / race.model.depth for full, time, _ in rounds]
        share = [race.ideal(full, fixed) / time for full, time, fixed in rounds]
        cells += [
            f"{median(plain):.3f}",
            f"{median(share):.3f} ({min(share):.2f}..{max(share):.2f})",
        ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--passes", type=int, default=9)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--only", help="one model, such as ALBERT-base")
    given = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    heads = "model, slots, tokens, mean exit layer, full depth ms a row"
    heads += ", run: of L / mean depth, run: realised share"
    heads += ", pool: of L / mean depth, pool: realised share"
    print("| " + heads.replace(", ", " | ") + " |\n" + "|---" * 9 + "|")
    for name, stock in cases():
        if given.only in (None, name):
            model = MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval()
            race = Race(model, given.tokens, given.rows, given.slots)
            print(line(name, race, given.passes), flush=True)


if __name__ == "__main__":
    main()
