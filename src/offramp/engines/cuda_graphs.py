"""CUDA graphs: a segment is captured once for a shape, then replayed in one launch.

A replay runs the same kernels on the same places in memory. So rows are copied to where the capture
read them, and batches have few sizes: they are filled up with copies of a row.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from offramp.backbones import Flow
from offramp.engines.segments import Passed, Running, Segments
from offramp.engines.trees import copy_tree, leaves_of

logger = logging.getLogger(__name__)

MOST = 128
"""CudaGraphs that an engine holds; the one not used for longest makes room."""

Repeat = Callable[[], object]
Tree = Mapping[str, Any]
"""Tensors, mappings of them, and None."""


class Recorder(Protocol):
    """What captures work on a device."""

    device: torch.device

    def capture(self, work: Callable[[], Passed]) -> tuple[Repeat, Passed]:
        """Do the work; what repeats it, and its results, which every repeat writes anew.

        Raises RuntimeError where it cannot be captured.
        """
        ...

    def turn(self) -> AbstractContextManager[None]:
        """Whoever is within is alone, on this machine's side and on the device."""
        ...


class NoQuestions(TorchDispatchMode):
    """Raises RuntimeError where the host would wait for a GPU, or send it Python's numbers."""

    asking = ("_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masked = name in ("index", "index_put_") and any(map(_is_mask, args[1]))
        if name in self.asking or masked or (name == "lift_fresh" and args[0].is_cuda):
            raise RuntimeError(f"{func} makes the host wait for the device")
        return func(*args, **(kwargs or {}))


def _is_mask(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8)


class CudaRecorder:
    """Captures on a CUDA device, see torch's notes on CUDA graphs.

    All its graphs share one pool of memory, so none may run beside another.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.Lock()
        self._side = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._done = torch.cuda.Event()

    def capture(self, work: Callable[[], Passed]) -> tuple[Repeat, Passed]:
        here = torch.cuda.current_stream(self.device)
        self._side.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        # a block of our own, since a capture that fails does not give its stream back
        with torch.cuda.stream(self._side):
            with NoQuestions():  # torch before 2.12 is harmed by a capture that fails
                work()  # and what is made at first use must not be made in a capture
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"
            ):
                results = work()
        here.wait_stream(self._side)
        return graph.replay, results

    @contextmanager
    def turn(self) -> Iterator[None]:
        with self._lock:
            here = torch.cuda.current_stream(self.device)
            here.wait_event(self._done)  # whoever came before may have used another stream
            try:
                yield
            finally:
                self._done.record(here)


class Captured:
    """One segment at one shape: where it reads, what repeats it, and where its results are."""

    def __init__(self, run: Callable[[Tree], Passed], given: Tree, recorder: Recorder) -> None:
        self._given = copy_tree(given)
        self._repeat, self._results = recorder.capture(lambda: run(self._given))

    def __call__(self, given: Tree) -> Passed:
        """Results for a tree of this shape; they hold until any graph of the recorder runs."""
        for (_, place), (_, leaf) in zip(leaves_of(self._given), leaves_of(given), strict=True):
            place.copy_(leaf)
        self._repeat()
        return self._results


class CudaGraphs:
    """The captured segments of an engine, by what they run and at which shape.

    A shape is captured when it comes for the second time: many never do. Once a capture has
    failed no more are made; segments without one run as they are.

    Args:
        recorder: captures.
        most: shapes that are kept in mind, those with a graph among them.
    """

    def __init__(self, recorder: Recorder, most: int = MOST) -> None:
        self.device, self.turn = recorder.device, recorder.turn
        self._recorder: Recorder | None = recorder
        self._most = most
        self._held: OrderedDict[Hashable, Captured | None] = OrderedDict()

    def run(self, what: Hashable, run: Callable[[Tree], Passed], given: Tree) -> Passed:
        """What `run` makes of a tree of tensors, which holds until the next call.

        Args:
            what: tells whatever else `run` hangs on.
        """
        key = (what, *((name, leaf.shape, leaf.dtype) for name, leaf in leaves_of(given)))
        new = key not in self._held
        graph = self._held.get(key)
        if graph is None and not new:
            graph = self._captured(run, given)
        self._held[key] = graph
        self._held.move_to_end(key)
        if len(self._held) > self._most:
            self._held.popitem(last=False)
        return run(given) if graph is None else graph(given)

    def _captured(self, run: Callable[[Tree], Passed], given: Tree) -> Captured | None:
        if self._recorder is None:
            return None
        try:
            return Captured(run, given, self._recorder)
        except RuntimeError as problem:
            reason = str(problem).strip().partition("\n")[0]
            logger.warning("No CUDA graph could be captured, so layers run without: %s", reason)
            self._recorder = None
            return None


class GraphedSegments(Segments):
    """Segments that are replayed, in batches of few sizes.

    Args:
        graphs: of the engine.
        weights: that layers and exits read.
        parts: see `Segments`; with `sync_every`.
    """

    overwrites = True

    def __init__(self, graphs: CudaGraphs, weights: Iterable[Tensor], *parts: Any) -> None:
        super().__init__(*parts)
        self._graphs = graphs
        self.turn = graphs.turn
        # graphs read the weights where these were; a model that is moved needs new ones
        places = tuple([weight.data_ptr() for weight in weights])
        self._what = (self.every, self.deepest, self.timed, places, str(self.policy.to_dict()))

    def size(self, rows: int) -> int:
        return rows_bucket(rows)

    def run(self, first: int, rows: Running, deadline: float = math.inf) -> Passed:
        constants, run = rows.flow.constants, super().run
        return self._graphs.run(
            (first, *self._what),
            lambda given: run(first, _as_rows(given, constants)),
            _as_tree(rows),
        )


def rows_bucket(rows: int) -> int:
    """The size of the batch that so many rows run in: 1, 2, 3, 4, 6, 8, 12, 16, 24, ..."""
    step = max(1, (1 << (rows - 1).bit_length()) // 4)
    return -(-rows // step) * step


def _as_tree(rows: Running) -> Tree:
    """All that changes from batch to batch."""
    flow = rows.flow._asdict()
    del flow["constants"]
    return {**flow, "state": rows.state, "carry": rows.carry}


def _as_rows(tree: Tree, constants: Any) -> Running:
    flow = {name: leaf for name, leaf in tree.items() if name not in ("state", "carry")}
    return Running(Flow(**flow, constants=constants), tree["state"], tree["carry"])
