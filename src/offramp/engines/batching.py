"""Batches of rows of similar length, under a budget of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch

from offramp.backbones import Batch

T = TypeVar("T")
R = TypeVar("R")

MAX_ROWS = 64
MAX_TOKENS = 16384
WINDOW = 16
"""Batches' worth of rows that a stream reads ahead, to sort them by length."""


def plan_batches(
    lengths: npt.ArrayLike,
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_padding: int | None = None,
) -> list[npt.NDArray[np.int64]]:
    """Row indices of each batch, longest rows first, so that memory runs out early or never.

    Args:
        lengths: tokens per row, (rows,).
        max_rows: of a batch.
        max_tokens: of a batch, padding included; a row that is longer goes alone.
        max_padding: tokens of a batch that are none.
    """
    lengths = np.asarray(lengths)
    order = np.argsort(-lengths, kind="stable")
    batches, first = [], 0
    while first < len(order):
        longest = max(1, int(lengths[order[first]]))
        rows = max(1, min(max_rows, max_tokens // longest))
        if max_padding is not None:
            padding = np.cumsum(longest - lengths[order[first : first + rows]])
            rows = max(1, int(np.searchsorted(padding, max_padding, side="right")))
        batches.append(order[first : first + rows])
        first += rows
    return batches


def bucket(length: int, longest: int | None = None) -> int:
    """The length to which a row of a stream is padded: one of a few, an eighth longer at most
    beyond 64 tokens, and never beyond `longest`."""
    step = 1 << max(3, (length - 1).bit_length() - 4)
    padded = -(-length // step) * step
    return padded if longest is None else min(padded, max(length, longest))


def collate(
    columns: Mapping[str, Sequence[Sequence[int]]],
    pad_id: int,
    device: torch.device | str = "cpu",
    tokens: int = 0,
) -> Batch:
    """One batch, (rows, tokens), from unpadded `input_ids` and perhaps `token_type_ids`.

    It is padded to its longest row, or to `tokens` if that is more. It has no attention mask
    where nothing is padded: every kernel is faster without one.
    """
    lengths = np.array([len(row) for row in columns["input_ids"]])
    real = np.arange(max(tokens, lengths.max())) < lengths[:, None]
    arrays = {}
    for name, rows in columns.items():
        arrays[name] = np.full(real.shape, pad_id if name == "input_ids" else 0, dtype=np.int64)
        arrays[name][real] = np.concatenate(rows)
    if not real.all():
        arrays["attention_mask"] = real.astype(np.int64)
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def windows(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Successive lists of up to `size` items. If these raise, those before come first."""
    remaining, problem = iter(items), None
    while problem is None:
        window: list[T] = []
        try:
            window.extend(islice(remaining, size))
        except Exception as raised:  # whatever the items are read from
            problem = raised
        if window:
            yield window
        elif problem is None:
            return
    raise problem


def in_batches(
    items: Sequence[T],
    length: Callable[[T], int],
    run: Callable[[list[T]], Sequence[R]],
    max_rows: int = MAX_ROWS,
    max_tokens: int = MAX_TOKENS,
    max_padding: int | None = None,
) -> list[R]:
    """Apply `run` to length-sorted batches; results come back in the order of the items."""
    results: dict[int, R] = {}
    lengths = [length(item) for item in items]
    for batch in plan_batches(lengths, max_rows, max_tokens, max_padding):
        answers = run([items[index] for index in batch])
        results.update(zip(batch.tolist(), answers, strict=True))
    return [results[index] for index in range(len(items))]
