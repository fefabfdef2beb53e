"""Claims about batches: every row once, the budget kept, the order restored."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.engines import collate, in_batches, plan_batches, windows

lengths_of_rows = st.lists(st.integers(0, 600), max_size=200)
budgets = st.tuples(st.integers(1, 32), st.integers(1, 2000))


@given(lengths_of_rows, budgets)
def test_every_row_is_in_exactly_one_batch(lengths: list[int], budget: tuple[int, int]) -> None:
    batches = plan_batches(lengths, *budget)
    assert sorted(int(row) for batch in batches for row in batch) == list(range(len(lengths)))


@given(lengths_of_rows, budgets)
def test_the_budget_is_kept_and_a_row_beyond_it_goes_alone(
    lengths: list[int], budget: tuple[int, int]
) -> None:
    max_rows, max_tokens = budget
    for batch in plan_batches(lengths, max_rows, max_tokens):
        longest = max(lengths[row] for row in batch)
        assert 1 <= len(batch) <= max_rows
        assert len(batch) * longest <= max_tokens or len(batch) == 1


@given(lengths_of_rows, budgets)
def test_batches_hold_rows_of_similar_length(lengths: list[int], budget: tuple[int, int]) -> None:
    order = [lengths[row] for batch in plan_batches(lengths, *budget) for row in batch]
    assert order == sorted(lengths, reverse=True)


@given(st.lists(st.text(max_size=30)), budgets)
def test_results_come_back_in_the_order_of_the_items(
    items: list[str], budget: tuple[int, int]
) -> None:
    seen = []

    def shout(batch: list[str]) -> list[str]:
        seen.append(len(batch))
        return [item.upper() for item in batch]

    assert in_batches(items, len, shout, *budget) == [item.upper() for item in items]
    assert sum(seen) == len(items)


@given(st.integers(0, 50), st.integers(1, 7))
def test_windows_hold_every_item_in_order(count: int, size: int) -> None:
    seen = list(windows(iter(range(count)), size))
    assert [item for window in seen for item in window] == list(range(count))
    assert all(len(window) == size for window in seen[:-1])


def test_windows_give_what_came_before_a_problem() -> None:
    def read() -> Iterator[int]:
        yield from range(5)
        raise ValueError("line 6")

    found = []
    with pytest.raises(ValueError, match="line 6"):
        found.extend(windows(read(), 3))
    assert found == [[0, 1, 2], [3, 4]]


def test_windows_read_no_further_than_they_must() -> None:
    source = iter(range(100))
    first = next(windows(source, 3))
    assert (first, next(source)) == ([0, 1, 2], 3)


@given(st.lists(st.lists(st.integers(1, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_collated_rows_keep_their_tokens_and_only_padding_is_masked(rows: list[list[int]]) -> None:
    batch = collate({"input_ids": rows, "token_type_ids": [[1] * len(row) for row in rows]}, 7)
    width = max(map(len, rows))
    padded = torch.tensor([row + [7] * (width - len(row)) for row in rows])
    assert torch.equal(batch["input_ids"], padded)
    mask = batch.get("attention_mask", torch.ones_like(padded))
    assert mask.sum(dim=1).tolist() == [len(row) for row in rows]
    assert torch.equal(batch["token_type_ids"], mask)


def test_rows_of_one_length_need_no_mask() -> None:
    assert set(collate({"input_ids": np.ones((3, 4), dtype=int).tolist()}, 0)) == {"input_ids"}
