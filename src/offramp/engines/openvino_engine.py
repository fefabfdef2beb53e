"""The OpenVINO engine: OpenVINO runs the files."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import torch

from offramp.backbones import Batch
from offramp.engines.base import UNLIMITED, Answers, Budget, Exitable
from offramp.engines.compiled import Array, CompiledEngine, Feed, Session
from offramp.errors import ConfigError
from offramp.policies import Policy, Rows

_DEVICE = "CPU"


class OpenVinoEngine(CompiledEngine):
    """Runs a multi-exit model in OpenVINO on the CPU, see `CompiledEngine`.

    In `float32`; in `int8` with layers in 8 bits and exits in float; in `bfloat16` on processors
    that have it, with decisions in float. Calls from several threads take turns.

    OpenVINO prepares itself for each shape of a batch, also of what is left of it, and keeps that:
    shapes that are new cost time, and many of them a gigabyte of memory. So batches are best
    padded to few lengths, see `bucket`.
    """

    name = "openvino"
    few_shapes = True

    def __init__(
        self,
        model: Exitable,
        dtype: str = "float32",
        threads: int | None = None,
        progress: bool = True,
    ) -> None:
        super().__init__(model, dtype, threads, progress)
        import openvino

        self._core = openvino.Core()
        able = self._core.get_property(_DEVICE, "OPTIMIZATION_CAPABILITIES")
        if dtype == "bfloat16" and "BF16" not in able:
            raise ConfigError("This processor does not compute in bfloat16. Use float32 or int8.")

    def run(
        self,
        batch: Batch,
        policy: Policy,
        rows: Rows | None = None,
        budget: Budget = UNLIMITED,
    ) -> Answers:
        """See `CompiledEngine.run`. Raises ConfigError for policies that hash the ids of rows."""
        if policy.hashes_ids:
            raise ConfigError(
                f"OpenVINO computes whole numbers in 32 bits, and policy '{policy.name}' draws by "
                "all 64 of a row's id: its rows would leave elsewhere. Use backend torch or onnx."
            )
        return super().run(batch, policy, rows, budget)

    def _load(self, file: bytes | Path) -> Session:
        settings = {
            # left alone it computes in bfloat16 wherever the processor can; int8 is so in the file
            "INFERENCE_PRECISION_HINT": "bf16" if self.dtype == "bfloat16" else "f32",
            "INFERENCE_NUM_THREADS": self.threads or torch.get_num_threads(),
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            # a thread that is bound to a core waits while another program has it
            "ENABLE_CPU_PINNING": False,
        }
        return _Session(self._core, file, settings)


class _Session:
    """A file loaded into OpenVINO, and requests that are idle: a call has one to itself."""

    def __init__(self, core: Any, file: bytes | Path, settings: dict[str, Any]) -> None:
        model = core.read_model(BytesIO(file) if isinstance(file, bytes) else file)
        # compiling adds names of values inside
        self.inputs = [value.get_any_name() for value in model.inputs]
        self.outputs = [value.get_any_name() for value in model.outputs]
        self._compiled = core.compile_model(model, _DEVICE, settings)
        self._idle: list[Any] = []

    def run(self, feed: Feed) -> list[Array]:
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        given = {place: feed[name] for place, name in enumerate(self.inputs)}
        said = list(request.infer(given, share_inputs=True).values())
        self._idle.append(request)
        return said
