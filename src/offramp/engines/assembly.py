"""One ONNX file from traced parts: rows that leave are gone, layers that nobody needs are skipped.

The first decision answers all rows; after each later one the answers of those that still run are
written over theirs. Those that stay are compacted, and what no layer changes, as masks, is picked
by their places. Each later layer stands in an `If` of its own, one behind the other, that runs
while rows are left. No part is nested in another, so a file is made in seconds and runs wherever
the opsets of its parts do. (Nested, whoever leaves early would be spared a look at each later
layer, but ONNX Runtime would load a weight once for each body around it.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper

from offramp.engines.exporting import BAR, BARS, OUT

INT64, BOOL, FLOAT = TensorProto.INT64, TensorProto.BOOL, TensorProto.FLOAT
Names = dict[str, str]
"""What a value is -> what it is called in the file."""

PLACE = "place"
"""Where each running row stands in the batch, (rows, 1)."""
CODE = "code"
"""The layer at which each row of the batch left, negative for a bad one: one value to write."""
_FROM_OUTSIDE = (BAR, "shared/")
"""What names of it begin with."""
_SMALL = 1 << 14
"""Bytes of a weight that is not worth sharing: what stands outside a body is handed in with every
run, one by one."""


def assemble(
    embedding: onnx.ModelProto,
    layers: Sequence[onnx.ModelProto],
    decisions: Sequence[onnx.ModelProto | None],
    forces: bool = False,
    own_bars: bool = False,
) -> onnx.ModelProto:
    """A file that answers batches of any size and leaves early.

    Inputs are those of the embedding and of the decisions (`bar` or `bars`, and `row_id` where a
    policy reads it). Outputs: `scores` (rows, classes), `exit_layer` (rows,) 1-based, `bad`
    (rows,).

    Args:
        forces: the last decision may let rows go on, who have to leave nevertheless: one more
            output, `forced` (rows,), says which.
        own_bars: each exit before the last has a bar of its own: `bars` instead of `bar`.
    """
    file = _File(embedding, forces, own_bars)
    file.start(layers, decisions)
    for number, parts in enumerate(zip(layers, decisions, strict=True), start=1):
        file.add_layer(number, *parts)
    return file.finish()


def assemble_all(embedding: onnx.ModelProto, layers: Sequence[onnx.ModelProto]) -> onnx.ModelProto:
    """A file that runs every layer and gives each exit's outputs as `<name>/<layer>`."""
    file = _File(embedding)
    for number, layer in enumerate(layers, start=1):
        file.add_exit(number, layer)
    return file.model()


