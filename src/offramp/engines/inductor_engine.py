"""The inductor engine: torch runs the layers as graphs that `torch.compile` makes of them.

Layers that are alike share a graph, whatever their weights, and so do batches of all sizes and
lengths: there is one for one row and one for more, each again for those with padding, and a few for
shapes that torch takes for special, such as as many rows as tokens. A graph is made when it is
first needed, which takes a quarter of a minute or so; torch keeps it on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import nn

from offramp.backbones import Batch
from offramp.engines.base import Exitable
from offramp.engines.torch_engine import TorchEngine
from offramp.errors import ConfigError
from offramp.exits import ExitOutput

GRAPHS = 32
"""As many may an engine have: some for each kind of layers, of which models have one to three."""
_NUMBERS = count()


class InductorEngine(TorchEngine):
    """Runs a multi-exit model as `TorchEngine` does, its layers compiled.

    Scores differ from those of `TorchEngine` in the last bits, in bf16 and fp16 by more: there a
    point must be chosen on it. Hooks that are put on a layer once its graph is made are not seen.

    Raises:
        ConfigError: a backbone that cannot be told how to run its layers; on a call, layers that
            cannot be compiled here.
    """

    name = "inductor"
    straightens = False

    def __init__(self, model: Exitable) -> None:
        if not hasattr(model.backbone, "through"):
            raise ConfigError(
                f"{type(model.backbone).__name__} has no `through`, so its layers cannot be "
                "compiled. Use backend torch."
            )
        super().__init__(model)
        self.backbone = model.backbone.through(_compiled())

    def _every(self, batch: Batch) -> tuple[ExitOutput, ...]:
        outputs, carry = [], None
        flow = self.backbone.embed(batch)
        for layer, read in enumerate(self.exits, start=1):
            flow = self.backbone.layer(layer, flow)
            output, carry = read(flow.hidden, flow.mask, carry)
            outputs.append(output)
        return tuple(outputs)


def _compiled() -> Callable[[nn.Module], Callable[..., Any]]:
    """What runs a layer by a graph.

    Torch keeps graphs by the code that they are of, and few for each: so every engine has a code of
    its own. Without room for another graph it would go on without, layer by layer, and slowly;
    with `fullgraph` it says so.
    """
    from torch import _dynamo as dynamo

    limit: dict[str, Any] = {"recompile_limit": GRAPHS}
    if limit.keys() - signature(torch.compile).parameters.keys():  # before torch 2.13
        limit, dynamo.config.recompile_limit = {}, GRAPHS
    own = _run.__code__.replace(co_name=f"{_run.__name__}_{next(_NUMBERS)}")
    graphs = torch.compile(FunctionType(own, globals()), dynamic=True, fullgraph=True, **limit)

    def run(layer: nn.Module, hidden: torch.Tensor, **given: Any) -> Any:
        try:
            return graphs(layer, hidden, given)
        except (dynamo.exc.TorchDynamoException, dynamo.exc.FailOnRecompileLimitHit) as problem:
            why = " ".join(str(problem).strip().splitlines()[:2]).rstrip(".")
            raise ConfigError(
                f"The layers cannot be compiled here: {why}. Compiling takes a C++ compiler on a "
                "CPU, such as g++, and Triton on a GPU. Or use backend torch."
            ) from problem

    return partial(partial, run)


def _run(layer: nn.Module, hidden: torch.Tensor, given: Mapping[str, Any]) -> Any:
    return layer(hidden, **given)
