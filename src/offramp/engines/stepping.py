"""Rows at different depths, run one layer on.

Rows that have run equally many layers form a group. Where all layers share one block (ALBERT),
one call runs groups of any depth; else it runs groups of one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch, Flow
from offramp.engines.base import UNLIMITED, Budget, RowAnswer, rows_of
from offramp.engines.trees import cut_tree, join_trees, take_tree
from offramp.errors import ConfigError
from offramp.exits import Exit
from offramp.policies import Decision, Policy, Rows, State, bars_of, decide

Answered = list[tuple[int, RowAnswer]]
"""Rows that have left, by their position in the stream."""
Told = tuple[list[list[float]], Tensor]
"""Of each row whether it leaves and whether it is bad; and the answers, (rows, classes)."""


class Waiting(NamedTuple):
    """A row that no layer has seen yet."""

    position: int
    id: int
    batch: Batch


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that have run the same layers.

    Attributes:
        depth: how many layers.
        positions: of the rows in the stream.
        deadlines: of the rows, on the clock `time.perf_counter`.
        flow: the rows themselves.
        state, carry: what the policy and the exits remember of them.
    """

    depth: int
    positions: list[int]
    deadlines: list[float]
    flow: Flow
    state: State
    carry: Any = None

    def __len__(self) -> int:
        return len(self.positions)


class Stepper:
    """Runs groups one layer on.

    Args:
        backbone: of the model.
        exits: one per layer.
        policy: decides who leaves.
        remembers: exits hand memory on, so that none may be skipped.
        slots: rows in a full batch.
        same_shape: every call has one shape: a layer's has exactly `slots` rows, copies where
            rows are missing, and what else is done to a row is done to it alone.
        proven: shapes at which a row's bits are known not to depend on its slot.
        budget: of each row.
    """

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[Exit],
        policy: Policy,
        remembers: bool,
        slots: int,
        same_shape: bool,
        proven: set[Any],
        budget: Budget = UNLIMITED,
    ) -> None:
        self.backbone, self.exits, self.policy = backbone, exits, policy
        self.bars = bars_of(policy, len(exits))
        self.remembers, self.slots, self.same_shape = remembers, slots, same_shape
        self.depth, self._proven = len(exits), proven
        self.budget, self.deepest = budget, budget.deepest(len(exits))
        weight = next(backbone.layers.parameters(), None)
        self.device = None if weight is None else weight.device
        self.looks = self.device is None or self.device.type == "cpu"  # nobody waits for values
        # with several shared blocks, as in few ALBERTs, a layer is not told by its input
        self.mixes = backbone.shared_weights and len(backbone.layers) == 1

    @torch.inference_mode()
    def enter(self, rows: Sequence[Waiting]) -> list[Group]:
        """Embed rows of one shape."""
        parts = [[row] for row in rows] if self.same_shape else [rows]
        return [self._embed(part) for part in parts]

    def _embed(self, rows: Sequence[Waiting]) -> Group:
        leaves = {name: torch.cat([row.batch[name] for row in rows]) for name in rows[0].batch}
        batch = {name: self._sent(leaf) for name, leaf in leaves.items()}
        known = rows_of(batch)
        ids = self._sent(torch.tensor([row.id for row in rows]))
        state = self.policy.start(Rows(ids, known.lengths))
        positions, deadlines = [row.position for row in rows], [self.budget.deadline()] * len(rows)
        return Group(0, positions, deadlines, self.backbone.embed(batch), state)

    def _sent(self, leaf: Tensor) -> Tensor:
        """On the model's device; the host does not wait for that."""
        return leaf if self.device is None else leaf.to(self.device, non_blocking=True)

    @torch.inference_mode()
    def step(self, groups: Sequence[Group]) -> tuple[list[Group], Answered]:
        """Run one layer; who stays, and the answers of those who leave."""
        flow = self.backbone.join([group.flow for group in groups])
        flow = self._layer(groups[0].depth + 1, flow, sum(map(len, groups)))
        ran: list[tuple[Group, Decision | None]] = []
        first = 0
        for group in groups if self.same_shape else _merged(groups):
            ran.append(self._exit(group, _between(flow, first, first + len(group))))
            first += len(group)
        told = _told([decision for _, decision in ran if decision is not None])
        stay: list[Group] = []
        answered: Answered = []
        for group, decision in ran:
            survivors = group if decision is None else self._left(group, next(told), answered)
            if survivors is not None:
                stay.append(survivors)
        return stay, answered

    def _layer(self, number: int, flow: Flow, count: int) -> Flow:
        if self.same_shape:
            places = torch.arange(self.slots, device=flow.hidden.device)
            if count < self.slots:
                flow = self.backbone.take(flow, places.where(places < count, 0))
            self._prove(number, flow, torch.zeros_like(places))
        return self.backbone.layer(number, flow)

    def _prove(self, number: int, flow: Flow, first: Tensor) -> None:
        """One row in all slots must come out alike; kernels that split a tensor between threads
        may round the ends of each part in another way."""
        shape = (self.mixes or number, flow.hidden.shape, flow.mask is None)
        case = (*shape, flow.hidden.dtype, flow.hidden.device, torch.get_num_threads())
        if case in self._proven:
            return
        hidden = self.backbone.layer(number, self.backbone.take(flow, first)).hidden
        if not ((hidden == hidden[:1]) | (hidden.isnan() & hidden[:1].isnan())).all():
            raise ConfigError(
                f"With {case[-1]} threads the last bits of a row depend on its slot in a batch of "
                f"shape {tuple(hidden.shape)}, so determinism='shape' cannot hold. Use one slot, "
                "or another number of slots or threads."
            )
        self._proven.add(case)

    def _exit(self, group: Group, flow: Flow) -> tuple[Group, Decision | None]:
        """A group that has run one layer more, and what is decided of it where that is asked."""
        layer, state, carry = group.depth + 1, group.state, group.carry
        last = layer == self.depth
        asked = last or self.policy.reads(layer) or any(self._due(group, layer))
        if asked or self.remembers:
            output, carry = self.exits[layer - 1](flow.hidden, flow.mask, carry)
        decision = None
        if asked:
            bar = self.bars[layer - 1]
            decision = decide(self.policy, state, layer, output, last, bar, self.looks)
            state = decision.state
        return Group(layer, group.positions, group.deadlines, flow, state, carry), decision

    def _due(self, group: Group, layer: int) -> list[bool]:
        """Which rows have no more to spend after a layer before the last."""
        if layer == self.depth or self.budget == UNLIMITED:
            return [False] * len(group)
        now = time.perf_counter()
        return [layer >= self.deepest or now >= deadline for deadline in group.deadlines]

    def _left(self, group: Group, told: Told, answered: Answered) -> Group | None:
        """Write down who leaves a group; who stays, or None."""
        flags, answers = told
        due = self._due(group, group.depth)
        leave = [bool(flag[0]) or spent for flag, spent in zip(flags, due, strict=True)]
        if not any(leave):
            return group
        for row, (own, bad) in enumerate(flags):
            if leave[row]:
                answer = RowAnswer(answers[row], group.depth, bool(bad), not own)
                answered.append((group.positions[row], answer))
        return None if all(leave) else self._stayers(group, leave)

    def _stayers(self, group: Group, leave: Sequence[bool]) -> Group:
        rows = [row for row, leaves in enumerate(leave) if not leaves]
        chosen = self._sent(torch.tensor(rows))
        return Group(
            group.depth,
            [group.positions[row] for row in rows],
            [group.deadlines[row] for row in rows],
            self.backbone.take(group.flow, chosen),
            take_tree(group.state, chosen),
            take_tree(group.carry, chosen),
        )


