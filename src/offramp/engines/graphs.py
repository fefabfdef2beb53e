"""The ONNX files of a model: made once, then found in the cache.

A file holds embedding, layers, exits and one policy with its bar as an input, so all thresholds
of a rule share a file. Making one takes half a minute to a few minutes; it is kept under a
name that changes with whatever it is made of.
"""

from __future__ import annotations

import json
import logging
import threading
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from offramp import __version__
from offramp.engines.base import Exitable
from offramp.engines.tracing import OUT, Traced, require_onnx, trace_model, trace_policy
from offramp.errors import ConfigError, OutputError
from offramp.policies import EvidencePolicy, Policy
from offramp.storage import cache_folder, fingerprint, whole_file

logger = logging.getLogger("offramp")

SCHEMA = 1
"""Of the files; another number leaves those in the cache alone."""


class Graphs:
    """Makes and keeps the files of one model in one number format.

    Args:
        model: in evaluation mode, fp32, on CPU.
        dtype: `float32` or `int8`: layers with weights and activations in 8 bits, exits in float.
        progress: show a bar while files are made.
    """

    def __init__(self, model: Exitable, dtype: str = "float32", progress: bool = True) -> None:
        require_onnx()
        _check(model)
        self.model = model
        self.dtype = dtype
        self._progress = progress
        self._lock = threading.Lock()

    def early_exit(self, policy: Policy) -> Any:
        """The file that leaves as a policy says, whatever its bar; an `onnx.ModelProto`."""
        from offramp.engines.assembly import assemble

        traced = self._traced
        return assemble(traced.embedding, traced.layers, trace_policy(policy, traced.outputs))

    def all_exits(self) -> Any:
        """The file that runs every layer and gives what each exit says."""
        from offramp.engines.assembly import assemble_all

        return assemble_all(self._traced.embedding, self._traced.layers)

    def file(self, policy: Policy | None) -> bytes | Path:
        """A file to run, from the cache where it is there; None is `all_exits`.

        A path, or the bytes of the file where nothing can be kept.
        """
        with self._lock:
            path = self._path(policy)
            if path is not None and path.is_file():
                return path
            made = self.all_exits() if policy is None else self.early_exit(policy)
            data = made.SerializeToString()
            if path is None:
                return data
            try:
                with whole_file(path) as staged:
                    staged.write_bytes(data)
            except OutputError as problem:
                logger.debug("The ONNX file is not cached: %s", problem)
                return data
            return path

    def _path(self, policy: Policy | None) -> Path | None:
        folder = cache_folder()
        weights = getattr(self.model, "fingerprint", None)
        if folder is None or weights is None:
            return None
        made_of = [weights(), self.dtype, rule_of(policy, self.model.depth), str(SCHEMA)]
        made_of += [__version__, torch.__version__, version("transformers")]
        return folder / "onnx" / f"{fingerprint(*made_of)}.onnx"

    @cached_property
    def _traced(self) -> Traced:
        parts = self.model.depth + 1
        bar = tqdm(total=parts, desc="onnx", unit="part", disable=None if self._progress else True)
        with bar:
            traced = trace_model(self.model, lambda part: _tell(bar, part))
        if self.dtype == "float32":
            return traced
        from offramp.engines.quantisation import quantise

        hidden = [f"{OUT}hidden"]
        return traced._replace(layers=tuple(quantise(layer, hidden) for layer in traced.layers))


def _tell(bar: Any, part: str) -> None:
    bar.set_postfix_str(part)
    bar.update()


def rule_of(policy: Policy | None, depth: int) -> str:
    """What of a policy stands in a file: all but its bar, and which exits it reads."""
    if policy is None:
        return "all exits"
    reads = [policy.reads(layer) for layer in range(1, depth + 1)]
    plain = policy.with_bar(0.0) if isinstance(policy, EvidencePolicy) else policy
    return json.dumps([plain.to_dict(), reads], sort_keys=True)


def _check(model: Any) -> None:
    """Refuse a model that a file would not be equal to. Raises ConfigError."""
    if getattr(model, "training", False):
        raise ConfigError("The model is in training mode. Call model.eval() first.")
    dtype, device = getattr(model, "dtype", torch.float32), getattr(model, "device", "cpu")
    if dtype != torch.float32 or str(device) != "cpu":
        raise ConfigError(
            f"Graphs are made of a model in float32 on the CPU; this one is {dtype} on {device}. "
            "Load it without dtype and device."
        )
