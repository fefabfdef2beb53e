"""Claims about the exit table, its files, and replay on it."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.errors import OutputError, TableError
from offramp.policies import (
    Entropy,
    EvidencePolicy,
    Fixed,
    Full,
    Margin,
    MaxProbability,
    Patience,
    Policy,
    Step,
)
from offramp.table import (
    ExitTable,
    TableHeader,
    TableWriter,
    concatenate,
    evidence_matrix,
    overlap,
    refuse_overlap,
    replay,
    require_role,
    sweep,
)
from offramp.testing import PROBLEM_TYPES
from offramp.testing.reference import random_outputs, rows_like, spread_policies, walk
from offramp.testing.strategies import policies, score_tables

SINGLE = PROBLEM_TYPES[0]
BARS = st.floats(-3, 1.1) | st.integers(0, 11).map(lambda n: n - 0.5) | st.just(0.0)


def make_table(rows: int = 60, problem_type: str = SINGLE, seed: int = 0, **fields) -> ExitTable:
    """Random scores with labels, varied lengths and costs that grow with them."""
    outputs = random_outputs(problem_type, rows, seed=seed)
    scores = torch.stack([output.scores for output in outputs], 1).numpy()
    random = np.random.default_rng(seed)
    labels = {
        SINGLE: random.integers(0, 4, rows),
        PROBLEM_TYPES[1]: random.integers(0, 2, (rows, 4)).astype(np.float32),
        "regression": random.normal(size=rows),
    }[problem_type]
    lengths = random.integers(4, 60, rows).astype(np.int32)
    fields = {
        "lengths": lengths,
        "layer_cost": lengths[:, None] * np.arange(2.0, 14.0),
        "exit_cost": np.full((rows, 12), 0.5),
        "labels": labels,
        "ids": np.arange(rows) + 1000 * seed,
        **fields,
    }
    return ExitTable.from_arrays(scores, problem_type=problem_type, **fields)


def table_of(scores) -> ExitTable:
    kind = "regression" if scores.shape[-1] == 1 else SINGLE
    return ExitTable.from_arrays(scores, problem_type=kind)


def huge_header() -> TableHeader:
    """Valid, and of 4 petabytes."""
    prints = ("model_fingerprint", "processor_fingerprint", "data_fingerprint")
    return TableHeader.plan(
        rows=10**9,
        depth=1000,
        num_scores=1000,
        problem_type=SINGLE,
        labelled=False,
        role="tune",
        **dict.fromkeys(prints, ""),
    )


def columns_of(table: ExitTable, rows=slice(None)) -> dict:
    return {name: column[rows] for name, column in table.columns.items()}


def same(one, other) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name), equal_nan=name == "answers")
        for name in ("exit_layers", "answers", "bad", "cost", "full_cost")
    )


class BatchMean(EvidencePolicy):
    """What the originals do wrong: one decision for the whole batch."""

    name = "batch_mean"
    threshold: float = 1.0

    @property
    def bar(self) -> float:
        return self.threshold

    def with_bar(self, bar: float) -> BatchMean:
        return BatchMean(threshold=bar)

    def evidence(self, state, layer, output):
        mean = output.scores.amax(dim=-1).mean()
        return mean.expand(output.scores.shape[0]), state


class Averaging(Policy):
    """Answers with the mean of the exits so far and waits for a signal."""

    name = "averaging"

    def step(self, state, layer, output):
        total = state.get("total", 0) + output.scores
        return Step(output.signals["gate"][:, 0] > 0, total / layer, {"total": total})


# files


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_table_comes_back_from_disk_bit_for_bit(tmp_path, problem_type):
    gate = np.random.default_rng(0).normal(size=(60, 12, 2)).astype(np.float32)
    table = make_table(problem_type=problem_type, signals={"gate": gate}, role="calibrate")
    table.save(tmp_path / "table")
    again = ExitTable.open(tmp_path / "table")
    assert again.header == table.header
    assert again.columns.keys() == table.columns.keys()
    for name in table.columns:
        assert again.columns[name].dtype == table.columns[name].dtype
        np.testing.assert_array_equal(again.columns[name], table.columns[name])


def test_an_opened_table_is_mapped_and_cannot_be_written_to(tmp_path):
    make_table().save(tmp_path / "table")
    scores = ExitTable.open(tmp_path / "table").scores
    assert isinstance(scores.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        scores[0] = 0


def test_rows_may_be_written_in_any_order_and_any_batches(tmp_path):
    table = make_table()
    order = np.random.default_rng(0).permutation(table.rows)
    with TableWriter(tmp_path / "table", table.header) as writer:
        for rows in np.array_split(order, 7):
            writer.write(rows, **columns_of(table, rows))
    np.testing.assert_array_equal(ExitTable.open(tmp_path / "table").scores, table.scores)


def test_a_writer_that_fails_leaves_the_old_table_and_nothing_else(tmp_path):
    old, new = make_table(seed=1), make_table(seed=2)
    old.save(tmp_path / "table")
    half = columns_of(new, slice(30)) | {"labels": np.zeros(7)}
    with (
        pytest.raises(TableError, match="needs shape"),
        TableWriter(tmp_path / "table", new.header) as writer,
    ):
        writer.write(np.arange(30), **half)
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    np.testing.assert_array_equal(ExitTable.open(tmp_path / "table").scores, old.scores)


def test_a_table_with_rows_missing_is_not_written(tmp_path):
    table = make_table()
    with (
        pytest.raises(TableError, match="50 of 60 rows"),
        TableWriter(tmp_path / "table", table.header) as writer,
    ):
        writer.write(np.arange(10), **columns_of(table, slice(10)))
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_table_is_never_overwritten(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match="not an exit table"):
        make_table().save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_table_that_does_not_fit_on_the_disk_is_refused_before_it_is_written(tmp_path):
    writer = TableWriter(tmp_path / "table", huge_header())
    with pytest.raises(OutputError, match="GB are free"):
        writer.__enter__()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "hint"),
    [
        ({"scores": np.zeros((3, 12, 4), np.float64) + 1j}, "scores.*float32"),
        ({"scores": np.zeros((3, 12, 5), np.float32)}, "needs shape"),
        ({"labels": np.zeros(3)}, "labels.*int64"),
        ({"gate": np.zeros(3)}, "unknown: gate"),
    ],
)
def test_a_writer_refuses_columns_that_do_not_fit(tmp_path, change, hint):
    table = make_table()
    with (
        pytest.raises(TableError, match=hint),
        TableWriter(tmp_path / "table", table.header) as writer,
    ):
        writer.write(np.arange(3), **(columns_of(table, slice(3)) | change))


@pytest.mark.parametrize("rows", [[60], [-1], [[0]]])
def test_a_writer_refuses_row_numbers_outside_the_table(tmp_path, rows):
    table = make_table()
    with (
        pytest.raises(TableError, match=r"0\.\.59"),
        TableWriter(tmp_path / "table", table.header) as writer,
    ):
        writer.write(rows, **columns_of(table, slice(1)))


# whose table, which rows, what for


def test_a_table_of_another_model_is_refused():
    table = make_table(model_fingerprint="a" * 32)
    table.check_model("a" * 32)
    with pytest.raises(TableError, match="b" * 32):
        table.check_model("b" * 32)


def test_a_role_is_enforced_with_what_is_allowed():
    require_role(make_table(role="tune"), ("tune", "calibrate"), "choose a policy")
    with pytest.raises(TableError, match="'test' may not be used to choose a policy"):
        require_role(make_table(role="test"), ("tune", "calibrate"), "choose a policy")


def test_one_shared_input_between_two_roles_is_refused_with_the_count():
    tune, other = make_table(ids=np.arange(60)), make_table(ids=np.arange(60, 120), role="test")
    assert overlap(tune, other) == 0
    refuse_overlap(tune, other)
    other = make_table(ids=np.r_[59, np.arange(60, 119)], role="test")
    assert overlap(tune, other) == 1
    with pytest.raises(TableError, match="1 inputs"):
        refuse_overlap(tune, other)


def test_shards_with_equal_headers_concatenate_to_the_whole():
    table = make_table()
    shards = [table.take(rows) for rows in np.array_split(np.arange(60), 4)]
    whole = concatenate(shards)
    assert whole.header == table.header
    for name, column in table.columns.items():
        np.testing.assert_array_equal(whole.columns[name], column)


def test_shards_of_different_data_give_a_table_of_all_of_it():
    first, second = (make_table(data_fingerprint=name) for name in ("one", "two"))
    whole = concatenate([first, second])
    assert whole.rows == 120
    assert whole.header.data_fingerprint not in ("one", "two")
    assert concatenate([second, first]).header.data_fingerprint != whole.header.data_fingerprint


def test_shards_that_differ_in_more_than_rows_are_refused_with_the_difference():
    with pytest.raises(TableError, match="role"):
        concatenate([make_table(role="tune"), make_table(role="test")])


def test_rows_are_taken_by_index_or_by_mask_and_never_all_dropped():
    table = make_table()
    mask = table.ids % 3 == 0
    np.testing.assert_array_equal(table.take(mask).ids, table.take(np.flatnonzero(mask)).ids)
    with pytest.raises(TableError, match="at least one"):
        table.take([False] * 60)
    with pytest.raises(TableError, match="at least one"):
        table.take([])


@pytest.mark.parametrize(
    ("problem_type", "labels"),
    [
        (SINGLE, np.full(60, 4)),
        (SINGLE, np.full(60, -100)),
        (SINGLE, np.full(60, 1.5)),
        (PROBLEM_TYPES[1], np.full((60, 4), 0.5, np.float32)),
        ("regression", np.full(60, np.nan)),
    ],
)
def test_labels_that_the_task_does_not_have_are_refused(problem_type, labels):
    with pytest.raises(TableError, match=r"(?i)labels"):
        make_table(problem_type=problem_type, labels=labels)


@pytest.mark.parametrize("shape", [(5, 12), (5, 12, 1), (0, 12, 3)])
def test_arrays_that_are_no_table_are_refused(shape):
    with pytest.raises(TableError):
        ExitTable.from_arrays(np.zeros(shape), problem_type=SINGLE)


# replay


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_replay_equals_asking_every_layer_about_every_row(problem_type):
    outputs = random_outputs(problem_type, rows=200)
    scores = torch.stack([output.scores for output in outputs], 1).numpy()
    table = ExitTable.from_arrays(scores, problem_type=problem_type)
    for policy in spread_policies(problem_type, outputs):
        slow, fast = walk(policy, outputs, rows_like(outputs)), replay(table, policy)
        np.testing.assert_array_equal(fast.exit_layers, slow.exit_layers)
        np.testing.assert_array_equal(fast.answers, slow.scores)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@given(data=st.data())
@settings(deadline=None)
def test_a_sweep_equals_the_replay_at_every_bar(problem_type, data):
    scores = data.draw(score_tables(problem_type)).numpy().copy()
    if data.draw(st.booleans()):
        row, layer = (data.draw(st.integers(0, size - 1)) for size in scores.shape[:2])
        scores[row, layer, 0] = data.draw(st.sampled_from((math.nan, math.inf, -math.inf)))
    table = ExitTable.from_arrays(scores, problem_type=problem_type)
    policy = data.draw(policies(problem_type, table.depth))
    # the bars most likely to go wrong lie on the evidence itself
    known = evidence_matrix(table, policy)
    near = st.sampled_from(known[np.isfinite(known)].tolist() or [0.0])
    bars = data.draw(st.lists(near | BARS, min_size=1, max_size=8))
    for bar, exit_layers in zip(bars, sweep(table, policy, bars), strict=True):
        expected = replay(table, policy.with_bar(bar)).exit_layers
        np.testing.assert_array_equal(exit_layers, expected, err_msg=f"{policy} at {bar}")


@given(st.data())
@settings(deadline=None)
def test_the_order_of_the_rows_does_not_matter(data):
    table = table_of(data.draw(score_tables()).numpy())
    policy = data.draw(policies(depth=table.depth))
    order = np.array(data.draw(st.permutations(range(table.rows))))
    whole, shuffled = replay(table, policy), replay(table.take(order), policy)
    np.testing.assert_array_equal(shuffled.exit_layers, whole.exit_layers[order])
    np.testing.assert_array_equal(shuffled.answers, whole.answers[order])


def subset_differs(table: ExitTable, policy: Policy, rows) -> bool:
    part, whole = replay(table.take(rows), policy), replay(table, policy)
    return not (
        np.array_equal(part.exit_layers, whole.exit_layers[rows])
        and np.array_equal(part.answers, whole.answers[rows])
    )


@given(st.data())
@settings(deadline=None)
def test_a_row_does_not_depend_on_the_rows_beside_it(data):
    kind = data.draw(st.sampled_from(PROBLEM_TYPES))
    scores = data.draw(score_tables(kind)).numpy()
    table = ExitTable.from_arrays(scores, problem_type=kind)
    policy = data.draw(policies(kind, table.depth))
    rows = data.draw(st.lists(st.integers(0, table.rows - 1), min_size=1, unique=True))
    assert not subset_differs(table, policy, rows)


def test_a_policy_that_looks_at_the_whole_batch_is_caught_by_that_check():
    table = make_table()
    assert any(subset_differs(table, BatchMean(threshold=1.0), [row]) for row in range(60))


def test_chunks_of_a_long_table_are_joined_without_a_seam():
    table = make_table(rows=200)
    long = table.take(np.resize(np.arange(200), 40_000))
    for policy in (Entropy(threshold=0.5), Patience(patience=3)):
        part, whole = replay(table, policy), replay(long, policy)
        np.testing.assert_array_equal(whole.exit_layers, np.resize(part.exit_layers, 40_000))
        first = next(sweep(long, policy, [policy.bar]))
        np.testing.assert_array_equal(first, whole.exit_layers)


@pytest.mark.parametrize("policy", [Entropy(), MaxProbability(), Margin(), Patience(patience=1)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_row_is_flagged_where_it_breaks_and_the_others_are_untouched(policy, value):
    scores = make_table().scores.copy()
    calm = scores.copy() * 1e-3  # nobody is sure before row 7 breaks
    calm[7, 4, 2] = value
    table = table_of(calm)
    clean = replay(table_of(scores * 1e-3), policy)
    found = replay(table, policy)
    others = np.arange(60) != 7
    if not isinstance(policy, Patience):
        assert (found.exit_layers[7], found.bad[7]) == (5, True)
    assert not found.bad[others].any()
    np.testing.assert_array_equal(found.exit_layers[others], clean.exit_layers[others])
    np.testing.assert_array_equal(found.answers[others], clean.answers[others])


def test_a_row_that_left_before_it_breaks_is_answered():
    scores = np.full((1, 3, 2), -1000.0)
    scores[..., 0] = 1000.0
    scores[0, 1] = np.nan
    found = replay(table_of(scores), Entropy())
    assert (found.exit_layers[0], found.bad[0]) == (1, False)


@pytest.mark.parametrize("policy", [Full(), Fixed(layer=5)])
def test_an_exit_that_is_not_read_harms_nobody_when_it_breaks(policy):
    scores = make_table().scores.copy()
    scores[:, 1] = np.nan
    found = replay(table_of(scores), policy)
    assert not found.bad.any()
    assert same(found, replay(table_of(make_table().scores), policy))


@pytest.mark.parametrize("policy", [Entropy(), MaxProbability(), Margin()])
def test_saturated_scores_leave_at_the_first_exit(policy):
    scores = np.random.default_rng(0).choice([-1000.0, 1000.0], size=(40, 6, 2))
    scores[..., 1] = -scores[..., 0]
    assert replay(table_of(scores), policy).histogram == (40, 0, 0, 0, 0, 0)


def test_a_policy_may_read_signals_and_answer_with_its_own_scores():
    gate = np.full((60, 12, 1), -1.0, np.float32)
    gate[:, 3] = 1.0
    table = make_table(signals={"gate": gate})
    found = replay(table, Averaging())
    assert found.histogram[3] == 60
    np.testing.assert_allclose(found.answers, table.scores[:, :4].mean(axis=1), atol=1e-6)


# cost


def test_full_depth_costs_exactly_one():
    assert replay(make_table(), Full()).share == 1.0
    assert replay(make_table(), Fixed(layer=12)).share == 1.0


def test_reading_every_exit_and_leaving_at_none_costs_a_little_more_than_full_depth():
    found = replay(make_table(), Entropy(threshold=0.0))
    assert found.histogram[-1] == 60
    np.testing.assert_allclose(found.cost - found.full_cost, 11 * 0.5)


def test_an_exit_that_is_not_read_is_not_paid_for():
    table = make_table()
    found = replay(table, Fixed(layer=5))
    np.testing.assert_allclose(found.cost, table.columns["layer_cost"][:, 4] + 0.5)


def test_exits_read_on_the_way_are_paid_for():
    always = np.tile(np.array([0.0, 9.0]), (4, 12, 1))
    table = ExitTable.from_arrays(always, problem_type=SINGLE, exit_cost=np.full((4, 12), 0.25))
    np.testing.assert_allclose(replay(table, Patience(patience=3)).cost, 4 + 4 * 0.25)


def test_cost_of_a_set_is_executed_over_full_so_long_rows_weigh_more():
    scores = np.zeros((2, 2, 2))
    scores[0, 0] = (50.0, -50.0)  # the first row leaves at layer 1
    table = ExitTable.from_arrays(
        scores, problem_type=SINGLE, layer_cost=[[100.0, 200.0], [1.0, 2.0]]
    )
    assert replay(table, Entropy()).share == pytest.approx((100 + 2) / (200 + 2))


@pytest.mark.parametrize("cost", [np.nan, -1.0, 0.0])
def test_costs_that_are_no_costs_are_refused(cost):
    table = ExitTable.from_arrays(
        np.zeros((3, 2, 2)), problem_type=SINGLE, layer_cost=np.full((3, 2), cost)
    )
    with pytest.raises(TableError, match="costs"):
        replay(table, Full())


def test_a_copied_table_needs_nothing_but_its_folder(tmp_path):
    make_table().save(tmp_path / "table")
    shutil.copytree(tmp_path / "table", tmp_path / "copy")
    shutil.rmtree(tmp_path / "table")
    assert same(
        replay(ExitTable.open(tmp_path / "copy"), Entropy()), replay(make_table(), Entropy())
    )
