"""What a layer does, call by call, and one function for it.

A layer is run under a `TorchFunctionMode` that writes down each call of torch. What the courses of
several examples have in common, but for sizes, is written as Python: the same calls in the same
order with the same values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_FACTS = (
    *("device", "dim", "dtype", "is_contiguous", "is_cpu", "is_cuda", "is_floating_point"),
    *("is_nested", "layout", "ndim", "numel", "requires_grad", "shape", "size", "stride"),
)
"""What may be asked of a tensor that is not its values."""
_SAME = (functional.dropout, torch.dropout)
"""Calls that give what they are given, outside training."""

Run = Callable[..., Any]


class Varies(Exception):
    """Examples differ in more than sizes, or what is done depends on values."""


class _Value(NamedTuple):
    """A tensor in the arguments of a call: what it is called in the source."""

    name: str


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
    sizes: Mapping[str, tuple[int, ...]]


def follow(layer: nn.Module, hidden: Tensor, given: Mapping[str, Any]) -> tuple[Course, Any]:
    """Run a layer and write down the calls of torch that it makes."""
    leaves = dict(_leaves(hidden, given))
    sizes = {name: tuple(leaf.shape) for name, leaf in leaves.items()}
    follower = _Follower({id(leaf): name for name, leaf in leaves.items()})
    with follower:
        said = layer(hidden, **given)
    return Course(tuple(follower.calls), follower.form(said), sizes), said


def _leaves(hidden: Tensor, given: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors that go in, by how the source names them."""
    yield "hidden", hidden
    for name, one in given.items():
        if isinstance(one, Tensor):
            yield f"given[{name!r}]", one
        elif isinstance(one, tuple | list):
            for place, leaf in enumerate(one):
                if isinstance(leaf, Tensor):
                    yield f"given[{name!r}][{place}]", leaf


class _Follower(TorchFunctionMode):
    def __init__(self, names: dict[int, str]) -> None:
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
            if not (func in _SAME and made is args[0]):
                self._note(form, made)
        elif not _is_fact(func):
            raise Varies(f"{func} gives {type(made).__name__}")
        return made

    def _note(self, form: _Call, made: Any) -> None:
        name = f"v{len(self.calls)}"
        self.calls.append(form)
        self._kept.append(made)
        if isinstance(made, Tensor):
            self._names[id(made)] = name
        else:
            for place, leaf in enumerate(made or ()):
                self._names[id(leaf)] = f"{name}[{place}]"

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
    source = _Source(courses)
    for place, calls in enumerate(zip(*(course.calls for course in courses), strict=True)):
        source.call(f"v{place}", calls)
    return source.functions([course.said for course in courses])


class _Source:
    """Python for a course, line by line, with the values that it names."""

    def __init__(self, courses: Sequence[Course]) -> None:
        self._lines: list[str] = []
        self._last: dict[str, int] = {}  # line that reads what a call gave last
        self._named: dict[str, Any] = {}
        self._sizes: dict[tuple[int, ...], str] = {}
        self._read: dict[str, str] = {}  # sizes that are needed, by their names
        self._rules: list[str] = []
        for name in courses[0].sizes:
            shapes = zip(*(course.sizes[name] for course in courses), strict=True)
            for axis, sizes in enumerate(shapes):
                self._rule(sizes, f"{name}.shape[{axis}]")
        self._rules.append(f"hidden.shape[1] <= {max(one.sizes['hidden'][1] for one in courses)}")

    def _rule(self, sizes: tuple[int, ...], here: str) -> None:
        """A size is what it was, or that of another axis, or free."""
        if len(set(sizes)) == 1:
            self._rules.append(f"{here} == {sizes[0]}")
        elif sizes in self._sizes:
            self._rules.append(f"{here} == {self._sizes[sizes]}")
        else:
            self._sizes[sizes] = here

    def call(self, name: str, calls: Sequence[_Call]) -> None:
        run = calls[0].run
        if any(one.run != run for one in calls):
            raise Varies("other calls at other sizes")
        args, kwargs = calls[0].args, calls[0].kwargs
        if any((len(one.args), [*one.kwargs]) != (len(args), [*kwargs]) for one in calls):
            raise Varies("other arguments at other sizes")
        args = [self._text(forms) for forms in zip(*(one.args for one in calls), strict=True)]
        args += [f"{key}={self._text([one.kwargs[key] for one in calls])}" for key in kwargs]
        self._last[name] = len(self._lines)
        self._lines.append(f"{name} = {self._name(run)}({', '.join(args)})")

    def functions(self, said: Sequence[Any]) -> tuple[Run, Run]:
        end = f"return {self._text(said)}"
        for name, line in self._last.items():
            if line < len(self._lines):
                self._lines[line] += f"; del {name}"  # its memory serves the next
        sizes = [f"{name} = {size}" for size, name in self._read.items()]
        source = "\n    ".join(("def run(hidden, given):", *sizes, *self._lines, end))
        source += f"\ndef fits(hidden, given):\n    return {' and '.join(self._rules)}\n"
        exec(compile(source, "<straight layer>", "exec"), self._named)
        return self._named["fits"], self._named["run"]

    def _text(self, forms: Sequence[Any]) -> str:
        """The source of a value that these have in common."""
        first = forms[0]
        if any(type(form) is not type(first) for form in forms):
            raise Varies("other kinds of arguments at other sizes")
        if isinstance(first, _Value):
            if len(set(forms)) != 1:
                raise Varies("other values are read at other sizes")
            value = first.name.partition("[")[0]
            if value in self._last:
                self._last[value] = len(self._lines)
            return first.name
        if isinstance(first, tuple | list):
            if len({len(form) for form in forms}) != 1:
                raise Varies("other numbers of arguments at other sizes")
            inside = "".join(f"{self._text(one)}, " for one in zip(*forms, strict=True))
            return f"({inside})" if isinstance(first, tuple) else f"[{inside}]"
        if isinstance(first, dict):
            raise Varies("a call takes a dictionary")
        if isinstance(first, slice):
            ends = zip(*((one.start, one.stop, one.step) for one in forms), strict=True)
            return f"slice({', '.join(map(self._text, ends))})"
        if any(form != first for form in forms):
            return self._size(forms)
        if first is None or type(first) in (bool, int):
            return repr(first)
        return self._name(first.leaf if isinstance(first, _Weight) else first)

    def _size(self, forms: Sequence[Any]) -> str:
        """A number that differs: a size of what goes in, or some times that."""
        for sizes, here in self._sizes.items():
            times = forms[0] // sizes[0] if type(forms[0]) is int else 0
            if times > 0 and list(forms) == [times * size for size in sizes]:
                name = self._read.setdefault(here, f"n{len(self._read)}")
                return name if times == 1 else f"{name} * {times}"
        raise Varies(f"{forms[0]} is no size of what goes in")

    def _name(self, value: Any) -> str:
        name = f"c{len(self._named)}"
        self._named[name] = value
        return name
