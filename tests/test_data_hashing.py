"""Ids of inputs, and samples, splits and overlaps that hang on them."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.data import (
    data_fingerprint,
    dataset_ids,
    drop_overlap,
    input_id,
    load_examples,
    split_examples,
)
from offramp.data.hashing import draws
from offramp.errors import ConfigError, DataError

SHARES = {"train": 0.7, "tune": 0.2, "test": 0.1}
# All parts are filled whatever hypothesis adds.
FIXED = [f"text {number}" for number in range(200)]
few = settings(max_examples=50, deadline=None)


def texts(rows: list[str]) -> Dataset:
    return load_examples(Dataset.from_dict({"text": rows}))


def test_the_id_of_an_input_is_fixed_forever() -> None:
    assert input_id("hello") == 4271387390095107803
    assert input_id("hello", "world") == 2575074068611890561


@few
@given(st.text(), st.text())
def test_ids_tell_texts_from_pairs_and_fit_an_int64(first: str, second: str) -> None:
    ids = {input_id(first), input_id(first, ""), input_id(first + "x"), input_id(first, second)}
    assert len(ids) == (3 if second == "" else 4)
    assert all(0 <= value < 2**63 for value in ids)
    assert input_id(first, second) == input_id(second, first) or first != second


def test_ids_of_a_dataset_are_those_of_its_rows() -> None:
    pairs = Dataset.from_dict({"text": ["a", "b"], "text_pair": ["c", "d"]})
    assert dataset_ids(pairs).tolist() == [input_id("a", "c"), input_id("b", "d")]
    assert dataset_ids(texts(["a"])).tolist() == [input_id("a")]


def test_the_fingerprint_sees_texts_labels_and_their_order() -> None:
    rows = {"text": ["a", "b"], "label": [0, 1]}
    others = [
        rows | {"text": ["a", "c"]},
        rows | {"label": [0, 0]},
        {"text": ["b", "a"], "label": [1, 0]},
        {"text": ["a", "b"]},
    ]
    names = [data_fingerprint(Dataset.from_dict(each)) for each in (rows, rows, *others)]
    assert names[0] == names[1]
    assert len(set(names)) == 5


def test_draws_are_uniform_and_purposes_independent() -> None:
    ids = np.array([input_id(str(number)) for number in range(20_000)])
    first, second = draws(ids, 0, "split"), draws(ids, 0, "sample")
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.03
    assert abs(np.corrcoef(first, draws(ids, 1, "split"))[0, 1]) < 0.03
    assert first.min() >= 0
    assert first.max() < 1


@few
@given(rows=st.lists(st.sampled_from(FIXED), max_size=50), seed=st.integers())
def test_equal_inputs_land_in_one_part_and_no_row_is_lost(rows: list[str], seed: int) -> None:
    parts = split_examples(texts(FIXED + rows), {"a": 0.5, "b": 0.5}, seed)
    found = [set(part["text"]) for part in parts.values()]
    assert not found[0] & found[1]
    assert sorted(row for part in parts.values() for row in part["row"]) == list(
        range(len(FIXED + rows))
    )
    assert all(part["row"][:] == sorted(part["row"]) for part in parts.values())


@few
@given(added=st.lists(st.text(), max_size=50), before=st.booleans())
def test_added_rows_move_no_other_row(added: list[str], before: bool) -> None:
    small = split_examples(texts(FIXED), SHARES, 3)
    large = split_examples(texts(added + FIXED if before else FIXED + added), SHARES, 3)
    for name in SHARES:
        assert set(small[name]["text"]) == set(large[name]["text"]) & set(FIXED)


def test_shares_are_met_and_the_seed_matters() -> None:
    rows = texts([f"row {number}" for number in range(5000)])
    parts = split_examples(rows, SHARES, 0)
    assert [round(len(part) / 5000, 1) for part in parts.values()] == [0.7, 0.2, 0.1]
    assert split_examples(rows, SHARES, 1)["test"]["row"][:] != parts["test"]["row"][:]


def test_a_part_of_a_cut_can_be_cut_again() -> None:
    rows = texts([f"row {number}" for number in range(2000)])
    train = split_examples(rows, {"train": 0.7, "test": 0.3}, 0)["train"]
    parts = split_examples(train, SHARES, 0)
    assert [round(len(part) / len(train), 1) for part in parts.values()] == [0.7, 0.2, 0.1]


@pytest.mark.parametrize("shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": float("nan")}])
def test_shares_that_do_not_sum_to_one_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="sum to 1"):
        split_examples(texts(FIXED), shares, 0)


def test_a_part_without_rows_is_an_error_not_an_empty_dataset() -> None:
    with pytest.raises(DataError, match="too few to cut: part"):
        split_examples(texts(["only one"]), SHARES, 0)


def test_rows_that_recur_in_other_data_are_dropped_and_counted() -> None:
    kept, dropped = drop_overlap(texts(["a", "b", "c", "a"]), texts(["x", "a"]), texts(["c"]))
    assert kept["text"][:] == ["b"]
    assert kept["row"][:] == [1]
    assert dropped == 3
    assert drop_overlap(texts(["a"]))[1] == 0
    assert drop_overlap(texts(["a"]), texts(["b"]))[0]["text"][:] == ["a"]
    with pytest.raises(DataError, match="All 1 rows"):
        drop_overlap(texts(["a"]), texts(["a"]))


@few
@given(rows=st.permutations(FIXED), seed=st.integers(0, 5))
def test_a_sample_depends_on_inputs_and_seed_not_on_their_order(rows: list[str], seed: int) -> None:
    sample = load_examples(Dataset.from_dict({"text": rows}), max_rows=20, seed=seed)
    same = load_examples(Dataset.from_dict({"text": FIXED}), max_rows=20, seed=seed)
    assert len(sample) == 20
    assert set(sample["text"]) == set(same["text"])
    assert [rows[row] for row in sample["row"]] == sample["text"][:]
    assert sample["row"][:] == sorted(sample["row"])


def test_a_sample_is_not_the_head_and_is_capped_by_what_there_is() -> None:
    rows = Dataset.from_dict({"text": FIXED})
    assert load_examples(rows, max_rows=20)["row"][:] != list(range(20))
    assert len(load_examples(rows, max_rows=1000)) == len(FIXED)
    with pytest.raises(ConfigError, match="at least 1"):
        load_examples(rows, max_rows=0)
