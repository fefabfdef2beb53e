"""What every part of a model costs a row, in FLOPs, by the row's length.

PyTorch's own counter runs on a copy without weights, so nothing is estimated by hand and a
base model takes a fraction of a second. A part of a transformer costs a + b T + c T^2 for T
tokens, so three lengths say everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from offramp.engines.base import Exitable
from offramp.policies import Policy
from offramp.table.replay import paid

Array = npt.NDArray[np.float64]
_LONGEST = 64


@dataclass(frozen=True, slots=True)
class CostModel:
    """FLOPs of one row as polynomials a, b, c of its tokens (special ones included).

    Attributes:
        embedding: everything before layer 1, (3,).
        layer: each layer alone, (depth, 3).
        exit: each exit alone, (depth, 3); the last is the model's own head.
    """

    embedding: Array
    layer: Array
    exit: Array

    def layers(self, lengths: npt.ArrayLike) -> Array:
        """Embedding and layers 1..i, (rows, depth)."""
        powers = _powers(lengths)
        return (powers @ self.embedding)[:, None] + np.cumsum(powers @ self.layer.T, axis=1)

    def exits(self, lengths: npt.ArrayLike) -> Array:
        """The exit after layer i alone, (rows, depth)."""
        return _powers(lengths) @ self.exit.T

    def share(
        self, lengths: npt.ArrayLike, exit_layers: npt.NDArray[np.int64], policy: Policy
    ) -> float:
        """Executed FLOPs of rows that left at `exit_layers`, as a share of full depth."""
        executed, full = paid(self.layers(lengths), self.exits(lengths), policy)
        return float(executed[np.arange(len(full)), exit_layers - 1].sum() / full.sum())


def cost_model(model: Exitable) -> CostModel:
    """Count what `model` costs; it is neither run nor changed."""
    config: Any = model.config  # type: ignore[attr-defined]
    # weights cost nothing: what has the same config was counted before
    key = type(model), config.to_json_string(use_diff=False)
    found = _KNOWN.get(key)
    if found is None:
        found = _count_all(model)
        if len(_KNOWN) >= _MOST_KNOWN:
            _KNOWN.clear()
        _KNOWN[key] = found
    return found


def _count_all(model: Exitable) -> CostModel:
    try:
        counts = _at_three_lengths(_copy(model, "meta"), "meta")
    except (RuntimeError, NotImplementedError):
        # a backbone that looks at values cannot run without them
        counts = _at_three_lengths(_copy(model, "cpu"), "cpu")
    parts = _polynomial(*counts)
    return CostModel(parts[0], parts[1::2], parts[2::2])


_KNOWN: dict[tuple[type, str], CostModel] = {}
_MOST_KNOWN = 32


def _copy(model: Any, device: str) -> Any:
    """The same architecture with its attention written out: fused kernels hide from the counter."""
    with torch.device(device), torch.random.fork_rng(devices=[]):
        copy = type(model)(model.config).eval()
    copy.set_attn_implementation("eager")
    return copy


def _at_three_lengths(model: Any, device: str) -> list[tuple[int, Array]]:
    longest = min(_LONGEST, getattr(model, "max_length", None) or _LONGEST)
    return [(tokens, _count(model, tokens, device)) for tokens in (longest, longest // 2, 1)]


@torch.inference_mode()
def _count(model: Exitable, tokens: int, device: str) -> Array:
    """FLOPs of embedding, layer 1, exit 1, layer 2 ..., for one row, (1 + 2 depth,)."""
    seen = []

    @contextlib.contextmanager
    def counted() -> Iterator[None]:
        with _Counter() as counter:
            yield
        seen.append(float(counter.get_total_flops()))

    batch = model.backbone.example(tokens, device)
    carry = None
    with counted():
        flow = model.backbone.embed(batch)
    for layer in range(1, model.depth + 1):
        with counted():
            flow = model.backbone.layer(layer, flow)
        with counted():
            _, carry = model.exit_at(layer)(flow.hidden, flow.mask, carry)
    return np.array(seen)


class _NoModules(ModuleTracker):
    """Tracks no modules: that takes hooks on every module of the process, other threads' too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *args: object) -> None:
        pass


class _Counter(FlopCounterMode):
    def __init__(self) -> None:
        super().__init__(display=False)
        self.mod_tracker = _NoModules()


def _polynomial(*counts: tuple[int, Array]) -> Array:
    """Coefficients of the parabola through three (tokens, FLOPs of the parts), (parts, 3)."""
    (t, ft), (u, fu), (v, fv) = counts
    slope, other = (ft - fu) / (t - u), (fu - fv) / (u - v)
    square = (slope - other) / (t - v)
    linear = slope - square * (t + u)
    return np.stack((ft - linear * t - square * t * t, linear, square), axis=1)


def _powers(lengths: npt.ArrayLike) -> Array:
    tokens = np.asarray(lengths, dtype=np.float64)
    return np.stack((np.ones_like(tokens), tokens, tokens * tokens), axis=1)
