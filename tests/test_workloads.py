"""Forced rows leave where they are told to, and nothing else about them is changed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.benchmark.workloads import Forced, forced_policies, numbered
from offramp.engines import TorchEngine
from offramp.exits import ExitOutput
from offramp.policies import Averaged, MaxProbability, Patience, Rows
from offramp.testing import tiny_batch, tiny_model


@given(
    shares=st.lists(st.floats(0.01, 1), min_size=1, max_size=3),
    depth=st.integers(1, 24),
    first=st.integers(0, 1000),
)
def test_forced_rows_leave_evenly_around_the_mean_that_is_named(
    shares: list[float], depth: int, first: int
) -> None:
    class Deep:
        problem_type = "single_label_classification"

    Deep.depth = depth  # type: ignore[attr-defined]
    policies = forced_policies(Deep(), shares, 1064)  # type: ignore[arg-type]
    for share, policy in zip(shares, policies, strict=True):
        layers = exit_layers(policy, first, 64, depth)
        wanted = max(1.0, share * depth)
        assert abs(layers.mean() - wanted) <= 0.3
        assert 1 <= layers.min() <= max(1, 2 * wanted - depth) + 1
        assert min(depth, 2 * wanted - 1) - 1 <= layers.max() <= depth


def exit_layers(policy: Forced, first: int, rows: int, depth: int) -> np.ndarray:
    """Where rows leave, the first numbered `first`."""
    state = policy.start(Rows(torch.arange(first, first + rows), torch.ones(rows)))
    found = np.full(rows, depth)
    for layer in reversed(range(1, depth)):
        leave, _, _ = policy.step(state, layer, ExitOutput(torch.zeros(rows, 2)))
        found[leave.numpy()] = layer
    return found


def test_forced_depths_do_not_depend_on_length() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 64)
    batches = [range(first, first + 4) for first in range(0, 64, 4)]
    (policy,) = forced_policies(tiny_model(), [0.5], 64)
    rows = numbered(lengths, batches)
    assert torch.equal(torch.cat([one.lengths for one in rows]), torch.from_numpy(lengths))
    ids = torch.cat([one.ids for one in rows])
    layers = exit_layers(policy, 0, 64, 6)[ids]
    assert abs(np.corrcoef(lengths, layers)[0, 1]) < 0.05


@pytest.mark.parametrize(
    "inner",
    [
        Patience(multi_label=True),
        Averaged(policy=MaxProbability(threshold=1.0)),
    ],
)
def test_a_policy_with_a_memory_may_do_the_work(inner: Any) -> None:
    (policy,) = forced_policies(tiny_model(), [0.5], 32)
    free = TorchEngine(tiny_model()).run(tiny_batch(32), policy)
    busy = TorchEngine(tiny_model()).run(tiny_batch(32), policy.model_copy(update={"inner": inner}))
    assert torch.equal(busy.exit_layers, free.exit_layers)


def test_one_rule_serves_all_depths_and_the_inner_policy_does_its_work() -> None:
    seen = []

    class Watched(MaxProbability):
        def evidence(self, *given: Any) -> Any:
            seen.append(given[1])
            return super().evidence(*given)

    model = tiny_model()
    few, more = forced_policies(model, (0.25, 0.5), 32)
    assert few.with_bar(more.bar).to_dict() == more.to_dict()
    watched = more.model_copy(update={"inner": Watched(threshold=1.0)})
    TorchEngine(model).run(tiny_batch(32), watched)
    assert seen == [1, 2, 3, 4, 5]
