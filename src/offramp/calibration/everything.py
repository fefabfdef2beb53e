"""Everything that fits a table: policies, parameters, temperatures, averages, bars per exit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from offramp.calibration.fitting import FITS
from offramp.calibration.judge import Judge, Outcome, bars_at
from offramp.metrics import MULTI, REGRESSION
from offramp.policies import (
    POLICIES,
    Averaged,
    EvidencePolicy,
    Fixed,
    Full,
    MaxProbability,
    PerExit,
    Policy,
    Sample,
    Tempered,
    has_one_bar,
)
from offramp.table import ExitTable
from offramp.table.replay import evidence_of_exits
from offramp.table.store import Array

LEVELS = 20
"""Bars that an exit may have, each letting 5% more of the rows leave."""
_NOTHING = 1e-200
_APART = (Fixed.name, Full.name, Sample.name, Averaged.name, PerExit.name)


def everything(judge: Judge) -> Iterator[Iterator[Outcome]]:
    """Searches of policies, some ten thousand in all.

    Every policy that fits the table, also with the average of exits for its answer or for what it
    looks at, with fitted temperatures, and with bars for each exit.
    """
    starts = [one for name in POLICIES if name not in _APART for one in _starts(name, judge.table)]
    yield from map(judge.search, starts)
    plain = [one for one in starts if has_one_bar(one)]
    averages = [mean for start in plain for mean in _averages(start, judge.table.problem_type)]
    yield from map(judge.search, averages)
    for start in [*plain, *averages]:
        inner = start.policy if isinstance(start, Averaged) else start
        if isinstance(inner, Tempered | MaxProbability):
            yield per_exit_path(judge, start)


def per_exit_path(judge: Judge, policy: EvidencePolicy, levels: int = LEVELS) -> Iterator[Outcome]:
    """Bars for each exit, from nobody leaving to all.

    Greedy: the next bar to be lowered is that of the exit where the rows that then leave lose
    least for what they save. That is counted as if every exit were read in any case, so the first
    bar of an exit seems to cost nothing; what comes out is counted as it is.

    Args:
        policy: whose evidence is compared with the bars.
        levels: of a bar.
    """
    table = judge.table
    evidence = evidence_of_exits(table, policy)[:, :-1]
    bars = [
        _levels(evidence[:, place], levels) if policy.reads(place + 1) else []
        for place in range(table.depth - 1)
    ]
    rows = _Rows(evidence, judge.losses_by_exit(policy), judge.costs_by_exit(policy))
    now: list[float | None] = [None] * len(bars)

    def steps() -> Iterator[tuple[Policy, Array]]:
        while (place := rows.best(bars)) is not None:
            bar = now[place] = bars[place].pop(0)
            yield PerExit(policy=policy, bars=tuple(now)), rows.lower(place, bar)

    yield from judge.outcomes(policy, steps())


class _Rows:
    """Where rows leave under the bars so far."""

    def __init__(self, evidence: Array, losses: Array, costs: Array) -> None:
        self._evidence, self._losses, self._costs = evidence, losses, costs
        self._where = np.full(len(losses), losses.shape[1] - 1)

    def _leaving(self, place: int, bar: float) -> Array:
        return np.flatnonzero((self._where > place) & (self._evidence[:, place] > bar))

    def best(self, bars: Sequence[list[float]]) -> int | None:
        """The exit whose next bar gives most; bars that nobody is moved by are dropped."""
        prices: dict[int, float] = {}
        for place, left in enumerate(bars):
            while left and not len(rows := self._leaving(place, left[0])):
                left.pop(0)
            if left:
                there = rows, self._where[rows]
                lost = (self._losses[rows, place] - self._losses[there]).sum()
                saved = (self._costs[there] - self._costs[rows, place]).sum()
                prices[place] = lost / max(saved, _NOTHING)
        return min(prices, key=lambda place: prices[place], default=None)

    def lower(self, place: int, bar: float) -> Array:
        """Exit layers (rows,) once this exit has a lower bar."""
        self._where[self._leaving(place, bar)] = place
        return self._where + 1


def _levels(evidence: Array, levels: int) -> list[float]:
    """Bars from one that few pass, or none, to one that all do but the least sure."""
    shares = np.linspace(0, 1, levels + 1)[:-1]
    falling: list[float] = bars_at(evidence[np.isfinite(evidence)], shares)[::-1].tolist()
    return falling


def _starts(name: str, table: ExitTable) -> list[Policy]:
    kind = POLICIES[name]
    if not set(table.header.signals).issuperset(kind.signals):
        return []
    starts = kind.variants(table.problem_type, table.depth)
    if not starts or name not in FITS:
        return starts
    fitted = FITS[name](table)
    if isinstance(fitted, Tempered) and table.header.num_scores > 2:
        return [fitted._with(measure=one) for one in ("probability", "margin", "certainty")]
    return [fitted]


def _averages(start: EvidencePolicy, problem_type: str) -> Iterator[Averaged]:
    for average in ("scores",) if problem_type == REGRESSION else ("scores", "probabilities"):
        for look in ("exit", "average"):
            options = {"policy": start, "average": average, "decide_on": look}
            yield Averaged.model_validate(options | {"multi_label": problem_type == MULTI})
