"""One exported file answers as the engine does, wherever ONNX Runtime is."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Said
from datasets import Dataset

pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnxruntime as ort

from offramp import calibrate, export, record
from offramp.calibration import OperatingPoint
from offramp.calibration.probabilities import Temperatures
from offramp.engines import TorchEngine, dtype_name
from offramp.engines.graphs import Graphs
from offramp.errors import ConfigError, OutputError, PointError
from offramp.model import MultiExitModel
from offramp.policies import MaxProbability, PerExit
from offramp.prediction import Exported, Predictor
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_processor, tiny_texts

pytest_plugins = ("cli_fixtures",)
EXAMPLE = Path(__file__).parents[1] / "examples" / "onnxruntime-node" / "answer.js"
POLICY = MaxProbability(threshold=0.45)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a point, chosen with torch."""
    place = tmp_path_factory.mktemp("export")
    model = tiny_model("bert", layers=3)
    processor = tiny_processor("bert")
    model.save_pretrained(place / "model", processor=processor)
    rows = Dataset.from_list([{"text": text} for text in tiny_texts(30)])
    table = record(model, rows, place / "table", "tune", processor=processor, progress=False)
    chosen = calibrate(table, max_disagreement=0.5).point
    # early exits do not pay on a model this small, so the policy is set by hand
    chosen.model_copy(update={"policy": POLICY.to_dict()}).save(place / "model")
    return place / "model"


@pytest.fixture(scope="module")
def done(folder: Path) -> Exported:
    return export(folder, folder.parent / "model.onnx", progress=False)


def _session(file: Path) -> Any:
    return ort.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def _run(session: Any, batch: Any, bar: Any = np.nan) -> dict[str, Any]:
    feed = {name: leaf.numpy() for name, leaf in batch.items()}
    feed.setdefault("attention_mask", np.ones_like(feed["input_ids"]))
    feed.setdefault("token_type_ids", np.zeros_like(feed["input_ids"]))
    feed["bar"] = np.array(bar, np.float32)
    feed["bars"] = np.array(bar, np.float32).reshape(-1)
    names = [value.name for value in session.get_inputs()]
    said = session.run(None, {name: feed[name] for name in names})
    return dict(zip([value.name for value in session.get_outputs()], said, strict=True))


def test_it_answers_as_the_engine_at_the_point_and_at_any_other_bar(
    folder: Path, done: Exported
) -> None:
    model = MultiExitModel.from_pretrained(folder)
    policy = Predictor.load(folder).policy
    session, engine = _session(done.path), TorchEngine(model)
    batch = tiny_batch_for(model.stock, 20, seed=4)
    for bar, same in ((np.nan, policy), (0.4, policy.with_bar(0.4)), (2.0, policy.with_bar(2.0))):  # type: ignore[attr-defined]
        ours, theirs = _run(session, batch, bar), engine.run(batch, same)
        assert ours["exit_layer"].tolist() == theirs.exit_layers.tolist()
        np.testing.assert_allclose(ours["scores"], theirs.scores, atol=5e-5)
        assert ours["answer"].tolist() == theirs.scores.argmax(1).tolist()
        assert not ours["bad"].any()


def test_bars_of_each_exit_can_be_changed_without_another_export(
    folder: Path, tmp_path: Path
) -> None:
    own = PerExit(policy=POLICY, bars=(0.5, 0.45))
    done = export(folder, tmp_path / "m.onnx", point=own, progress=False)
    model = MultiExitModel.from_pretrained(folder)
    session, engine = _session(done.path), TorchEngine(model)
    batch = tiny_batch_for(model.stock, 20, seed=4)
    told: list[tuple[Any, tuple[float, ...]]] = [
        ([np.nan, np.nan], (0.5, 0.45)),
        (np.nan, (0.5, 0.45)),
        ([0.4, np.nan], (0.4, 0.45)),
        ([np.inf, 0.4], (2.0, 0.4)),
        (0.4, (0.4, 0.4)),
    ]
    for given, bars in told:
        theirs = engine.run(batch, PerExit(policy=POLICY, bars=bars))
        assert _run(session, batch, given)["exit_layer"].tolist() == theirs.exit_layers.tolist()
    assert (done.bar, done.bars) == (None, (0.5, 0.45))
    said = session.get_modelmeta().custom_metadata_map
    assert (said["offramp.bar"], json.loads(said["offramp.bars"])) == ("", [0.5, 0.45])


