"""A file exported for OpenVINO answers as the engine does, in plain OpenVINO."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openvino", reason="needs the extra openvino")
pytest.importorskip("onnxscript", reason="needs the extra openvino")

import openvino

from offramp import export
from offramp.engines import TorchEngine, make_engine
from offramp.errors import ConfigError, ModelError, OutputError
from offramp.policies import MaxProbability
from offramp.prediction import Exported, Predictor
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_processor

POLICY = MaxProbability(threshold=0.45)
LABELS = ["good & <cheap>", "b\u00e4d", '"so-so"']


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def predictor(cache: Path) -> Predictor:
    model = tiny_model("bert", layers=3)
    model.config.id2label = dict(enumerate(LABELS))
    return Predictor(model, tiny_processor("bert"), POLICY)


@pytest.fixture(scope="module")
def done(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    place = tmp_path_factory.mktemp("openvino")
    return export(predictor, place / "model.xml", format="openvino", progress=False)


def _compiled(path: Path) -> Any:
    return openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def _run(compiled: Any, batch: Any, bar: float = np.nan) -> dict[str, Any]:
    feed = {name: leaf.numpy() for name, leaf in batch.items()}
    feed.setdefault("attention_mask", np.ones_like(feed["input_ids"]))
    feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
    feed["bar"] = np.array(bar, np.float32)
    said = compiled({value.any_name: feed[value.any_name] for value in compiled.inputs})
    return {value.any_name: said[value] for value in compiled.outputs}


@pytest.mark.parametrize("rows", [1, 20])
def test_it_answers_as_the_torch_engine_at_the_point_and_at_any_other_bar(
    rows: int, predictor: Predictor, done: Exported
) -> None:
    compiled, engine = _compiled(done.path), TorchEngine(predictor.model)
    batch = tiny_batch_for(predictor.model.stock, rows, seed=4)
    for bar, threshold in ((np.nan, 0.45), (0.4, 0.4), (2.0, 2.0)):
        ours = _run(compiled, batch, bar)
        theirs = engine.run(batch, POLICY.with_bar(threshold))
        assert ours["exit_layer"].tolist() == theirs.exit_layers.tolist()
        np.testing.assert_allclose(ours["scores"], theirs.scores, atol=5e-5)
        assert ours["answer"].tolist() == theirs.scores.argmax(1).tolist()
        assert not ours["bad"].any()


def test_the_file_says_what_it_is(predictor: Predictor, done: Exported) -> None:
    file = openvino.Core().read_model(done.path)

    def said(name: str) -> str:
        return file.get_rt_info(["offramp", name]).astype(str)

    assert json.loads(said("labels")) == LABELS
    assert json.loads(said("policy")) == done.policy
    assert float(said("bar")) == done.bar
    assert said("model_fingerprint") == predictor.model.fingerprint()
    assert done.outputs == ("answer", "scores", "exit_layer", "bad")
    assert done.bytes == sum(file.stat().st_size for file in done.path.parent.iterdir())


def test_eight_bits_of_its_own_engine_alone(predictor: Predictor, tmp_path: Path) -> None:
    model, how = predictor.model, {"format": "openvino", "progress": False}
    engine = make_engine(model, "openvino", "int8", progress=False)
    small = Predictor(model, predictor.processor, POLICY, engine=engine)
    batch = tiny_batch_for(model.stock, 6, seed=4)
    ours = _run(_compiled(export(small, tmp_path / "m.xml", **how).path), batch)
    assert ours["exit_layer"].tolist() == engine.run(batch, POLICY).exit_layers.tolist()
    with pytest.raises(ConfigError, match=r"in int8 on openvino.*backend='onnx' and dtype='int8'"):
        export(small, tmp_path / "m.onnx", progress=False)


@pytest.mark.parametrize("problem", [RuntimeError("basic_ios::clear"), KeyboardInterrupt()])
def test_a_disk_that_is_full_and_ctrl_c_leave_what_was_there(
    problem: BaseException, predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {"m.xml": "old", "m.bin": "weights"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)

    def half(model: object, path: Path, **_: object) -> None:
        path.with_suffix(".bin").write_bytes(b"half of")
        raise problem

    monkeypatch.setattr(openvino, "save_model", half)
    kind = OutputError if isinstance(problem, RuntimeError) else KeyboardInterrupt
    with pytest.raises(kind):
        export(predictor, tmp_path / "m.xml", format="openvino", progress=False)
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == before


def test_new_weights_never_lie_beside_an_old_graph(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("m.xml", "m.bin"):
        (tmp_path / name).write_text("old")
    replace, seen = os.replace, []

    def watched(source: Path, target: Path) -> None:
        replace(source, target)
        seen.append({file.name for file in tmp_path.glob("m.*")})

    monkeypatch.setattr(os, "replace", watched)
    export(predictor, tmp_path / "m.xml", format="openvino", progress=False)
    assert seen[-2:] == [{"m.bin"}, {"m.bin", "m.xml"}]


def test_what_cannot_be_exported_is_refused(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match=r"ends with \.xml, or choose format 'onnx'"):
        export(predictor, tmp_path / "m.onnx", format="openvino")
    (tmp_path / "m.bin").mkdir()
    with pytest.raises(OutputError, match=r"m\.bin is a folder"):
        export(predictor, tmp_path / "m.xml", format="openvino", progress=False)

    def unknown(self: object, model: object) -> None:
        raise openvino.frontend.OpConversionFailure("no such operation")

    monkeypatch.setattr(openvino.Core, "read_model", unknown)
    with pytest.raises(ModelError, match=r"no such operation.*Use format onnx"):
        export(predictor, tmp_path / "n.xml", format="openvino", progress=False)
