"""What several policies remember of a row: its last answer, and numbers of its last exits."""

from __future__ import annotations

import torch
from torch import Tensor

LONGEST = 1000
"""Bounds the memory that one row may ask for; no model is that deep."""


def answers(scores: Tensor, multi_label: bool) -> Tensor:
    """Labels (rows,), or with `multi_label` the sets of them, (rows, labels) bool."""
    return scores > 0 if multi_label else scores.argmax(dim=-1)


def same(answer: Tensor, before: Tensor) -> Tensor:
    """Where a row's answer, or its whole set of labels, is that of the exit before; (rows,)."""
    alike = answer == before
    return alike if alike.dim() == 1 else alike.all(dim=-1)


def unknown(like: Tensor, length: int, value: float) -> Tensor:
    """Memory of `length` exits that have not been, (rows, length)."""
    return torch.full((like.shape[0], length), value, device=like.device)


def remember(values: Tensor, newest: Tensor) -> Tensor:
    """Drop the oldest of (rows, length) and append (rows,)."""
    return torch.cat((values[:, 1:], newest.unsqueeze(1)), dim=1)