class _File:
    """A file while it is put together."""

    def __init__(
        self, embedding: onnx.ModelProto, forces: bool = False, own_bars: bool = False
    ) -> None:
        self.forces, self.own_bars = forces, own_bars
        self.written = ["answers", CODE, *(["forced"] if forces else [])]
        self.nodes: list[NodeProto] = []
        self.weights: list[TensorProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.domains: dict[str, int] = {}
        self.inputs = {value.name: value for value in embedding.graph.input}
        self.now: Names = {name: name for name in self.inputs}
        self.kinds: dict[str, tuple[int, int]] = {}  # element type and rank, by what it is
        self.now |= self._inline(self.nodes, embedding, "embed.", self.now)
        self.needs: list[set[str]] = []  # what the parts after each layer read

    # -- the early-exit file ----------------------------------------------------------------

    def start(
        self,
        layers: Sequence[onnx.ModelProto],
        decisions: Sequence[onnx.ModelProto | None],
    ) -> None:
        """What comes in, and what each layer must hand on."""
        self.depth = len(layers)
        later: set[str] = set()
        for layer, decision in zip(reversed(layers), reversed(decisions), strict=True):
            self.needs.insert(0, set(later))
            later |= set() if decision is None else _reads(decision)
            later = (later - _made_by(layer)) | _reads(layer)
        made = set().union(*map(_made_by, layers))
        # what comes from the embedding and is the same after every layer
        self.unchanged = {
            what: name
            for what, name in self.now.items()
            if what not in made and not what.startswith(_FROM_OUTSIDE)
        }
        self._outer_inputs(decisions)
        self.kinds |= {"answers": (FLOAT, 2), CODE: (INT64, 1), "forced": (BOOL, 1)}
        self.kinds |= {"exit_layer": (INT64, 1), "bad": (BOOL, 1), PLACE: (INT64, 2)}

    def _outer_inputs(self, decisions: Sequence[onnx.ModelProto | None]) -> None:
        """`bar` or `bars` and what a policy starts on; unread ones are dropped."""
        for decision in decisions:
            used = set() if decision is None else _used(decision)
            for value in [] if decision is None else decision.graph.input:
                if value.name in (BAR, "row_id", "length") and value.name in used:
                    if value.name == BAR and self.own_bars:
                        value = helper.make_tensor_value_info(BARS, FLOAT, ["exits"])
                    self.inputs.setdefault(value.name, value)
                    self.now[value.name] = value.name
                    self.kinds[value.name] = _kind(value)

    @property
    def _some_left(self) -> bool:
        """Whether rows may have left by now."""
        return PLACE in self.now

    def add_layer(
        self, number: int, layer: onnx.ModelProto, decision: onnx.ModelProto | None
    ) -> None:
        """One layer, its exit and decision; in an `If` once a row may have left."""
        if self._some_left:
            self._run_if_any(number, layer, decision)
        else:
            self._run(self.nodes, number, layer, decision)

    def _run(
        self,
        nodes: list[NodeProto],
        number: int,
        layer: onnx.ModelProto,
        decision: onnx.ModelProto | None,
    ) -> None:
        wanted = self.needs[number - 1] | (set() if decision is None else _reads(decision))
        if self._some_left:
            self._pick(nodes, number, _reads(layer) & set(self.unchanged))
        made = self._inline(nodes, layer, f"layer{number}.", self.now, wanted)
        self.now |= made
        if decision is None:
            return
        if self.own_bars and BAR in _reads(decision):
            self._pick_bar(nodes, number)
        said = self._inline(nodes, decision, f"decide{number}.", self.now)
        self.now |= {name: said[name] for name in said if name.startswith("state/")}
        self._write(nodes, number, said)
        if number < self.depth:
            self._compact(nodes, number, said["leave"])

    def _write(self, nodes: list[NodeProto], number: int, said: Names) -> None:
        """The answers of all running rows, in their places; at first that is all rows."""
        mine = f"write{number}."
        self.constant(f"{mine}good", [number])
        self.constant(f"{mine}bad", [-number])
        code = [said["bad"], f"{mine}bad", f"{mine}good"]
        nodes.append(helper.make_node("Where", code, [f"{mine}left"]))
        values = {"answers": said["answer"], CODE: f"{mine}left"}
        leave, forced = said["leave"], f"{mine}forced.now"
        if self.forces and number == self.depth:
            nodes.append(helper.make_node("Not", [leave], [forced]))
            values["forced"] = forced
        elif self.forces and not self._some_left:
            nodes.append(helper.make_node("Xor", [leave, leave], [forced]))  # nobody yet
            values["forced"] = forced
        for name, value in values.items():
            if self._some_left:
                inputs = [self.now[name], self.now[PLACE], value]
                value = mine + name
                nodes.append(helper.make_node("ScatterND", inputs, [value]))
            self.now[name] = value

    def _compact(self, nodes: list[NodeProto], number: int, leave: str) -> None:
        mine = f"keep{number}."
        nodes.append(helper.make_node("Not", [leave], [f"{mine}stay"]))
        names = sorted(self._of_rows(number))
        if self._some_left:
            names.append(PLACE)
        else:
            nodes += [
                helper.make_node("NonZero", [f"{mine}stay"], [f"{mine}at"]),
                helper.make_node("Transpose", [f"{mine}at"], [mine + PLACE]),
            ]
            self.now[PLACE] = mine + PLACE
        for name in names:
            new = f"{mine}{name}"
            nodes.append(
                helper.make_node("Compress", [self.now[name], f"{mine}stay"], [new], axis=0)
            )
            self.now[name] = new

    def _pick(self, nodes: list[NodeProto], number: int, names: Iterable[str]) -> None:
        """Of what no layer changes, the part of the running rows."""
        for name in sorted(names):
            inputs, new = [self.unchanged[name], self.now[PLACE]], f"of{number}.{name}"
            nodes.append(helper.make_node("GatherND", inputs, [new]))
            self.now[name] = new

    def _pick_bar(self, nodes: list[NodeProto], number: int) -> None:
        self.now[BAR] = f"bar{number}"
        self.constant(f"bar{number}.at", number - 1)
        nodes.append(helper.make_node("Gather", [BARS, f"bar{number}.at"], [self.now[BAR]]))

    def _of_rows(self, number: int) -> set[str]:
        """What later parts read that a layer or decision has made of its rows."""
        return {
            name
            for name in self.needs[number - 1] & (set(self.now) - set(self.unchanged))
            if not name.startswith(_FROM_OUTSIDE)
        }

    def _run_if_any(
        self, number: int, layer: onnx.ModelProto, decision: onnx.ModelProto | None
    ) -> None:
        before = dict(self.now)
        inside: list[NodeProto] = []
        self._run(inside, number, layer, decision)
        kept = [*self.written]
        if number < self.depth:
            kept += [PLACE, *sorted(self._of_rows(number))]
        changed = [name for name in kept if self.now[name] != before.get(name)]
        run = helper.make_graph(
            inside, f"layer {number}", [], [self._value(n, self.now[n]) for n in changed]
        )
        skip = self._skipping(number, changed, before)
        left = f"if{number}.left"
        self.nodes += [
            helper.make_node("Size", [before[PLACE]], [f"{left}.count"]),
            helper.make_node("Cast", [f"{left}.count"], [left], to=BOOL),
            helper.make_node(
                "If",
                [left],
                [f"if{number}.{name}" for name in changed],
                name=f"if{number}",
                then_branch=run,
                else_branch=skip,
            ),
        ]
        self.now |= {name: f"if{number}.{name}" for name in changed}

    def _skipping(self, number: int, names: Iterable[str], before: Names) -> onnx.GraphProto:
        """Everything stays as it was; what was not there yet is empty."""
        nodes, values = [], []
        for name in names:
            new = f"skip{number}.{name}"
            if name in before:
                nodes.append(helper.make_node("Identity", [before[name]], [new]))
            else:
                kind, rank = self.kinds[name]
                self.constant(f"{new}.shape", [0] * rank)  # OpenVINO forgets the rank of a constant
                fill = helper.make_tensor("", kind, [1], [0])
                shape = [f"{new}.shape"]
                nodes.append(helper.make_node("ConstantOfShape", shape, [new], value=fill))
            values.append(self._value(name, new))
        return helper.make_graph(nodes, f"skip {number}", [], values)

    def finish(self) -> onnx.ModelProto:
        """The file with its outputs."""
        self.constant("zero", 0)
        self.nodes += [
            helper.make_node("Abs", [self.now[CODE]], ["left.at"]),
            helper.make_node("Less", [self.now[CODE], "zero"], ["left.bad"]),
        ]
        self.now |= {"exit_layer": "left.at", "bad": "left.bad"}
        self.give("scores", "answers")
        for name in ["exit_layer", "bad", *(["forced"] if self.forces else [])]:
            self.give(name, name)
        return self.model()

    # -- every exit -------------------------------------------------------------------------

    def add_exit(self, number: int, layer: onnx.ModelProto) -> None:
        made = self._inline(self.nodes, layer, f"layer{number}.", self.now)
        self.now |= made
        for name in made:
            if name == "scores" or name.startswith("signals/"):
                self.give(f"{name}/{number}", name)

    # -- what both need ---------------------------------------------------------------------

    def give(self, name: str, what: str) -> None:
        """Make a value an output of the file."""
        self.nodes.append(helper.make_node("Identity", [self.now[what]], [name]))
        self.outputs.append(self._value(what, name))

    def constant(self, name: str, value: Any) -> None:
        self.weights.append(numpy_helper.from_array(np.array(value, np.int64), name))

    def _value(self, what: str, name: str) -> ValueInfoProto:
        kind, rank = self.kinds[what]
        return helper.make_tensor_value_info(name, kind, [None] * rank)

    def _inline(
        self,
        nodes: list[NodeProto],
        part: onnx.ModelProto,
        prefix: str,
        given: Mapping[str, str],
        wanted: set[str] | None = None,
    ) -> Names:
        """Copy a part's nodes under names of their own; what its outputs are called."""
        graph = part.graph
        outputs = {value.name.removeprefix(OUT): value for value in graph.output}
        if wanted is not None:
            outputs = {name: value for name, value in outputs.items() if name in wanted}
        needs = needed(graph, [value.name for value in outputs.values()])
        names = {value.name: given[value.name] for value in graph.input if value.name in given}
        for weight in graph.initializer:
            if weight.name in needs.values_read:
                names[weight.name] = prefix + weight.name
                copied = TensorProto()
                copied.CopyFrom(weight)
                copied.name = names[weight.name]
                self.weights.append(copied)
        for node in needs.nodes:
            nodes.append(_renamed(node, names, prefix))
        self.kinds |= {name: _kind(value) for name, value in outputs.items()}
        for one in part.opset_import:
            self.domains[one.domain] = max(one.version, self.domains.get(one.domain, 0))
        return {name: names[value.name] for name, value in outputs.items()}

    def model(self) -> onnx.ModelProto:
        """The file, each weight once."""
        outputs = {value.name for value in self.outputs}
        nodes = _read_by_some(self.nodes, outputs)
        read = all_read(nodes) | outputs
        graph = helper.make_graph(
            nodes,
            "offramp",
            [value for name, value in self.inputs.items() if name in read],
            self.outputs,
            [weight for weight in self.weights if weight.name in read],
        )
        versions = [helper.make_opsetid(*pair) for pair in self.domains.items()]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10)
        _share_weights(model.graph)
        _bring_home(model.graph)
        return model


