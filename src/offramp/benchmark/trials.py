"""The same race on one number of threads after the other."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from offramp.benchmark.contenders import Shop
from offramp.benchmark.document import BASELINE, Contender, Skipped, Threaded
from offramp.benchmark.race import Race, ready
from offramp.benchmark.subject import Rows as Data
from offramp.benchmark.workloads import Work
from offramp.errors import ConfigError
from offramp.policies import Policy

logger = logging.getLogger("offramp")


@dataclass(frozen=True)
class Trial:
    """What came of one number of threads."""

    able: list[Contender]
    broken: list[Skipped]
    found: Threaded


@dataclass(frozen=True)
class Trials:
    """What is to be timed, on whatever number of threads.

    Args:
        make_shop: of that many threads.
        minutes: for each workload; see `Race` for the others.
    """

    make_shop: Callable[[int], Shop]
    wanted: Sequence[Contender]
    data: Data
    policies: Mapping[str, Policy]
    works: Sequence[Work]
    passes: int | None
    minutes: float
    quiet: bool

    def on(self, threads: int) -> Trial:
        """Run all workloads. Raises ConfigError where the baseline does not run."""
        logger.info("On %d %s.", threads, "thread" if threads == 1 else "threads")
        with _torch_threads(threads):
            shop = self.make_shop(threads)
            able, broken = ready(shop, self.wanted, self.data.batch([0]), self.quiet)
            _check_baseline(able, broken)
            race = Race(shop, able, self.data, self.policies, self.passes, self.minutes, self.quiet)
            workloads = tuple(race.run(work) for work in self.works)
        return Trial(able, broken, Threaded(threads=threads, workloads=workloads))


def fastest(trials: Sequence[Trial]) -> Trial:
    """The one of the least time, by the geometric mean over contenders and workloads."""
    everywhere = set.intersection(*({one.name for one in trial.able} for trial in trials))

    def mean(trial: Trial) -> float:
        timings = (timing for work in trial.found.workloads for timing in work.timings)
        spent = [timing.ms.median for timing in timings if timing.contender in everywhere]
        return float(np.log(spent).mean())

    return min(trials, key=mean)


def _check_baseline(able: Sequence[Contender], broken: Sequence[Skipped]) -> None:
    """Raise ConfigError where what everybody is compared with does not run here."""
    if all(one.name != BASELINE for one in able):
        short = BASELINE.partition(",")[0]
        why = next((one.why for one in broken if short in one.names), "it is not there")
        raise ConfigError(f"{BASELINE}, which all are compared with, does not run here: {why}")


@contextmanager
def _torch_threads(wanted: int) -> Iterator[None]:
    """That many in torch, until the end."""
    before = torch.get_num_threads()
    torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)
