"""Engines that run a model's ONNX file: one call per batch, rows leave inside the graph.

What differs between them is what loads a file and runs it, a `Session`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch
from offramp.engines.base import NO_CLOCK, UNLIMITED, Answers, Budget, Exitable, rows_of
from offramp.engines.exporting import bars_given
from offramp.engines.graphs import Graphs, rule_of
from offramp.engines.settings import INTEGERS, dtype_name
from offramp.engines.steps import in_steps, join_answers, join_outputs, rows_a_step, widest
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows

Array = npt.NDArray[Any]
Feed = dict[str, Array]


class Session(Protocol):
    """A loaded file, and the names of what goes in and comes out; safe to share."""

    inputs: list[str]
    outputs: list[str]

    def run(self, feed: Feed) -> list[Array]:
        """The outputs, in their order, of a feed that may hold more than the inputs."""
        ...


class _Ready(NamedTuple):
    """A file that is loaded for a policy, with the policy's bars as its inputs."""

    policy: Policy | None
    deepest: int
    session: Session
    bars: Feed


MOST = 8
"""Files that an engine keeps loaded, or twice as many as there are depths to stop at: callers
choose policies and budgets, so there is a bound."""


_VERSION = attrgetter("_version")  # a third faster than a loop over hundreds of weights


class CompiledEngine(ABC):
    """Runs a multi-exit model as files that a runtime loads, on the CPU.

    A file for each rule is made when it is first asked for, which takes up to a few minutes, and
    kept in the cache; thresholds are inputs. Any number of threads may share an engine.

    Args:
        model: in evaluation mode, fp32, on CPU.
        dtype: what the runtime computes in.
        threads: that one call uses; None is as many as torch's.
        progress: show a bar while a file is made.

    Raises:
        MissingExtraError: without the extra of the engine's name.
        ConfigError: a model in another state; on a call, weights that have changed since.
    """

    name: str
    cuts = False
    """Whether large batches run in steps, which may have any shape."""

    def __init__(
        self,
        model: Exitable,
        dtype: str = "float32",
        threads: int | None = None,
        progress: bool = True,
    ) -> None:
        self.model = model
        self.dtype = dtype = dtype_name(dtype)
        self.threads = threads
        # sixteen bits are the runtime's own doing
        stored = dtype if dtype in INTEGERS else "float32"
        self._graphs = Graphs(model, stored, progress, runtime=self.name)
        self.widest = widest(model.backbone.layers) if self.cuts else 0
        self._sessions: dict[str, Session] = {}
        # a policy is frozen, so the same object is the same rule
        self._latest: _Ready | None = None
        self._known, self._making = threading.Lock(), threading.Lock()
        leaves: Iterable[torch.Tensor] = getattr(model, "parameters", tuple)()
        self._weights = [leaf for leaf in leaves if not leaf.is_inference()]
        self._made_of = self._writes()

    @abstractmethod
    def _load(self, file: bytes | Path) -> Session:
        """Make a file ready to run with `self.threads` threads in `self.dtype`."""

    def run(
        self,
        batch: Batch,
        policy: Policy,
        rows: Rows | None = None,
        budget: Budget = UNLIMITED,
    ) -> Answers:
        """Answer every row of a batch, see `TorchEngine.run`; each depth budget has its own file.

        Raises ConfigError for a batch without rows, for a policy that cannot be a graph, and for
        a budget of seconds, since a graph has no clock.
        """
        if budget.seconds is not None:
            raise ConfigError(NO_CLOCK.format(self.name))
        ready = self._ready(policy, budget.deepest(self.model.depth))

        def step(part: Batch, mine: Rows) -> Answers:
            known = {"row_id": mine.ids.numpy(), "length": mine.lengths.numpy()}
            said = ready.session.run(_feed(part) | ready.bars | known)
            return Answers(*map(torch.from_numpy, said))

        rows = rows_of(batch) if rows is None else rows
        return in_steps(batch, rows, self._size(batch), step, join_answers)

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """What every exit says of every row; each layer is run."""
        session = self._ready(None, self.model.depth).session

        def step(part: Batch, mine: Rows) -> tuple[ExitOutput, ...]:
            said = dict(zip(session.outputs, session.run(_feed(part)), strict=True))
            return tuple(_output(said, layer) for layer in range(1, self.model.depth + 1))

        return in_steps(batch, rows_of(batch), self._size(batch), step, join_outputs)

    def _size(self, batch: Batch) -> int:
        return rows_a_step(batch, self.widest, self.threads or torch.get_num_threads())

    def _writes(self) -> int:
        """How often weights have been written to; cheap enough to ask with every call."""
        return sum(map(_VERSION, self._weights))

    def _ready(self, policy: Policy | None, deepest: int) -> _Ready:
        if self._writes() != self._made_of:
            raise ConfigError(
                "The model's weights have changed since this engine was made. Make a new one."
            )
        latest = self._latest
        if latest is not None and latest.policy is policy and latest.deepest == deepest:
            return latest  # writing a rule down takes as long as a few nodes
        session = self._session(policy, deepest)
        given = {} if policy is None else bars_given(policy, self.model.depth)
        bars = {name: np.array(bar, dtype=np.float32) for name, bar in given.items()}
        self._latest = latest = _Ready(policy, deepest, session, bars)
        return latest

    def _session(self, policy: Policy | None, deepest: int) -> Session:
        rule = rule_of(policy, self.model.depth, deepest)
        if (found := self._used(rule)) is None:
            with self._making:
                if (found := self._used(rule)) is None:
                    found = self._graphs.load(policy, self._load, deepest)
                    with self._known:
                        self._sessions[rule] = found
                        if len(self._sessions) > max(MOST, 2 * self.model.depth):
                            del self._sessions[next(iter(self._sessions))]
        return found

    def _used(self, rule: str) -> Session | None:
        """A file that is loaded; it is then the last to go."""
        with self._known:
            found = self._sessions.pop(rule, None)
            if found is not None:
                self._sessions[rule] = found
            return found


def _feed(batch: Batch) -> Feed:
    """A batch as arrays, with what a tokenizer may leave out; other columns are not read."""
    feed = {name: leaf.numpy() for name, leaf in batch.items()}
    first = next(iter(feed.values()))
    if not len(first):
        raise ConfigError("The batch has no rows.")
    if "input_ids" in feed:
        feed = {name: array.astype(np.int64, copy=False) for name, array in feed.items()}
        shape = feed["input_ids"].shape
        feed.setdefault("attention_mask", np.ones(shape, np.int64))
        feed.setdefault("token_type_ids", np.zeros(shape, np.int64))
    return feed


def _output(said: Mapping[str, Array], layer: int) -> ExitOutput:
    end = f"/{layer}"
    mine = {n.removesuffix(end): torch.from_numpy(a) for n, a in said.items() if n.endswith(end)}
    scores = mine.pop("scores")
    return ExitOutput(scores, {name.removeprefix("signals/"): leaf for name, leaf in mine.items()})
