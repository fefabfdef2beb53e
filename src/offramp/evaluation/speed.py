"""Wall-clock speed-up, measured in interleaved passes, beside the ideal.

Full depth is the faster of ours and the stock model's own forward. In every pass all contenders
take turns, a few batches each, so whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch
from offramp.engines import Engine, cost_model, rows_of
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import Full, Policy

Seconds = npt.NDArray[np.float64]
Job = Callable[[], object]
TURN_SECONDS = 0.5
"""Of the slowest contender: short enough that all meet the same machine."""


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured times of a set of batches, and what could have been.

    Attributes:
        full_seconds: full depth, per pass, of `full_is`.
        full_is: which was asked for, or is faster: `ours` or `stock`.
        early_seconds: under the policy, per pass.
        fixed_seconds: from tokenised input to the first layer, per pass.
        speed_up: full over early, geometric mean over passes; `interval` is its 95 % interval.
        cost: executed share of full-depth FLOPs.
        mean_exit_layer: over the rows.
        rows, passes: what was timed.
    """

    full_seconds: float
    full_is: str
    early_seconds: float
    fixed_seconds: float
    speed_up: float
    interval: tuple[float, float]
    cost: float
    mean_exit_layer: float
    rows: int
    passes: int

    @property
    def ideal(self) -> float:
        """The speed-up if a FLOP always took the same time and deciding none."""
        return ideal_speed_up(self.full_seconds, self.fixed_seconds, self.cost)

    @property
    def realised_share(self) -> float:
        return self.speed_up / self.ideal


def measure_speed(
    engine: Engine,
    model: MultiExitModel,
    batches: Sequence[Batch],
    policy: Policy,
    passes: int = 5,
    against: Literal["stock", "ours"] | None = None,
) -> Speed:
    """Time a policy against full depth on the same batches.

    Args:
        engine: runs `model`.
        batches: tokenised and padded, on the model's device.
        passes: over all batches, after one that is not counted; at least 2.
        against: whose full depth; the faster one if it is left out.
    """
    if passes < 2 or not batches:
        raise ConfigError(f"A speed needs batches and at least 2 passes; given {passes} passes.")
    contenders: dict[str, Callable[[Batch], object]] = {
        "stock": lambda batch: model.stock(**batch),
        "ours": lambda batch: engine.run(batch, Full()),
        "early": lambda batch: engine.run(batch, policy),
        "fixed": model.backbone.embed,
    }
    on_gpu = next(iter(batches[0].values())).is_cuda
    jobs = {name: [partial(run, b) for b in batches] for name, run in contenders.items()}
    timed = list(islice(laps(jobs, on_gpu), 1, passes + 1))
    seconds = {name: np.array([lap[name] for lap in timed]) for name in jobs}
    faster = "stock" if seconds["stock"].sum() < seconds["ours"].sum() else "ours"
    full_is = against or faster
    full, early = seconds[full_is], seconds["early"]
    speed_up, interval = _ratio(full, early)
    cost, layers = _executed(engine, model, batches, policy)
    return Speed(
        full_seconds=float(full.mean()),
        full_is=full_is,
        early_seconds=float(early.mean()),
        fixed_seconds=float(seconds["fixed"].mean()),
        speed_up=speed_up,
        interval=interval,
        cost=cost,
        mean_exit_layer=float(layers.mean()),
        rows=len(layers),
        passes=passes,
    )


def ideal_speed_up(full: float, fixed: float, cost: float) -> float:
    """Full time over the time that a share `cost` of all but the fixed time would take."""
    return full / (fixed + cost * (full - fixed))


def laps(
    jobs: Mapping[str, Sequence[Job]], on_gpu: bool = False, rest: float = 0.0
) -> Iterator[dict[str, float]]:
    """Seconds of every contender, pass after pass and without end; the first pass warms up.

    Args:
        jobs: of each contender, one per batch; each in turn does a few, then the next few.
        on_gpu: wait for the GPU before the clock is read.
        rest: seconds between two contenders, for the threads of the one to fall asleep.
    """
    names, number, turn = list(jobs), 0, 1
    while True:
        # another one goes first in every pass, since the first finds the caches cold
        order = names[number % len(names) :] + names[: number % len(names)]
        seconds = dict.fromkeys(names, 0.0)
        for place in range(0, max(map(len, jobs.values())), turn):
            for name in order:
                if some := jobs[name][place : place + turn]:
                    time.sleep(rest)
                    seconds[name] += _clock(some, on_gpu)
        yield seconds
        slowest = max(seconds[name] / max(len(jobs[name]), 1) for name in names)
        turn = max(1, round(TURN_SECONDS / max(slowest, 1e-9)))
        number += 1


@torch.inference_mode()
def _clock(jobs: Sequence[Job], on_gpu: bool) -> float:
    if len(jobs) > 1:
        _run(jobs[0], on_gpu)  # whose turn it was has the caches: that would cost quick ones most
    start = time.perf_counter()
    for job in jobs:
        _run(job, on_gpu)
    return time.perf_counter() - start


def _run(job: Job, on_gpu: bool) -> None:
    job()
    if on_gpu:
        torch.cuda.synchronize()


def _ratio(full: Seconds, early: Seconds) -> tuple[float, tuple[float, float]]:
    """Geometric mean of full over early, and its 95 % t interval over passes."""
    from scipy import stats

    logs = np.log(full / early)
    margin = stats.t.ppf(0.975, len(logs) - 1) * logs.std(ddof=1) / np.sqrt(len(logs))
    low, middle, high = np.exp(logs.mean() + margin * np.array([-1, 0, 1]))
    return float(middle), (float(low), float(high))


def _executed(
    engine: Engine, model: MultiExitModel, batches: Sequence[Batch], policy: Policy
) -> tuple[float, npt.NDArray[np.int64]]:
    """Executed share of full-depth FLOPs, and the exit layer of every row."""
    layers = np.concatenate([engine.run(b, policy).exit_layers.cpu().numpy() for b in batches])
    lengths = np.concatenate([rows_of(batch).lengths.cpu().numpy() for batch in batches])
    return cost_model(model).share(lengths, layers, policy), layers
