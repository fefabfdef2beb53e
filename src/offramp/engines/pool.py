"""The depth pool: rows in, one after the other; answers out, as soon as they are there.

Slots are refilled as rows leave, so that batches do not shrink.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar

import numpy as np

from offramp.backbones import Batch
from offramp.engines.base import Budget, RowAnswer
from offramp.engines.stepping import Answered, Group, Stepper, Waiting, split
from offramp.errors import ConfigError

R = TypeVar("R")

Numbered = tuple[int, Batch]
"""The id of a row and a batch of that row alone."""
Determinism = Literal["shape"]
SLOTS = 32
"""Rows in a full batch of a stream."""
REFILL = 0.25
"""Share of the slots that are free before rows enter a pool of several depths."""
AHEAD = 16
"""Batches' worth of rows that a stream holds, so that rows of one shape meet."""


class Pool:
    """Rows of one shape on their way: those of equal depth stand in one lane.

    A step runs one full batch. Where layers share their block, it takes rows from all lanes,
    the deepest first; else from the deepest lane that fills it.
    """

    def __init__(self, stepper: Stepper) -> None:
        self._stepper = stepper
        self._waiting: deque[Waiting] = deque()
        self._lanes: list[deque[Group]] = [deque() for _ in range(stepper.depth)]
        self._sizes = [0] * stepper.depth  # the first lane's holds those that wait as well

    def add(self, row: Waiting) -> None:
        self._waiting.append(row)
        self._sizes[0] += 1

    def __len__(self) -> int:
        return sum(self._sizes)

    @property
    def full(self) -> bool:
        """Whether there is a full batch to run; rows that wait are embedded a batch at a time."""
        embedded = len(self) - len(self._waiting)
        most = embedded if self._stepper.mixes else max(self._sizes)
        return max(most, len(self._waiting)) >= self._stepper.slots

    def step(self) -> Answered:
        """Run one batch, a full one if there is one; the answers of rows that leave."""
        groups = [group for lane in self._chosen() for group in self._taken(lane)]
        stay, answered = self._stepper.step(groups)
        for group in stay:
            self._lanes[group.depth].append(group)
            self._sizes[group.depth] += len(group)
        return answered

    def _chosen(self) -> list[tuple[int, int]]:
        """Lanes, and how many rows to take from each."""
        slots = self._stepper.slots
        deepest_first = range(len(self._sizes) - 1, -1, -1)
        if not self._stepper.mixes:
            filled = [lane for lane in deepest_first if self._sizes[lane] >= slots]
            # where none is full, rows of the first lane go on and meet those of the next
            lane = filled[0] if filled else next(n for n, size in enumerate(self._sizes) if size)
            return [(lane, min(slots, self._sizes[lane]))]
        chosen = []
        for lane in deepest_first:
            if lane == 0 and not self._worth_a_group(slots):
                break
            count = min(slots, self._sizes[lane])
            slots -= count
            if count:
                chosen.append((lane, count))
        return chosen

    def _worth_a_group(self, free: int) -> bool:
        """Whether so many free slots are refilled now: every group that enters will cost a call
        of exit and policy after each layer."""
        slots = self._stepper.slots
        return self._stepper.same_shape or free >= REFILL * slots

    def _taken(self, chosen: tuple[int, int]) -> Iterator[Group]:
        """Rows of a lane, in the order in which they came."""
        number, count = chosen
        lane = self._lanes[number]
        self._sizes[number] -= count
        while count:
            if not lane:
                lane.extend(self._entered())
            group = lane.popleft()
            if len(group) > count:
                group, rest = split(group, count)
                lane.appendleft(rest)
            count -= len(group)
            yield group

    def _entered(self) -> list[Group]:
        """A batch of those that wait, embedded."""
        count = min(self._stepper.slots, len(self._waiting))
        return self._stepper.enter([self._waiting.popleft() for _ in range(count)])


class Stream:
    """Answers of the rows of an iterable as they come, (position, answer).

    Args:
        rows: an id and a batch of one row each.
        stepper: runs them.
        ahead: how many rows may be held; one of a rare shape waits while four times as many
            are read, then it goes on in a batch that is not full.
    """

    def __init__(self, rows: Iterable[Numbered], stepper: Stepper, ahead: int) -> None:
        self._source = enumerate(rows)
        self._stepper, self._ahead = stepper, ahead
        self._pools: dict[Any, Pool] = {}
        self._full: dict[Pool, None] = {}
        self._where: dict[int, Pool] = {}  # of each row that is held, the longest held first
        self._read = 0
        self._ended = False
        self._problem: Exception | None = None

    def __iter__(self) -> Iterator[tuple[int, RowAnswer]]:
        while (pool := self._next()) is not None:
            answered = pool.step()
            self._note(pool)
            for position, _ in answered:
                del self._where[position]
            yield from answered
        if self._problem is not None:
            raise self._problem

    def _next(self) -> Pool | None:
        """The pool to step, or None when all rows are answered."""
        while True:
            position, oldest = next(iter(self._where.items()), (self._read, None))
            if self._read - position > 4 * self._ahead:
                return oldest
            if self._full:
                return next(iter(self._full))
            if self._ended or len(self._where) >= self._ahead:
                return oldest
            self._read_one()

    def _read_one(self) -> None:
        try:
            position, (id, batch) = next(self._source)
            batch = _one_row(batch)
        except StopIteration:
            self._ended = True
            return
        except Exception as problem:
            # rows that were read before get their answers first
            self._ended, self._problem = True, problem
            return
        shape = tuple((name, leaf.shape[1:], leaf.dtype) for name, leaf in sorted(batch.items()))
        pool = self._pools.get(shape)
        if pool is None:
            pool = self._pools[shape] = Pool(self._stepper)
        pool.add(Waiting(position, id, batch))
        self._where[position] = pool
        self._read = position + 1
        self._note(pool)

    def _note(self, pool: Pool) -> None:
        if pool.full:
            self._full[pool] = None
        else:
            self._full.pop(pool, None)


def check_options(slots: int, ahead: int, determinism: str | None, budget: Budget) -> None:
    """Refuse what makes no sense. Raises ConfigError."""
    for option, value in (("slots", slots), ("ahead", ahead)):
        if not isinstance(value, int | np.integer):
            raise ConfigError(f"{option} is {value!r}; give a whole number.")
    if slots < 1 or ahead < slots:
        raise ConfigError(
            f"slots={slots}, ahead={ahead}: a stream needs at least one slot, and as many rows "
            "ahead as slots."
        )
    if determinism not in (None, "shape"):
        raise ConfigError(f"determinism='{determinism}' is unknown. Give 'shape' or None.")
    if determinism is not None and budget.seconds is not None:
        raise ConfigError("Answers by the clock are never the same: determinism or seconds.")


def _one_row(batch: Batch) -> Batch:
    """Without the mask where nothing is masked, so that it never depends on the neighbours."""
    if any(leaf.shape[0] != 1 for leaf in batch.values()):
        shapes = {name: tuple(leaf.shape) for name, leaf in batch.items()}
        raise ConfigError(f"A row of a stream is a batch of one row; one has {shapes}.")
    mask = batch.get("attention_mask")
    if mask is None or not mask.all():
        return batch
    return {name: leaf for name, leaf in batch.items() if name != "attention_mask"}


def in_order(results: Iterable[tuple[int, R]]) -> Iterator[tuple[int, R]]:
    """Results by their position, each as soon as all before it are there."""
    held: dict[int, R] = {}
    due = 0
    for position, result in results:
        held[position] = result
        while due in held:
            yield due, held.pop(due)
            due += 1
