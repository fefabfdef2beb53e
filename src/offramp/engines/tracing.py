"""A multi-exit model and a policy as small ONNX graphs: embedding, each layer, each decision.

Every value has a name of its own, the same in all graphs: `input_ids`, `hidden`, `mask`,
`rows/<name>` and `shared/<name>` (what layers need), `scores`, `signals/<name>` and `carry...`
(what exits say and hand on), `state/<name>` and `bar` (the policy's), `leave`, `bad`, `answer`.
A graph's inputs carry these names, its outputs the same with `out/` before them.

Sizes are not told but seen: everything runs on two batches of different rows and tokens, and an
axis that differs between them is dynamic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from offramp.backbones import Flow, example_rows
from offramp.engines.alike import Values
from offramp.engines.base import Exitable
from offramp.engines.exporting import BAR, Exports, Part
from offramp.engines.masks import Embed, with_thin_masks
from offramp.errors import ConfigError, MissingExtraError
from offramp.exits import ExitOutput
from offramp.policies import Policy, Rows, bars_of, decide

_SIZES = ((3, 11), (2, 150))
"""Rows and tokens of the two batches. What a layer does only beyond the longer one, as with a
larger window in Python, no graph can know."""
_MOVES = ("hidden", "carry")
_OLDEST = 1, 24
"""Of ONNX Runtime: with all of opset 23."""
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


def require_onnx(extra: str = "onnx") -> None:
    """Raise MissingExtraError where graphs cannot be made, or not run with an extra's runtime, and
    ConfigError where that is too old."""
    for package in ("onnx", "onnxscript", _RUNTIMES[extra]):
        try:
            __import__(package)
        except ImportError:
            raise MissingExtraError(package, extra) from None
    if extra == "onnx":
        import onnxruntime

        found = onnxruntime.__version__
        if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < _OLDEST:
            oldest = ".".join(map(str, _OLDEST))
            raise ConfigError(
                f"onnxruntime {found} cannot run these files; they need {oldest} or newer. "
                "Install it with: pip install --upgrade 'offramp[onnx]'"
            )


@torch.no_grad()
def trace_model(model: Exitable, progress: Callable[[str], object] = lambda part: None) -> Traced:
    """The graphs of a model in fp32 on CPU, in evaluation mode.

    Args:
        progress: called with the name of each part before it is traced, which takes seconds.

    Raises ModelError for a layer or exit that cannot be traced, by number.
    """
    backbone = model.backbone
    most = backbone.max_length
    batches = [example_rows(backbone, rows, min(tokens, most or tokens)) for rows, tokens in _SIZES]
    longest = None if most is None else example_rows(backbone, 2, most)
    embed = with_thin_masks(backbone, batches, longest)
    flows = [embed(batch) for batch in batches]
    exports = Exports(model)
    progress("embedding")
    embedding, _ = exports.graph(_embedding(embed), batches, "the embedding")
    layers, outputs = [], []
    values = [_values(flow) for flow in flows]
    for number in range(1, model.depth + 1):
        progress(f"layer {number}")
        layer = _layer(model, number, flows[0].constants)
        layer(values[0])  # an exit may work something out once and keep it
        graph, said = exports.graph(layer, values, f"layer {number} or its exit")
        layers.append(graph)
        outputs.append((_output(said[0]), _output(said[1])))
        values = [_next(given, new) for given, new in zip(values, said, strict=True)]
    return Traced(embedding, tuple(layers), tuple(outputs))


@torch.no_grad()
def trace_policy(
    policy: Policy,
    outputs: tuple[tuple[ExitOutput, ExitOutput], ...],
    deepest: int | None = None,
) -> list[Any]:
    """The graph of a policy's decision after each layer; None where it reads no exit.

    The bar of an `EvidencePolicy` after this layer is an input, so that one graph serves all
    thresholds.

    Args:
        deepest: the last layer that is asked for; before full depth some rows may want to go on.

    Raises ConfigError for a policy that looks at values in Python.
    """
    graphs: list[Any] = []
    exports = Exports(error=ConfigError)
    bars = bars_of(policy, len(outputs))
    kept = [_start_of(one.scores.shape[0]) for one in outputs[0]]
    for layer, pair in enumerate(outputs[:deepest], start=1):
        last = layer == len(outputs)
        if not (layer == deepest or last or policy.reads(layer)):
            graphs.append(None)
            continue
        decision = _decision(policy, layer, last)
        given = [_of_output(one) | mine for one, mine in zip(pair, kept, strict=True)]
        if bars[layer - 1] is not None:
            given = [{**one, BAR: torch.tensor(0.5)} for one in given]
        graph, said = exports.graph(decision, given, f"policy '{policy.name}'")
        graphs.append(graph)
        kept = [_prefixed("state/", _within("state/", one)) for one in said]
    return graphs


def _start_of(rows: int) -> Values:
    """What a policy is started on, at the first exit it reads."""
    return {"row_id": torch.arange(rows), "length": torch.full((rows,), 7)}


def _decision(policy: Policy, layer: int, last: bool) -> Part:
    def run(given: Values) -> Values:
        state = _within("state/", given)
        if "row_id" in given:
            state = policy.start(Rows(given["row_id"], given["length"]))
        # a graph cannot look at values
        decision = decide(policy, state, layer, _output(given), last, given.get(BAR), look=False)
        bad = decision.bad
        return {
            "leave": decision.leave,
            "bad": torch.zeros_like(decision.leave) if bad is None else bad,
            "answer": decision.answer.float(),
            **_prefixed("state/", decision.state),
        }

    return run


def _embedding(embed: Embed) -> Part:
    return lambda batch: _values(embed(batch))


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
