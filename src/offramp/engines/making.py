"""Engines by the name of what runs them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from offramp.engines.base import Engine
from offramp.engines.settings import INTEGERS, as_device, as_dtype, dtype_name, lacks
from offramp.engines.torch_engine import NO_GPU, TorchEngine, check_torch_options
from offramp.engines.tracing import require_onnx
from offramp.errors import ConfigError
from offramp.registry import Registry, nearest

logger = logging.getLogger("offramp")

ENGINES: Registry[Callable[..., Engine]] = Registry("backend")
"""Makes an engine from (model, dtype, threads, progress), by backend; torch takes `sync_every` and
`cuda_graphs` as well."""

ON_TORCH = ("torch", "inductor")
"""Those that run the model itself, on any device."""
DTYPES = {
    **dict.fromkeys(ON_TORCH, ("float32", "bfloat16", "float16")),
    "onnx": ("float32", *INTEGERS),
    "openvino": ("float32", "bfloat16", *INTEGERS),
}
"""The number formats of the backends here; another's own are its own business."""

_PACKAGES = {name: partial(require_onnx, name) for name in ("onnx", "openvino")}
"""Raises MissingExtraError where those of a backend are not installed."""


def make_engine(
    model: Any,
    backend: str = "torch",
    dtype: str | torch.dtype | None = None,
    *,
    threads: int | None = None,
    progress: bool = True,
    sync_every: int | None = None,
    cuda_graphs: bool = False,
) -> Engine:
    """An engine that runs a multi-exit model.

    Args:
        model: in evaluation mode; for backends that do not run in torch in fp32 and on the CPU.
        backend: `torch`, `inductor`, `onnx`, `openvino`, or another that is registered.
        dtype: `fp32`; `bf16` with torch, inductor or openvino; `fp16` with torch or inductor;
            `int8` with onnx or openvino. None is the model's own.
        threads: that a call may use; None is as many as torch's. Torch itself has one number
            for the whole process: `torch.set_num_threads`.
        progress: show a bar while a backend prepares.
        sync_every, cuda_graphs: of `TorchEngine`, with backend torch.

    Raises:
        ConfigError: no such backend, or not in this number format, or no number of threads; an
            option of torch with another, or CUDA graphs of a model that is not on a GPU.
        MissingExtraError: what the backend needs is not installed.
    """
    make = ENGINES[backend]
    check_dtype(backend, dtype)
    options = _of_torch(backend, threads, sync_every, cuda_graphs)
    return make(model, dtype, threads, progress, **options)


def check_backend(
    backend: str,
    dtype: str | torch.dtype | None = None,
    device: str | int | torch.device | None = None,
    *,
    threads: int | None = None,
    sync_every: int | None = None,
    cuda_graphs: bool = False,
) -> torch.device:
    """Refuse at once what `make_engine` would refuse later; gives the device the model is to be on.

    Raises:
        ConfigError: no such backend or device, not in this number format, or an option that makes
            no sense there.
        MissingExtraError: what the backend needs is not installed.
    """
    check_dtype(backend, dtype)
    _of_torch(backend, threads, sync_every, cuda_graphs)
    if backend in _PACKAGES:
        _PACKAGES[backend]()
    if backend in ON_TORCH:
        target = as_device(device)
        if cuda_graphs and target.type != "cuda":
            raise ConfigError(NO_GPU)
        return target
    if device not in (None, -1) and str(device).partition(":")[0] != "cpu":
        raise ConfigError(
            f"Backend '{backend}' runs on the CPU, not on '{device}'. Leave the device out."
        )
    return torch.device("cpu")


def _of_torch(
    backend: str, threads: int | None, sync_every: int | None, cuda_graphs: bool
) -> dict[str, Any]:
    """The options that are for torch alone, where they are asked for. Raises ConfigError."""
    if threads is not None and (type(threads) is not int or threads < 1):
        raise ConfigError(f"threads is {threads!r}; give a whole number from 1.")
    check_torch_options(sync_every, cuda_graphs)
    asked = {"cuda_graphs": cuda_graphs or None, "sync_every": sync_every}
    options = {name: value for name, value in asked.items() if value is not None}
    if options and backend != TorchEngine.name:
        raise ConfigError(f"{next(iter(options))} is for backend torch, not for {backend}.")
    return options


def check_dtype(backend: str, dtype: str | torch.dtype | None) -> None:
    """Refuse a backend that is not there, or does not compute in that format. ConfigError."""
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
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool, **options: Any
) -> Engine:
    return TorchEngine(_in_format(model, dtype), **options)


@ENGINES.register("inductor")
def _inductor(
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool
) -> Engine:
    from offramp.engines.inductor_engine import InductorEngine

    return InductorEngine(_in_format(model, dtype))


def _in_format(model: Any, dtype: str | torch.dtype | None) -> Any:
    """The model, or a copy in another number format."""
    wanted = as_dtype(dtype)
    on_cpu = next((leaf.is_cpu for leaf in model.parameters()), False)
    if on_cpu and wanted == torch.bfloat16 and lacks("avx512_bf16", "amx_bf16"):
        logger.warning(
            "This processor has no instructions for bf16: it will be slower than fp32. Leave the "
            "dtype out, or use int8 with backend onnx."
        )
    if wanted is not None and wanted != model.dtype:
        return copy.deepcopy(model).to(dtype=wanted)
    return model


@ENGINES.register("onnx")
def _onnx(
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool
) -> Engine:
    from offramp.engines.onnx_engine import OnnxEngine

    return OnnxEngine(model, dtype_name(dtype or "float32"), threads, progress)


@ENGINES.register("openvino")
def _openvino(
    model: Any, dtype: str | torch.dtype | None, threads: int | None, progress: bool
) -> Engine:
    from offramp.engines.openvino_engine import OpenVinoEngine

    return OpenVinoEngine(model, dtype_name(dtype or "float32"), threads, progress)
