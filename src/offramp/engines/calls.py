"""What a layer does, call by call, and one function for it.

A layer is run under a `TorchFunctionMode` that writes down each call of torch. What the courses of
several examples have in common, but for sizes, becomes a graph of torch.fx, and so one Python
function: the same calls in the same order with the same values.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FACTS = (
    *("device", "dim", "dtype", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point"),
    *("is_nested", "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride"),
)
"""What may be asked of a tensor that is not its values."""
_DROPOUTS = (functional.dropout, torch.dropout)
"""Calls that give what they are given, outside training."""

Run = Callable[..., Any]
Name = tuple[Any, ...]
"""Of a tensor: ("hidden",), ("given", key), or the number of the call that gave it; then the place
in it, if it is one of several."""


class Varies(Exception):
    """Examples differ in more than sizes, or what is done depends on values."""


class _Value(NamedTuple):
    """A tensor in the arguments of a call."""

    name: Name


class _Weight:
    """A tensor that was there before, by identity."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf = leaf

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Weight) and self.leaf is other.leaf

    __hash__ = None  # type: ignore[assignment]


class _Call(NamedTuple):
    """One call of torch, with names in the place of tensors."""

    run: Run
    args: Any
    kwargs: Any


class Course(NamedTuple):
    """What a layer did with one example.

    Attributes:
        calls: in order.
        said: what came out, with names in the place of tensors.
        sizes: of each tensor that went in, by its name.
    """

    calls: tuple[_Call, ...]
    said: Any
    sizes: Mapping[Name, tuple[int, ...]]


def follow(layer: nn.Module, hidden: Tensor, given: Mapping[str, Any]) -> tuple[Course, Any]:
    """Run a layer and write down the calls of torch that it makes."""
    leaves = dict(_leaves(hidden, given))
    sizes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    follower = _Follower({id(leaf): name for name, leaf in leaves.items()})
    with follower:
        said = layer(hidden, **given)
    return Course(tuple(follower.calls), follower.form(said), sizes), said


def _leaves(hidden: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[Name, Tensor]]:
    """Tensors that go in."""
    yield ("hidden",), hidden
    for key, one in given.items():
        if isinstance(one, Tensor):
            yield ("given", key), one
        elif isinstance(one, tuple | list):
            for place, leaf in enumerate(one):
                if isinstance(leaf, Tensor):
                    yield ("given", key, place), leaf


class _Follower(TorchFunctionMode):
    def __init__(self, names: dict[int, Name]) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._names = names
        self._kept: list[Any] = []  # an id is a tensor's own while the tensor is there

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = _Call(func, self.form(args), self.form(kwargs or {}))
        made = func(*args, **(kwargs or {}))
        if made is None or all(isinstance(leaf, Tensor) for leaf in tree_leaves(made)):
            if not (func in _DROPOUTS and made is args[0]):
                self._note(form, made)
        elif not _is_fact(func):
            raise Varies(f"{func} gives {type(made).__name__}")
        return made

    def _note(self, form: _Call, made: Any) -> None:
        number = len(self.calls)
        self.calls.append(form)
        self._kept.append(made)
        if isinstance(made, Tensor):
            self._names[id(made)] = (number,)
        else:
            for place, leaf in enumerate(made or ()):
                self._names[id(leaf)] = (number, place)

    def form(self, given: Any) -> Any:
        """Arguments with names in the place of tensors."""
        if isinstance(given, Tensor):
            name = self._names.get(id(given))
            return _Weight(given) if name is None else _Value(name)
        if isinstance(given, tuple):
            return tuple(map(self.form, given))
        if isinstance(given, list):
            return list(map(self.form, given))
        if isinstance(given, dict):
            return {name: self.form(one) for name, one in given.items()}
        if isinstance(given, slice):
            return slice(*map(self.form, (given.start, given.stop, given.step)))
        return given


def _is_fact(func: Any) -> bool:
    """Whether a call, or the getter of a property, asks for no values."""
    getter_of = getattr(func, "__self__", None)
    return getattr(func, "__name__", "") in _FACTS or getattr(getter_of, "__name__", "") in _FACTS


# One function for all examples


def written(courses: Sequence[Course]) -> tuple[Run, Run]:
    """Whether (hidden, given) has sizes that courses tell of, and what they all do with these.

    Raises Varies where they differ in more than sizes.
    """
    if len(courses) < 2 or len({len(course.calls) for course in courses}) != 1:
        raise Varies("the number of calls depends on sizes")
    sizes = Sizes(courses)
    graph = _Writer(sizes)
    for number, calls in enumerate(zip(*(course.calls for course in courses), strict=True)):
        graph.call(number, calls)
    return sizes.fit, graph.function([course.said for course in courses])


