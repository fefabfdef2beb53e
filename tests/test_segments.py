"""Segments: whatever the host asks and when, every row gets the answer it gets layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from engine_support import numbered, outputs_of, run_table, same
from hypothesis import given, settings
from hypothesis import strategies as st
from segment_support import FreeTable, alone, graphed
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from offramp.engines import TorchEngine, rows_of, segments, stepping
from offramp.engines.cuda_graphs import NoQuestions
from offramp.engines.segments import Running, Segments
from offramp.engines.stepping import Stepper, Waiting
from offramp.errors import ConfigError
from offramp.policies import MaxProbability, Patience
from offramp.testing import (
    ARCHITECTURES,
    IMAGE_ARCHITECTURES,
    RELATIVES,
    EchoModel,
    Scripted,
    check_engine,
    echo_batch,
    spread_policies,
    tiny_batch_for,
    tiny_model,
    walk,
)
from offramp.testing.strategies import policies, problem_types, score_tables


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- answers do not depend on when the host asks ------------------------------------------


@settings(max_examples=150, deadline=None)
@given(data=st.data(), problem_type=problem_types(), every=st.integers(1, 13))
def test_segments_of_any_length_answer_as_layer_by_layer(
    data: st.DataObject, problem_type: str, every: int
) -> None:
    table = data.draw(harmed(problem_type))
    policy = data.draw(policies(problem_type, depth=table.shape[1]))
    found = run_table(table, policy, sync_every=every)
    assert same(found, run_table(table, policy))
    assert same(found, walk(policy, outputs_of(table), numbered(list(range(len(table))))))


@settings(max_examples=75, deadline=None)
@given(data=st.data(), problem_type=problem_types(), every=st.integers(1, 13))
def test_replayed_segments_answer_as_layer_by_layer(
    data: st.DataObject, problem_type: str, every: int
) -> None:
    table = data.draw(harmed(problem_type))
    policy = data.draw(policies(problem_type, depth=table.shape[1]))
    rows = numbered(list(range(len(table))))
    engine, memory = graphed(FreeTable(table), every)
    for _ in range(4):
        found = engine.run(echo_batch(rows.ids.tolist()), policy, rows)
        assert same(found, run_table(table, policy))
    assert memory.captures
    assert memory.repeats


@st.composite
def harmed(draw: Any, problem_type: str) -> Tensor:
    """Scores of which some are no numbers."""
    table = draw(score_tables(problem_type))
    for value in draw(st.lists(st.sampled_from((math.nan, math.inf, -math.inf)), max_size=3)):
        row, layer = (draw(st.integers(0, size - 1)) for size in table.shape[:2])
        table[row, layer, 0] = value
    return table


@pytest.mark.parametrize(("arch", "every"), [("bert", 3), ("modernbert", 6)])
def test_segments_keep_what_engines_must_keep(arch: str, every: int) -> None:
    some = [Patience(), MaxProbability(threshold=0.6)]
    check_engine(lambda model: TorchEngine(model, sync_every=every), tiny_model(arch), some)


def test_replayed_segments_keep_what_engines_must_keep() -> None:
    made = []

    def make(model: Any) -> TorchEngine:
        engine, memory = graphed(model)
        made.append(memory)
        return engine

    model = tiny_model("bert")
    check_engine(make, model, [Patience(), MaxProbability(threshold=0.6)])
    assert any(memory.repeats for memory in made)


@torch.inference_mode()
@pytest.mark.parametrize("arch", ["bert", "albert"])
def test_at_equal_shape_not_one_bit_of_an_answer_differs(arch: str) -> None:
    model = tiny_model(arch)
    batch = tiny_batch_for(model.stock, 16, tokens=12, seed=1)
    outputs = model.all_exits(batch)
    engine = TorchEngine(model, sync_every=model.depth)  # nobody is taken out
    for policy in spread_policies(model.problem_type, outputs):
        assert same(engine.run(batch, policy), walk(policy, outputs, rows_of(batch))), policy


# --- who is asked what ---------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("arch", [*ARCHITECTURES, *RELATIVES, *IMAGE_ARCHITECTURES])
def test_nothing_is_asked_inside_a_segment(arch: str) -> None:
    model = tiny_model(arch)
    batch = tiny_batch_for(model.stock, 4, tokens=12, seed=1)
    flow = model.backbone.embed(batch)
    exits = [model.exit_at(layer) for layer in range(1, model.depth + 1)]
    policies = spread_policies(model.problem_type, model.all_exits(batch))
    kinds = {type(policy): policy for policy in policies}
    for policy in policies if arch == "bert" else kinds.values():
        segments = Segments(model.backbone, exits, policy, model.remembers, model.depth)
        rows = Running(flow, policy.start(rows_of(batch)))
        with NoQuestions():
            segments.run(1, rows)


def test_the_watch_sees_who_asks() -> None:
    values = torch.ones(3)
    for ask in (lambda: values.sum().item(), lambda: values.nonzero(), lambda: values[values > 0]):
        with pytest.raises(RuntimeError, match="wait"), NoQuestions():
            ask()


@pytest.mark.parametrize(
    ("every", "questions"), [(1, 11), (2, 5), (3, 3), (5, 2), (12, 0), (50, 0)]
)
def test_a_segment_costs_one_question_and_the_last_none(
    every: int, questions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    ask = segments.ask
    monkeypatch.setattr(segments, "ask", lambda leave: asked.append(1) or ask(leave))
    script = Scripted(layers=tuple(range(1, 13)), inner=Patience())
    TorchEngine(EchoModel(), sync_every=every).run(echo_batch(range(12)), script)
    assert len(asked) == questions


def test_between_questions_nothing_else_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ask", unwatched(segments.ask))
    table = torch.randn(16, 12, 3, generator=torch.Generator().manual_seed(0))
    script = Scripted(layers=tuple(range(1, 13)) * 2, inner=Patience())
    engine = TorchEngine(FreeTable(table), sync_every=3)
    with NoQuestions():
        engine.run(echo_batch(range(16)), script)


def unwatched(ask: Callable[[Tensor], int]) -> Callable[[Tensor], int]:
    def asked(leave: Tensor) -> int:
        with _disable_current_modes():
            return ask(leave)

    return asked


@torch.inference_mode()
@pytest.mark.parametrize("arch", ["albert", "bert"])
def test_a_step_of_a_stream_asks_once_for_all_its_groups(
    arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(arch)
    rows = [Waiting(n, n, row) for n, row in alone(8)]
    exits = [model.exit_at(layer) for layer in range(1, model.depth + 1)]
    script = Scripted(layers=(1, 2, 3, 4) * 2, inner=Patience())
    stepper = Stepper(model.backbone, exits, script, model.remembers, 8, False, set())
    stepper.looks = False  # as on a GPU
    groups, answered = stepper.enter(rows[:4]), []
    asked = []
    told = stepping._told
    monkeypatch.setattr(stepping, "_told", lambda found: asked.append(len(found)) or told(found))
    for step in range(4):
        with NoQuestions():
            groups, left = stepper.step(groups)
        answered += left
        groups += stepper.enter(rows[4:]) if step == 0 and stepper.mixes else []
    assert [answer.exit_layer for place, answer in sorted(answered) if place < 4] == [1, 2, 3, 4]
    assert asked == ([1, 2, 2, 2] if stepper.mixes else [1] * 4)


def test_rows_that_leave_run_to_the_end_of_their_segment_and_no_further() -> None:
    ran = []
    model = EchoModel()
    layer = model.backbone.layer
    model.backbone.layer = (  # type: ignore[method-assign]
        lambda number, flow: ran.append((number, len(flow.hidden))) or layer(number, flow)
    )
    script = Scripted(layers=(1, 2, 4, 5), inner=Patience())
    found = TorchEngine(model, sync_every=3).run(echo_batch(range(4)), script)
    assert found.exit_layers.tolist() == [1, 2, 4, 5]
    assert ran == [(1, 4), (2, 4), (3, 4), (4, 2), (5, 2), (6, 2)]


@pytest.mark.parametrize("every", [0, -3])
def test_no_layers_are_no_segment(every: int) -> None:
    with pytest.raises(ConfigError, match="sync_every"):
        TorchEngine(EchoModel(), sync_every=every)
