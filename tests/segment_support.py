"""What tests of segments share: a stand-in for the graphs of a GPU."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from engine_support import TableModel
from torch import Tensor

from offramp.backbones import Batch
from offramp.engines import TorchEngine
from offramp.engines.cuda_graphs import CudaGraphs
from offramp.engines.segments import Passed
from offramp.engines.trees import leaves_of
from offramp.testing import tiny_batch

CPU = torch.device("cpu")


class Memory:
    """Stands for CUDA's graphs on a CPU: a repeat works on the places of the capture.

    As in a shared pool of memory, it destroys the results of all other graphs.
    """

    device = CPU

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.captures = self.repeats = 0
        self.lock = threading.Lock()

    def capture(self, work: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
        results, again = work(), work()
        # what is handed on as it was given lies with what is given, not in the pool
        fresh = [
            one
            for one, other in zip(_tensors(results), _tensors(again), strict=True)
            if one.data_ptr() != other.data_ptr()
        ]
        self.results += fresh
        self.captures += 1

        def repeat() -> None:
            self.repeats += 1
            for place in self.results:
                place.fill_(math.nan if place.is_floating_point() else 1)
            for place, leaf in zip(_tensors(results), _tensors(work()), strict=True):
                place.copy_(leaf)

        repeat_alone = torch.inference_mode()(repeat)
        return repeat_alone, results

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self.lock.acquire(blocking=False) or self.lock.acquire(timeout=60)
        try:
            yield
        finally:
            self.lock.release()


def _tensors(passed: Passed) -> list[Tensor]:
    flow, state, carry = passed.rows
    left = None if passed.left is None else passed.left._asdict()
    if left is not None and isinstance(left["layers"], int):
        del left["layers"]
    tree = {"hidden": flow.hidden, "state": state, "carry": carry, "left": left}
    return [leaf for _, leaf in leaves_of(tree)]


def graphed(model: Any, sync_every: int = 3, **options: Any) -> tuple[TorchEngine, Memory]:
    engine, memory = TorchEngine(model, sync_every=sync_every), Memory()
    engine._graphs = CudaGraphs(memory, **options)
    return engine, memory


class FreeTable(TableModel):
    """One whose layers look at nothing, as in a graph they cannot."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        one = torch.tensor((0.0, 1.0), dtype=torch.double)
        self.backbone.layer = lambda number, flow: flow._replace(  # type: ignore[method-assign]
            hidden=flow.hidden + one
        )


def alone(rows: int) -> list[tuple[int, Batch]]:
    batch = tiny_batch(rows, tokens=12, padded=False)
    return [(n, {name: leaf[n : n + 1] for name, leaf in batch.items()}) for n in range(rows)]
