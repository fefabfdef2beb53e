"""Cells of speed.py's part `profile`: what the time of a run goes to, stage by stage.

ONNX Runtime's own profiler times each node, and what a node is called says what it is for. Of the
torch engine the functions that make up a run are timed.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from offramp.engines import TorchEngine, segments
from offramp.engines.assembly import bodies
from offramp.engines.onnx_engine import OnnxEngine
from offramp.evaluation.speed import Job

PURPOSES = {
    "decide": "policy",
    "write": "answers",
    "left": "answers",
    "keep": "compaction",
    "of": "compaction",
    "if": "branch",
    "skip": "branch",
    "embed": "front",
}
"""Of the nodes of a file, by what their names begin with; those of layers are told apart."""
ADDED = ("exit", "policy", "answers", "compaction", "branch")
RUN, BODY = "model_run", "SequentialExecutor::Execute"
_STATE = re.compile(r"layer\d+\.out/hidden")
Event = dict[str, Any]
Spent = Counter[str]
"""Microseconds by stage, and how many layers were run as `layers`."""


def stages(passes: Sequence[Spent]) -> dict[str, str | int | float]:
    """Microseconds a layer by stage, medians over passes; a stage that is not there is left out."""
    found = {stage for spent in passes for stage in spent} - {"layers", "front"}
    facts: dict[str, str | int | float] = {"passes": len(passes)}
    for stage in ("layer", *ADDED, "between"):
        if stage in found:
            a_layer = [spent[stage] / spent["layers"] for spent in passes]
            facts[f"{stage}, us"] = round(float(np.median(a_layer)), 1)
    added = [sum(spent[stage] for stage in ADDED) / spent["layers"] for spent in passes]
    return facts | {"exit to branch, us": round(float(np.median(added)), 1)}


# ONNX Runtime


class ProfiledOnnx(OnnxEngine):
    """With the profiler on, for one policy; all nodes have names, which the profile gives back."""

    def _load(self, file: bytes | Path) -> Any:
        import onnx
        import onnxruntime

        model = onnx.load_from_string(file) if isinstance(file, bytes) else onnx.load(file)
        self.of_layers = named(model.graph.node)
        self._place = tempfile.TemporaryDirectory(prefix="offramp-profile-")
        plain = onnxruntime.SessionOptions

        def profiling() -> Any:
            options = plain()
            options.enable_profiling = True
            options.profile_file_prefix = f"{self._place.name}/run"
            return options

        with mock.patch("onnxruntime.SessionOptions", profiling):
            self.session: Any = super()._load(model.SerializeToString())
        return self.session

    def spent(self, jobs: Sequence[Job], passes: int) -> list[Spent]:
        """In each pass over some calls of `run`, after one that is not counted; for once."""
        for _ in range(passes + 1):
            for job in jobs:
                job()
        events = json.loads(Path(self.session._session.end_profiling()).read_text())
        runs = [spent_in(run, self.of_layers) for run in _runs(events)]
        size = len(runs) // (passes + 1)
        return [sum(runs[n : n + size], Spent()) for n in range(size, len(runs), size)]


def named(nodes: Sequence[Any]) -> set[str]:
    """Call nodes as what they make, in branches too; those that layers are of, without exits."""
    states = {node.output[0] for node in nodes if _STATE.fullmatch(node.output[0])}
    layers: set[str] = set()
    for node in reversed(nodes):
        node.name = node.output[0]
        if not states.isdisjoint(node.output):
            states.update(node.input)
            layers.add(node.name)
        for body in bodies(node):
            layers |= named(body.node)
    return layers


def _runs(events: Sequence[Event]) -> Iterator[list[Event]]:
    """The events of each run; what the runtime did before the first is none of them."""
    run: list[Event] = []
    for event, after in pairwise(events):
        if after["name"] == RUN:  # and this was the body of the whole file
            yield [*run, after]
            run = []
        elif event["name"] == BODY or event["cat"] == "Node":
            run.append(event)


def spent_in(events: Iterable[Event], of_layers: set[str]) -> Spent:
    """In one run. `between` holds what no node takes, and the profiler's own work: nodes are
    timed in whole microseconds, the rest of which falls there."""
    spent = Spent()
    for event in events:
        name, took = event["name"].removesuffix("_kernel_time"), event["dur"]
        if name == RUN:
            spent["between"] += took
        elif name == BODY:  # a branch takes what its nodes and the time between them do not
            spent["branch"] -= took
            spent["between"] += took
        elif event["cat"] == "Node":
            spent[purpose(name, of_layers)] += took
            spent["between"] -= took
            spent["layers"] += _STATE.fullmatch(name) is not None
    return spent


def purpose(name: str, of_layers: set[str]) -> str:
    """What a node is for; one that the runtime has fused under another name is a layer's."""
    begins = re.match(r"(\w+?)\d*\.", name)
    if begins is None or name in of_layers:
        return "layer"
    return PURPOSES.get(begins[1], "exit")


# Torch


class ProfiledTorch(TorchEngine):
    """With a clock around what makes up a run."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._spent = Spent()
        self.backbone: Any = copy.copy(self.backbone)
        self.backbone.embed = self._timed("front", self.backbone.embed)
        self.backbone.layer = self._timed("layer", self.backbone.layer)
        self.exits = [self._timed("exit", read) for read in self.exits]

    def _timed(self, stage: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            start = time.perf_counter()
            found = call(*given)
            took = 1e6 * (time.perf_counter() - start)
            self._spent.update({stage: took, "between": -took, "layers": stage == "layer"})
            return found

        return timed

    def spent(self, jobs: Sequence[Job], passes: int) -> list[Spent]:
        """In each pass over some calls of `run`, after two that are not counted."""
        found = []
        with ExitStack() as stack:
            for stage, owner, name in _STAGES:
                timed = self._timed(stage, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, timed))
            for _ in range(passes + 2):
                self._spent = Spent()
                start = time.perf_counter()
                for job in jobs:
                    job()
                self._spent["between"] += 1e6 * (time.perf_counter() - start)
                found.append(self._spent)
        return found[2:]


_STAGES: tuple[tuple[str, Any, str], ...] = (
    ("policy", segments, "decide"),
    ("answers", segments.Run, "_answer"),
    ("compaction", segments.Run, "_taken"),
)