class Needed(NamedTuple):
    """Nodes, in order, and the values that they or their readers read."""

    nodes: list[NodeProto]
    values_read: set[str]


def needed(graph: onnx.GraphProto, outputs: Iterable[str]) -> Needed:
    """What some values of a graph depend on."""
    read, kept = set(outputs), []
    for node in reversed(graph.node):
        if read.intersection(node.output):
            kept.append(node)
            read.update(node.input)
    return Needed(kept[::-1], read)


def _made_by(part: onnx.ModelProto) -> set[str]:
    return {value.name.removeprefix(OUT) for value in part.graph.output}


def _used(part: onnx.ModelProto) -> set[str]:
    """Inputs that some output depends on."""
    return needed(part.graph, [value.name for value in part.graph.output]).values_read


def _reads(part: onnx.ModelProto) -> set[str]:
    used = _used(part)
    return {value.name for value in part.graph.input if value.name in used}


def _kind(value: ValueInfoProto) -> tuple[int, int]:
    tensor = value.type.tensor_type
    return tensor.elem_type, len(tensor.shape.dim)


def _renamed(node: NodeProto, names: Names, prefix: str) -> NodeProto:
    copied = NodeProto()
    copied.CopyFrom(node)
    copied.name = prefix + node.name
    del copied.input[:], copied.output[:], copied.metadata_props[:]
    copied.doc_string = ""
    copied.input.extend(name and names[name] for name in node.input)
    for name in node.output:
        names[name] = name and prefix + name
    copied.output.extend(names[name] for name in node.output)
    return copied