def test_the_file_says_what_it_is(folder: Path, done: Exported) -> None:
    said = _session(done.path).get_modelmeta().custom_metadata_map
    assert json.loads(said["offramp.labels"]) == ["label-0", "label-1", "label-2"]
    assert json.loads(said["offramp.policy"]) == done.policy
    assert float(said["offramp.bar"]) == done.bar
    assert said["offramp.model_fingerprint"] == MultiExitModel.from_pretrained(folder).fingerprint()
    assert done.outputs == ("answer", "scores", "exit_layer", "bad")
    assert said["offramp.temperatures"] == ""


def test_the_file_says_the_temperatures_of_its_point(folder: Path, tmp_path: Path) -> None:
    warm = Temperatures(values=(2.0, 1.5, 1.0), rows=100)
    point = OperatingPoint.load(folder).model_copy(update={"temperatures": warm})
    file = export(folder, tmp_path / "m.onnx", point=point, progress=False).path
    said = _session(file).get_modelmeta().custom_metadata_map
    assert json.loads(said["offramp.temperatures"]) == [2.0, 1.5, 1.0]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Graphs, "load", lambda *_: pytest.fail("a graph was made"))
    with pytest.raises(OutputError, match="cannot be written"):
        export(folder, "/dev/null/m.onnx", progress=False)


@pytest.mark.parametrize(
    ("problem_type", "answer"),
    [
        ("multi_label_classification", lambda scores: scores > 0),
        ("regression", lambda scores: scores[:, 0]),
    ],
)
def test_other_tasks_answer_with_labels_or_a_number(
    problem_type: str, answer: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = tiny_model("bert", problem_type, layers=2)
    predictor = Predictor(model, tiny_processor("bert"), "full")
    session = _session(export(predictor, tmp_path / "m.onnx", progress=False).path)
    said = _run(session, tiny_batch_for(model.stock, 5))
    assert said["answer"].tolist() == answer(said["scores"]).tolist()
    assert said["exit_layer"].tolist() == [2] * 5


def test_eight_bits_make_a_smaller_file_at_a_point_of_their_own(
    folder: Path, done: Exported, tmp_path: Path
) -> None:
    with pytest.raises(PointError, match=f"--backend onnx --dtype {dtype_name('int8')}"):
        export(folder, tmp_path / "m.onnx", dtype="int8")
    small = export(folder, tmp_path / "m.onnx", point=POLICY, dtype="int8", progress=False)
    assert small.bytes < done.bytes
    batch = tiny_batch_for(MultiExitModel.from_pretrained(folder).stock, 4)
    assert _run(_session(small.path), batch)["scores"].shape == (4, 3)


@pytest.mark.parametrize(("vnni", "chosen"), [(True, "int7"), (False, "int8")])
def test_a_point_of_eight_bits_is_refused_where_weights_keep_seven_and_the_other_way_round(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vnni: bool, chosen: str
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "model"))
    new = {"engine": "onnx", "dtype": chosen}
    OperatingPoint.load(place).model_copy(update=new).save(place)
    has = {"architecture": "x86_64", "avx512_vnni": vnni}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    with pytest.raises(PointError, match=rf"in {chosen}, not on onnx in {dtype_name('int8')}"):
        Predictor.load(place, backend="onnx", dtype="int8")


def test_a_predictor_is_exported_as_it_computes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"computes in float32.*Load it with.*dtype='int8'"):
        export(Predictor.load(folder), tmp_path / "m.onnx", dtype="int8")


