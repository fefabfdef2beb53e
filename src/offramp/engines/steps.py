"""A large batch in steps that a processor's caches hold.

Rows do not depend on each other, so a batch may as well run in parts. On a CPU that is faster where
what a layer makes of the batch outgrows the caches; `docs/results/batches.md` has the figures. A
GPU wants its batches whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from offramp.backbones import Batch
from offramp.engines.base import Answers
from offramp.engines.trees import join_trees
from offramp.exits import ExitOutput
from offramp.policies import Rows

T = TypeVar("T")

STEP_VALUES = 3 << 19
"""Of the widest tensor of a step, for each thread: 6 MiB in fp32."""
CALL_TOKENS = 64
"""Tokens, for each thread, that take longer than one more call."""


def widest(layers: Iterable[nn.Module]) -> int:
    """Values that a layer makes of one token at most; 0 where there are no weights to tell."""
    weights = (leaf for layer in layers for leaf in layer.parameters() if leaf.dim() == 2)
    return max((leaf.shape[0] for leaf in weights), default=0)


def rows_a_step(batch: Batch, width: int, threads: int) -> int:
    """How many rows of a batch of tokens on the CPU run together; all of any other batch, and of
    one that holds something that all its rows share.

    It depends on the shape of the batch alone, so at equal shape nothing depends on neighbours.

    Args:
        width: values of a token, see `widest`; 0 leaves every batch whole.
        threads: that a call uses.
    """
    first = batch.get("input_ids", next(iter(batch.values())))
    count = first.shape[0]
    if count == 1 or not width or "input_ids" not in batch or first.device.type != "cpu":
        return count
    if any(leaf.shape[0] != count for leaf in batch.values()):
        return count
    steps = -(-first.numel() * width // (threads * STEP_VALUES))
    return -(-count // max(1, steps)) or 1


def most_padding(engine: Any, device: torch.device) -> int | None:
    """Tokens of padding beyond which a batch is better made two; None where it is best whole."""
    if not getattr(engine, "widest", 0) or device.type != "cpu":
        return None
    return CALL_TOKENS * (getattr(engine, "threads", None) or torch.get_num_threads())


def in_steps(
    batch: Batch,
    rows: Rows,
    size: int,
    run: Callable[[Batch, Rows], T],
    join: Callable[[Sequence[T]], T],
) -> T:
    """What `run` makes of a batch, `size` rows at a time."""
    count = rows.ids.shape[0]
    if count <= size:
        return run(batch, rows)
    parts = [slice(first, first + size) for first in range(0, count, size)]
    return join(
        [
            run({n: leaf[at] for n, leaf in batch.items()}, Rows(rows.ids[at], rows.lengths[at]))
            for at in parts
        ]
    )


def join_answers(parts: Sequence[Answers]) -> Answers:
    """The answers of rows that follow each other."""
    forced = None
    if any(part.forced is not None for part in parts):
        nobody = (torch.zeros_like(part.bad) for part in parts)
        pairs = zip(parts, nobody, strict=True)
        forced = torch.cat([none if part.forced is None else part.forced for part, none in pairs])
    return Answers(
        torch.cat([part.scores for part in parts]),
        torch.cat([part.exit_layers for part in parts]),
        torch.cat([part.bad for part in parts]),
        forced,
    )


def join_outputs(parts: Sequence[tuple[ExitOutput, ...]]) -> tuple[ExitOutput, ...]:
    """What each exit says of rows that follow each other."""
    return tuple(
        ExitOutput(torch.cat([o.scores for o in same]), join_trees([o.signals for o in same]))
        for same in zip(*parts, strict=True)
    )
