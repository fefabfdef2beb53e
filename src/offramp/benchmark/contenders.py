"""What takes part: offramp's engines, and what a user has without them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

import torch

from offramp.backbones import Batch
from offramp.benchmark.document import Contender, Runtime
from offramp.benchmark.exporting import export_plain, quantise_plain
from offramp.engines import Engine, TorchEngine, as_dtype
from offramp.errors import ConfigError
from offramp.evaluation.speed import Job
from offramp.model import MultiExitModel, truncated
from offramp.policies import Policy, Rows

PLAIN: dict[Runtime, str] = {
    "torch": "transformers",
    "onnx": "onnxruntime",
    "openvino": "openvino",
}
"""What a runtime is called where offramp is not in between."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
_PLAIN_PRECISIONS = {
    "torch": ("fp32", "bf16", "fp16"),
    "onnx": ("fp32", "int8"),
    "openvino": ("fp32", "bf16"),
}
_NEEDS = {
    "torch": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
"""What a runtime without offramp imports; the model is exported first."""
_OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}


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
        for said in (None, *leaves)
    ]
    return plain + ours


def _plain(runtime: Runtime, precision: str, layers: int, depth: int) -> Contender:
    some = "" if layers == depth else f", {layers} of {depth} layers"
    return Contender(
        name=f"{PLAIN[runtime]} {precision}{some}",
        side="plain",
        runtime=runtime,
        precision=precision,
        layers=layers,
    )


class Runner(Protocol):
    """A contender, ready to run."""

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        """What is to be timed of a batch; what can be prepared before is done now."""
        ...

    def fixed(self, batch: Batch) -> Job | None:
        """What comes before the first layer, or None where it cannot be run alone."""
        ...


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
            return _Ours(self._engine(contender), self.device)
        for name in _NEEDS[contender.runtime]:
            import_module(name)
        if contender.runtime == "torch":
            return _Transformers(self._stock(contender), self.device)
        path = self.exported(contender.precision, contender.layers)
        if contender.runtime == "onnx":
            return _OnnxRuntime(path, self.threads)
        return _OpenVino(path, contender.precision, self.threads)

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
        if (contender.runtime, contender.precision) != ("torch", "fp32"):
            raise ConfigError("This engine is not there yet.")
        return TorchEngine(self.model)

    def exported(self, precision: str, layers: int) -> Path:
        """The stock model as a file, made once."""
        # OpenVINO reads the file of fp32 and computes in what it is told
        kind = "int8" if precision == "int8" else "fp32"
        path = self.place / f"{kind}-{layers}.onnx"
        if not path.exists():
            if kind == "int8":
                quantise_plain(self.exported("fp32", layers), path)
            else:
                export_plain(self._cut(layers), self.example, path, self.model.max_length)
        return path


def with_mask(batch: Batch) -> Batch:
    """As a processor gives it: with an attention mask, also where nothing is padded."""
    if "input_ids" not in batch or "attention_mask" in batch:
        return batch
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def _arrays(batch: Batch) -> dict[str, Any]:
    return {name: leaf.numpy() for name, leaf in with_mask(batch).items()}


class _Ours:
    """An engine of offramp."""

    def __init__(self, engine: Engine, device: torch.device) -> None:
        self.engine = engine
        self._device = device

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        there = {name: leaf.to(self._device) for name, leaf in batch.items()}
        return partial(self.engine.run, there, policy, rows.to(self._device))

    def fixed(self, batch: Batch) -> Job | None:
        if not isinstance(self.engine, TorchEngine):
            return None
        there = {name: leaf.to(self._device) for name, leaf in batch.items()}
        return partial(self.engine.backbone.embed, there)


class _Plain:
    """A runtime that knows nothing of layers."""

    def fixed(self, batch: Batch) -> Job | None:
        return None


class _Transformers(_Plain):
    def __init__(self, stock: Any, device: torch.device) -> None:
        self._stock, self._device = stock, device

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        there = {name: leaf.to(self._device) for name, leaf in with_mask(batch).items()}
        return partial(self._stock, **there)


class _OnnxRuntime(_Plain):
    def __init__(self, path: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        # threads that wait for work by spinning take the cores from whoever is next
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        providers = ["CPUExecutionProvider"]
        self._session = onnxruntime.InferenceSession(path, options, providers=providers)

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        return partial(self._session.run, None, _arrays(batch))


class _OpenVino(_Plain):
    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import openvino

        settings: Mapping[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _OPENVINO_HINTS[precision],
        }
        core = openvino.Core()
        self._request = core.compile_model(path, "CPU", settings).create_infer_request()

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        feed = _arrays(batch)
        return partial(self._request.infer, feed, share_inputs=True, share_outputs=True)
