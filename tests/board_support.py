"""Leaderboards as a comparison might find them."""

from __future__ import annotations

from typing import Any

import numpy as np

from offramp.comparison.board import (
    TARGETS,
    AtTarget,
    Board,
    Difference,
    Figure,
    MethodRow,
    Missing,
    Point,
    PolicyRow,
    Reading,
)

NAMES = [
    "auto",
    "cosee",
    "cap",
    "beem",
    "elbert",
    "gpfee",
    "palbert",
    "fastbert",
    "pcee_bert",
    "f_pabee",
    "jei_dnn",
    "romebert",
    "pabee",
    "berxit",
    "pondernet",
    "truncated",
    "deebert",
]
POLICIES = ("entropy", "patience", "max_probability", "energy", "fixed")
DEPTH = 12


def figure(value: float, wide: float = 0.008) -> Figure:
    return Figure(value=value, low=value - wide, high=value + 1.1 * wide)


def difference(value: float, p: float, p_holm: float) -> Difference:
    wide = abs(value) * (0.6 if p_holm < 0.05 else 1.8) + 1e-4
    return Difference(value=value, low=value - wide, high=value + wide, p=p, p_holm=p_holm)


def make_curve(quality: float, high: float, spread: float, seed: int) -> tuple[Point, ...]:
    """Rises from the commonest answer to full depth, sooner where quality is larger."""
    noise = np.random.default_rng(seed).normal(0, 0.003 * spread, DEPTH)
    costs = [(n + 1) / DEPTH * 1.01 for n in range(DEPTH)]
    scores = [high - spread * (1 - cost) ** 3 * (1.1 - quality) for cost in costs]
    dots = [
        Point(cost=cost, score=score + shift, policy={"name": "entropy", "threshold": cost})
        for cost, score, shift in zip(costs, scores, noise, strict=True)
    ]
    return (Point(cost=0, score=high - spread, policy=None), *dots)


def make_family(
    name: str, quality: float, high: float, spread: float, seeds: tuple[int, ...]
) -> PolicyRow:
    """One target is missing, one was reached by no seed; an exit has no AUROC."""
    curves = tuple(make_curve(quality, high, spread, seed) for seed in seeds)
    area = float(np.mean([[dot.score for dot in curve[3:]] for curve in curves]))
    policy: dict[str, Any] = {"name": name, "threshold": 0.1234567, "floor": None}
    at = [
        AtTarget(
            target=target,
            score=figure(area + spread * (0.05 - 0.02 * target), 0.01 * spread),
            readings=tuple(
                Reading(seed=seed, policy=policy, score=area, cost_reduction=target * 1.013)
                for seed in (seeds if target < 4 else ())
            ),
        )
        for target in (TARGETS if name != "patience" else TARGETS[:2])
    ]
    auroc = [None, *np.linspace(0.6 + 0.2 * quality, 0.84, DEPTH - 2)]
    if name == "fixed":
        auroc = [None] * (DEPTH - 1)
    return PolicyRow(
        name=name,
        area=figure(area, 0.03 * spread),
        tune_area=area + 0.01 * spread,
        at=tuple(at),
        auroc=tuple(auroc),
        curves=curves,
    )


def make_method(place: int, name: str, high: float, spread: float, **fields: Any) -> MethodRow:
    quality, seeds = 1 - 0.055 * place, fields.pop("seeds", (0, 1, 2))
    families = [
        make_family(policy, quality - 0.06 * n, high, spread, seeds)
        for n, policy in enumerate(POLICIES)
    ]
    gap = -0.003 * place * spread
    holm = 0.2 if place < 4 else 0.012 if place < 9 else 0.0004
    against = {} if place == 0 else {key: difference(gap, holm / 9, holm) for key in ("area", "2")}
    return MethodRow(
        **{
            "name": name,
            "paper": f"{name}: leaving early, the journal of exits {2018 + place % 7}",
            "learning_rate": None if place % 5 == 0 else 3e-5,
            "own": "patience" if place % 2 else "entropy",
            "chosen": "entropy",
            "policies": tuple(families),
            "full_score": figure(high),
            "seconds": 183.0 * (1 + 0.2 * (place % 7)),
            "times_plain": None if place == 3 else 1 + 0.2 * (place % 7),
            "parameters_added": 0 if name == "truncated" else 3_084 + 591_360 * (place % 3),
            "against": against,
            "against_fixed": {"area": difference(0.01, 0.002, 0.03)},
            "against_plain": {
                "full": difference(-0.001, 0.6, 1),
                "2": difference(-0.004, 0.01, 0.03),
            },
        }
        | fields
    )


def make_board(
    names: tuple[str, ...] | list[str] = NAMES,
    high: float = 0.91,
    spread: float = 0.4,
    **fields: Any,
) -> Board:
    """17 methods, three seeds, one run missing; scores from `high - spread` to `high`."""
    seeds = {"elbert": (0, 2)}
    methods = [
        make_method(place, name, high, spread, seeds=seeds.get(name, (0, 1, 2)))
        for place, name in enumerate(names)
    ]
    return Board(
        **{
            "title": "SST-2, MiniLM-L6",
            "facts": {
                "model": "nreimers/MiniLM-L6-H384-uncased",
                "rows": "10,000 train, 1,000 tune, 872 test",
                "epochs": "3 for the fine-tune, 3 for each method",
                "command": "offramp compare minilm --data sst2 --methods all --seeds 3",
            },
            "metric": "accuracy",
            "depth": DEPTH,
            "seeds": (0, 1, 2),
            "test_rows": 872,
            "guess": high - spread,
            "plain": figure(high + 0.003),
            "reference": names[0],
            "methods": tuple(methods),
            "missing": (Missing(method="elbert", seed=1, why="out of memory after 2 epochs"),),
        }
        | fields
    )
