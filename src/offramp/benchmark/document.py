"""What `bench` finds, as it is written to `bench.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import numpy as np
import numpy.typing as npt

from offramp import __version__
from offramp.storage import Strict

Side = Literal["plain", "offramp"]
Runtime = Literal["torch", "inductor", "onnx", "openvino"]
BASELINE = "transformers fp32"
"""What a user has who does nothing about speed; every contender is compared with it."""


class Spread(Strict):
    """The median over passes, and its quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: npt.ArrayLike) -> Self:
        low, median, high = np.quantile(np.asarray(values, dtype=np.float64), (0.25, 0.5, 0.75))
        return cls(median=float(median), low=float(low), high=float(high))


class Contender(Strict):
    """What takes part.

    Attributes:
        side: `plain` is what a user has without offramp.
        layers: that it has; a smaller number than the model's is a truncation.
        leaves: where rows leave, in words; None is full depth.
        pool: takes rows one by one through the depth pool; on the stream alone.
        peak_megabytes: of a process of its own, above what its libraries take, or of tensors on a
            GPU; None where it was not measured.
    """

    name: str
    side: Side
    runtime: Runtime
    precision: str
    layers: int
    leaves: str | None = None
    pool: bool = False
    peak_megabytes: float | None = None


class EarlyExit(Strict):
    """What rows that leave early gain over full depth of the same runtime and precision.

    Attributes:
        mean_exit_layer: over rows.
        cost: executed share of full-depth FLOPs.
        speed_up: full over early, of each pass.
        full_is: the contender that full depth is, the faster of ours and the plain one.
        fixed_ms: a row, from tokens to the first layer.
        ideal: the speed-up if a FLOP always took the same time and deciding none.
        realised_share: speed-up over ideal.
    """

    mean_exit_layer: float
    cost: float
    speed_up: Spread
    full_is: str
    fixed_ms: float
    ideal: float
    realised_share: float


class Timing(Strict):
    """One contender on one workload.

    Attributes:
        seconds: per pass over all rows.
        ms: a row.
        rows_per_second: of each pass.
        times_baseline: how often it is as fast as `BASELINE`, of each pass.
        early: None at full depth.
    """

    contender: str
    seconds: tuple[float, ...]
    ms: Spread
    rows_per_second: Spread
    times_baseline: Spread
    early: EarlyExit | None = None


class Workload(Strict):
    """The same rows for all contenders.

    Attributes:
        name: `batch 1`, `batch 8`, ..., `stream`.
        batch_size: None for the stream.
    """

    name: str
    batch_size: int | None
    rows: int
    passes: int
    timings: tuple[Timing, ...]

    def of(self, contender: str) -> Timing:
        return next(one for one in self.timings if one.contender == contender)

    def has(self, contender: str) -> bool:
        return any(one.contender == contender for one in self.timings)

    def fastest(self, names: Sequence[str]) -> Timing | None:
        """The one of the smallest median among these."""
        found = [one for one in self.timings if one.contender in names]
        return min(found, key=lambda one: one.ms.median, default=None)

    def times(self, contender: str, other: str) -> Spread:
        """How often a contender is as fast as another, pass by pass."""
        mine, theirs = self.of(contender).seconds, self.of(other).seconds
        return Spread.of(np.divide(theirs, mine))


class Threaded(Strict):
    """The same race on another number of threads."""

    threads: int
    workloads: tuple[Workload, ...]


class Lengths(Strict):
    """Tokens a row; an image counts as one."""

    source: str
    shortest: int
    median: float
    mean: float
    longest: int


class Skipped(Strict):
    """What did not take part, for one and the same reason."""

    names: tuple[str, ...]
    why: str


class Bench(Strict):
    """A benchmark.

    Attributes:
        model: its name.
        source: what it is, in words.
        parameters: of the stock model.
        forced: some rows leave by a pattern, whatever the exits say.
        threads: of every runtime; where several numbers were tried, the fastest by the geometric
            mean over contenders and workloads.
        machine: names and versions.
        others: what the other numbers of threads came to.
    """

    schema_version: Literal[1] = 1
    offramp: str = __version__
    model: str
    source: str
    depth: int
    parameters: int
    forced: bool
    threads: int
    machine: dict[str, str]
    lengths: Lengths
    contenders: tuple[Contender, ...]
    workloads: tuple[Workload, ...]
    skipped: tuple[Skipped, ...]
    others: tuple[Threaded, ...] = ()

    def by_threads(self, workload: str, contender: str) -> dict[int, float]:
        """Milliseconds a row on each number of threads; empty where it was not timed."""
        here = Threaded(threads=self.threads, workloads=self.workloads)
        return {
            trial.threads: work.of(contender).ms.median
            for trial in sorted((here, *self.others), key=lambda trial: trial.threads)
            for work in trial.workloads
            if work.name == workload and work.has(contender)
        }

    def named(self, name: str) -> Contender:
        return next(one for one in self.contenders if one.name == name)

    def names(self, side: Side, early: bool | None = None, full_model: bool = False) -> list[str]:
        """Of contenders of a side; only early or full-depth ones, or those of all layers."""
        return [
            one.name
            for one in self.contenders
            if one.side == side
            and early in (None, one.leaves is not None)
            and (not full_model or one.layers == self.depth)
        ]
