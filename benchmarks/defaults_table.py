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


def choices(part: str, now: str) -> Iterator[str]:
    """What the code chose before this study, and what it does `now`, by what they lose."""
    rate, rows = CROSSED[part], []
    for study in studies(part):
        for number, seed in enumerate(study.seeds, start=1):
            alone = Study(study.name, part, [seed])
            chosen, better = f"{seed['default']}@{rate}", alone.better(rate)
            regret = "0" if better == chosen else alone.minus(better, chosen).signed
            gain = alone.minus(now, chosen).signed
            rows.append(
                (study.name, number, seed["default"], better.partition("@")[0], regret, gain)
            )
    head = ("set", "seed", "chosen before", "better of cls, mean", "regret", "now minus before")
    yield from table(head, rows)


if __name__ == "__main__":
    for part in ("attach", "train"):
        print("#", part)
        print("\n".join(poolings(part)))
        print("\n".join(hidden(part)))
        print(
            "\n".join(choices(part, {"train": "attention@0.003", "attach": "attention@0.01"}[part]))
        )
    print("\n".join(poolings("train", "full")))
