"""Contenders that are ready to run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch

from offramp.backbones import Batch
from offramp.engines import Engine
from offramp.engines.pool import Numbered
from offramp.evaluation.speed import Job
from offramp.policies import Policy, Rows

_OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}


class Runner(Protocol):
    """A contender, ready to run."""

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        """What is to be timed of a batch; what can be prepared before is done now."""
        ...


class Ours:
    """An engine of offramp.

    Args:
        front: makes what runs all that comes before the first layer, and no more.
    """

    def __init__(self, engine: Engine, front: Callable[[], Runner], device: torch.device) -> None:
        self.engine = engine
        self._make_front, self._device = front, device

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        return partial(self.engine.run, _on(self._device, batch), policy, rows.to(self._device))

    def stream(self, rows: Sequence[Numbered], policy: Policy) -> Job:
        """The same of rows that come one by one, where the engine has a pool."""
        engine: Any = self.engine
        return lambda: list(engine.stream(rows, policy))

    @cached_property
    def front(self) -> Runner:
        return self._make_front()


class Transformers:
    """A module that is called as a processor's batch."""

    def __init__(self, stock: Callable[..., Any], device: torch.device) -> None:
        self._stock, self._device = stock, device

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        return partial(self._stock, **_on(self._device, with_mask(batch)))


class Embedding:
    """What our torch engine does before the first layer."""

    def __init__(self, embed: Callable[[Batch], Any], device: torch.device) -> None:
        self._embed, self._device = embed, device

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        return partial(self._embed, _on(self._device, batch))


class OnnxRuntime:
    """A file in ONNX Runtime on the CPU."""

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
        self._names = {value.name for value in self._session.get_inputs()}

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        return partial(self._session.run, None, _arrays(batch, self._names))


class OpenVino:
    """A file in OpenVINO on the CPU."""

    def __init__(self, path: Path, precision: str, threads: int) -> None:
        import openvino

        settings: Mapping[str, Any] = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _OPENVINO_HINTS[precision],
        }
        model = openvino.Core().compile_model(path, "CPU", settings)
        self._names = {value.get_any_name() for value in model.inputs}
        self._request = model.create_infer_request()

    def job(self, batch: Batch, rows: Rows, policy: Policy) -> Job:
        feed = _arrays(batch, self._names)
        return partial(self._request.infer, feed, share_inputs=True, share_outputs=True)


def with_mask(batch: Batch) -> Batch:
    """As a processor gives it: with an attention mask, also where nothing is padded."""
    if "input_ids" not in batch or "attention_mask" in batch:
        return batch
    return {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}


def _arrays(batch: Batch, names: set[str]) -> dict[str, Any]:
    return {name: leaf.numpy() for name, leaf in with_mask(batch).items() if name in names}


def _on(device: torch.device, batch: Batch) -> Batch:
    return {name: leaf.to(device) for name, leaf in batch.items()}
