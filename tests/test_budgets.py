"""Budgets: nobody runs deeper, or longer, than allowed; who had to leave is told so."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from engine_support import TableModel, numbered, outputs_of
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_support import FreeTable, graphed
from torch import Tensor

from offramp.backbones import Batch
from offramp.engines import Answers, Budget, TorchEngine, rows_of
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import Fixed, Full, MaxProbability, Patience, Policy, Rows, decide
from offramp.table import ExitTable, replay
from offramp.testing import echo_batch, spread_policies, tiny_batch_for, tiny_model, walk
from offramp.testing.strategies import policies, problem_types, score_tables

pytest_plugins = ("engine_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")


def expected(policy: Policy, table: Tensor, rows: Rows, deepest: int) -> Answers:
    """Everyone runs all layers; whoever left later than allowed is looked up at the limit."""
    outputs = outputs_of(table)
    free = walk(policy, outputs, rows)
    state, answers = policy.start(rows), []
    for layer, output in enumerate(outputs[:deepest], start=1):
        step = decide(policy, state, layer, output, layer == len(outputs))
        state, answers = step.state, [step.answer.float()]
    late = free.exit_layers > deepest
    return Answers(
        torch.where(late[:, None], answers[0], free.scores),
        free.exit_layers.clamp_max(deepest),
        free.bad & ~late,
        late,
    )


def told(answers: Answers) -> Tensor:
    """Which rows are said to have had to leave."""
    return torch.zeros_like(answers.bad) if answers.forced is None else answers.forced


def alike(one: Answers, other: Answers) -> bool:
    pairs = [(one.exit_layers, other.exit_layers), (one.bad, other.bad), (told(one), told(other))]
    return all(torch.equal(a, b) for a, b in pairs) and torch.equal(
        one.scores.nan_to_num(), other.scores.nan_to_num()
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data(), problem_type=problem_types(), every=st.none() | st.integers(1, 5))
def test_a_depth_is_never_exceeded_and_moves_nobody_else(
    data: st.DataObject, problem_type: str, every: int | None
) -> None:
    table = data.draw(score_tables(problem_type))
    depth = table.shape[1]
    policy, deepest = data.draw(policies(problem_type, depth)), data.draw(st.integers(1, depth + 2))
    rows = numbered(list(range(len(table))))
    engine = TorchEngine(TableModel(table), sync_every=every)
    found = engine.run(echo_batch(rows.ids.tolist()), policy, rows, Budget(depth=deepest))
    assert alike(found, expected(policy, table, rows, min(deepest, depth)))


@settings(max_examples=50, deadline=None)
@given(data=st.data(), every=st.integers(1, 5), deepest=st.integers(1, 6))
def test_replayed_segments_keep_to_it_and_are_told_apart(
    data: st.DataObject, every: int, deepest: int
) -> None:
    table = data.draw(score_tables("single_label_classification"))
    policy = data.draw(policies("single_label_classification", depth=table.shape[1]))
    rows = numbered(list(range(len(table))))
    engine, _ = graphed(FreeTable(table), every)
    for limit in (deepest, None, deepest, deepest, None):
        found = engine.run(echo_batch(rows.ids.tolist()), policy, rows, Budget(depth=limit))
        reached = min(limit or table.shape[1], table.shape[1])
        assert alike(found, expected(policy, table, rows, reached))


@settings(max_examples=75, deadline=None)
@given(data=st.data(), problem_type=problem_types(), slots=st.integers(1, 5))
def test_streams_keep_to_it(data: st.DataObject, problem_type: str, slots: int) -> None:
    table = data.draw(score_tables(problem_type))
    depth = table.shape[1]
    policy, deepest = data.draw(policies(problem_type, depth)), data.draw(st.integers(1, depth))
    rows = numbered(list(range(len(table))))
    asked = [(row, echo_batch([row])) for row in range(len(table))]
    results = TorchEngine(TableModel(table)).stream(
        asked, policy, ordered=True, slots=slots, budget=Budget(depth=deepest)
    )
    said = [answer for _, answer in results]
    found = Answers(
        torch.stack([one.scores for one in said]),
        torch.tensor([one.exit_layer for one in said]),
        torch.tensor([one.bad for one in said]),
        torch.tensor([one.forced for one in said]),
    )
    assert alike(found, expected(policy, table, rows, deepest))


@pytest.mark.parametrize("deepest", [1, 2])
def test_files_keep_to_it_as_torch_does(bert_model: MultiExitModel, deepest: int) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    from offramp.engines.onnx_engine import OnnxEngine

    batch = tiny_batch_for(bert_model.stock, 12, seed=4)
    engine, budget = OnnxEngine(bert_model, progress=False), Budget(depth=deepest)
    forced = 0
    for policy in (MaxProbability(threshold=0.45), Patience(patience=1), Full()):
        ours = engine.run(batch, policy, budget=budget)
        theirs = TorchEngine(bert_model).run(batch, policy, budget=budget)
        torch.testing.assert_close(ours.scores, theirs.scores, atol=5e-5, rtol=0)
        assert torch.equal(ours.exit_layers, theirs.exit_layers)
        assert torch.equal(told(ours), told(theirs))
        forced += int(told(ours).sum())
    assert forced > 0


class Slow(TableModel):
    """Every layer takes a while."""

    def __init__(self, table: Tensor, seconds: float) -> None:
        super().__init__(table)
        run = self.backbone.layer

        def layer(number: int, flow: Any) -> Any:
            time.sleep(seconds)
            self.ran = max(self.ran, number)
            return run(number, flow)

        self.ran = 0
        self.backbone.layer = layer  # type: ignore[method-assign]


@pytest.fixture
def slow() -> Slow:
    return Slow(torch.randn(6, 8, 3, generator=torch.Generator().manual_seed(0)), 0.02)


@pytest.mark.parametrize("policy", [Full(), Fixed(layer=7), Patience(patience=6)])
@pytest.mark.parametrize("every", [None, 3])
def test_who_is_out_of_time_gets_the_answer_of_the_exit_it_has_come_to(
    slow: Slow, policy: Policy, every: int | None
) -> None:
    engine = TorchEngine(slow, sync_every=every)
    rows = numbered(list(range(6)))
    found = engine.run(echo_batch(rows.ids.tolist()), policy, rows, Budget(seconds=0.03))
    assert slow.ran < 7
    assert found.forced is not None
    assert found.forced.all()
    assert set(found.exit_layers.tolist()) == {slow.ran}
    assert torch.equal(found.scores, slow.table[:, slow.ran - 1])


def test_who_has_time_is_not_forced(slow: Slow) -> None:
    rows = numbered(list(range(6)))
    engine, batch = TorchEngine(slow), echo_batch(rows.ids.tolist())
    found = engine.run(batch, Patience(patience=2), rows, Budget(seconds=60))
    assert torch.equal(found.scores, engine.run(batch, Patience(patience=2), rows).scores)
    assert found.forced is None or not found.forced.any()


def test_rows_of_a_stream_have_a_clock_each(slow: Slow) -> None:
    def asked() -> Iterator[tuple[int, Batch]]:
        for row in range(6):
            yield row, echo_batch([row])

    results = list(TorchEngine(slow).stream(asked(), Full(), slots=2, budget=Budget(seconds=0.05)))
    assert sorted(position for position, _ in results) == list(range(6))
    assert all(answer.forced and answer.exit_layer < 8 for _, answer in results)
    for position, answer in results:
        assert torch.equal(answer.scores, slow.table[position, answer.exit_layer - 1])


@pytest.mark.parametrize("arch", ["bert", "albert", "vit"])
def test_no_layer_beyond_the_depth_is_run(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(arch, layers=4)
    batch = tiny_batch_for(model.stock, 5, seed=1)
    ran: list[int] = []
    layer = model.backbone.layer
    monkeypatch.setattr(
        model.backbone, "layer", lambda number, flow: (ran.append(number), layer(number, flow))[1]
    )
    engine = TorchEngine(model)
    for _ in range(2):  # examples go through all layers once
        engine.run(batch, Full())
    for policy in spread_policies(model.problem_type, model.all_exits(batch)):
        ran.clear()
        answers = engine.run(batch, policy, rows_of(batch), Budget(depth=2))
        assert max(ran) <= 2
        assert int(answers.exit_layers.max()) <= 2


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Budget(depth=0), "runs no layer"),
        (lambda: Budget(depth=True), "runs no layer"),
        (lambda: Budget(seconds=True), "no time"),
        (lambda: Budget(seconds=float("inf")), "no time"),
        (lambda: Budget(seconds=0.0), "no time"),
        (lambda: Budget(seconds=float("nan")), "no time"),
    ],
)
def test_a_budget_of_nothing_is_refused(make: Callable[[], Budget], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()


def test_the_integers_of_numpy_are_whole_numbers() -> None:
    assert Budget(depth=np.int64(3)) == Budget(depth=3)


@given(st.data())
def test_a_budget_within_another_is_never_more(data: st.DataObject) -> None:
    budgets = st.builds(
        Budget, st.none() | st.integers(1, 9), st.none() | st.floats(0.1, 9, allow_nan=False)
    )
    one, other = data.draw(budgets), data.draw(budgets)
    both = one.within(other)
    assert both == other.within(one)
    assert one.within(Budget()) == one
    for asked in (one, other):
        assert both.within(asked) == both
    assert both.depth in (one.depth, other.depth)
    assert both.seconds in (one.seconds, other.seconds)


@pytest.mark.parametrize("depth", [0, -1, 1.5, "3"])
def test_a_replay_within_no_depth_is_refused(depth: Any) -> None:
    table = ExitTable.from_arrays(
        np.zeros((4, 3, 2), np.float32), problem_type="single_label_classification"
    )
    with pytest.raises(ConfigError, match="runs no layer"):
        replay(table, Full(), depth)


def test_the_clock_does_not_go_with_answers_that_are_always_the_same(slow: Slow) -> None:
    budget = Budget(seconds=1)
    with pytest.raises(ConfigError, match="by the clock"):
        TorchEngine(slow).stream([], Full(), determinism="shape", budget=budget)
