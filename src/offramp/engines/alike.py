"""What a part of a model does, operation by operation, so that equal parts are traced once.

Most encoders repeat one layer with other weights. Two parts that run the same operations of torch
with the same constants on the same inputs, and differ in which weights they read, have the same
graph but for its weights. Whatever else they differ in (a head, a Python constant, a tensor that
is no weight, a window that the inputs outgrow) shows as another operation, number or input.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

Values = dict[str, Tensor]


class Course(NamedTuple):
    """What a part did with some values.

    Attributes:
        steps: each operation, with all that it was given; a weight by when it was first read.
        weights: those read, in that order.
        said: what came out.
    """

    steps: str
    weights: tuple[Tensor, ...]
    said: Values


def follow(
    run: Callable[[Values], Values], given: Mapping[str, Tensor], weights: Collection[int]
) -> Course:
    """Run a part and write down what it does; `weights` are the ids of tensors that are some."""
    own = {name: leaf.clone() for name, leaf in given.items()}  # one tensor may have two names
    follower = _Follower(own, weights)
    with follower:
        said = run(own)
    ends = [f"{name}: {follower.name(leaf)}" for name, leaf in said.items()]
    return Course("\n".join(follower.steps + ends), tuple(follower.weights), said)


class _Follower(TorchDispatchMode):
    def __init__(self, given: Values, weights: Collection[int]) -> None:
        super().__init__()
        self.steps: list[str] = []
        self.weights: list[Tensor] = []
        self._are_weights = weights
        self._names: dict[int, str] = {}
        self._kept: list[Tensor] = []  # an id is a tensor's own while the tensor is there
        for name, leaf in given.items():
            self._call(leaf, f"<{name}: {_kind(leaf)}>")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = tree_map_only(Tensor, self.name, (args, kwargs or {}))
        made = func(*args, **(kwargs or {}))
        for place, leaf in enumerate(tree_leaves(made)):
            if isinstance(leaf, Tensor):
                self._call(leaf, f"<step {len(self.steps)}.{place}>")
        self.steps.append(f"{func} {given}")
        return made

    def name(self, leaf: Tensor) -> str:
        """Where a tensor comes from; a constant is its own name."""
        if id(leaf) in self._names:
            return self._names[id(leaf)]
        if id(leaf) not in self._are_weights:
            data = leaf.detach().flatten().contiguous().view(torch.uint8).numpy().tobytes()
            return f"<constant {_kind(leaf)} {hashlib.sha256(data).hexdigest()}>"
        self._call(leaf, f"<weight {len(self.weights)}: {_kind(leaf)}>")
        self.weights.append(leaf)
        return self._names[id(leaf)]

    def _call(self, leaf: Tensor, name: str) -> None:
        self._names[id(leaf)] = name
        self._kept.append(leaf)


def _kind(leaf: Tensor) -> str:
    return f"{leaf.dtype} {list(leaf.shape)}"
