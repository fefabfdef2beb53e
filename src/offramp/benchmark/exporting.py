"""The stock model as ONNX, as whoever does without offramp would have it."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones import Batch
from offramp.errors import ModelError
from offramp.model import MultiExitModel

MOST_ROWS = 4096


class Front(nn.Module):
    """What comes before the first layer, for `export_plain`."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        flow = self.model.backbone.embed(batch)
        made = [flow.hidden, flow.mask, *flow.inputs.values(), *flow.shared.values()]
        # what is handed through would be an output that is an input
        return tuple(leaf.clone() for leaf in made if leaf is not None)


class Scores(nn.Module):
    """A classifier that gives its scores alone, for `export_plain`."""

    def __init__(self, stock: nn.Module) -> None:
        super().__init__()
        self.stock = stock

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        scores: Tensor = self.stock(**batch).logits
        return scores


@torch.no_grad()
def export_plain(module: nn.Module, batch: Batch, path: Path, longest: int | None) -> None:
    """Write a function of a batch as one ONNX file with free numbers of rows and tokens.

    Args:
        module: in evaluation mode, on the CPU.
        batch: an example; it names the inputs.
        path: of the file.
        longest: row in tokens that the model can read.

    Raises:
        Whatever torch meets in a model that it cannot trace.
    """
    tokens = torch.export.Dim("tokens", min=2, max=longest or 1 << 16)
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    shapes = {
        name: {0: rows, 1: tokens} if leaf.dim() == 2 else {0: rows} for name, leaf in batch.items()
    }
    with _hushed():
        traced = torch.export.export(
            module.eval(), (dict(batch),), dynamic_shapes=(shapes,), strict=False
        )
        program: Any = torch.onnx.export(
            traced, (), input_names=list(batch), dynamo=True, verbose=False
        )
    program.save(path, external_data=False)


def quantise_plain(path: Path, target: Path) -> None:
    """Dynamic int8 of all weights of an ONNX file, one scale per channel."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with _hushed(), TemporaryDirectory(dir=target.parent) as place:
        # turns the weights that layers share: left to the graph, the quantiser passes them over
        turned = Path(place, "turned.onnx")
        quant_pre_process(path, turned, skip_symbolic_shape=True)
        model = onnx.load(turned)
        given = {weight.name for weight in model.graph.initializer}
        if any(one.op_type == "Transpose" and one.input[0] in given for one in model.graph.node):
            raise ModelError("ONNX Runtime has left weights unturned, which would stay floats.")
        # shapes noted by the exporter are of weights before the quantiser turns them
        del model.graph.value_info[:]
        quantize_dynamic(
            model,
            target,
            per_channel=True,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["MatMul", "Gemm"],
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": 1},
        )


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """Without what the exporter has to say on the way."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            open(os.devnull, "w", encoding="utf-8") as nothing,
            contextlib.redirect_stdout(nothing),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
