"""What a policy would have done on recorded rows, without the model.

`replay` calls the same `decide` as an engine, layer by layer, and keeps only rows that still
run. `sweep` gives the exit layers for many bars from one pass over the evidence; it is the
fast twin of `replay(table, policy.with_bar(bar))` and agrees with it exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from offramp.errors import ConfigError, TableError
from offramp.exits.base import ExitOutput
from offramp.policies import (
    Decision,
    EvidencePolicy,
    Policy,
    State,
    decide,
    has_one_bar,
    reads_all,
)
from offramp.table.store import Array, ExitTable

_CHUNK = 16384


@dataclass(frozen=True, slots=True)
class Replay:
    """A policy's outcome on the rows of a table.

    Attributes:
        depth: number of layers.
        exit_layers: (rows,) int64, 1-based.
        answers: (rows, classes) float32, raw scores.
        bad: (rows,) bool, rows that left because their scores were not finite.
        forced: (rows,) bool, rows that a depth budget made leave.
        cost: (rows,) executed FLOPs, with the exits that the policy read.
        full_cost: (rows,) FLOPs of the model as it was: all layers and its own head.
    """

    depth: int
    exit_layers: npt.NDArray[np.int64]
    answers: npt.NDArray[np.float32]
    bad: npt.NDArray[np.bool_]
    forced: npt.NDArray[np.bool_]
    cost: npt.NDArray[np.float64]
    full_cost: npt.NDArray[np.float64]

    @property
    def share(self) -> float:
        """Cost of the whole set: sum executed / sum full; long rows weigh more."""
        return float(self.cost.sum() / self.full_cost.sum())

    @property
    def histogram(self) -> tuple[int, ...]:
        """Rows that left after layer 1, 2, ..., depth."""
        return histogram(self.exit_layers, self.depth)


def histogram(exit_layers: Array, depth: int) -> tuple[int, ...]:
    """Rows that left after layer 1, 2, ..., depth."""
    return tuple(np.bincount(exit_layers, minlength=depth + 1)[1:].tolist())


def paid(
    layer_cost: Array, exit_cost: Array, policy: Policy, max_depth: int | None = None
) -> tuple[Array, Array]:
    """FLOPs by exit layer (rows, depth) under a policy, and of full depth (rows,).

    The exits that the policy reads on the way are paid for, and the one that answers. Reading
    every exit and leaving at none therefore costs slightly more than full depth.

    Args:
        layer_cost: embedding and layers 1..i, (rows, depth).
        exit_cost: the exit after layer i alone, (rows, depth).
        max_depth: a depth budget, at whose layer an exit is read in any case.
    """
    depth = layer_cost.shape[1]
    asked = {depth, max_depth or depth}
    read = np.array([layer in asked or policy.reads(layer) for layer in range(1, depth + 1)])
    executed = layer_cost + np.cumsum(exit_cost * read, axis=1)
    return executed, layer_cost[:, -1] + exit_cost[:, -1]


def executed_cost(
    table: ExitTable, policy: Policy, max_depth: int | None = None
) -> tuple[Array, Array]:
    """`paid` for the rows of a table. Raises TableError for costs that are none."""
    columns = table.columns
    executed, full = paid(columns["layer_cost"], columns["exit_cost"], policy, max_depth)
    if not (np.isfinite(executed).all() and (executed > 0).all() and (full > 0).all()):
        raise TableError("The table's costs must be finite and positive. Record it again.")
    return executed, full


def replay(table: ExitTable, policy: Policy, max_depth: int | None = None) -> Replay:
    """Run a policy over a recorded table; equal to what an engine does with the model.

    Args:
        max_depth: the most layers that a row may run; who has run them leaves, see `Budget`.

    Raises ConfigError for a depth that runs no layer.
    """
    if max_depth is not None and not (isinstance(max_depth, int) and max_depth >= 1):
        raise ConfigError(
            f"A depth of {max_depth!r} runs no layer. Give a whole number, 1 or more."
        )
    deepest = table.depth if max_depth is None else min(max_depth, table.depth)
    exit_layers = np.zeros(table.rows, dtype=np.int64)
    answers = np.zeros((table.rows, table.header.num_scores), dtype=np.float32)
    bad, forced = np.zeros((2, table.rows), dtype=bool)
    with torch.inference_mode():
        for rows in _chunks(table.rows):
            for layer, at, found in _decisions(table, policy, rows, deepest):
                exit_layers[at] = layer
                answers[at] = found.answer.numpy()
                bad[at] = False if found.bad is None else found.bad.numpy()
                forced[at] = ~found.leave.numpy()  # else they go on and are written anew
    executed, full = executed_cost(table, policy, max_depth)
    cost = executed[np.arange(table.rows), exit_layers - 1]
    return Replay(table.depth, exit_layers, answers, bad, forced, cost, full)


def _decisions(
    table: ExitTable, policy: Policy, rows: Array, deepest: int
) -> Iterator[tuple[int, Array, Decision]]:
    """What is decided of the rows that still run, layer by layer."""
    state = policy.start(table.start(rows))
    for layer in range(1, deepest + 1):
        last = layer == table.depth
        if not (layer == deepest or policy.reads(layer)):
            continue
        found = decide(policy, state, layer, table.output(rows, layer), last)
        yield layer, rows, found
        stay = ~found.leave
        rows = rows[stay.numpy()]
        if not len(rows):
            return
        state = {name: leaf[stay] for name, leaf in found.state.items()}


@torch.inference_mode()
def evidence_matrix(table: ExitTable, policy: EvidencePolicy) -> npt.NDArray[np.float32]:
    """Largest evidence so far, (rows, depth): a row has left by layer i if it is above the bar."""
    by_layer = evidence_of_exits(table, policy).T
    return np.maximum.accumulate(by_layer, axis=0, out=by_layer).T


@torch.inference_mode()
def evidence_of_exits(table: ExitTable, policy: EvidencePolicy) -> npt.NDArray[np.float32]:
    """Evidence of each exit for itself, (rows, depth).

    A broken score counts as +inf, since its row leaves there. Stored layer by layer, so that
    a column is contiguous.
    """
    by_layer = np.empty((table.depth, table.rows), dtype=np.float32)
    for rows, layer, output, evidence, _ in _looks(table, policy):
        broken = ~torch.isfinite(output.scores).all(dim=-1)
        # evidence that is no number passes no bar
        known = evidence.float().nan_to_num(-torch.inf, torch.inf, -torch.inf)
        by_layer[layer - 1, rows] = known.masked_fill(broken, torch.inf).numpy()
    return by_layer.T


@torch.inference_mode()
def answer_matrix(table: ExitTable, policy: EvidencePolicy) -> npt.NDArray[np.float32]:
    """What a row that leaves after layer i is answered with, (rows, depth, classes)."""
    if type(policy).answer is EvidencePolicy.answer:
        return table.scores
    answers = np.empty(table.scores.shape, dtype=np.float32)
    for rows, layer, output, _, state in _looks(table, policy):
        answers[rows, layer - 1] = policy.answer(state, output).numpy()
    return answers


def _looks(
    table: ExitTable, policy: EvidencePolicy
) -> Iterator[tuple[Array, int, ExitOutput, Tensor, State]]:
    """Rows, layer, output, evidence and next state, for all rows at every layer."""
    for rows in _chunks(table.rows):
        state = policy.start(table.start(rows))
        for layer in range(1, table.depth + 1):
            output = table.output(rows, layer)
            evidence, state = policy.evidence(state, layer, output)
            yield rows, layer, output, evidence, state


def sweep(
    table: ExitTable,
    policy: EvidencePolicy,
    bars: npt.ArrayLike,
    evidence: npt.NDArray[np.float32] | None = None,
) -> Iterator[npt.NDArray[np.int64]]:
    """Exit layers (rows,) for each bar, as `replay(table, policy.with_bar(bar))` gives them.

    `evidence` is `evidence_matrix(table, policy)`, if at hand. A policy that does not read
    every exit (`fixed`, `full`), or has one inside that does not, is replayed, since what it does
    not read cannot stop it; so is one with a `step` of its own, or with bars of each exit.
    """
    swept = has_one_bar(policy) and reads_all(policy, table.depth)
    for bar in np.asarray(bars, dtype=np.float64).tolist():
        candidate = policy.with_bar(bar)
        if not (swept and reads_all(candidate, table.depth)):
            yield replay(table, candidate).exit_layers
            continue
        if evidence is None:
            evidence = evidence_matrix(table, policy)
        yield _first_above(evidence, candidate.bar)


def _first_above(evidence: npt.NDArray[np.float32], bar: float) -> npt.NDArray[np.int64]:
    """1-based layer of the first evidence above the bar, or the last layer."""
    # torch compares a float32 tensor with a number rounded to float32, so must we
    not_yet = evidence.T[:-1] <= np.float32(bar)
    return 1 + not_yet.sum(axis=0, dtype=np.int64)


def _chunks(rows: int) -> Iterator[npt.NDArray[np.int64]]:
    for first in range(0, rows, _CHUNK):
        yield np.arange(first, min(first + _CHUNK, rows))
