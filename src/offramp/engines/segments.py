"""Batches by segments: some layers at a time, then the host asks who stays.

Whoever asks a GPU for a value waits until all its work is done, and then the GPU waits for more. So
nothing is asked inside a segment: all its rows go through its layers, exits and policy look after
each, and the first decision to leave is kept. At its end, rows that have left are taken out. Where
nobody waits, on a CPU, a segment ends as soon as a row leaves, and none runs a layer too many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch, Flow
from offramp.engines.base import UNLIMITED, Answers, Budget
from offramp.engines.trees import take_tree
from offramp.exits import Exit
from offramp.policies import Decision, Policy, Rows, State, bars_of, decide


class Running(NamedTuple):
    """Rows on their way: what the layers know of them, the policy, and the exits."""

    flow: Flow
    state: State
    carry: Any = None


class Left(NamedTuple):
    """Rows that have left in a segment; what is said of the others means nothing."""

    leave: Tensor  # (rows,) bool
    layers: int | Tensor  # that answered, (rows,) int64, or one for all
    answer: Tensor  # (rows, classes)
    bad: Tensor | None  # (rows,) bool, or None where every row is finite
    forced: Tensor | None = None  # (rows,) bool, or None where no row is

    def first(self, decision: Decision, layer: int) -> Left:
        """With those that leave after a later layer; whoever left before keeps what was said."""
        before, column = self.leave, self.leave.unsqueeze(1)
        bad = decision.bad
        if self.bad is not None:
            bad = self.bad if bad is None else torch.where(before, self.bad, bad)
        return Left(
            before | decision.leave,
            torch.where(before, self.layers, layer),
            torch.where(column, self.answer, decision.answer),
            bad,
        )

    def all(self) -> Left:
        """With the others as well, who have no more to spend: what was said last answers them."""
        return self._replace(leave=torch.ones_like(self.leave), forced=~self.leave)

    def cut(self, rows: int) -> Left:
        """The first so many rows, as views."""
        layers = self.layers if isinstance(self.layers, int) else self.layers[:rows]
        bad, forced = (leaf if leaf is None else leaf[:rows] for leaf in (self.bad, self.forced))
        return Left(self.leave[:rows], layers, self.answer[:rows], bad, forced)


class Passed(NamedTuple):
    """Rows after a segment, with those that have left in it."""

    layer: int  # the last that was run
    rows: Running
    left: Left | None  # None where no row has left, or no exit was read
    leaving: int | None = None  # how many have left, where the host knows


def ask(leave: Tensor) -> int:
    """How many rows leave: where the host waits for the device, and nowhere else."""
    return sum(leave.tolist())


class Segments:
    """The layers of a model with their exits under a policy; it keeps nothing of the rows.

    Args:
        backbone: of the model.
        exits: one per layer.
        policy: decides who leaves after which layer.
        remembers: exits hand memory on, so that none may be skipped.
        sync_every: layers of a segment. None, where nobody waits for values: it ends as soon as a
            row leaves.
        budget: of each row.
    """

    overwrites = False
    """The next call overwrites what this one gave."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[Exit],
        policy: Policy,
        remembers: bool,
        sync_every: int | None = None,
        budget: Budget = UNLIMITED,
    ) -> None:
        self.backbone, self.exits, self.policy = backbone, exits, policy
        self.bars = bars_of(policy, len(exits))
        self.remembers, self.depth = remembers, len(exits)
        self.looks = sync_every is None
        self.every = sync_every or self.depth
        self.budget = budget
        self.deepest = budget.deepest(self.depth)
        self.timed = budget.seconds is not None

    turn: Callable[[], AbstractContextManager[None]] = nullcontext
    """Batches run within it, so that those that must not meet do not."""

    def size(self, rows: int) -> int:
        """Of the batch that so many rows run in."""
        return rows

    def run(self, first: int, rows: Running, deadline: float = math.inf) -> Passed:
        """Run the segment that starts with layer `first`.

        It ends with an answer for every row where the depth of the budget is reached, or where
        the deadline may have passed.
        """
        flow, state, carry = rows
        left, leaving, layer = None, None, first
        last = min(first + self.every - 1, self.deepest)
        for layer in range(first, last + 1):
            flow = self.backbone.layer(layer, flow)
            over = layer == self.deepest or (self.timed and self._over(layer == last, deadline))
            asked = over or self.policy.reads(layer)
            if not (asked or self.remembers):
                continue
            output, carry = self.exits[layer - 1](flow.hidden, flow.mask, carry)
            if not asked:
                continue
            full, bar = layer == self.depth, self.bars[layer - 1]
            found = decide(self.policy, state, layer, output, full, bar, self.looks)
            state = found.state
            if self.looks:
                leaving = ask(found.leave)
                if not (leaving or over):
                    continue
            if left is None:
                left = Left(found.leave, layer, found.answer, found.bad)
            else:
                left = left.first(found, layer)
            if self.looks:
                break
        return Passed(layer, Running(flow, state, carry), left, leaving)

    def _over(self, last: bool, deadline: float) -> bool:
        """Whether time may be up, where it is limited; inside a segment there is no clock."""
        return time.perf_counter() >= deadline if self.looks else last


