"""Engines by the name of what runs them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch

from offramp.engines.base import Engine
from offramp.engines.settings import as_dtype, dtype_name
from offramp.engines.torch_engine import TorchEngine
from offramp.errors import ConfigError
from offramp.registry import Registry, nearest

ENGINES: Registry[Callable[..., Engine]] = Registry("backend")
"""Makes an engine from (model, dtype, threads, progress), by backend."""

DTYPES = {"torch": ("float32", "bfloat16", "float16"), "onnx": ("float32", "int8")}
"""The number formats of the backends here; another's own are its own business."""


def make_engine(
    model: Any,
    backend: str = "torch",
    dtype: str | torch.dtype | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
) -> Engine:
    """An engine that runs a multi-exit model.

    Args:
        model: in evaluation mode; for backends other than `torch` in fp32 and on the CPU.
        backend: `torch`, `onnx`, or another that is registered.
        dtype: `fp32`; `bf16` or `fp16` with torch; `int8` with onnx. None is the model's own.
        threads: that a call may use; None is as many as torch's. Torch itself has one number
            for the whole process: `torch.set_num_threads`.
        progress: show a bar while a backend prepares.

    Raises:
        ConfigError: no such backend, or not in this number format.
        MissingExtraError: what the backend needs is not installed.
    """
    make = ENGINES[backend]
    check_dtype(backend, dtype)
    return make(model, dtype, threads, progress)


def check_dtype(backend: str, dtype: str | torch.dtype | None) -> None:
    """Refuse a backend that is not there, or does not compute in that format. ConfigError."""
    if backend not in ENGINES:
        ENGINES[backend]
    known = DTYPES.get(backend)
    if dtype is None or known is None or dtype_name(dtype) in known:
        return
    able = [name for name, formats in DTYPES.items() if dtype_name(dtype) in formats]
    mend = f" Use backend='{able[0]}'." if able else nearest(str(dtype), list(known))
    raise ConfigError(
        f"Backend '{backend}' does not compute in {dtype}; it does in: {', '.join(known)}.{mend}"
    )


@ENGINES.register("torch")
def _torch(
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool
) -> Engine:
    wanted = as_dtype(dtype)
    if wanted is not None and wanted != model.dtype:
        model = copy.deepcopy(model).to(dtype=wanted)
    return TorchEngine(model)


@ENGINES.register("onnx")
def _onnx(
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool
) -> Engine:
    from offramp.engines.onnx_engine import OnnxEngine

    return OnnxEngine(model, dtype_name(dtype or "float32"), threads, progress)
