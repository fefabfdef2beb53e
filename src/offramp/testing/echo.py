"""A model that answers with the row it was asked about, and a policy that obeys a script.

Together they show whether an engine's bookkeeping ever hands a row another row's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pydantic import Field, PrivateAttr, SerializeAsAny
from torch import Tensor, nn

from offramp.backbones import Batch, Flow, join_rows, take_rows
from offramp.exits import ExitOutput, Pooling
from offramp.policies import Policy, Rows, State, Step

_WANTED = "scripted.layer"


class Scripted(Policy):
    """Runs another policy in full and overrides only its decision to leave.

    For tests, and for measuring a given histogram of exits with heads and policy at work.

    Args:
        layers: the exit layer (1-based) of the row with id 0, 1, 2, ...
        inner: the policy that does the work.
    """

    name = "scripted"
    layers: tuple[int, ...] = Field(min_length=1)
    inner: SerializeAsAny[Policy]
    _layers: Tensor = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._layers = torch.tensor(self.layers)

    def start(self, rows: Rows) -> State:
        layers = self._layers.to(rows.ids.device).index_select(0, rows.ids)
        return {**self.inner.start(rows), _WANTED: layers}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        own = {name: leaf for name, leaf in state.items() if name != _WANTED}
        _, answer, own = self.inner.step(own, layer, output)
        own[_WANTED] = state[_WANTED]
        return Step(state[_WANTED] <= layer, answer, own)


class EchoBackbone:
    """Layers that count themselves; the hidden state of a row is (its id, layers run).

    The row's id is its first token. It also travels in the mask and in the inputs, and every
    layer checks that the three still agree.
    """

    pooler: nn.Linear | None = None
    view: nn.Module | None = None
    reads = "text"
    poolings: tuple[Pooling, ...] = ("cls",)
    max_length = None

    def __init__(self, depth: int, shared: bool = False) -> None:
        self.depth = depth
        self.shared_weights = shared
        self.layers = nn.ModuleList([nn.Identity() for _ in range(1 if shared else depth)])

    def example(self, tokens: int, device: torch.device | str) -> Batch:
        return {"input_ids": torch.zeros((1, tokens), dtype=torch.long, device=device)}

    def embed(self, batch: Batch) -> Flow:
        ids = batch["input_ids"][:, :1]
        hidden = torch.stack((ids.double(), torch.zeros_like(ids, dtype=torch.double)), dim=-1)
        return Flow(hidden, mask=ids, inputs={"id": ids})

    def layer(self, number: int, flow: Flow) -> Flow:
        ids = flow.hidden[:, :, 0]
        others = (flow.mask, flow.inputs["id"])
        if any(other is None or not ids.equal(other.double()) for other in others):
            raise AssertionError(f"Before layer {number} the rows of one flow are mixed up.")
        hidden = flow.hidden + torch.tensor((0.0, 1.0), dtype=torch.double)
        return flow._replace(hidden=hidden)

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        return take_rows(flow, rows)

    def join(self, flows: Sequence[Flow]) -> Flow:
        return join_rows(flows)

    def width(self, number: int) -> int:
        return 2

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden[:, 0]

    def answer(self, pooled: Tensor) -> Tensor:
        return pooled

    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return hidden[:, 0].float()


class EchoModel:
    """Answers every row with scores (its id, layers run); implements `engines.Exitable`.

    Ids below 2**24 are exact. The carry holds the ids too, and every exit checks them.

    Args:
        depth: number of layers.
        shared: all layers share one block.
    """

    def __init__(self, depth: int = 12, shared: bool = False) -> None:
        self.backbone = EchoBackbone(depth, shared)

    @property
    def depth(self) -> int:
        return self.backbone.depth

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]:
        return self._echo

    def all_exits(self, batch: Batch) -> tuple[ExitOutput, ...]:
        ids = batch["input_ids"][:, :1].float()
        layers = range(1, self.depth + 1)
        return tuple(
            ExitOutput(torch.cat((ids, torch.full_like(ids, layer)), dim=1)) for layer in layers
        )

    def _echo(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        scores = self.backbone.head(hidden)
        if carry is not None and not carry["id"].equal(scores[:, 0]):
            raise AssertionError("The memory between exits belongs to other rows.")
        return ExitOutput(scores), {"id": scores[:, 0]}


def echo_batch(ids: Sequence[int], tokens: int = 1) -> Batch:
    """Rows of `tokens` tokens, each the row's id."""
    return {"input_ids": torch.tensor(list(ids)).unsqueeze(1).repeat(1, tokens)}
