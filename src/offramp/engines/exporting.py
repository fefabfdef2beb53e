"""Parts of a model as ONNX graphs; of parts that do the same one is traced.

Tracing takes seconds a part and optimising a graph a fraction of one. So a traced graph is kept
without its weights, as a mould for the parts that do the same with other ones: the layers of an
encoder, those of another model of this kind, a policy's decision after another layer. Constants
are folded after the weights are in, and what comes out is compared with the part itself.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from offramp.engines.alike import Course, Values, follow
from offramp.errors import ConfigError, ModelError
from offramp.policies import EvidencePolicy, Policy, has_own_bars

Part = Callable[[Values], Values]
OUT = "out/"
BAR, BARS = "bar", "bars"
"""Inputs: a threshold for all exits, float (), or one for each exit before the last, float
(exits,)."""
_TURN = threading.Lock()


def bars_given(policy: Policy, depth: int) -> dict[str, float | tuple[float, ...]]:
    """The thresholds of a policy by the input that takes them: one, or one for each exit before
    the last."""
    if isinstance(policy, EvidencePolicy) and has_own_bars(policy):
        return {BARS: tuple(policy.bar_at(layer) for layer in range(1, depth))}
    return {BAR: getattr(policy, "bar", 0.0)}


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


_MOULDS: dict[str, Any] = {}
"""Graphs traced in this process, by what they do: each an `onnx_ir.Model`, not optimised, in which
the weight that is read first is `weight.0` and holds nothing, and so on."""
_MOST_MOULDS = 256


class Exports:
    """Makes graphs; of parts that do the same, one is traced and the others are made of it.

    Args:
        owner: of the weights, if they have one.
        error: what a part that cannot be traced raises.
    """

    def __init__(
        self,
        owner: object = None,
        error: type[ConfigError] | type[ModelError] = ModelError,
    ) -> None:
        self._owner = owner
        self._error = error
        self._weights = _named_weights(owner)
        self._names = {id(leaf): name for name, leaf in self._weights.items()}

    def graph(self, run: Part, given: list[Values], what: str) -> tuple[Any, list[Values]]:
        """An `onnx.ModelProto` of a part, dynamic where the two sets of values differ in size,
        and what the part says to each set."""
        try:
            courses = [follow(run, one, self._names) for one in given]
            with _TURN, _quiet():
                graph = self._of_another(courses, given)
                if graph is None:
                    graph = self._anew(run, courses, given)
        except Exception as problem:  # torch raises whatever the traced code made it meet
            raise self._error(
                f"{what[0].upper()}{what[1:]} cannot be a graph ({_reason(problem)}). "
                "It runs with backend='torch'."
            ) from problem
        return graph, [course.said for course in courses]

    def _anew(self, run: Part, courses: list[Course], given: list[Values]) -> Any:
        program = _trace(_Part(run, self._owner).eval(), given)
        self._keep(program.model, courses)
        program.optimize()
        return program.model_proto

    def _keep(self, model: Any, courses: list[Course]) -> None:
        """Make a mould of a graph that shows each weight that was read, as it is, once."""
        order = {id(leaf): place for place, leaf in enumerate(courses[0].weights)}
        ids = {name: id(self._weights.get(name)) for name in model.graph.initializers}
        places = {name: order[own] for name, own in ids.items() if own in order}
        if sorted(places.values()) != list(range(len(order))):
            return
        mould = model.clone()
        for name, place in places.items():
            value = mould.graph.initializers[name]
            value.name, value.const_value = f"weight.{place}", None
        if len(_MOULDS) >= _MOST_MOULDS:
            _MOULDS.clear()
        _MOULDS[_key(courses)] = mould

    def _of_another(self, courses: list[Course], given: list[Values]) -> Any:
        """The graph of a part that did the same, with this one's weights; None if none did."""
        mould = _MOULDS.get(_key(courses))
        if mould is None:
            return None
        try:
            graph = self._filled(mould, courses[0].weights)
            pairs = zip(given, courses, strict=True)
            same = all(_says(graph, one, course.said) for one, course in pairs)
        except Exception:  # whatever it was: there is the slow way
            return None
        return graph if same else None

    def _filled(self, mould: Any, weights: tuple[Tensor, ...]) -> Any:
        import onnx_ir

        program = torch.onnx.ONNXProgram(mould.clone(), None)
        for place, leaf in enumerate(weights):
            value = program.model.graph.initializers[f"weight.{place}"]
            value.name = self._names[id(leaf)]
            value.const_value = onnx_ir.tensor(leaf.detach(), name=value.name)
        program.optimize()
        return program.model_proto


def _named_weights(owner: object) -> dict[str, Tensor]:
    """Parameters and buffers under all the names that they have in a `_Part`."""
    if not isinstance(owner, nn.Module):
        return {}
    named = [
        *owner.named_parameters("owner", remove_duplicate=False),
        *owner.named_buffers("owner", remove_duplicate=False),
    ]
    return dict(named)


def _key(courses: list[Course]) -> str:
    return "\n".join(course.steps for course in courses)


def _trace(part: nn.Module, given: list[Values]) -> Any:
    """A `torch.onnx.ONNXProgram` of a part, with weights as they are."""
    # a tensor that stands under two names would become one input
    example = {name: leaf.clone() for name, leaf in given[1].items()}
    shapes = {name: _dynamic(given[0][name], leaf) for name, leaf in example.items()}
    from offramp.engines.attention import translations  # needs an extra

    program = torch.export.export(part, (example,), dynamic_shapes=(shapes,), strict=False)
    return torch.onnx.export(
        program,
        (),
        dynamo=True,
        input_names=list(example),
        output_names=list(part(example)),
        verbose=False,
        optimize=False,
        custom_translation_table=translations(program),
    )


def _says(graph: Any, given: Values, said: Values) -> bool:
    """Whether a graph gives the same answers, but for rounding and where tokens are padding: one
    that sees no other gets a state that each runtime makes up."""
    from onnx.reference import ReferenceEvaluator

    mask = given.get("mask")

    def real(leaf: Tensor) -> Tensor:
        padded = mask is not None and leaf.shape[:2] == mask.shape
        return leaf[mask.bool()] if padded else leaf  # type: ignore[union-attr]

    feed = {name: leaf.numpy() for name, leaf in given.items()}
    ours = ReferenceEvaluator(graph).run([f"{OUT}{name}" for name in said], feed)
    pairs = zip(ours, said.values(), strict=True)
    return all(_near(real(torch.as_tensor(one)), real(leaf)) for one, leaf in pairs)


def _near(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.double(), theirs.double()
    size = theirs.nan_to_num(0, 0, 0).abs().max().item()
    return torch.allclose(ours, theirs, rtol=0, atol=1e-4 * size, equal_nan=True)


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
