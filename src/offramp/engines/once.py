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
_ROW_BY_ROW = {
    *("Abs", "Add", "And", "Cast", "Clip", "Concat", "Div", "Equal", "Expand", "Greater", "Less"),
    *(
        "Max",
        "Min",
        "Mul",
        "Neg",
        "Not",
        "Or",
        "Reciprocal",
        "ReduceMax",
        "ReduceMean",
        "ReduceMin",
    ),
    *("ReduceSum", "Squeeze", "Sub", "Unsqueeze", "Where"),
}
"""Steps that say the same of a row whoever its neighbours are, while its axis is the first."""


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
        source = next(part for part in parts if made in part.values)
        value = _named(source.values[made], f"{'rows' if made.of_rows else 'shared'}/once.{number}")
        source.give(made, value, first)
        for part in parts:
            part.read(made, value)
    return first, tuple(part.model for part in parts)


class _Part:
    """The graph of a layer with its exit, and which of its values could be made before it.

    Attributes:
        model: the graph, a copy.
        values: those that could, as this graph has them.
    """

    def __init__(self, layer: ModelProto, given: Collection[str]) -> None:
        self.model = _copy(layer)
        graph = self.model.graph
        self._nodes = needed(graph, [value.name for value in graph.output]).nodes
        self._stored = {weight.name: weight for weight in graph.initializer}
        self._dims = known_dims(graph)
        self._made = {
            value.name: _Made(value.name, not value.name.startswith("shared/"))
            for value in graph.input
            if value.name in given
        }
        self._made |= {
            weight.name: _Made(_digest(weight.data_type, [*weight.dims], _bytes(weight)), False)
            for weight in graph.initializer
            # parameters are equal before training, and later each layer has its own
            if math.prod(weight.dims) <= _FEW and not weight.name.startswith("owner.")
        }
        inside = {value.name: value for value in (*graph.value_info, *graph.output)}
        self.values: dict[_Made, ValueInfoProto] = {}
        for node in self._nodes:
            made, name = self._how(node), node.output[0]
            if made is not None:
                self._made[name] = made
                if name in inside:
                    self.values.setdefault(made, inside[name])

    def _how(self, node: NodeProto) -> _Made | None:
        """How a node's value is made; None where only the layer can make it."""
        before = [self._made.get(name) for name in node.input if name]
        known = [made for made in before if made is not None]
        if not 0 < len(known) == len(before) or len(node.output) != 1 or bodies(node):
            return None
        options = attributes(node)
        of_rows = any(made.of_rows for made in known)
        if node.op_type == "Shape" and options.get("start", 0) > 0:
            of_rows = False
        elif of_rows and not (node.op_type in _ROW_BY_ROW and self._is_of_rows(node.output[0])):
            return None  # rows that leave could not be taken out of it
        # an input that is left out has its place, too
        steps = [self._made[name].how if name else "" for name in node.input]
        return _Made(_digest(node.domain, node.op_type, steps, sorted(options.items())), of_rows)

    def _is_of_rows(self, name: str) -> bool:
        """Whether the first axis of a value is that of the rows, and no other is."""
        rows, dims = self._dims["hidden"][0], self._dims.get(name, ())
        return dims[:1] == (rows,) and dims.count(rows) == 1

    def ends(self) -> Iterator[_Made]:
        """What could be made before and is read by what could not."""
        for node in self._nodes:
            if node.output[0] not in self._made:
                made = map(self._made.get, node.input)
                yield from (one for one in made if one in self.values)

    def give(self, made: _Made, value: ValueInfoProto, embedding: ModelProto) -> None:
        """Make a value in the embedding, as an output that is called so."""
        graph, last = embedding.graph, self.values[made].name
        called = {one.name: OUT + one.name for one in self.model.graph.input}
        called |= {last: OUT + value.name, "": ""}
        for node in needed(self.model.graph, [last]).nodes:
            step = NodeProto()
            step.CopyFrom(node)
            step.name = f"{value.name}.{node.name}"
            for names in (step.input, step.output):
                for place, name in enumerate(names):
                    if name not in called:
                        called[name] = f"{value.name}.{name}"
                        if name in self._stored:
                            graph.initializer.append(_named(self._stored[name], called[name]))
                    names[place] = called[name]
            graph.node.append(step)
        graph.output.append(_named(value, OUT + value.name))
        opsets = {one.domain: one.version for one in self.model.opset_import}
        for one in embedding.opset_import:
            one.version = max(one.version, opsets.get(one.domain, 0))

    def read(self, made: _Made, value: ValueInfoProto) -> None:
        """Read an input that is called so in the place of what is made here."""
        same = {name: value.name for name, one in self._made.items() if one == made}
        if same:
            self.model.graph.input.append(value)
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
