"""A multi-exit model and a policy as small ONNX graphs: embedding, each layer, each decision.

Every value has a name of its own, the same in all graphs: `input_ids`, `hidden`, `mask`,
`rows/<name>` and `shared/<name>` (what layers need), `scores`, `signals/<name>` and `carry...`
(what exits say and hand on), `state/<name>` and `bar` (the policy's), `leave`, `bad`, `answer`.
A graph's inputs carry these names, its outputs the same with `out/` before them.

Sizes are not told but seen: everything runs on two batches of different rows and tokens, and an
axis that differs between them is dynamic.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backbones import Backbone, Flow
from offramp.engines.base import Exitable
from offramp.errors import ConfigError, MissingExtraError, ModelError
from offramp.exits import ExitOutput
from offramp.policies import EvidencePolicy, Policy, Rows, decide

Values = dict[str, Tensor]
OUT = "out/"
_SIZES = ((3, 11), (5, 19))
"""Rows and tokens of the two batches."""


class Traced(NamedTuple):
    """Graphs of a model, and what they were traced on.

    Attributes:
        embedding: from a batch to the state before layer 1.
        layers: layer and exit 1..L.
        outputs: scores and signals of each exit on the two batches.
    """

    embedding: Any
    layers: tuple[Any, ...]
    outputs: tuple[tuple[ExitOutput, ExitOutput], ...]


class _Part(nn.Module):
    """A function of named values, with the module that holds its weights."""

    def __init__(self, run: Callable[[Values], Values], owner: nn.Module | None = None) -> None:
        super().__init__()
        self.owner = owner
        self._run = run

    def forward(self, given: Values) -> Values:
        # a graph's output must not be one of its inputs, nor the same tensor as another output
        return {f"{OUT}{name}": leaf.clone() for name, leaf in self._run(given).items()}


@dataclass(frozen=True, slots=True)
class _Names:
    """A flow and what travels with it, as named values, and back."""

    constants: Any

    def flow(self, values: Values) -> Flow:
        return Flow(
            values["hidden"],
            values.get("mask"),
            _within("rows/", values),
            _within("shared/", values),
            self.constants,
        )


def require_onnx() -> None:
    """Raise MissingExtraError where graphs cannot be made or run."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, "onnx") from None


@torch.no_grad()
def trace_model(model: Exitable, progress: Callable[[str], object] = lambda part: None) -> Traced:
    """The graphs of a model in fp32 on CPU, in evaluation mode.

    Args:
        progress: called with the name of each part before it is traced, which takes seconds.

    Raises:
        MissingExtraError: without the extra `onnx`.
        ModelError: a layer or exit that cannot be traced, by number.
    """
    require_onnx()
    backbone = model.backbone
    batches = [_batch(backbone, rows, tokens) for rows, tokens in _SIZES]
    flows = [backbone.embed(batch) for batch in batches]
    progress("embedding")
    embed = _Part(lambda given: _values(backbone.embed(given)), _owner(model))
    embedding = _export(embed, batches, "the embedding")
    layers, outputs = [], []
    values = [_values(flow) for flow in flows]
    for number in range(1, model.depth + 1):
        progress(f"layer {number}")
        part = _Part(_layer(model, number, _Names(flows[0].constants)), _owner(model))
        layers.append(_export(part, values, f"layer {number} or its exit"))
        said = [_unprefixed(part(given)) for given in values]
        outputs.append((_output(said[0]), _output(said[1])))
        values = [_next(given, new) for given, new in zip(values, said, strict=True)]
    return Traced(embedding, tuple(layers), tuple(outputs))


@torch.no_grad()
def trace_policy(policy: Policy, outputs: tuple[tuple[ExitOutput, ExitOutput], ...]) -> list[Any]:
    """The graph of a policy's decision after each layer; None where it reads no exit.

    The bar of an `EvidencePolicy` is an input, so that one graph serves all thresholds.

    Raises ConfigError for a policy that looks at values in Python.
    """
    depth = len(outputs)
    graphs: list[Any] = []
    states: list[Values] | None = None
    for layer, output in enumerate(outputs, start=1):
        last = layer == depth
        if not (last or policy.reads(layer)):
            graphs.append(None)
            continue
        part = _Part(_decision(policy, layer, last, started=states is not None))
        given = [
            _of_output(one) | _policy_inputs(policy, state, one)
            for one, state in zip(output, states or [{}, {}], strict=True)
        ]
        graphs.append(_export(part, given, f"policy '{policy.name}'", ConfigError))
        states = [_states(_unprefixed(part(one))) for one in given]
    return graphs


