"""Graphs of segments: captured when a shape comes again, and their answers are those without."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_support import same
from segment_support import FreeTable, Memory, alone, graphed

from offramp import pipeline
from offramp.backbones import Batch
from offramp.engines import TorchEngine, check_backend, make_engine
from offramp.engines.cuda_graphs import CudaGraphs, rows_bucket
from offramp.engines.segments import Running, Segments
from offramp.engines.stepping import Stepper
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Patience, Policy, make_policy
from offramp.prediction import Predictor
from offramp.testing import (
    echo_batch,
    spread_policies,
    tiny_batch_for,
    tiny_model,
    tiny_tokenizer,
)

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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


def test_a_pipeline_asks_for_graphs_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, memory = tiny_model("bert", layers=3), Memory()
    model.save_pretrained(tmp_path, processor=tiny_tokenizer())
    cpu = torch.device("cpu")
    monkeypatch.setattr("offramp.prediction.predictor.check_backend", lambda *_, **__: cpu)
    monkeypatch.setattr("offramp.engines.torch_engine._gpu_of", lambda model: memory.device)
    monkeypatch.setattr("offramp.engines.torch_engine.CudaRecorder", lambda device: memory)
    policy, texts = MaxProbability(threshold=0.45), ["A dull story.", "What a film!"]
    plain = pipeline(tmp_path, policy, device="cpu")
    classify = pipeline(tmp_path, policy, device="cpu", cuda_graphs=True, sync_every=2)
    for _ in range(3):
        for found, wanted in zip(classify(texts), plain(texts), strict=True):
            assert found["label"] == wanted["label"]
            assert found["exit_layer"] == wanted["exit_layer"]
    assert memory.repeats > memory.captures > 0


@pytest.mark.parametrize(
    ("backend", "option", "said"),
    [
        ("torch", {"cuda_graphs": True}, "need the model on a GPU: device='cuda'"),
        ("inductor", {"cuda_graphs": True}, "cuda_graphs is for backend torch, not for inductor"),
        ("onnx", {"sync_every": 2}, "sync_every is for backend torch, not for onnx"),
        ("torch", {"sync_every": 0}, "1 or more"),
        ("torch", {"sync_every": "2"}, "sync_every='2': give a number of layers"),
        ("torch", {"cuda_graphs": "no"}, "cuda_graphs='no': give True or False"),
        ("onnx", {"threads": 0}, "threads is 0; give a whole number from 1"),
    ],
)
def test_options_of_a_gpu_are_refused_where_they_make_no_sense(
    backend: str, option: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        make_engine(tiny_model("bert", layers=2), backend, **option)
    with pytest.raises(ConfigError, match=said):
        check_backend(backend, device="cpu", **option)  # before the weights are read


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


def test_one_weight_that_is_moved_means_new_graphs() -> None:
    model = tiny_model("bert")
    engine, memory = graphed(model, sync_every=model.depth)
    batch = tiny_batch_for(model.stock, 4, tokens=8, seed=1)
    for weight in (list(model.backbone.layers.parameters())[3], next(model.exits.parameters())):
        for _ in range(2):
            engine.run(batch, Patience())
        weight.data = weight.data.clone()
    for _ in range(2):
        engine.run(batch, Patience())
    assert memory.captures == 3


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
