"""The torch engine: rows leave at their exit and the survivors are compacted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from offramp.backbones import Batch
from offramp.engines.base import UNLIMITED, Answers, Budget, Exitable, RowAnswer, rows_of
from offramp.engines.cuda_graphs import CudaGraphs, CudaRecorder, GraphedSegments
from offramp.engines.pool import (
    AHEAD,
    SLOTS,
    Determinism,
    Numbered,
    Stream,
    check_options,
    in_order,
)
from offramp.engines.segments import Run, Segments
from offramp.engines.stepping import Stepper
from offramp.engines.steps import in_steps, join_answers, join_outputs, rows_a_step, widest
from offramp.engines.straight import Straight
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows

NO_GPU = "CUDA graphs need the model on a GPU: device='cuda', or model.cuda()."
SYNC_EVERY = 3
"""Layers between two questions to a GPU: a row that leaves runs one layer too many on average."""


class TorchEngine:
    """Runs a multi-exit model eagerly on CPU or GPU.

    It keeps no rows between calls, so any number of threads may share it, each with its own
    policy.

    Args:
        model: in evaluation mode, on its device, in its compute dtype.
        sync_every: layers after which the host asks who has left and takes these rows out; until
            then they run along. None is 3 on a GPU, which stands still whenever it is asked, and
            1 elsewhere, where asking costs nothing. Answers do not depend on it.
        cuda_graphs: replay these layers as one CUDA graph for each shape of a batch; calls of
            several threads take turns. Batches are filled up to few sizes; pad them to few
            lengths, see `bucket`.

    Raises:
        ConfigError: an option that makes no sense, or CUDA graphs without a GPU.
    """

    name = "torch"
    straightens = True
    """Layers run without the modules around their calls of torch, see `straight`."""

    def __init__(
        self, model: Exitable, *, sync_every: int | None = None, cuda_graphs: bool = False
    ) -> None:
        check_torch_options(sync_every, cuda_graphs)
        self.model, self.sync_every = model, sync_every
        # graphs leave no Python between the calls of torch
        wanted = self.straightens and not cuda_graphs
        self._straight = Straight(model.backbone) if wanted else None
        self.backbone = model.backbone if self._straight is None else self._straight.backbone
        self.remembers: bool = getattr(model, "remembers", False)
        exits = [model.exit_at(layer) for layer in range(1, model.depth + 1)]
        # a module's call costs more than a small exit itself, and nothing hooks an exit
        self.exits = [getattr(read, "forward", read) for read in exits]
        # a model that is moved keeps its parameters, and to list them costs more than a launch
        self._weights: list[torch.Tensor] = list(getattr(model, "parameters", tuple)())
        self._graphs = CudaGraphs(CudaRecorder(_gpu_of(model))) if cuda_graphs else None
        self.few_shapes = cuda_graphs  # batches are best padded to few lengths
        self.widest = 0 if cuda_graphs else widest(model.backbone.layers)
        self._proven: set[Any] = set()
        self._ran = False

    @property
    def dtype(self) -> str:
        """The model's, as it is now."""
        return str(getattr(self.model, "dtype", torch.float32)).removeprefix("torch.")

    @torch.inference_mode()
    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """Run every layer and every exit."""

        def step(part: Batch, mine: Rows) -> tuple[ExitOutput, ...]:
            return self._every(part)

        return in_steps(batch, rows_of(batch), self._size(batch), step, join_outputs)

    def _every(self, batch: Batch) -> tuple[ExitOutput, ...]:
        return self.model.all_exits(batch)

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        policy: Policy,
        rows: Rows | None = None,
        budget: Budget = UNLIMITED,
    ) -> Answers:
        """Answer every row of a batch.

        Args:
            batch: what the model's processor gives; leave `attention_mask` out where nothing is
                padded.
            policy: decides who leaves after which layer.
            rows: ids and lengths for policies that read them.
            budget: of each row.

        Raises:
            ConfigError: the model is in training mode, where dropout makes answers random, or
                there are no rows.
        """
        self._ready()
        first = next(iter(batch.values()))
        if not len(first):
            raise ConfigError("The batch has no rows.")
        rows = rows_of(batch) if rows is None else rows.to(first.device)
        segments, deadline = self._segments(policy, first.device, budget), budget.deadline()

        def step(part: Batch, mine: Rows) -> Answers:
            return Run(segments, mine, deadline).through(part)

        with segments.turn():
            return in_steps(batch, rows, self._size(batch), step, join_answers)

    def stream(
        self,
        rows: Iterable[Numbered],
        policy: Policy,
        *,
        ordered: bool = False,
        determinism: Determinism | None = None,
        slots: int = SLOTS,
        ahead: int | None = None,
        budget: Budget = UNLIMITED,
    ) -> Iterator[tuple[int, RowAnswer]]:
        """Answer rows as they come, in full batches, however early their neighbours leave.

        Rows of equal shape share batches: pad them to few lengths, see `bucket`. If the iterable
        raises, the rows before get their answers and then it is raised.

        Args:
            rows: an id and a batch of one row each; may be endless. For a model on a GPU they are
                best left on the CPU: they are sent a batch at a time.
            policy: decides who leaves after which layer.
            ordered: give the answers in the order of the rows instead of as they are found.
            determinism: `shape` keeps the shape of every call, with copies in empty slots, so that
                not one bit of an answer depends on a row's neighbours. It does depend on slots,
                threads and machine.
            slots: rows of a full batch.
            ahead: rows read before their answers are there, by default 16 times the slots.
            budget: of each row; its seconds begin with its first layer.

        Returns:
            The position of each row, from 0, and its answer.

        Raises:
            ConfigError: on the call, options that make no sense or a model in training mode;
                later, a batch of several rows, or a machine that `shape` cannot be had on.
        """
        self._ran = True  # a stream is many calls
        self._ready()
        ahead = AHEAD * slots if ahead is None else ahead
        check_options(slots, ahead, determinism, budget)
        same_shape = determinism == "shape"
        parts = (self.backbone, self.exits, policy, self.remembers)
        stepper = Stepper(*parts, slots, same_shape, self._proven, budget)
        results = iter(Stream(rows, stepper, ahead))
        return in_order(results) if ordered else results

    def _size(self, batch: Batch) -> int:
        return rows_a_step(batch, self.widest, torch.get_num_threads())

    def _segments(self, policy: Policy, device: torch.device, budget: Budget) -> Segments:
        every = self.sync_every or (SYNC_EVERY if device.type == "cuda" else None)
        parts = (self.backbone, self.exits, policy, self.remembers, every, budget)
        if self._graphs is None or self._graphs.device != device:
            return Segments(*parts)
        return GraphedSegments(self._graphs, self._weights, *parts)

    def _ready(self) -> None:
        if getattr(self.model, "training", False):
            raise ConfigError("The model is in training mode. Call model.eval() first.")
        if self._straight is not None and self._ran:  # to one call alone it would not pay
            self._straight.find()
        self._ran = True


def check_torch_options(sync_every: int | None, cuda_graphs: bool) -> None:
    """Refuse what is no number of layers, or neither yes nor no. Raises ConfigError."""
    if sync_every is not None and (type(sync_every) is not int or sync_every < 1):
        raise ConfigError(f"sync_every={sync_every!r}: give a number of layers, 1 or more.")
    if type(cuda_graphs) is not bool:
        raise ConfigError(f"cuda_graphs={cuda_graphs!r}: give True or False.")


def _gpu_of(model: Exitable) -> torch.device:
    weight = next(model.backbone.layers.parameters(), None)
    if weight is None or not weight.is_cuda:
        raise ConfigError(NO_GPU)
    return weight.device