def test_the_file_reads_what_the_tokenizer_gives_and_nothing_more(
    folder: Path, done: Exported, tmp_path: Path
) -> None:
    assert "token_type_ids" in done.inputs
    silent = Predictor.load(folder)
    silent.processor.model_input_names = ["input_ids", "attention_mask"]
    fewer = export(silent, tmp_path / "model.onnx", progress=False)
    assert set(fewer.inputs) == set(done.inputs) - {"token_type_ids"}
    given = tiny_batch_for(silent.model.stock, 6)
    batch = {name: leaf for name, leaf in given.items() if name != "token_type_ids"}
    known, found = _run(_session(done.path), batch), _run(_session(fewer.path), batch)
    for name, values in known.items():
        np.testing.assert_array_equal(found[name], values)


def test_a_point_of_another_format_says_so_in_card_and_info(
    folder: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    place = Path(shutil.copytree(folder, tmp_path / "model"))
    point = OperatingPoint.load(place).model_copy(update={"engine": "onnx", "dtype": "int8"})
    point.save(place)
    assert "is for `--backend onnx --dtype int8` alone" in (place / "README.md").read_text()
    assert "onnx, int8" in offramp("info", place).out
    assert "on onnx in int8, not on torch" in offramp("predict", place, "A film.").err


@pytest.mark.parametrize(
    ("how", "error", "said"),
    [
        ({"output": "m.pt"}, OutputError, r"ends with \.onnx"),
        ({"format": "tflite"}, ConfigError, "Unknown format 'tflite'"),
        ({"dtype": "bf16"}, ConfigError, "fp32 or int8, not in bf16"),
        ({"output": "/dev/null/m.onnx", "point": POLICY}, OutputError, "cannot be written"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    how: dict[str, Any], error: type[Exception], said: str, folder: Path, tmp_path: Path
) -> None:
    given = {"output": tmp_path / "m.onnx", "progress": False, **how}
    with pytest.raises(error, match=said):
        export(folder, **given)
    assert not list(tmp_path.iterdir())


def test_a_policy_that_asks_which_row_it_is_cannot_be_in_a_file(tmp_path: Path) -> None:
    from offramp.testing import Scripted

    predictor = Predictor(tiny_model("bert", layers=2), tiny_processor("bert"), "full")
    script = Scripted(layers=(1, 2) * 8, inner=POLICY)
    with pytest.raises(ConfigError, match="which row it is"):
        export(predictor, tmp_path / "m.onnx", point=script, progress=False)


def test_the_command_says_what_it_wrote(
    offramp: Callable[..., Said], folder: Path, tmp_path: Path
) -> None:
    said = offramp("export", folder, "-o", tmp_path / "m.onnx")
    assert said.code == 0
    assert "bar" in said.out
    assert "answer, scores, exit_layer, bad" in said.out
    as_json = offramp("export", folder, "-o", tmp_path / "m.onnx", "--json")
    assert json.loads(as_json.out)["bytes"] == (tmp_path / "m.onnx").stat().st_size


def _has_node() -> bool:
    node = shutil.which("node")
    asked = [node or "", "-e", "require('onnxruntime-node')"]
    return node is not None and subprocess.run(asked, capture_output=True).returncode == 0


@pytest.mark.skipif(not _has_node(), reason="needs node with onnxruntime-node on NODE_PATH")
def test_the_same_file_runs_in_javascript(folder: Path, done: Exported) -> None:
    model = MultiExitModel.from_pretrained(folder)
    policy = Predictor.load(folder).policy
    batch = {"input_ids": tiny_batch_for(model.stock, 6, tokens=9)["input_ids"]}
    ids = json.dumps(batch["input_ids"].tolist())
    for extra, same in (([], policy), (["0.4"], policy.with_bar(0.4))):  # type: ignore[attr-defined]
        asked = ["node", str(EXAMPLE), str(done.path), ids, *extra]
        said = json.loads(subprocess.run(asked, capture_output=True, check=True, text=True).stdout)
        theirs = TorchEngine(model).run(batch, same)
        assert said["exit_layer"] == theirs.exit_layers.tolist()
        ours = torch.tensor(said["scores"]).view_as(theirs.scores)
        torch.testing.assert_close(ours, theirs.scores, atol=5e-5, rtol=0)
