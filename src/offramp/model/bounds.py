"""Refuse a config that claims more than its weights file holds, before anything is allocated."""

from __future__ import annotations

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
    longest: int

    @classmethod
    def of(cls, folder: Path) -> Extent:
        """Raises ModelError where weights are missing or broken."""
        tensors, longest = 0, 0
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise ModelError(
                f"{folder}: no model.safetensors; the folder holds no weights that may be loaded."
            )
        for path in paths:
            try:
                with safe_open(path, framework="pt") as file:
                    shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
            except (SafetensorError, OSError) as problem:
                raise ModelError(f"{path}: broken weights file: {problem}") from problem
            tensors += len(shapes)
            longest = max([longest, *(side for shape in shapes for side in shape)])
        return cls(tensors, longest)

    def check(self, config: Any, source: Path) -> None:
        """Refuse any number in a config that is larger than the weights can account for."""
        for key, value in _numbers(config):
            # every label has a row in some tensor
            limit = self.longest if key == "num_labels" else max(self.longest, _FLOOR)
            if abs(value) > limit:
                raise ModelError(
                    f"{source}: key '{key}' is {value}, more than the weights file can account for."
                )


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

    With `virtual`, parameters take no memory until weights are loaded with `assign`.
    """

    def __init__(self, extent: Extent, source: Path, virtual: bool = False) -> None:
        super().__init__()
        self._source = source
        self._virtual = virtual
        # a parameter may be made more than once on its way; a false depth is off by far more
        self._left = 4 * extent.tensors + 1000

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty:
            self._left -= 1
            if self._left < 0:
                raise ModelError(f"{self._source} claims far more layers than the weights hold.")
            if self._virtual:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)