class Run:
    """One batch on its way: the only place that knows which row is where.

    Args:
        segments: of the model, under its policy.
        rows: of the batch.
        deadline: of the batch, on the clock `time.perf_counter`.
    """

    def __init__(self, segments: Segments, rows: Rows, deadline: float = math.inf) -> None:
        self.segments, self.deadline = segments, deadline
        self.count = self.running = rows.ids.shape[0]
        self.state = segments.policy.start(rows)
        self.where: Tensor | None = None  # original position of each running row; None = all
        self.answers: Answers | None = None  # of the rows that have left

    def through(self, batch: Batch) -> Answers:
        segments = self.segments
        rows = Running(segments.backbone.embed(batch), self.state)
        if segments.size(self.count) > self.count:
            rows = self._taken(rows, torch.arange(self.count, device=rows.flow.hidden.device))
        layer = 0
        while self.running:
            layer, rows, left, leaving = segments.run(layer + 1, rows, self.deadline)
            if left is None:
                continue
            if layer == segments.deepest or time.perf_counter() >= self.deadline:
                left, leaving = left if layer == segments.depth else left.all(), self.running
            elif leaving is None:
                leaving = ask(left.leave[: self.running])
            if leaving:
                stay = self._answer(left, leaving)
                rows = self._taken(rows, stay) if self.running else rows
        assert self.answers is not None  # every row left at the last layer
        return self.answers

    def _taken(self, rows: Running, stay: Tensor) -> Running:
        """These rows, the last again and again where the batch is to be larger."""
        missing = self.segments.size(self.running) - self.running
        if missing:
            stay = torch.cat((stay, stay[-1:].expand(missing)))
        flow = self.segments.backbone.take(rows.flow, stay)
        return Running(flow, take_tree(rows.state, stay), take_tree(rows.carry, stay))

    def _answer(self, left: Left, leaving: int) -> Tensor:
        """Write down the rows that leave; which stay."""
        if left.leave.shape[0] > self.running:
            left = left.cut(self.running)
        self.running -= leaving
        if leaving == self.count and not self.segments.overwrites:
            # all at once: so it is with every batch of one row
            self.answers = _answers(left.answer.float(), left.layers, left.bad, left.forced)
            return left.leave[:0]
        # those that stay come first; not every GPU build of torch sorts truth values
        order = left.leave.byte().argsort(stable=True)
        places = order if self.where is None else self.where.index_select(0, order)
        self.where = places[: self.running]
        self._write(left, order[self.running :], places[self.running :])
        return order[: self.running]

    def _write(self, left: Left, rows: Tensor, places: Tensor) -> None:
        answer = left.answer.index_select(0, rows).float()
        if self.answers is None:
            nobody = torch.zeros(self.count, dtype=torch.bool, device=answer.device)
            empty = answer.new_zeros((self.count, answer.shape[1]))
            self.answers = _answers(empty, 0, None, nobody)
        self.answers.scores.index_copy_(0, places, answer)
        if isinstance(left.layers, int):
            self.answers.exit_layers.index_fill_(0, places, left.layers)
        else:
            self.answers.exit_layers.index_copy_(0, places, left.layers.index_select(0, rows))
        if left.bad is not None:
            self.answers.bad.index_copy_(0, places, left.bad.index_select(0, rows))
        if left.forced is not None and self.answers.forced is not None:
            self.answers.forced.index_copy_(0, places, left.forced.index_select(0, rows))


def _answers(
    scores: Tensor, layers: int | Tensor, bad: Tensor | None, forced: Tensor | None
) -> Answers:
    """Answers of rows that have all left."""
    count, device = scores.shape[0], scores.device
    if isinstance(layers, int):
        layers = torch.full((count,), layers, device=device)
    if bad is None:
        bad = torch.zeros(count, dtype=torch.bool, device=device)
    return Answers(scores, layers, bad, forced)
