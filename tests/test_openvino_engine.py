"""The OpenVINO engine finds the exits that the torch engine finds."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnxscript", reason="needs the extra openvino")

import openvino
from engine_fixtures import BAND, BROKEN

from offramp.engines import TorchEngine, make_engine
from offramp.engines.graphs import Graphs
from offramp.engines.openvino_engine import OpenVinoEngine
from offramp.errors import ConfigError, MissingExtraError
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, Sample
from offramp.testing import check_engine
from offramp.testing.tiny import tiny_batch_for, tiny_model

pytest_plugins = ("engine_fixtures",)
pytestmark = pytest.mark.usefixtures("one_thread")

# A threshold that all, or none, are above: one rule is one file, and files take their time.
AT_ONCE, FULL = MaxProbability(threshold=0.0), MaxProbability(threshold=1.0)


@pytest.fixture(scope="module")
def bert(bert_model: MultiExitModel) -> OpenVinoEngine:
    return OpenVinoEngine(bert_model, progress=False)


@pytest.fixture(scope="module")
def eight_bits(bert_model: MultiExitModel) -> OpenVinoEngine:
    return OpenVinoEngine(bert_model, "int8", progress=False)


@pytest.fixture(scope="module")
def sixteen_bits(bert: OpenVinoEngine) -> OpenVinoEngine:
    try:
        return OpenVinoEngine(bert.model, "bfloat16", progress=False)
    except ConfigError as problem:
        pytest.skip(str(problem))


@pytest.fixture(params=["eight_bits", "sixteen_bits"])
def fewer_bits(request: pytest.FixtureRequest) -> OpenVinoEngine:
    return request.getfixturevalue(request.param)


def test_it_does_what_the_slow_twin_does(bert: OpenVinoEngine) -> None:
    policies = [MaxProbability(threshold=0.45)]
    check_engine(lambda _: bert, bert.model, policies, rows=16, band=BAND, compiled=True)


def test_layers_that_share_their_weights() -> None:
    model = tiny_model("albert", layers=2)
    engine, policies = OpenVinoEngine(model, progress=False), [MaxProbability(threshold=0.45)]
    check_engine(lambda _: engine, model, policies, rows=16, band=BAND, compiled=True)


def test_every_exit_says_what_the_model_says(bert: OpenVinoEngine) -> None:
    batch = tiny_batch_for(bert.model.stock, 7, seed=3)
    pairs = zip(bert.all_exits(batch), TorchEngine(bert.model).all_exits(batch), strict=True)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.scores, theirs.scores, atol=BAND, rtol=0)


@pytest.mark.parametrize("name", ["bert", "eight_bits", "sixteen_bits"])
def test_a_row_that_is_not_a_number_leaves_alone_and_at_once(
    name: str, request: pytest.FixtureRequest
) -> None:
    engine = request.getfixturevalue(name)
    batch = tiny_batch_for(engine.model.stock, 5, seed=2)
    policy = MaxProbability(threshold=0.6)
    before = engine.run(batch, policy)
    batch["input_ids"][3, 1] = BROKEN
    after = engine.run(batch, policy)
    assert after.bad.tolist() == [False, False, False, True, False]
    assert after.exit_layers[3] == 1
    others = ~after.bad
    assert torch.equal(after.exit_layers[others], before.exit_layers[others])
    band = 0.02 if name == "sixteen_bits" else BAND
    torch.testing.assert_close(after.scores[others], before.scores[others], atol=band, rtol=0)


def test_fewer_bits_move_scores_a_little_and_no_row_by_its_neighbours(
    fewer_bits: OpenVinoEngine,
) -> None:
    model = fewer_bits.model
    batch = tiny_batch_for(model.stock, 9, seed=1)
    whole, exact = fewer_bits.run(batch, FULL), TorchEngine(model).run(batch, FULL)
    drift = (whole.scores - exact.scores).abs()
    assert 0 < drift.mean() < 0.1 * exact.scores.std()
    # sums of another shape may be rounded to the number of 8 bits beside
    band = BAND if fewer_bits.dtype == "int8" else 2**-7 * exact.scores.abs().max().item()
    for row in range(9):
        mine = {name: leaf[row : row + 1] for name, leaf in batch.items()}
        alone = fewer_bits.run(mine, FULL)
        torch.testing.assert_close(alone.scores[0], whole.scores[row], atol=band, rtol=0)


def test_bfloat16_decides_in_float(sixteen_bits: OpenVinoEngine) -> None:
    batch = tiny_batch_for(sixteen_bits.model.stock, 1, seed=6)
    evidence = sixteen_bits.run(batch, AT_ONCE).scores.softmax(dim=1).max().item()
    # closer together than two numbers of bfloat16 are
    below, above = (MaxProbability(threshold=evidence + step) for step in (-1e-5, 1e-5))
    assert sixteen_bits.run(batch, below).exit_layers.tolist() == [1]
    assert sixteen_bits.run(batch, above).exit_layers.tolist() != [1]


def test_bfloat16_is_refused_where_the_processor_has_none(
    bert: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino.Core, "get_property", lambda *_: ["FP32", "INT8"])
    with pytest.raises(ConfigError, match="does not compute in bfloat16"):
        make_engine(bert.model, "openvino", "bf16")


def test_it_uses_the_threads_it_is_given(
    bert: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[int] = []
    compile_model = openvino.Core.compile_model

    def compiled(self: Any, *given: Any) -> Any:
        made = compile_model(self, *given)
        used.append(made.get_property("INFERENCE_NUM_THREADS"))
        return made

    monkeypatch.setattr(openvino.Core, "compile_model", compiled)
    for threads in (2, None):
        engine = make_engine(bert.model, "openvino", threads=threads, progress=False)
        engine.run(tiny_batch_for(bert.model.stock, 2), FULL)
    assert used == [2, torch.get_num_threads()]


def test_what_it_cannot_run_is_refused(
    bert: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match="no rows"):
        bert.run({"input_ids": torch.zeros((0, 4), dtype=torch.long)}, FULL)
    with pytest.raises(ConfigError, match=r"'openvino' does not compute in fp16.*backend='torch'"):
        make_engine(bert.model, "openvino", "fp16")
    with pytest.raises(ConfigError, match="float32, int8, int7, not in bfloat16"):
        Graphs(bert.model, "bfloat16")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingExtraError, match=r"offramp\[openvino\]"):
        make_engine(bert.model, "openvino")


def test_draws_by_the_ids_of_rows_are_refused(bert: OpenVinoEngine) -> None:
    with pytest.raises(ConfigError, match="32 bits, and policy 'sample'"):
        bert.run(tiny_batch_for(bert.model.stock, 2), Sample())


def test_it_needs_nothing_of_onnx_runtime(
    bert: OpenVinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    engine = make_engine(bert.model, "openvino", progress=False)
    assert engine.run(tiny_batch_for(bert.model.stock, 3), FULL).exit_layers.tolist() == [3] * 3