class Sizes:
    """What courses tell of the sizes of what goes in: some are fixed, some equal others.

    Attributes:
        free: sizes that differ, one for each course, by the tensor and axis that have them first.
    """

    def __init__(self, courses: Sequence[Course]) -> None:
        self.free: dict[tuple[int, ...], tuple[Name, int]] = {}
        self._fixed: list[tuple[Name, int, int]] = []
        self._equal: list[tuple[Name, int, Name, int]] = []
        for name in courses[0].sizes:
            shapes = zip(*(course.sizes[name] for course in courses), strict=True)
            for axis, sizes in enumerate(shapes):
                if len(set(sizes)) == 1:
                    self._fixed.append((name, axis, sizes[0]))
                elif sizes in self.free:
                    self._equal.append((name, axis, *self.free[sizes]))
                else:
                    self.free[sizes] = (name, axis)
        tokens = [course.sizes["hidden",][1] for course in courses]
        self._least, self._most = min(tokens), max(tokens)

    def fit(self, hidden: Tensor, given: Mapping[str, Any]) -> bool:
        """Whether sizes are as the courses had them, and no row is longer or shorter than any."""
        inputs = {"hidden": hidden, "given": given}

        def size(name: Name, axis: int) -> int:
            leaf: Any = inputs
            for key in name:
                leaf = leaf[key]
            return int(leaf.shape[axis])

        return (
            self._least <= hidden.shape[1] <= self._most
            and all(size(name, axis) == wanted for name, axis, wanted in self._fixed)
            and all(size(*one[:2]) == size(*one[2:]) for one in self._equal)
        )


class _Writer:
    """Writes what calls have in common as a graph."""

    def __init__(self, sizes: Sizes) -> None:
        self._graph, self._sizes = Graph(), sizes
        self._nodes: dict[Name, Node] = {}
        for name in ("hidden", "given"):
            self._nodes[name,] = self._graph.placeholder(name)
        self._measured: dict[tuple[Name, int], Node] = {}
        self._weights: dict[str, Tensor] = {}

    def call(self, number: int, calls: Sequence[_Call]) -> None:
        run, args, kwargs = calls[0]
        for one in calls:
            if (one.run, len(one.args), [*one.kwargs]) != (run, len(args), [*kwargs]):
                raise Varies("other calls at other sizes")
        args = self._common([one.args for one in calls])
        kwargs = {key: self._common([one.kwargs[key] for one in calls]) for key in kwargs}
        self._nodes[number,] = self._graph.call_function(run, args, kwargs)

    def function(self, said: Sequence[Any]) -> Run:
        self._graph.output(self._common(said))
        return GraphModule(self._weights, self._graph).forward

    def _common(self, forms: Sequence[Any]) -> Any:
        """What these have in common, as an argument of a node."""
        first = forms[0]
        if any(type(form) is not type(first) for form in forms):
            raise Varies("other kinds of arguments at other sizes")
        if isinstance(first, _Value):
            if len(set(forms)) != 1:
                raise Varies("other values are read at other sizes")
            return self._node(first.name)
        if isinstance(first, tuple | list):
            if len({len(form) for form in forms}) != 1:
                raise Varies("other numbers of arguments at other sizes")
            return type(first)(map(self._common, zip(*forms, strict=True)))
        if isinstance(first, slice):
            ends = zip(*((one.start, one.stop, one.step) for one in forms), strict=True)
            return slice(*map(self._common, ends))
        if isinstance(first, dict):
            raise Varies("a call takes a dictionary")
        if any(form != first for form in forms):
            return self._size(forms)
        return self._weight(first.leaf) if isinstance(first, _Weight) else first

    def _node(self, name: Name) -> Node:
        if name not in self._nodes:
            whole = self._node(name[:-1])
            self._nodes[name] = self._graph.call_function(operator.getitem, (whole, name[-1]))
        return self._nodes[name]

    def _weight(self, leaf: Tensor) -> Node:
        name = f"weight_{len(self._weights)}"
        self._weights[name] = leaf
        return self._graph.get_attr(name)

    def _size(self, forms: Sequence[Any]) -> Node:
        """A number that differs: a size of what goes in, or some times that."""
        for sizes, (name, axis) in self._sizes.free.items():
            times = forms[0] // sizes[0] if type(forms[0]) is int else 0
            if times > 0 and list(forms) == [times * size for size in sizes]:
                size = self._measure(name, axis)
                return (
                    size if times == 1 else self._graph.call_function(operator.mul, (size, times))
                )
        raise Varies(f"{forms[0]} is no size of what goes in")

    def _measure(self, name: Name, axis: int) -> Node:
        if (name, axis) not in self._measured:
            shape = self._graph.call_function(getattr, (self._node(name), "shape"))
            self._measured[name, axis] = self._graph.call_function(operator.getitem, (shape, axis))
        return self._measured[name, axis]
