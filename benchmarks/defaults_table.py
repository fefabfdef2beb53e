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
BASE = {"train": "@0.001", "attach": "@0.003"}


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

    def at(self, pooling: str, hidden: bool = False) -> str:
        return f"{pooling}{'+hidden' if hidden else ''}{BASE[self.part]}"

    @property
    def better(self) -> str:
        """Of [CLS] and mean, the one that scores better over all seeds."""
        return max(("cls", "mean"), key=lambda pooling: self.score(self.at(pooling)).value)

    @property
    def spread(self) -> float:
        """Standard error of a difference between poolings as it moves with the seed.

        Rows, weights and held-out rows all change with it. From how far every configuration
        moves against the mean of all that all seeds have.
        """
        common = [c for c in self.configs if all(c in seed["configs"] for seed in self.seeds)]
        scores = np.array([self.score(config).by_seed for config in common])
        moved = scores - scores.mean(axis=0)
        moved = moved - moved.mean(axis=1, keepdims=True)
        freedom = (scores.shape[0] - 1) * (scores.shape[1] - 1)
        if not freedom:
            return float("nan")
        return float(np.sqrt(2 * np.square(moved).sum() / freedom / scores.shape[1]))


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


def poolings(part: str) -> Iterator[str]:
    """Linear exits at one rate: scores, and each pooling against the better of [CLS] and mean."""
    rows = []
    for study in studies(part):
        better = study.better
        cells = [f"{study.name} ({MODELS[study.name]})", len(study.seeds)]
        for pooling in POOLINGS:
            score = study.score(study.at(pooling))
            if pooling == better:
                cells.append(f"**{score}** ± {1.96 * score.error:.1f}")
            else:
                cells.append(f"{score} ({study.minus(study.at(pooling), study.at(better)).signed})")
        rows.append([*cells, f"{1.96 * study.spread:.1f}"])
    yield from table(("set (model)", "seeds", *POOLINGS, "± by seed"), rows)


def full_depth(part: str = "train") -> Iterator[str]:
    rows = []
    for study in studies(part):
        better = study.at(study.better)
        row: list[object] = [study.name]
        for pooling in POOLINGS:
            score, minus = (
                study.score(study.at(pooling), "full"),
                study.minus(study.at(pooling), better, "full"),
            )
            row.append(score if study.at(pooling) == better else f"{score} ({minus.signed})")
        rows.append(row)
    yield from table(("set", *POOLINGS), rows)


def hidden(part: str) -> Iterator[str]:
    rows = [
        [s.name, *(s.minus(s.at(p, True), s.at(p)).signed for p in POOLINGS)] for s in studies(part)
    ]
    yield from table(("set", *POOLINGS), rows)


def rates(part: str) -> Iterator[str]:
    """Linear exits at other rates, against the same at the default rate."""
    rows = []
    for study in studies(part):
        for config in study.configs:
            pooling, _, rate = config.partition("@")
            if f"@{rate}" != BASE[part] and "+hidden" not in pooling:
                rows.append((study.name, rate, pooling, study.minus(config, study.at(pooling))))
    names = sorted(
        {(name, float(rate)) for name, rate, _, _ in rows},
        key=lambda n: (list(MODELS).index(n[0]), n[1]),
    )
    measured = {(name, float(rate), pooling): minus.signed for name, rate, pooling, minus in rows}
    lines = [
        [name, f"{rate:g}", *(measured.get((name, rate, pooling), "") for pooling in POOLINGS)]
        for name, rate in names
    ]
    yield from table(("set", "rate", *POOLINGS), lines)


def choices(part: str) -> Iterator[str]:
    """What the code chose before this study, and what that costs."""
    rows = []
    for study in studies(part):
        for number, seed in enumerate(study.seeds):
            alone = Study(study.name, part, [seed])
            best, chosen = alone.at(alone.better), alone.at(seed["default"])
            regret = "0" if best == chosen else alone.minus(best, chosen).signed
            rows.append((study.name, number + 1, alone.better, seed["default"], regret))
    yield from table(("set", "seed", "better of cls, mean", "chosen", "regret"), rows)


if __name__ == "__main__":
    for part in ("attach", "train"):
        if studies(part):
            print("#", part)
            for make in (poolings, hidden, rates, choices):
                print("\n".join(make(part)))
    if studies("train"):
        print("\n".join(full_depth()))
