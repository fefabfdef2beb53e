"""What layers work out anew from masks alone is worked out once, before the first of them.

A layer turns a mask into what it adds to its shares, its exit into what it must not look at: steps
on a few numbers each, which on short rows cost as much as some of the layer's own products.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple, TypeVar

from onnx import ModelProto, NodeProto, TensorProto, ValueInfoProto, numpy_helper

from offramp.engines.assembly import attributes, bodies, needed, read_instead
from offramp.engines.exporting import OUT
from offramp.engines.slimming import known_dims

__all__ = ["work_out_once"]

_FEW = 64
"""Numbers of a constant that may take part: a weight is another thing."""


class _Made(NamedTuple):
    """How a value is made of constants and of what no layer changes.

    Attributes:
        how: a digest of every step on the way; values that are made alike are the same.
        of_rows: its first axis is that of the rows. Others say nothing of the rows.
    """

    how: str
    of_rows: bool


def work_out_once(
    embedding: ModelProto, layers: Sequence[ModelProto]
) -> tuple[ModelProto, tuple[ModelProto, ...]]:
    """The same functions together: what several layers make alike, of values that no layer
    changes, becomes an output of the embedding and an input of theirs.

    The given graphs are not changed. Nodes that nobody needs any more stay, for `assemble` to
    leave out.
    """
    given = {value.name.removeprefix(OUT) for value in embedding.graph.output}
    given -= {value.name.removeprefix(OUT) for layer in layers for value in layer.graph.output}
    parts = [_Part(layer, given) for layer in layers]
    found = Counter(made for part in parts for made in dict.fromkeys(part.ends()))
    first = _copy(embedding)
    for number, made in enumerate(made for made, parts_of in found.items() if parts_of > 1):
        name = f"{'rows' if made.of_rows else 'shared'}/once.{number}"
        next(part for part in parts if made in part.makers).give(made, name, first)
        for part in parts:
            part.read(made, name)
    return first, tuple(part.model for part in parts)


class _Part:
    """The graph of a layer with its exit, and which of its values could be made before it.

    Attributes:
        model: the graph, a copy.
        makers: the node that makes such a value.
    """

    def __init__(self, layer: ModelProto, given: Collection[str]) -> None:
        self.model = _copy(layer)
        graph = self.model.graph
        self._nodes = needed(graph, [value.name for value in graph.output]).nodes
        self._stored = {weight.name: weight for weight in graph.initializer}
        self._inside = {value.name: value for value in graph.value_info}
        self._dims = known_dims(graph)
        self._made = {
            value.name: _Made(value.name, not value.name.startswith("shared/"))
            for value in graph.input
            if value.name in given
        }
        self._made |= {
            weight.name: _Made(_digest(weight.data_type, [*weight.dims], _bytes(weight)), False)
            for weight in graph.initializer
            # a parameter is the layer's own, even where it happens to be another's value
            if math.prod(weight.dims) <= _FEW and not weight.name.startswith("owner.")
        }
        self.makers: dict[_Made, NodeProto] = {}
        for node in self._nodes:
            made = self._how(node)
            if made is not None:
                self._made[node.output[0]] = made
                self.makers.setdefault(made, node)

    def _how(self, node: NodeProto) -> _Made | None:
        """How a node's value is made; None where only the layer can make it."""
        before = [self._made[name] for name in node.input if name in self._made]
        known = 0 < len(before) == len([*filter(None, node.input)])
        if not known or len(node.output) != 1 or bodies(node):
            return None
        name, options = node.output[0], attributes(node)
        of_rows = any(made.of_rows for made in before)
        if node.op_type == "Shape" and options.get("start", 0) > 0:
            of_rows = False
        elif of_rows and self._dims.get(name, ("",))[:1] != self._dims.get("hidden", ())[:1]:
            return None  # rows that leave could not be taken out of it
        steps = [node.domain, node.op_type, *(made.how for made in before)]
        return _Made(_digest(*steps, sorted(options.items())), of_rows)

    def ends(self) -> Iterator[_Made]:
        """What could be made before and is read by what could not."""
        for node in self._nodes:
            if node.output[0] not in self._made:
                made = (self._made.get(name) for name in node.input if name in self._inside)
                yield from (one for one in made if one in self.makers)

    def give(self, made: _Made, name: str, embedding: ModelProto) -> None:
        """Make a value in the embedding, as an output that is called so."""
        graph, last = embedding.graph, self.makers[made].output[0]
        called = {value.name: OUT + value.name for value in self.model.graph.input}
        called |= {last: OUT + name, "": ""}
        for node in needed(self.model.graph, [last]).nodes:
            step = NodeProto()
            step.CopyFrom(node)
            step.name = f"{name}.{node.name}"
            for names in (step.input, step.output):
                for place, one in enumerate(names):
                    if one not in called:
                        called[one] = f"{name}.{one}"
                        if one in self._stored:
                            graph.initializer.append(_named(self._stored[one], called[one]))
                    names[place] = called[one]
            graph.node.append(step)
        graph.output.append(_named(self._inside[last], OUT + name))
        opsets = {one.domain: one.version for one in self.model.opset_import}
        for one in embedding.opset_import:
            one.version = max(one.version, opsets.get(one.domain, 0))

    def read(self, made: _Made, name: str) -> None:
        """Read an input that is called so in the place of what is made here."""
        same = {value: name for value, one in self._made.items() if one == made}
        if same:
            self.model.graph.input.append(_named(self._inside[min(same)], name))
            read_instead(self._nodes, same)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _bytes(weight: TensorProto) -> bytes:
    return numpy_helper.to_array(weight).tobytes()


_Named = TypeVar("_Named", TensorProto, ValueInfoProto)


def _named(one: _Named, name: str) -> _Named:
    copy = type(one)()
    copy.CopyFrom(one)
    copy.name = name
    return copy


def _copy(model: ModelProto) -> ModelProto:
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy
