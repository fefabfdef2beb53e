"""Wall-clock speed-up, measured in interleaved passes, beside the ideal.

Full depth is the faster of ours and the stock model's own forward. In every pass all
contenders run each batch back to back, so whatever else the machine does falls on all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch
from offramp.engines import Engine, cost_model, rows_of
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import Full, Policy

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Speed:
    """Measured times of a set of batches, and what could have been.

    Attributes:
        full_seconds: full depth, per pass: the faster of ours and the stock model's.
        full_is: which of the two that was, `ours` or `stock`.
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
        rest = self.full_seconds - self.fixed_seconds
        return self.full_seconds / (self.fixed_seconds + self.cost * rest)

    @property
    def realised_share(self) -> float:
        return self.speed_up / self.ideal


def measure_speed(
    engine: Engine,
    model: MultiExitModel,
    batches: Sequence[Batch],
    policy: Policy,
    passes: int = 5,
) -> Speed:
    """Time a policy against full depth on the same batches.

    Args:
        engine: runs `model`.
        batches: tokenised and padded, on the model's device.
        passes: over all batches, after one that is not counted; at least 2.
    """
    if passes < 2 or not batches:
        raise ConfigError(f"A speed needs batches and at least 2 passes; given {passes} passes.")
    contenders: dict[str, Callable[[Batch], object]] = {
        "stock": lambda batch: model.stock(**batch),
        "ours": lambda batch: engine.run(batch, Full()),
        "early": lambda batch: engine.run(batch, policy),
        "fixed": model.backbone.embed,
    }
    seconds = _time(contenders, batches, passes)
    full_is = min("stock", "ours", key=lambda name: seconds[name].sum())
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


@torch.inference_mode()
def _time(
    contenders: dict[str, Callable[[Batch], object]], batches: Sequence[Batch], passes: int
) -> dict[str, Seconds]:
    """Seconds of each contender per pass over all batches, (passes,)."""
    seconds = {name: np.zeros(passes + 1) for name in contenders}
    names = list(contenders)
    for number in range(passes + 1):
        # another one goes first in every pass, since the first finds the caches cold
        order = names[number % len(names) :] + names[: number % len(names)]
        for batch in batches:
            for name in order:
                seconds[name][number] += _clock(contenders[name], batch)
    return {name: values[1:] for name, values in seconds.items()}


def _clock(run: Callable[[Batch], object], batch: Batch) -> float:
    on_gpu = next(iter(batch.values())).is_cuda
    start = time.perf_counter()
    run(batch)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - start


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
