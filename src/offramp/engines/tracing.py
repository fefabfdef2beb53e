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
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from offramp.backbones import Backbone, Flow
from offramp.engines.base import Exitable
from offramp.errors import ConfigError, MissingExtraError, ModelError
from offramp.exits import ExitOutput
from offramp.policies import EvidencePolicy, Policy, Rows, decide

Values = dict[str, Tensor]
Part = Callable[[Values], Values]
OUT = "out/"
_SIZES = ((3, 11), (5, 19))
"""Rows and tokens of the two batches."""
_MOVES = ("hidden", "carry")
_TURN = threading.Lock()
_RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino"}


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
    """A function of named values, with the module that holds its weights, if one does."""

    def __init__(self, run: Part, owner: object) -> None:
        super().__init__()
        if isinstance(owner, nn.Module):
            self.owner = owner
        self._run = run

    def forward(self, given: Values) -> Values:
        # a graph's output must not be one of its inputs, nor the same tensor as another output
        return {f"{OUT}{name}": leaf.clone() for name, leaf in self._run(given).items()}


def require_onnx(extra: str = "onnx") -> None:
    """Raise MissingExtraError where graphs cannot be made, or not run with an extra's runtime."""
    for package in ("onnx", "onnxscript", _RUNTIMES[extra]):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, extra) from None


@torch.no_grad()
def trace_model(model: Exitable, progress: Callable[[str], object] = lambda part: None) -> Traced:
    """The graphs of a model in fp32 on CPU, in evaluation mode.

    Args:
        progress: called with the name of each part before it is traced, which takes seconds.

    Raises ModelError for a layer or exit that cannot be traced, by number.
    """
    backbone = model.backbone
    batches = [_batch(backbone, rows, tokens) for rows, tokens in _SIZES]
    flows = [backbone.embed(batch) for batch in batches]
    progress("embedding")
    embedding = _export(_embed(backbone), batches, "the embedding", model)
    layers, outputs = [], []
    values = [_values(flow) for flow in flows]
    for number in range(1, model.depth + 1):
        progress(f"layer {number}")
        layer = _layer(model, number, flows[0].constants)
        # before the graph: an exit may work something out once and keep it
        said = [layer(given) for given in values]
        layers.append(_export(layer, values, f"layer {number} or its exit", model))
        outputs.append((_output(said[0]), _output(said[1])))
        values = [_next(given, new) for given, new in zip(values, said, strict=True)]
    return Traced(embedding, tuple(layers), tuple(outputs))


@torch.no_grad()
def trace_policy(policy: Policy, outputs: tuple[tuple[ExitOutput, ExitOutput], ...]) -> list[Any]:
    """The graph of a policy's decision after each layer; None where it reads no exit.

    The bar of an `EvidencePolicy` is an input, so that one graph serves all thresholds.

    Raises ConfigError for a policy that looks at values in Python.
    """
    graphs: list[Any] = []
    kept = [_start_of(one.scores.shape[0]) for one in outputs[0]]
    for layer, pair in enumerate(outputs, start=1):
        last = layer == len(outputs)
        if not (last or policy.reads(layer)):
            graphs.append(None)
            continue
        decision = _decision(policy, layer, last)
        given = [_of_output(one) | mine for one, mine in zip(pair, kept, strict=True)]
        if isinstance(policy, EvidencePolicy):
            given = [{**one, "bar": torch.tensor(0.5)} for one in given]
        graphs.append(_export(decision, given, f"policy '{policy.name}'", error=ConfigError))
        kept = [_prefixed("state/", _within("state/", decision(one))) for one in given]
    return graphs


def _start_of(rows: int) -> Values:
    """What a policy is started on, at the first exit it reads."""
    return {"row_id": torch.arange(rows), "length": torch.full((rows,), 7)}


def _decision(policy: Policy, layer: int, last: bool) -> Part:
    def run(given: Values) -> Values:
        state = _within("state/", given)
        if "row_id" in given:
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


def _embed(backbone: Backbone) -> Part:
    return lambda batch: _values(backbone.embed(batch))


def _layer(model: Exitable, number: int, constants: Any) -> Part:
    read = model.exit_at(number)

    def run(given: Values) -> Values:
        flow = model.backbone.layer(number, _flow(given, constants))
        output, carry = read(flow.hidden, flow.mask, _carry(given))
        said = {"hidden": flow.hidden, **_of_output(output)}
        if isinstance(carry, Tensor):
            return {**said, "carry": carry}
        return {**said, **_prefixed("carry/", carry or {})}

    return run


def _carry(given: Values) -> Any:
    return given["carry"] if "carry" in given else _within("carry/", given) or None


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
    if flow.mask is not None:
        values["mask"] = flow.mask
    return {**values, **_prefixed("shared/", flow.shared)}


def _flow(values: Values, constants: Any) -> Flow:
    rows, shared = _within("rows/", values), _within("shared/", values)
    return Flow(values["hidden"], values.get("mask"), rows, shared, constants)


def _next(given: Values, said: Values) -> Values:
    """What the next layer is given: state and memory are new, all else stays as it is."""
    stays = {name: leaf for name, leaf in given.items() if not name.startswith(_MOVES)}
    return stays | {name: leaf for name, leaf in said.items() if name.startswith(_MOVES)}


def _of_output(output: ExitOutput) -> Values:
    return {"scores": output.scores, **_prefixed("signals/", output.signals)}


def _output(values: Values) -> ExitOutput:
    return ExitOutput(values["scores"], _within("signals/", values))


def _prefixed(prefix: str, leaves: Mapping[str, Tensor]) -> Values:
    return {f"{prefix}{name}": leaf for name, leaf in leaves.items()}


def _within(prefix: str, values: Values) -> Values:
    return {n.removeprefix(prefix): leaf for n, leaf in values.items() if n.startswith(prefix)}


def _export(
    run: Part,
    given: list[Values],
    what: str,
    owner: object = None,
    error: type[ConfigError] | type[ModelError] = ModelError,
) -> Any:
    """An `onnx.ModelProto` of a part, dynamic where the two sets of values differ in size."""
    # a tensor that stands under two names would become one input
    example = {name: leaf.clone() for name, leaf in given[1].items()}
    shapes = {name: _dynamic(given[0][name], leaf) for name, leaf in example.items()}
    part = _Part(run, owner).eval()
    try:
        with _TURN, _quiet():
            program = torch.export.export(part, (example,), dynamic_shapes=(shapes,), strict=False)
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                input_names=list(example),
                output_names=list(part(example)),
                verbose=False,
            )
    except Exception as problem:  # torch raises whatever the traced code made it meet
        raise error(
            f"{what[0].upper()}{what[1:]} cannot be a graph ({_reason(problem)}). "
            "It runs with backend='torch'."
        ) from problem
    return made.model_proto  # type: ignore[union-attr]


def _reason(problem: BaseException) -> str:
    """What went wrong at first: what is raised in the end says little."""
    while problem.__cause__ is not None:
        problem = problem.__cause__
    first = str(problem).strip().split("\n")[0]
    return f"{type(problem).__name__}: {first[:200]}"


def _dynamic(one: Tensor, other: Tensor) -> dict[int, Any]:
    sizes = enumerate(zip(one.shape, other.shape, strict=True))
    return {axis: torch.export.Dim.DYNAMIC for axis, (a, b) in sizes if a != b}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says on the way; errors come as exceptions.

    Warnings and loggers are those of the whole process, so one thread at a time.
    """
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
