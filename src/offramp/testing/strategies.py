"""Hypothesis strategies for whoever tests a part of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from offramp.backbones import Batch
from offramp.errors import MissingExtraError
from offramp.policies import POLICIES, EvidencePolicy, Policy
from offramp.testing.tiny import PROBLEM_TYPES, tiny_batch

try:
    from hypothesis import strategies as st
except ImportError:
    raise MissingExtraError("hypothesis", "dev") from None

__all__ = ["batches", "policies", "problem_types", "score_tables"]


def problem_types() -> st.SearchStrategy[str]:
    return st.sampled_from(PROBLEM_TYPES)


@st.composite
def score_tables(
    draw: Any, problem_type: str = "single_label_classification", max_rows: int = 40
) -> Tensor:
    """Raw scores of all exits, (rows, layers, classes), with overthinking.

    Rows settle on a class and may leave it again; some scores are saturated, some tied.
    """
    rows, layers = draw(st.integers(1, max_rows)), draw(st.integers(2, 12))
    classes = 1 if problem_type == "regression" else draw(st.integers(2, 5))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    steps = torch.randn(rows, layers, classes, generator=random)
    # a walk that forgets: sure early, of another mind later
    for layer in range(1, layers):
        steps[:, layer] += draw(st.sampled_from((0.0, 0.5, 0.9))) * steps[:, layer - 1]
    scale = draw(st.sampled_from((0.0, 0.1, 1.0, 5.0, 1000.0)))
    return (steps * scale).round() if draw(st.booleans()) else steps * scale


@st.composite
def policies(
    draw: Any, problem_type: str = "single_label_classification", depth: int = 12
) -> Policy:
    """A policy of any registered family that fits the task and reads scores only, at any bar."""
    kinds = [POLICIES[name].variants(problem_type, depth) for name in POLICIES]
    variants = [variant for kind in kinds for variant in kind if not variant.needs]
    policy = draw(st.sampled_from(variants))
    if not isinstance(policy, EvidencePolicy):
        return policy
    bar = draw(st.floats(-3, 1.1) | st.integers(0, depth - 1).map(lambda n: n - 0.5))
    return policy.with_bar(bar)


@st.composite
def batches(draw: Any, max_rows: int = 32, max_tokens: int = 32) -> Batch:
    """Token ids of the tiny models, of random lengths, with or without padding."""
    rows, tokens = draw(st.integers(1, max_rows)), draw(st.integers(2, max_tokens))
    return tiny_batch(
        rows, tokens, seed=draw(st.integers(0, 2**32 - 1)), padded=draw(st.booleans())
    )
