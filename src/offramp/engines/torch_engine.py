"""The torch engine: rows leave at their exit and the survivors are compacted."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from offramp.backbones import Backbone, Batch
from offramp.engines.base import Answers, Exitable, RowAnswer, rows_of
from offramp.engines.pool import (
    AHEAD,
    SLOTS,
    Determinism,
    Numbered,
    Stream,
    check_options,
    in_order,
)
from offramp.engines.stepping import Stepper
from offramp.engines.trees import take_tree
from offramp.errors import ConfigError
from offramp.exits import Exit, ExitOutput
from offramp.policies import Decision, Policy, Rows, State, decide


class TorchEngine:
    """Runs a multi-exit model eagerly on CPU or GPU.

    It keeps no rows between calls, so any number of threads may share it, each with its own
    policy.

    Args:
        model: in evaluation mode, on its device, in its compute dtype.
    """

    name = "torch"

    def __init__(self, model: Exitable) -> None:
        self.model = model
        self.backbone = model.backbone
        self.remembers: bool = getattr(model, "remembers", False)
        exits = [model.exit_at(layer) for layer in range(1, model.depth + 1)]
        # a module's call costs more than a small exit itself, and nothing hooks an exit
        self.exits = [getattr(read, "forward", read) for read in exits]
        self._proven: set[Any] = set()

    @property
    def dtype(self) -> str:
        """The model's, as it is now."""
        return str(getattr(self.model, "dtype", torch.float32)).removeprefix("torch.")

    @torch.inference_mode()
    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        """Run every layer and every exit."""
        return self.model.all_exits(batch)

    @torch.inference_mode()
    def run(self, batch: Batch, policy: Policy, rows: Rows | None = None) -> Answers:
        """Answer every row of a batch.

        Args:
            batch: what the model's processor gives; leave `attention_mask` out where nothing is
                padded.
            policy: decides who leaves after which layer.
            rows: ids and lengths for policies that read them.

        Raises:
            ConfigError: the model is in training mode, where dropout makes answers random, or
                there are no rows.
        """
        self._check_mode()
        first = next(iter(batch.values()))
        if not len(first):
            raise ConfigError("The batch has no rows.")
        rows = rows_of(batch) if rows is None else rows.to(first.device)
        return _Run(self.backbone, self.exits, policy, rows, self.remembers).through(batch)

    def stream(
        self,
        rows: Iterable[Numbered],
        policy: Policy,
        *,
        ordered: bool = False,
        determinism: Determinism | None = None,
        slots: int = SLOTS,
        ahead: int | None = None,
    ) -> Iterator[tuple[int, RowAnswer]]:
        """Answer rows as they come, in full batches, however early their neighbours leave.

        Rows of equal shape share batches: pad them to few lengths, see `bucket`. If the iterable
        raises, the rows before get their answers and then it is raised.

        Args:
            rows: an id and a batch of one row each; may be endless.
            policy: decides who leaves after which layer.
            ordered: give the answers in the order of the rows instead of as they are found.
            determinism: `shape` keeps the shape of every call, with copies in empty slots, so that
                not one bit of an answer depends on a row's neighbours. It does depend on slots,
                threads and machine.
            slots: rows of a full batch.
            ahead: rows read before their answers are there, by default 16 times the slots.

        Returns:
            The position of each row, from 0, and its answer.

        Raises:
            ConfigError: on the call, options that make no sense or a model in training mode;
                later, a batch of several rows, or a machine that `shape` cannot be had on.
        """
        self._check_mode()
        ahead = AHEAD * slots if ahead is None else ahead
        check_options(slots, ahead, determinism)
        same_shape = determinism == "shape"
        stepper = Stepper(
            self.backbone, self.exits, policy, self.remembers, slots, same_shape, self._proven
        )
        results = iter(Stream(rows, stepper, ahead))
        return in_order(results) if ordered else results

    def _check_mode(self) -> None:
        if getattr(self.model, "training", False):
            raise ConfigError("The model is in training mode. Call model.eval() first.")


class _Run:
    """One batch on its way: the only place that knows which row is where."""

    def __init__(
        self,
        backbone: Backbone,
        exits: Sequence[Exit],
        policy: Policy,
        rows: Rows,
        remembers: bool,
    ) -> None:
        self.backbone = backbone
        self.exits = exits
        self.policy = policy
        self.remembers = remembers
        self.count = rows.ids.shape[0]
        self.state: State = policy.start(rows)
        self.carry: Any = None
        self.where: Tensor | None = None  # original position of each running row; None = all
        self.answers: Answers | None = None  # of the rows that have left

    def through(self, batch: Batch) -> Answers:
        flow = self.backbone.embed(batch)
        for layer, read in enumerate(self.exits, start=1):
            flow = self.backbone.layer(layer, flow)
            last = layer == len(self.exits)
            asked = last or self.policy.reads(layer)
            if not (asked or self.remembers):
                continue
            output, self.carry = read(flow.hidden, flow.mask, self.carry)
            if not asked:
                continue
            decision = decide(self.policy, self.state, layer, output, last)
            self.state = decision.state
            stay = self._answer(decision, layer)
            if stay is None:
                continue
            if stay.numel() == 0:
                break
            flow = self.backbone.take(flow, stay)
            self.state = take_tree(self.state, stay)
            self.carry = take_tree(self.carry, stay)
        assert self.answers is not None  # every row left at the last layer
        return self.answers

    def _answer(self, decision: Decision, layer: int) -> Tensor | None:
        """Write down the rows that leave; the rows that stay, or None where all stay."""
        leaving = decision.leave.nonzero().squeeze(1)
        if leaving.numel() == 0:
            return None
        if leaving.numel() == self.count:  # all at once: so it is with every batch of one row
            self.answers = _answers(decision.answer.float(), layer, decision.bad)
            return leaving[:0]
        answer = decision.answer.index_select(0, leaving).float()
        if self.answers is None:
            self.answers = _answers(answer.new_zeros((self.count, answer.shape[1])), 0, None)
        places = leaving if self.where is None else self.where.index_select(0, leaving)
        self.answers.scores.index_copy_(0, places, answer)
        self.answers.exit_layers.index_fill_(0, places, layer)
        if decision.bad is not None:
            self.answers.bad.index_copy_(0, places, decision.bad.index_select(0, leaving))
        stay = (~decision.leave).nonzero().squeeze(1)
        self.where = stay if self.where is None else self.where.index_select(0, stay)
        return stay


def _answers(scores: Tensor, layer: int, bad: Tensor | None) -> Answers:
    """Answers of rows that all left after `layer`."""
    count, device = scores.shape[0], scores.device
    if bad is None:
        bad = torch.zeros(count, dtype=torch.bool, device=device)
    return Answers(scores, torch.full((count,), layer, device=device), bad)
