"""What takes part: offramp's engines, and what a user has without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from offramp.backbones import Batch
from offramp.benchmark.document import Contender, Runtime
from offramp.benchmark.exporting import Front, Scores, export_plain, quantise_plain
from offramp.benchmark.runners import Embedding, OnnxRuntime, OpenVino, Ours, Runner, Transformers
from offramp.engines import Engine, as_dtype, check_dtype, make_engine
from offramp.engines.making import ON_TORCH
from offramp.errors import ConfigError
from offramp.model import MultiExitModel, truncated

PLAIN: dict[Runtime, str] = {
    "torch": "transformers",
    "onnx": "onnxruntime",
    "openvino": "openvino",
}
"""What a runtime is called where offramp is not in between; the others run ours alone."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_PLAIN_PRECISIONS = {
    "torch": ("fp32", "bf16", "fp16"),
    "inductor": (),
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}
NEEDS: dict[Runtime, tuple[str, ...]] = {
    "torch": (),
    "inductor": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""What a runtime imports, with the exporter."""


def line_up(
    depth: int, runtimes: Sequence[Runtime], precisions: Sequence[str], leaves: Sequence[str]
) -> list[Contender]:
    """Everything that could take part.

    Args:
        depth: layers of the model.
        leaves: where rows of ours leave, in words, beside full depth.
    """
    pairs = [(runtime, precision) for runtime in runtimes for precision in precisions]
    without = [pair for pair in pairs if pair[1] in _PLAIN_PRECISIONS[pair[0]]]
    plain = [_plain("torch", "fp32", depth, depth)]
    plain += [
        _plain(runtime, precision, layers, depth)
        for layers in (depth, depth // 2)
        for runtime, precision in without
        if layers and (runtime, precision, layers) != ("torch", "fp32", depth)
    ]
    ours = [
        Contender(
            name=f"offramp {runtime} {precision}, {said or 'full depth'}",
            side="offramp",
            runtime=runtime,
            precision=precision,
            layers=depth,
            leaves=said,
        )
        for runtime, precision in pairs
        if computes(runtime, precision)
        for said in (None, *leaves)
    ]
    return plain + ours


def with_pools(contenders: Sequence[Contender]) -> list[Contender]:
    """The same, and beside each whose rows leave in torch one that runs them in a depth pool."""
    found = []
    for one in contenders:
        found.append(one)
        if one.leaves is not None and one.runtime in ON_TORCH:
            found.append(one.model_copy(update={"name": f"{one.name}, depth pool", "pool": True}))
    return found


def computes(runtime: Runtime, precision: str) -> bool:
    """Whether there is such an engine of ours."""
    try:
        check_dtype(runtime, precision)
    except ConfigError:
        return False
    return True


def _plain(runtime: Runtime, precision: str, layers: int, depth: int) -> Contender:
    some = "" if layers == depth else f", {layers} of {depth} layers"
    return Contender(
        name=f"{PLAIN[runtime]} {precision}{some}",
        side="plain",
        runtime=runtime,
        precision=precision,
        layers=layers,
    )


@dataclass
class Shop:
    """What contenders are made of.

    Args:
        open_model: gives it in evaluation mode, on the CPU, in fp32.
        example: a batch with a mask; it names the inputs.
        place: a folder for exported files.
        threads: of every runtime.
        device: of those that run in torch.
    """

    open_model: Callable[[], MultiExitModel]
    example: Batch
    place: Path
    threads: int
    device: torch.device
    _ready: dict[tuple[str, str, str, int], Runner] = field(default_factory=dict)

    @cached_property
    def model(self) -> MultiExitModel:
        return self.open_model()

    def prepare(self, contender: Contender) -> Runner:
        """Contenders that differ only in where rows leave share one runner.

        Raises:
            ImportError: of a library that is not installed.
            OfframpError: it is not possible with this model or on this machine.
        """
        one = contender
        key = (one.side, one.runtime, one.precision, one.layers)
        if key not in self._ready:
            self._ready[key] = self._make(contender)
        return self._ready[key]

    def _make(self, contender: Contender) -> Runner:
        if contender.side == "offramp":
            return Ours(self._engine(contender), lambda: self._front(contender), self.device)
        for name in NEEDS[contender.runtime]:
            import_module(name)
        if contender.runtime == "torch":
            return Transformers(self._stock(contender), self.device)
        path = self.exported(contender.precision, contender.layers)
        return self._plain(contender.runtime, path, contender.precision)

    def _front(self, contender: Contender) -> Runner:
        """What comes before the first layer, in that runtime."""
        if contender.runtime in ON_TORCH:
            engine: Any = self._engine(contender)
            return Embedding(engine.backbone.embed, self.device)
        path = self.place / "front.onnx"
        if not path.exists():
            export_plain(Front(self.model), self.example, path, self.model.max_length)
        return self._plain(contender.runtime, path, "fp32")

    def _plain(self, runtime: Runtime, path: Path, precision: str) -> Runner:
        if runtime == "onnx":
            return OnnxRuntime(path, self.threads)
        return OpenVino(path, precision, self.threads)

    def _stock(self, contender: Contender) -> Any:
        """The stock model or its first layers, on the device."""
        stock = self._cut(contender.layers)
        dtype = as_dtype(contender.precision)
        if self.device.type == "cpu" and dtype == torch.float32:
            return stock
        return copy.deepcopy(stock).to(self.device, dtype)

    def _cut(self, layers: int) -> Any:
        whole = self.model.stock
        return whole if layers == self.model.depth else truncated(whole, layers)

    def _engine(self, contender: Contender) -> Engine:
        model: Any = self.model
        if contender.runtime in ON_TORCH and self.device.type != "cpu":
            model = copy.deepcopy(model).to(self.device)
        return make_engine(
            model, contender.runtime, contender.precision, threads=self.threads, progress=False
        )

    def exported(self, precision: str, layers: int) -> Path:
        """The stock model as a file, made once."""
        # OpenVINO reads the file of fp32 and computes in what it is told
        kind = "int8" if precision == "int8" else "fp32"
        path = self.place / f"{kind}-{layers}.onnx"
        if not path.exists():
            if kind == "int8":
                quantise_plain(self.exported("fp32", layers), path)
            else:
                export_plain(Scores(self._cut(layers)), self.example, path, self.model.max_length)
        return path
