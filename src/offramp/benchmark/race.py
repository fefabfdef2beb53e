"""Lets everything that takes part run in turns, and says what came of it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from offramp.backbones import Batch
from offramp.benchmark.contenders import Shop
from offramp.benchmark.document import (
    BASELINE,
    Contender,
    EarlyExit,
    Skipped,
    Spread,
    Timing,
    Workload,
)
from offramp.benchmark.runners import Ours
from offramp.benchmark.subject import Rows as Data
from offramp.benchmark.words import about
from offramp.benchmark.workloads import STREAM, Work, numbered
from offramp.engines import CostModel, cost_model
from offramp.engines.batching import bucket
from offramp.engines.pool import Numbered
from offramp.errors import MissingExtraError, OfframpError
from offramp.evaluation import ideal_speed_up, laps
from offramp.evaluation.speed import Job
from offramp.policies import Full, Policy, Rows

logger = logging.getLogger("offramp")

FEWEST_PASSES, MOST_PASSES = 3, 25
REST_SECONDS = 0.002
"""For the threads of one runtime to fall asleep before the next one is timed."""
Seconds = Mapping[str, npt.NDArray[np.float64]]
_EXTRA_OF = {"onnx": "onnx", "onnxruntime": "onnx", "onnxscript": "onnx", "openvino": "openvino"}


def ready(
    shop: Shop, contenders: Sequence[Contender], batch: Batch, quiet: bool = False
) -> tuple[list[Contender], list[Skipped]]:
    """Prepare all and let each run once: those that can take part, and those that cannot."""
    able = []
    unable: dict[str, list[str]] = {}
    with tqdm(contenders, desc="preparing", disable=quiet or None, leave=False) as bar:
        for one in bar:
            bar.set_postfix_str(one.name)
            why = _hindrance(shop, one, batch)
            if why is None:
                able.append(one)
            else:
                # a runtime and precision, however many contenders it would have been
                unable.setdefault(why, []).append(one.name.partition(",")[0])
    return able, [
        Skipped(names=tuple(dict.fromkeys(names)), why=why) for why, names in unable.items()
    ]


def _hindrance(shop: Shop, contender: Contender, batch: Batch) -> str | None:
    """Why it cannot take part."""
    leaf = next(iter(batch.values()))
    rows = Rows(torch.arange(len(leaf)), torch.full((len(leaf),), leaf.shape[1]))
    try:
        with torch.inference_mode():
            shop.prepare(contender).job(batch, rows, Full())()
    except ImportError as problem:
        name = (problem.name or "").partition(".")[0]
        if name in _EXTRA_OF:
            return str(MissingExtraError(name, _EXTRA_OF[name]))
        return _first_line(problem)
    except OfframpError as problem:
        return str(problem)
    except Exception as problem:  # exporters and runtimes raise whatever they like
        logger.debug("%s", contender.name, exc_info=True)
        return _first_line(problem)
    return None


def _first_line(problem: Exception) -> str:
    return str(problem).strip().split("\n")[0][:300] or type(problem).__name__


@dataclass
class Race:
    """Those that take part.

    Args:
        data: the rows.
        policies: for rows that leave early, by their words.
        passes: None for as many as fit into `minutes`, which is for each workload.
    """

    shop: Shop
    contenders: Sequence[Contender]
    data: Data
    policies: Mapping[str, Policy]
    passes: int | None
    minutes: float
    quiet: bool = False

    def run(self, work: Work) -> Workload:
        """Measure one workload."""
        running = [one for one in self.contenders if work.name == STREAM or not one.pool]
        jobs = {one.name: self._jobs(one, work) for one in running}
        executed = {
            one.name: self._executed(one, jobs[one.name], work, self.policies[one.leaves])
            for one in running
            if one.leaves is not None
        }
        seconds = self._timed(work.name, {**jobs, **self._fixed(work)})
        timings = []
        for one in running:
            early = None
            if one.name in executed:
                early = self._gain(one, seconds, work.rows, *executed[one.name])
            timings.append(_timing(one.name, seconds, work.rows, early))
        return Workload(
            name=work.name,
            batch_size=work.batch_size,
            rows=work.rows,
            passes=len(seconds[BASELINE]),
            timings=tuple(timings),
        )

    def _jobs(self, contender: Contender, work: Work) -> list[Job]:
        runner = self.shop.prepare(contender)
        policy = Full() if contender.leaves is None else self.policies[contender.leaves]
        if contender.pool and isinstance(runner, Ours):
            return [runner.stream(self._one_by_one(work), policy)]
        batches = work.plain if contender.side == "plain" else work.ours
        return [runner.job(batch, rows, policy) for batch, rows in self._batches(batches)]

    def _fixed(self, work: Work) -> dict[str, list[Job]]:
        """What comes before the first layer, of each runtime and precision of ours."""
        jobs = {}
        for one in self.contenders:
            runner = self.shop.prepare(one)
            if isinstance(runner, Ours) and one.leaves is None:
                batches = self._batches(work.ours)
                jobs[_fixed_name(one)] = [runner.front.job(*each, Full()) for each in batches]
        return jobs

    def _batches(self, places: Sequence[Sequence[int]]) -> Iterator[tuple[Batch, Rows]]:
        """Batches with their rows numbered, as forced policies want them."""
        for chosen, rows in zip(places, numbered(self.data.lengths, places), strict=True):
            yield self.data.batch(chosen), rows

    def _one_by_one(self, work: Work) -> list[Numbered]:
        """Rows as they come, as `Predictor.stream` pads them; numbered as in the batches."""
        ids = np.empty(len(self.data.lengths), dtype=np.int64)
        for places, rows in zip(work.ours, numbered(self.data.lengths, work.ours), strict=True):
            ids[list(places)] = rows.ids
        longest = self.shop.model.max_length
        padded = [bucket(length, longest) for length in self.data.lengths.tolist()]
        return [(int(ids[at]), self.data.batch([at], padded[at])) for at in range(len(ids))]

    @cached_property
    def _costs(self) -> CostModel:
        return cost_model(self.shop.model)

    def _executed(
        self, contender: Contender, jobs: Sequence[Job], work: Work, policy: Policy
    ) -> tuple[float, float]:
        """Mean exit layer, and the executed share of full-depth FLOPs."""
        answers: list[Any] = [job() for job in jobs]
        if contender.pool:
            places = np.array([position for position, _ in answers[0]])
            layers = np.array([row.exit_layer for _, row in answers[0]])
        else:
            places = np.concatenate([list(batch) for batch in work.ours])
            layers = np.concatenate([one.exit_layers.cpu().numpy() for one in answers])
        return float(layers.mean()), self._costs.share(self.data.lengths[places], layers, policy)

    def _timed(self, name: str, jobs: Mapping[str, Sequence[Job]]) -> Seconds:
        """Seconds of each pass, after one that is not counted."""
        rest = REST_SECONDS if self.shop.threads > 1 else 0.0
        running = laps(jobs, self.shop.device.type == "cuda", rest)
        first = sum(next(running).values())
        wanted = self.passes or self._fitting(first)
        logger.info("%s: %d passes, about %s.", name, wanted, about(first * wanted))
        with tqdm(total=wanted, desc=name, unit="pass", disable=self.quiet or None) as bar:
            taken = []
            for _ in range(wanted):
                taken.append(next(running))
                bar.update()
        return {one: np.array([lap[one] for lap in taken]) for one in jobs}

    def _fitting(self, seconds: float) -> int:
        """Passes that fit into the time."""
        fit = int(self.minutes * 60 / max(seconds, 1e-6)) - 1
        return min(max(fit, FEWEST_PASSES), MOST_PASSES)

    def _gain(
        self, contender: Contender, seconds: Seconds, rows: int, layer: float, cost: float
    ) -> EarlyExit:
        """Early exit beside full depth of the same runtime and precision."""
        whole = [one.name for one in self.contenders if _is_full_depth_of(one, contender)]
        full_is = min(whole, key=lambda name: float(np.median(seconds[name])))
        fixed = float(np.median(seconds[_fixed_name(contender)]))
        ideal = ideal_speed_up(float(np.median(seconds[full_is])), fixed, cost)
        speed_up = Spread.of(seconds[full_is] / seconds[contender.name])
        return EarlyExit(
            mean_exit_layer=layer,
            cost=cost,
            speed_up=speed_up,
            full_is=full_is,
            fixed_ms=1000 * fixed / rows,
            ideal=ideal,
            realised_share=speed_up.median / ideal,
        )


def _is_full_depth_of(one: Contender, early: Contender) -> bool:
    return one.leaves is None and (one.runtime, one.precision, one.layers) == (
        early.runtime,
        early.precision,
        early.layers,
    )


def _fixed_name(contender: Contender) -> str:
    """Of the clock that times what comes before the first layer; no contender is called so."""
    return f"before layer 1: {contender.runtime} {contender.precision}"


def _timing(name: str, seconds: Seconds, rows: int, early: EarlyExit | None) -> Timing:
    mine = seconds[name]
    return Timing(
        contender=name,
        seconds=tuple(mine.tolist()),
        ms=Spread.of(1000 * mine / rows),
        rows_per_second=Spread.of(rows / mine),
        times_baseline=Spread.of(seconds[BASELINE] / mine),
        early=early,
    )
