"""The ONNX files of a model: made once, then found in the cache.

A file holds embedding, layers, exits and one policy with its bar, or those of its exits, as an
input, so all thresholds of a rule share a file. Making one takes seconds to minutes; it is kept
under a name that changes with whatever it is made of, and those that were used longest ago make
room.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from offramp import __version__
from offramp.engines.base import Exitable
from offramp.engines.exporting import OUT
from offramp.engines.settings import INTEGERS
from offramp.engines.tracing import Traced, require_onnx, trace_model, trace_policy
from offramp.errors import ConfigError, ModelError, OutputError
from offramp.policies import EvidencePolicy, Policy, has_own_bars, with_inner
from offramp.storage import (
    cache_folder,
    drop_oldest,
    fingerprint,
    fingerprint_of_files,
    whole_file,
)

logger = logging.getLogger("offramp")

DTYPES = ("float32", *INTEGERS)
LARGEST = 2**31 - 2**26
"""Bytes of weights in a file, which protobuf ends at 2 GiB."""
CACHE = 8 << 30
"""Bytes of files that the cache keeps."""
T = TypeVar("T")


class Graphs:
    """Makes and keeps the files of one model in one number format, for one thread at a time.

    Args:
        model: in evaluation mode, fp32, on CPU.
        dtype: `float32`, or one of `INTEGERS`: exits stay in float.
        progress: show a bar while files are made.
        runtime: that runs them, `onnx` or `openvino`.

    Raises:
        MissingExtraError: without the extra.
        ConfigError: a model in another state, or another number format.
    """

    def __init__(
        self,
        model: Exitable,
        dtype: str = "float32",
        progress: bool = True,
        runtime: str = "onnx",
    ) -> None:
        require_onnx(runtime)
        _check(model)
        if dtype not in DTYPES:
            known = ", ".join(DTYPES)
            raise ConfigError(f"Files are in {known}, not in {dtype}. Load the model in one.")
        _check_size(model, dtype)
        self.model = model
        self.dtype = dtype
        self._runtime = runtime
        self._progress = progress

    def early_exit(self, policy: Policy, deepest: int | None = None) -> Any:
        """The file that leaves as a policy says, whatever its bar; an `onnx.ModelProto`.

        Args:
            deepest: the last layer that runs; with it, an output says which rows had to leave.
        """
        from offramp.engines.assembly import assemble

        traced, deepest = self._traced, deepest or self.model.depth
        decisions = trace_policy(policy, traced.outputs, deepest)
        layers = traced.layers[:deepest]
        forces, own_bars = deepest < self.model.depth, has_own_bars(policy)
        return assemble(traced.embedding, layers, decisions, forces, own_bars)

    def all_exits(self) -> Any:
        """The file that runs every layer and gives what each exit says."""
        from offramp.engines.assembly import assemble_all

        return assemble_all(self._traced.embedding, self._traced.layers)

    def load(
        self,
        policy: Policy | None,
        read: Callable[[bytes | Path], T],
        deepest: int | None = None,
    ) -> T:
        """What `read` makes of a file: of the one in the cache, or else of a new one.

        Args:
            policy: None is `all_exits`.
            deepest: see `early_exit`.
            read: given a path, or what would stand there. A file in the cache that it raises at
                is torn, and made anew.
        """
        path = self._path(policy, deepest)
        torn: Exception | None = None
        if path is not None and _is_there(path):
            try:
                found = read(path)
            except Exception as problem:  # each runtime has errors of its own
                torn = problem
            else:
                _used(path)
                return found
        made = self.all_exits() if policy is None else self.early_exit(policy, deepest)
        data = made.SerializeToString()
        found = read(data)  # where this fails, too, it was not the file
        if torn is not None:
            logger.warning("%s is broken and is made anew: %s", path, str(torn)[:200])
        if path is not None:
            _keep(path, data)
        return found

    def _path(self, policy: Policy | None, deepest: int | None) -> Path | None:
        """Where a file is kept; None where it cannot be, or not be told from others."""
        folder = cache_folder()
        weights = getattr(self.model, "fingerprint", None)
        code = _code_of(self.model, policy)
        if folder is None or weights is None or code is None:
            return None
        rule = rule_of(policy, self.model.depth, deepest)
        made_of = [weights(), self.dtype, self._runtime, rule, code]
        made_of += [__version__, torch.__version__, version("transformers")]
        return folder / "onnx" / f"{fingerprint(*made_of)}.onnx"

    @cached_property
    def _traced(self) -> Traced:
        parts = self.model.depth + 1
        bar = tqdm(total=parts, desc="onnx", unit="part", disable=None if self._progress else True)
        with bar:
            traced = trace_model(self.model, lambda part: _tell(bar, part))
        from offramp.engines.fusion import fuse_attention
        from offramp.engines.once import work_out_once
        from offramp.engines.quantisation import quantise
        from offramp.engines.slimming import slim

        layers = tuple(map(slim, traced.layers))
        if self._runtime == "onnx":
            layers = tuple(map(fuse_attention, layers))
        if self.dtype in INTEGERS:
            ends, few = [f"{OUT}hidden"], self.dtype == "int7"
            layers = tuple(quantise(layer, ends, reduce_range=few) for layer in layers)
        embedding, layers = work_out_once(traced.embedding, layers)
        return traced._replace(embedding=embedding, layers=layers)


def _tell(bar: Any, part: str) -> None:
    bar.set_postfix_str(part)
    bar.update()


def _is_there(path: Path) -> bool:
    """An empty file is not: it reads as a graph without nodes."""
    try:
        return path.is_file() and path.stat().st_size > 0
    except OSError:  # a folder that is not ours to look into
        return False


def _keep(path: Path, data: bytes) -> None:
    try:
        with whole_file(path) as staged:
            staged.write_bytes(data)
        drop_oldest(path.parent, CACHE)
    except OutputError as problem:
        logger.warning("The file is not cached, and is made anew by each process: %s", problem)


def _used(path: Path) -> None:
    """Note that a file is in use, so that others make room first."""
    with contextlib.suppress(OSError):  # another's cache may be read as well
        os.utime(path)


def rule_of(policy: Policy | None, depth: int, deepest: int | None = None) -> str:
    """What of a policy stands in a file: all but its bars, and which exits it reads.

    Args:
        deepest: the last layer that runs, where that is not the last of all.
    """
    if policy is None:
        return "all exits"
    if deepest is not None and deepest < depth:
        return f"{rule_of(policy, depth)} to layer {deepest}"
    parts = list(with_inner(policy))
    reads = [[one.reads(layer) for layer in range(1, depth + 1)] for one in parts]
    plain = policy
    if isinstance(policy, EvidencePolicy) and policy.takes_bars:
        plain = policy.without_bars()
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in map(type, parts)]
    return json.dumps([plain.to_dict(), reads, kinds], sort_keys=True)


def _code_of(model: Exitable, policy: Policy | None) -> str | None:
    """A name for the code of exits, layers and policy, which need not be ours and may change, and
    for ours that makes files of them.

    None where some of it stands in no file.
    """
    parts: list[object] = [model, model.backbone]
    parts += model.modules() if isinstance(model, nn.Module) else ()
    parts += () if policy is None else with_inner(policy)
    kinds = {kind for part in parts for kind in type(part).__mro__}
    modules = sorted({kind.__module__ for kind in kinds} - {"builtins"})
    try:
        theirs = [Path(inspect.getfile(sys.modules[name])) for name in modules]
        return fingerprint_of_files(*theirs, *sorted(Path(__file__).parent.glob("*.py")))
    except (KeyError, TypeError, OSError):
        return None


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


def _check_size(model: Any, dtype: str) -> None:
    """Refuse now what could not be written in the end. Raises ModelError."""
    weights = sum(leaf.numel() for leaf in getattr(model, "parameters", tuple)())
    least = weights * (1 if dtype in INTEGERS else 4)
    if least > LARGEST:
        other = "" if dtype in INTEGERS else "dtype int8 or "
        raise ModelError(
            f"The model's weights take {least / 1e9:.1f} GB in {dtype}, and an ONNX file holds "
            f"2.1 GB. Use {other}backend torch."
        )