def _policy_inputs(policy: Policy, state: Values, output: ExitOutput) -> Values:
    inputs = dict(state)
    if isinstance(policy, EvidencePolicy):
        inputs["bar"] = torch.tensor(0.5)
    if not state:
        rows = output.scores.shape[0]
        inputs["row_id"] = torch.arange(rows)
        inputs["length"] = torch.full((rows,), 7)
    return inputs


def _decision(policy: Policy, layer: int, last: bool, started: bool) -> Callable[[Values], Values]:
    def run(given: Values) -> Values:
        state = _within("state/", given)
        if not started:
            state = policy.start(Rows(given["row_id"], given["length"]))
        decision = decide(policy, state, layer, _output(given), last, given.get("bar"))
        bad = decision.bad
        return {
            "leave": decision.leave,
            "bad": torch.zeros_like(decision.leave) if bad is None else bad,
            "answer": decision.answer.float(),
            **_prefixed("state/", decision.state),
        }

    return run


def _layer(model: Exitable, number: int, names: _Names) -> Callable[[Values], Values]:
    read = model.exit_at(number)

    def run(given: Values) -> Values:
        flow = model.backbone.layer(number, names.flow(given))
        output, carry = read(flow.hidden, flow.mask, _carry(given))
        said = {"hidden": flow.hidden, **_of_output(output)}
        if isinstance(carry, Tensor):
            return {**said, "carry": carry}
        return {**said, **_prefixed("carry/", carry or {})}

    return run


def _carry(given: Values) -> Any:
    return given["carry"] if "carry" in given else _within("carry/", given) or None


def _owner(model: Exitable) -> nn.Module | None:
    return model if isinstance(model, nn.Module) else None


def _batch(backbone: Backbone, rows: int, tokens: int) -> Values:
    """Rows of different lengths, so that a mask is made and kept."""
    one = backbone.example(tokens, "cpu")
    batch = {name: leaf.repeat(rows, *[1] * (leaf.dim() - 1)) for name, leaf in one.items()}
    if "input_ids" not in batch:
        return batch
    # ids that tell positions apart where these are counted from padding
    batch["input_ids"] = batch["input_ids"] + 5
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][1:, tokens // 2 :] = 0
    return batch


def _values(flow: Flow) -> Values:
    values = {"hidden": flow.hidden, **_prefixed("rows/", flow.inputs)}
    return (
        values
        | ({} if flow.mask is None else {"mask": flow.mask})
        | _prefixed("shared/", flow.shared)
    )


def _next(values: Values, new: Values) -> Values:
    """What the next layer is given: the newest of everything but what exits said."""
    kept = {n: leaf for n, leaf in new.items() if n == "hidden" or n.startswith("carry")}
    return {**values, **kept}


def _of_output(output: ExitOutput) -> Values:
    return {"scores": output.scores, **_prefixed("signals/", output.signals)}


def _output(values: Values) -> ExitOutput:
    return ExitOutput(values["scores"], _within("signals/", values))


def _states(values: Values) -> Values:
    return {name: leaf for name, leaf in values.items() if name.startswith("state/")}


def _prefixed(prefix: str, leaves: Mapping[str, Tensor]) -> Values:
    return {f"{prefix}{name}": leaf for name, leaf in leaves.items()}


def _within(prefix: str, values: Values) -> Values:
    return {n.removeprefix(prefix): leaf for n, leaf in values.items() if n.startswith(prefix)}


def _unprefixed(values: Values) -> Values:
    return _within(OUT, values)


def _export(
    part: _Part,
    given: list[Values],
    what: str,
    error: type[ConfigError] | type[ModelError] = ModelError,
) -> Any:
    """An `onnx.ModelProto` of a part, dynamic where the two sets of values differ in size."""
    # a tensor that stands under two names would become one input
    example = {name: leaf.clone() for name, leaf in given[1].items()}
    shapes = {name: _dynamic(given[0][name], leaf) for name, leaf in example.items()}
    try:
        with _quiet():
            program = torch.export.export(
                part.eval(), (example,), dynamic_shapes=(shapes,), strict=False
            )
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=list(example),
                output_names=list(part(example)),
                verbose=False,
            )
    except Exception as problem:  # torch raises whatever the traced code made it meet
        reason = str(problem).strip().split("\n")[0][:200]
        raise error(
            f"{what[0].upper()}{what[1:]} cannot be a graph ({type(problem).__name__}: "
            f"{reason}). Use backend='torch'."
        ) from problem
    return made.model_proto  # type: ignore[union-attr]


def _dynamic(one: Tensor, other: Tensor) -> dict[int, Any]:
    sizes = enumerate(zip(one.shape, other.shape, strict=True))
    return {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in sizes if a != b}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says on the way; errors come as exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
