"""Segments: whatever the host asks and when, every row gets the answer it gets layer by layer."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from engine_support import TableModel, numbered, outputs_of, run_table, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from offramp.backbones import Batch
from offramp.engines import TorchEngine, rows_of, segments, stepping
from offramp.engines.cuda_graphs import CudaGraphs, NoQuestions, rows_bucket
from offramp.engines.segments import Passed, Running, Segments
from offramp.engines.stepping import Stepper, Waiting
from offramp.engines.trees import leaves_of
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Patience, Policy, make_policy
from offramp.prediction import Predictor
from offramp.testing import (
    ARCHITECTURES,
    IMAGE_ARCHITECTURES,
    RELATIVES,
    EchoModel,
    Scripted,
    check_engine,
    echo_batch,
    spread_policies,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_tokenizer,
    walk,
)
from offramp.testing.strategies import policies, problem_types, score_tables

CPU = torch.device("cpu")
cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Memory:
    """Stands for CUDA's graphs on a CPU: a repeat works on the places of the capture.

    As in a shared pool of memory, it destroys the results of all other graphs.
    """

    device = CPU

    def __init__(self) -> None:
        self.results: list[Tensor] = []
        self.captures = self.repeats = 0
        self.lock = threading.Lock()

    def capture(self, work: Callable[[], Passed]) -> tuple[Callable[[], object], Passed]:
        results, again = work(), work()
        # what is handed on as it was given lies with what is given, not in the pool
        fresh = [
            one
            for one, other in zip(_tensors(results), _tensors(again), strict=True)
            if one.data_ptr() != other.data_ptr()
        ]
        self.results += fresh
        self.captures += 1

        def repeat() -> None:
            self.repeats += 1
            for place in self.results:
                place.fill_(math.nan if place.is_floating_point() else 1)
            for place, leaf in zip(_tensors(results), _tensors(work()), strict=True):
                place.copy_(leaf)

        repeat_alone = torch.inference_mode()(repeat)
        return repeat_alone, results

    @contextmanager
    def turn(self) -> Iterator[None]:
        assert self.lock.acquire(blocking=False) or self.lock.acquire(timeout=60)
        try:
            yield
        finally:
            self.lock.release()


def _tensors(passed: Passed) -> list[Tensor]:
    flow, state, carry = passed.rows
    left = None if passed.left is None else passed.left._asdict()
    if left is not None and isinstance(left["layers"], int):
        del left["layers"]
    tree = {"hidden": flow.hidden, "state": state, "carry": carry, "left": left}
    return [leaf for _, leaf in leaves_of(tree)]


def graphed(model: Any, sync_every: int = 3, **options: Any) -> tuple[TorchEngine, Memory]:
    engine, memory = TorchEngine(model, sync_every=sync_every), Memory()
    engine._graphs = CudaGraphs(memory, **options)
    return engine, memory


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


class FreeTable(TableModel):
    """One whose layers look at nothing, as in a graph they cannot."""

    def __init__(self, table: Tensor) -> None:
        super().__init__(table)
        one = torch.tensor((0.0, 1.0), dtype=torch.double)
        self.backbone.layer = lambda number, flow: flow._replace(  # type: ignore[method-assign]
            hidden=flow.hidden + one
        )


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
    for policy in spread_policies(model.problem_type, model.all_exits(batch)):
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


def alone(rows: int) -> list[tuple[int, Batch]]:
    batch = tiny_batch(rows, tokens=12, padded=False)
    return [(n, {name: leaf[n : n + 1] for name, leaf in batch.items()}) for n in range(rows)]


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


# --- graphs ---------------------------------------------------------------------------------


def run_free(engine: TorchEngine, rows: int, policy: Policy | None = None) -> Any:
    return engine.run(echo_batch(range(rows)), policy or MaxProbability(threshold=0.7))


def free_table(rows: int = 64) -> FreeTable:
    return FreeTable(torch.randn(rows, 6, 3, generator=torch.Generator().manual_seed(0)))


def test_a_shape_is_captured_when_it_comes_again_and_then_replayed() -> None:
    engine, memory = graphed(free_table(), sync_every=6)
    counts = []
    for _ in range(4):
        run_free(engine, 8)
        counts.append((memory.captures, memory.repeats))
    assert counts == [(0, 0), (1, 1), (1, 2), (1, 3)]


def test_batches_of_similar_size_share_a_graph() -> None:
    engine, memory = graphed(free_table(), sync_every=6)
    for rows in range(33, 49):
        assert same(run_free(engine, rows), run_free(TorchEngine(free_table()), rows))
    assert (memory.captures, memory.repeats) == (1, 15)


def test_sizes_are_few_and_at_most_half_as_large_again() -> None:
    sizes = [rows_bucket(rows) for rows in range(1, 65)]
    assert sorted(set(sizes)) == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]
    assert all(rows <= size < 1.5 * rows for rows, size in enumerate(sizes, start=1))


def test_another_policy_is_another_graph() -> None:
    engine, memory = graphed(free_table(), sync_every=6)
    for policy in (Patience(), MaxProbability(threshold=0.5), MaxProbability(threshold=0.9)):
        wanted = run_free(TorchEngine(free_table()), 8, policy)
        for _ in range(3):
            assert same(run_free(engine, 8, policy), wanted)
    assert memory.captures == 3


def test_answers_outlive_the_next_replay() -> None:
    engine, _ = graphed(free_table(), sync_every=6)
    policy = make_policy({"name": "fixed", "layer": 2})  # all leave at once
    first = [run_free(engine, 8, policy) for _ in range(3)]
    wanted = run_free(TorchEngine(free_table()), 8, policy)
    assert all(same(found, wanted) for found in first)


def test_graphs_that_are_not_used_make_room() -> None:
    engine, memory = graphed(free_table(), sync_every=6, most=2)
    for _ in range(3):
        for rows in (2, 4, 8):
            run_free(engine, rows)
    assert memory.captures == 0  # forgotten each time before it came again
    for _ in range(2):
        run_free(engine, 8)
    assert memory.captures == 1


def test_where_capture_fails_layers_run_without_and_it_is_said_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Refuses(Memory):
        def capture(self, work: Any) -> Any:
            self.captures += 1
            raise RuntimeError("operation not permitted when stream is capturing\nCompile with")

    engine, memory = TorchEngine(free_table(), sync_every=3), Refuses()
    engine._graphs = CudaGraphs(memory)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert same(run_free(engine, 8), run_free(TorchEngine(free_table()), 8))
    assert memory.captures == 1
    assert [record.getMessage() for record in caplog.records] == [
        "No CUDA graph could be captured, so layers run without: "
        "operation not permitted when stream is capturing"
    ]


def test_a_model_that_is_moved_gets_new_graphs() -> None:
    model = tiny_model("bert")
    engine, memory = graphed(model, sync_every=model.depth)
    batch = tiny_batch_for(model.stock, 4, tokens=8, seed=1)
    for _ in range(2):
        engine.run(batch, Patience())
    model.to(torch.float64)
    for _ in range(2):
        found = engine.run(batch, Patience())
        assert same(found, TorchEngine(model).run(batch, Patience()))
    assert memory.captures == 2


def test_a_predictor_pads_to_few_lengths_so_that_graphs_come_again() -> None:
    model, tokenizer = tiny_model("bert"), tiny_tokenizer("bert")
    engine, memory = graphed(model)
    texts = ["so " * words for words in range(10, 16)]
    plain = Predictor(model, tokenizer, Patience(), max_rows=1)
    few = Predictor(model, tokenizer, Patience(), max_rows=1, engine=engine)
    wanted = [answer.exit_layer for answer in plain.answer(texts)[0]]
    few.answer(texts)
    assert memory.repeats == 0  # each length by itself
    engine.few_shapes = True
    assert [answer.exit_layer for answer in few.answer(texts)[0]] == wanted
    assert memory.repeats > 0


def test_graphs_without_a_gpu_are_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match=r"model\.cuda\(\)"):
        TorchEngine(tiny_model("bert"), cuda_graphs=True)


# --- on a GPU -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu() -> MultiExitModel:
    return tiny_model("bert").cuda()


def gpu_batch(model: MultiExitModel, rows: int = 12) -> Batch:
    batch = tiny_batch_for(model.stock, rows, tokens=16, seed=3)
    return {name: leaf.cuda() for name, leaf in batch.items()}


def close(one: Any, other: Any) -> bool:
    layers = torch.equal(one.exit_layers, other.exit_layers)
    return layers and torch.allclose(one.scores, other.scores, atol=1e-4)


@cuda
def test_a_gpu_replays_what_it_runs(on_gpu: MultiExitModel) -> None:
    graphs, eager = TorchEngine(on_gpu, cuda_graphs=True), TorchEngine(on_gpu, sync_every=1)
    for rows in (1, 5, 12):
        batch = gpu_batch(on_gpu, rows)
        for policy in spread_policies(on_gpu.problem_type, on_gpu.all_exits(batch)):
            wanted = eager.run(batch, policy)
            for _ in range(3):
                assert close(graphs.run(batch, policy), wanted), policy
    assert any(graph is not None for graph in graphs._graphs._held.values())


@cuda
@torch.inference_mode()
def test_a_gpu_is_asked_nothing_inside_a_segment(on_gpu: MultiExitModel) -> None:
    batch = gpu_batch(on_gpu)
    flow = on_gpu.backbone.embed(batch)
    exits = [on_gpu.exit_at(layer) for layer in range(1, on_gpu.depth + 1)]
    segments = Segments(on_gpu.backbone, exits, Patience(), False, on_gpu.depth)
    rows = Running(flow, {})
    segments.run(1, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        segments.run(1, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@cuda
@pytest.mark.filterwarnings("always:called a synchronizing CUDA operation")
def test_a_stream_on_a_gpu_waits_once_a_step(
    on_gpu: MultiExitModel, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    steps = []
    step = Stepper.step
    monkeypatch.setattr(Stepper, "step", lambda self, groups: steps.append(1) or step(self, groups))
    dict(TorchEngine(on_gpu).stream(alone(8), Patience(), slots=8))  # loads what is loaded once
    torch.cuda.set_sync_debug_mode("warn")
    try:
        found = dict(TorchEngine(on_gpu).stream(alone(32), Patience(), slots=8))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(found) == 32
    waits = [one for one in recwarn if "synchronizing CUDA" in str(one.message)]
    assert len(waits) <= len(steps)


@cuda
def test_after_a_capture_that_fails_a_gpu_answers_as_before(
    on_gpu: MultiExitModel, caplog: pytest.LogCaptureFixture
) -> None:
    class Asking(MaxProbability):
        name = "asking"

        def evidence(self, *given: Any) -> Any:
            evidence, state = super().evidence(*given)
            return evidence + 0 * evidence.sum().item(), state

    batch, policy = gpu_batch(on_gpu), Asking(threshold=0.5)
    engine, stream = TorchEngine(on_gpu, cuda_graphs=True), torch.cuda.current_stream()
    wanted = TorchEngine(on_gpu, sync_every=1).run(batch, policy)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert close(engine.run(batch, policy), wanted)
    assert torch.cuda.current_stream() == stream
    assert len(caplog.records) == 1


@cuda
def test_threads_on_a_gpu_take_turns(on_gpu: MultiExitModel) -> None:
    engine = TorchEngine(on_gpu, cuda_graphs=True)
    batches = [gpu_batch(on_gpu, rows) for rows in (3, 6, 12)]
    wanted = [TorchEngine(on_gpu, sync_every=1).run(batch, Patience()) for batch in batches]
    wrong: list[int] = []

    def ask(number: int) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(30):
                place = (number + turn) % 3
                found = engine.run(batches[place], Patience())
                torch.cuda.current_stream().synchronize()
                if not close(found, wanted[place]):
                    wrong.append(place)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
