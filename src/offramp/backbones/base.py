"""A model cut into embedding, layers and rest, so that layers run one at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from offramp.errors import ModelError
from offramp.exits import Pooling

Batch = Mapping[str, Tensor]
"""What a processor gives: input_ids, attention_mask, perhaps token_type_ids, (rows, tokens); or
pixel_values, (rows, channels, height, width)."""


class Flow(NamedTuple):
    """Rows on their way through the layers.

    Attributes:
        hidden: (rows, tokens, width), the state after the layers run so far; (rows, width, y, x)
            in a convolutional network.
        mask: (rows, tokens), 1 = real token, or None where every token is real.
        inputs: what the layers need besides the hidden state; each tensor in it has the row
            as its first axis.
        shared: tensors that the layers need and that are the same for all rows.
        constants: what else the layers need; it does not depend on rows or tokens, and is opaque
            to everyone but the backbone that made it.
    """

    hidden: Tensor
    mask: Tensor | None
    inputs: Mapping[str, Tensor]
    shared: Mapping[str, Tensor] = {}
    constants: Any = None


@runtime_checkable
class Backbone(Protocol):
    """The only code that knows a model's attribute names.

    `layer(i, flow)` for i in 1..depth after `embed` equals the stock forward: difference
    exactly 0 in fp32 at equal shape. `offramp.testing.check_backbone` checks that.
    """

    depth: int
    layers: nn.ModuleList
    """Their modules, fewer than `depth` where layers share weights."""
    shared_weights: bool
    reads: str
    """`text` or `image`."""
    poolings: tuple[Pooling, ...]
    """Those that make sense for its states; the first one is the plainest."""
    pooler: nn.Linear | None
    view: nn.Module | None
    """What exits read of a state: pre-norm layers leave a sum, which the model norms at its end;
    a convolution leaves a map, whose pixels are tokens. None where they read it as it is."""

    @property
    def max_length(self) -> int | None:
        """Longest input in tokens, special tokens included, or None where nothing limits it."""
        ...

    def example(self, tokens: int, device: torch.device | str) -> Batch:
        """One row of so many tokens, which images do not have, with all that the model reads but
        a mask."""
        ...

    def embed(self, batch: Batch) -> Flow:
        """Everything before layer 1."""
        ...

    def layer(self, number: int, flow: Flow) -> Flow:
        """Run layer `number` (1-based) on all rows of the flow."""
        ...

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        """Keep only `rows` (indices, int64), in that order."""
        ...

    def join(self, flows: Sequence[Flow]) -> Flow:
        """The rows of several flows of one padded length, one after the other; with one block
        shared by all layers they may have run different ones."""
        ...

    def width(self, number: int) -> int:
        """Width of the hidden state after layer `number`."""
        ...

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The model's own pooled vector of a viewed state: what its head reads, (rows, width)."""
        ...

    def answer(self, pooled: Tensor) -> Tensor:
        """The model's own scores from its own pooled vector, (rows, classes)."""
        ...

    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """The model's own answer from the last hidden state as it is, (rows, classes)."""
        ...


def example_rows(
    backbone: Backbone,
    rows: int,
    tokens: int,
    device: torch.device | str = "cpu",
    padded: bool = True,
) -> dict[str, Tensor]:
    """A batch; if padded, its texts differ in length, so that a mask is made and kept."""
    one = backbone.example(tokens, device)
    batch = {name: leaf.repeat(rows, *[1] * (leaf.dim() - 1)) for name, leaf in one.items()}
    if "input_ids" not in batch:
        return batch
    # ids that tell positions apart where these are counted from padding
    batch["input_ids"] = batch["input_ids"] + 5
    if padded:
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        batch["attention_mask"][rows // 2 :, tokens // 2 :] = 0
    return batch


def take_rows(flow: Flow, rows: Tensor) -> Flow:
    """`Backbone.take` for flows whose every tensor has the row as first axis."""
    return Flow(
        hidden=flow.hidden.index_select(0, rows),
        mask=None if flow.mask is None else flow.mask.index_select(0, rows),
        inputs={name: leaf.index_select(0, rows) for name, leaf in flow.inputs.items()},
        shared=flow.shared,
        constants=flow.constants,
    )


def join_rows(flows: Sequence[Flow]) -> Flow:
    """`Backbone.join` for flows whose every tensor has the row as first axis.

    Rows without a mask get one of ones beside rows that have one. Raises ModelError where a flow
    lacks anything else that another has.
    """
    if len(flows) == 1:
        return flows[0]
    fullest = max(flows, key=lambda flow: len(flow.inputs))
    names = dict.fromkeys(name for flow in flows for name in flow.inputs)
    masked = [flow.mask for flow in flows if flow.mask is not None]
    return Flow(
        hidden=torch.cat([flow.hidden for flow in flows]),
        mask=torch.cat([_mask(flow, masked[0]) for flow in flows]) if masked else None,
        inputs={name: torch.cat([_input(flow, name, fullest) for flow in flows]) for name in names},
        shared=fullest.shared,
        constants=fullest.constants,
    )


def _mask(flow: Flow, like: Tensor) -> Tensor:
    rows = flow.hidden.shape[0]
    return like.new_ones((rows, *like.shape[1:])) if flow.mask is None else flow.mask


def _input(flow: Flow, name: str, fullest: Flow) -> Tensor:
    """What the layers need of the rows of `flow`, in the form that `fullest` has."""
    if name in flow.inputs:
        return flow.inputs[name]
    rows = flow.hidden.shape[0]
    if name in flow.shared:  # what all rows of a flow share is each row's own in a flow of one
        return flow.shared[name].expand(rows, *flow.shared[name].shape[1:])
    if name not in fullest.inputs or not name.startswith("attention_mask"):
        raise ModelError(f"Flows cannot be joined: one has '{name}' and another has not.")
    like = fullest.inputs[name]
    # nothing is masked: 0 is added to attention, or True and 1 let it pass
    neutral = 0 if like.is_floating_point() else 1
    return like.new_full((rows, *like.shape[1:]), neutral)