def all_read(nodes: Iterable[NodeProto]) -> set[str]:
    """What nodes and those of their bodies read."""
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
        for graph in bodies(node):
            read |= all_read(graph.node) | {value.name for value in graph.output}
    return read


def attributes(node: NodeProto) -> dict[str, Any]:
    """The options of a node by name."""
    return {one.name: helper.get_attribute_value(one) for one in node.attribute}


def bodies(node: NodeProto) -> list[onnx.GraphProto]:
    """The graphs inside a node."""
    return [item.g for item in node.attribute if item.type == onnx.AttributeProto.GRAPH]


def _read_by_some(nodes: Iterable[NodeProto], outputs: Iterable[str]) -> list[NodeProto]:
    """The nodes that outputs depend on; within bodies, too."""
    read, kept = set(outputs), list[NodeProto]()
    for node in reversed([*nodes]):
        if read.isdisjoint(node.output):
            continue
        for body in bodies(node):
            inside = _read_by_some(body.node, [value.name for value in body.output])
            del body.node[:]
            body.node.extend(inside)
        read |= all_read([node])
        kept.append(node)
    return kept[::-1]


def _share_weights(graph: onnx.GraphProto) -> None:
    """Equal weights become one, as those of all layers of an ALBERT are, but for small ones."""
    first: dict[bytes, str] = {}
    same: dict[str, str] = {}
    kept = []
    for weight in graph.initializer:
        if weight.ByteSize() < _SMALL:
            kept.append(weight)
            continue
        facts = f"{weight.data_type} {list(weight.dims)}".encode()
        key = hashlib.sha256(facts + numpy_helper.to_array(weight).tobytes()).digest()
        if key in first:
            same[weight.name] = first[key]
        else:
            first[key] = weight.name
            kept.append(weight)
    del graph.initializer[:]
    graph.initializer.extend(kept)
    read_instead(graph.node, same)


def _bring_home(graph: onnx.GraphProto) -> None:
    """Put a weight that one body alone reads into it: a run hands over all else, one by one."""
    outside = {name for node in graph.node for name in node.input}
    inside = [body for node in graph.node for body in bodies(node)]
    reads = [all_read(body.node) for body in inside]
    kept: list[TensorProto] = []
    for weight in graph.initializer:
        homes = [body for body, read in zip(inside, reads, strict=True) if weight.name in read]
        at_home = len(homes) == 1 and weight.name not in outside
        (homes[0].initializer if at_home else kept).append(weight)
    del graph.initializer[:]
    graph.initializer.extend(kept)


def read_instead(nodes: Iterable[NodeProto], other: Names) -> None:
    """Let nodes, those of bodies too, read other values instead of some."""
    for node in nodes:
        for place, name in enumerate(node.input):
            node.input[place] = other.get(name, name)
        for graph in bodies(node):
            read_instead(graph.node, other)