def split(group: Group, count: int) -> tuple[Group, Group]:
    """The first `count` rows of a group and the others; nothing is copied."""
    return _part(group, 0, count), _part(group, count, len(group))


def _part(group: Group, start: int, stop: int) -> Group:
    return Group(
        group.depth,
        group.positions[start:stop],
        group.deadlines[start:stop],
        _between(group.flow, start, stop),
        cut_tree(group.state, start, stop),
        cut_tree(group.carry, start, stop),
    )


def _between(flow: Flow, start: int, stop: int) -> Flow:
    """Neighbouring rows, as views."""
    mask = None if flow.mask is None else flow.mask[start:stop]
    return flow._replace(
        hidden=flow.hidden[start:stop], mask=mask, inputs=cut_tree(flow.inputs, start, stop)
    )


def _merged(groups: Sequence[Group]) -> Iterator[Group]:
    """Neighbouring groups of one depth as one; their flows have been joined already."""
    for depth, alike in groupby(groups, key=lambda group: group.depth):
        same = list(alike)
        yield Group(
            depth,
            [position for group in same for position in group.positions],
            [deadline for group in same for deadline in group.deadlines],
            same[0].flow,
            join_trees([group.state for group in same]),
            join_trees([group.carry for group in same]),
        )


def _told(decisions: Sequence[Decision]) -> Iterator[Told]:
    """What the host learns of each group's rows. It waits for the device once, for all groups."""
    if not decisions:
        return
    leave = torch.cat([decision.leave for decision in decisions])
    bad = torch.cat([_bad(decision) for decision in decisions])
    answers = torch.cat([decision.answer for decision in decisions]).float()
    all_rows = torch.cat((torch.stack((leave, bad), dim=1).float(), answers), dim=1).cpu()
    flags, answers = all_rows[:, :2].tolist(), all_rows[:, 2:]
    first = 0
    for decision in decisions:
        last = first + len(decision.leave)
        yield flags[first:last], answers[first:last]
        first = last


def _bad(decision: Decision) -> Tensor:
    return torch.zeros_like(decision.leave) if decision.bad is None else decision.bad
