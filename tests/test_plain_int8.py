"""What a user has without offramp in int8: what early exit in int8 is held against."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

onnx = pytest.importorskip("onnx", reason="needs the extra 'onnx'")
ort = pytest.importorskip("onnxruntime", reason="needs the extra 'onnx'")

from offramp.benchmark.exporting import Scores, export_plain, quantise_plain  # noqa: E402
from offramp.testing.tiny import tiny_batch  # noqa: E402


@pytest.mark.parametrize("arch", ["bert", "albert"])
def test_all_weights_are_in_8_bits_those_that_layers_share_too(arch: str, tmp_path: Path) -> None:
    # smaller weights are turned by the exporter itself
    config = AutoConfig.for_model(
        arch, hidden_size=256, num_hidden_layers=2, num_attention_heads=4, intermediate_size=256
    )
    stock, batch = AutoModelForSequenceClassification.from_config(config).eval(), tiny_batch(2)
    plain, quick = tmp_path / "plain.onnx", tmp_path / "int8.onnx"
    export_plain(Scores(stock), batch, plain, stock.config.max_position_embeddings)
    quantise_plain(plain, quick)
    kinds = Counter(node.op_type for node in onnx.load(quick).graph.node)
    assert kinds["MatMul"] == 2 * kinds["Softmax"], "what is left are the products in attention"
    assert kinds["MatMulInteger"] >= 6 * kinds["Softmax"]
    session = ort.InferenceSession(quick, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    (scores,) = session.run(None, {name: batch[name].numpy() for name in names})
    with torch.no_grad():
        wanted = stock(**batch).logits.numpy()
    assert np.abs(scores - wanted).max() < 0.1 * np.abs(wanted).max()
