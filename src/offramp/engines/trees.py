"""Memory of rows: a tensor, a dict of tensors or nothing, each with the row as first axis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


def take_tree(tree: Any, rows: Tensor) -> Any:
    """Keep rows of a tensor, of a dict of tensors, or of nothing."""
    return _mapped(tree, lambda leaf: leaf.index_select(0, rows))


def cut_tree(tree: Any, start: int, stop: int) -> Any:
    """Rows `start` to `stop`, as views."""
    return _mapped(tree, lambda leaf: leaf[start:stop])


def join_trees(trees: Sequence[Any]) -> Any:
    """The rows of several trees of one structure, one after the other."""
    first = trees[0]
    if len(trees) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(trees))
    return {name: join_trees([tree[name] for tree in trees]) for name in first}


def copy_tree(tree: Any) -> Any:
    """The same rows, in memory of their own."""
    return _mapped(tree, torch.clone)


def leaves_of(tree: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a tree, each with where it stands."""
    if isinstance(tree, Tensor):
        yield name, tree
    elif tree is not None:
        for key, leaf in tree.items():
            yield from leaves_of(leaf, f"{name}/{key}")


def _mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {name: _mapped(leaf, change) for name, leaf in tree.items()}
    if tree is not None:
        raise TypeError(f"Rows cannot be taken from a {type(tree).__name__}; use tensors or dicts.")
    return None
