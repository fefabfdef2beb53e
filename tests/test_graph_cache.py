"""Claims about the cache of files: whatever befalls it, answers are right and nothing is torn."""

from __future__ import annotations

import errno
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import Said

pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")

import onnx

from offramp.engines import bucket
from offramp.engines.base import Answers
from offramp.engines.graphs import Graphs
from offramp.engines.onnx_engine import OnnxEngine
from offramp.errors import ConfigError
from offramp.policies import Entropy, Fixed, Full, Margin
from offramp.prediction import Predictor
from offramp.prediction.exporting import _read
from offramp.testing.tiny import tiny_batch_for, tiny_model, tiny_texts, tiny_tokenizer

pytest_plugins = ("cli_fixtures",)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Graphs:
    """Of a model whose files are made in no time."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    other = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    made = onnx.helper.make_model(onnx.helper.make_graph([node], "made", [value], [other]))
    monkeypatch.setattr(Graphs, "early_exit", lambda *_: made)
    return Graphs(tiny_model("bert", layers=2), progress=False)


def _name(graphs: Graphs) -> str:
    return graphs.load(Full(), _read).graph.name


@pytest.mark.parametrize("content", [b"", b"of another program", None])
def test_a_file_that_is_torn_or_of_another_program_is_made_anew(
    content: bytes | None, graphs: Graphs, tmp_path: Path
) -> None:
    assert _name(graphs) == "made"
    (file,) = tmp_path.rglob("*.onnx")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert _name(graphs) == "made"
    assert file.read_bytes() == whole


def test_files_that_were_used_longest_ago_make_room(
    graphs: Graphs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = [Fixed(layer=1), Entropy(), Margin()]
    for age, rule in zip((30, 20, 10), rules, strict=True):
        before = {*tmp_path.rglob("*.onnx")}
        graphs.load(rule, _read)
        (made,) = {*tmp_path.rglob("*.onnx")} - before
        os.utime(made, (time.time() - age,) * 2)
    first, second, third = sorted(tmp_path.rglob("*.onnx"), key=lambda file: file.stat().st_mtime)
    graphs.load(rules[0], _read)  # the oldest is used again
    monkeypatch.setattr("offramp.engines.graphs.CACHE", 3 * first.stat().st_size)
    graphs.load(Full(), _read)
    assert first.exists()
    assert not second.exists()
    assert third.exists()


@pytest.mark.parametrize("place", ["/dev/null", "/" + "long" * 100, "full"])
def test_a_cache_that_cannot_be_written_is_said_once_and_no_harm(
    place: str,
    graphs: Graphs,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if place == "full":

        def write(path: Path, data: bytes) -> None:
            with open(path, "wb") as handle:
                handle.write(data[:10])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "write_bytes", write)
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", place)
    with caplog.at_level(logging.WARNING, "offramp"):
        assert _name(graphs) == "made"
    (record,) = caplog.records
    assert "is made anew by each process" in record.message
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_ctrl_c_while_a_file_is_made_leaves_nothing(
    place: Path,
    tmp_path: Path,
    offramp: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def stopped(model: object, progress: Callable[[str], object]) -> None:
        progress("embedding")
        raise KeyboardInterrupt

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("offramp.engines.graphs.trace_model", stopped)
    to_file = ("export", "-o", tmp_path / "m.onnx")
    for command in (("predict", "--backend", "onnx", "--data", place / "rows.csv"), to_file):
        said = offramp(*command, "--point", "full", place / "exits")
        assert said.code == 130
        assert said.err.splitlines()[-1].startswith("Stopped with Ctrl-C")
        assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_an_engine_notices_that_the_weights_have_changed() -> None:
    model = tiny_model("bert", layers=2)
    engine = OnnxEngine(model, progress=False)
    with torch.no_grad():
        next(model.parameters()).mul_(1.01)
    with pytest.raises(ConfigError, match=r"weights have changed.*Make a new one"):
        engine.run(tiny_batch_for(model.stock, 2), Full())


def test_openvino_is_given_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino", reason="needs the extra openvino")
    from offramp.engines.openvino_engine import OpenVinoEngine

    seen: set[int] = set()

    def run(self: object, batch: dict[str, Any], *_: object) -> Answers:
        rows, tokens = batch["input_ids"].shape
        seen.add(tokens)
        no = torch.zeros(rows, dtype=torch.bool)
        return Answers(torch.zeros(rows, 3), torch.ones(rows, dtype=torch.int64), no)

    monkeypatch.setattr(OpenVinoEngine, "run", run)
    model = tiny_model("bert", layers=2)
    engine = OpenVinoEngine(model, progress=False)
    predictor = Predictor(model, tiny_tokenizer(), Full(), engine=engine, max_rows=1)
    predictor.answer(tiny_texts(60))
    assert seen <= {bucket(length, 64) for length in range(1, 65)}
    assert len(seen) > 1
