"""The ONNX engine: ONNX Runtime runs the files."""

from __future__ import annotations

from pathlib import Path

import torch

from offramp.engines.compiled import Array, CompiledEngine, Feed, Session

# Their fused kernel is slower than the operators it stands for: 54 microseconds against 16 for
# 32 tokens of width 384 on one thread, a tenth of a layer.
_WITHOUT = ["SkipLayerNormFusion", "BiasGeluFusion"]


class OnnxEngine(CompiledEngine):
    """Runs a multi-exit model in ONNX Runtime on the CPU, see `CompiledEngine`.

    In `float32`, or in `int8` with layers in 8 bits and exits in float. Rows do not depend on
    their neighbours in either.
    """

    name = "onnx"
    cuts = True

    def _load(self, file: bytes | Path) -> Session:
        return _Session(file, self.threads)


class _Session:
    """A file loaded into ONNX Runtime."""

    def __init__(self, file: bytes | Path, threads: int | None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads or torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # a pool that spins while another works takes its cores
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session = onnxruntime.InferenceSession(
            file if isinstance(file, bytes) else str(file),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=_WITHOUT,
        )
        self.inputs = [value.name for value in self._session.get_inputs()]
        self.outputs = [value.name for value in self._session.get_outputs()]

    def run(self, feed: Feed) -> list[Array]:
        return self._session.run(None, {name: feed[name] for name in self.inputs})
