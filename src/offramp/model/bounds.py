"""Refuse a config that claims more than its weights file holds, before anything is allocated."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch.overrides import TorchFunctionMode

from offramp.errors import ModelError

_FLOOR = 1_000_000
"""Token ids and positions may exceed every tensor's sides, but not by more than this."""

UNUSABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)
"""What transformers and torch raise on a config or file that makes no model."""


@dataclass(frozen=True, slots=True)
class Extent:
    """What a folder's weights files hold, read from their headers."""

    tensors: int
    values: int
    longest: int

    @classmethod
    def of(cls, folder: Path) -> Extent:
        """Raises ModelError where weights are missing or broken."""
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(
                f"{folder}: no model.safetensors; the folder holds no weights that may be loaded."
            )
        shapes = [shape for path in paths for shape in _shapes(path)]
        return cls(
            tensors=len(shapes),
            values=sum(math.prod(shape) for shape in shapes),
            longest=max((side for shape in shapes for side in shape), default=0),
        )

    def check(self, config: Any, source: Path) -> None:
        """Refuse any number in a config that is larger than the weights can account for."""
        for key, value in _numbers(config):
            # every label has a row in some tensor
            limit = self.longest if key == "num_labels" else max(self.longest, _FLOOR)
            if abs(value) > limit:
                raise ModelError(
                    f"{source}: key '{key}' is {value}, more than the weights file can account for."
                )


def _shapes(path: Path) -> list[list[int]]:
    try:
        with safe_open(path, framework="pt") as file:
            return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    except (SafetensorError, OSError) as problem:
        raise ModelError(f"{path}: broken weights file: {problem}") from problem


def _numbers(config: Any) -> Iterator[tuple[str, int]]:
    """Every whole number in JSON data, with the key it stands under."""
    todo = [("", config)]
    while todo:
        key, value = todo.pop()
        if isinstance(value, dict):
            todo += [(str(name), leaf) for name, leaf in value.items()]
        elif isinstance(value, list):
            todo += [(key, leaf) for leaf in value]
        elif isinstance(value, int):
            yield key, value


class Building(TorchFunctionMode):
    """While a model is built: no more parameters than its weights file can fill.

    With `virtual`, parameters take no memory until weights are loaded with `assign`;
    transformers does the same for stock models.
    """

    def __init__(self, extent: Extent, source: Path, virtual: bool = False) -> None:
        super().__init__()
        self._source = source
        self._virtual = virtual
        # a parameter may be made more than once on its way, and a new head comes on top; a
        # false claim is off by far more
        self._tensors = 4 * extent.tensors + 1000
        self._values = 4 * extent.values + 10_000_000

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.empty:
            return func(*args, **kwargs)
        made = func(*args, **({**kwargs, "device": "meta"} if self._virtual else kwargs))
        self._tensors -= 1
        self._values -= made.numel()
        if self._tensors < 0 or self._values < 0:
            raise ModelError(f"{self._source} claims far more than the weights file holds.")
        return made
