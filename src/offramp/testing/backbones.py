"""What every backbone must keep: the layers, run one at a time, are the stock model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from offramp.backbones import Backbone, Batch, Flow, make_backbone
from offramp.testing.reference import ensure

_ROWS, _TOKENS = 6, 14
BAND = 1e-5
"""How far fp32 scores of a row may differ between shapes; measured 2e-6, with head-room."""


@torch.inference_mode()
def check_backbone(
    stock: PreTrainedModel, cut: Callable[[PreTrainedModel], Backbone] = make_backbone
) -> None:
    """Check that a stock classifier, cut into layers, gives exactly what it gives whole.

    Args:
        stock: a classifier in evaluation mode, of an architecture that is registered.
        cut: what makes a backbone of it.

    Raises:
        AssertionError: saying where they differ.
    """
    name = type(stock).__name__
    ensure(not stock.training, f"{name} is in training mode; call eval() first.")
    batches = dict(_batches(stock))
    # the first request for hidden states leaves transformers' own hooks behind
    stock(**next(iter(batches.values())), output_hidden_states=True)
    before = _portrait(stock)
    backbone = cut(stock)
    for kind, batch in batches.items():
        _check_stepping(stock, backbone, batch, f"{name}, {kind}")
        _check_take(stock, backbone, batch, f"{name}, {kind}")
        _check_join(backbone, batch, f"{name}, {kind}")
    _check_join_with_a_mask(stock, backbone, batches, name)
    _check_threads(backbone, [*batches.values()] * 4, name)
    ensure(_portrait(stock) == before, f"{name}: cutting or running it changes the stock model.")


def _batches(stock: PreTrainedModel) -> Iterator[tuple[str, Batch]]:
    config = stock.config
    draw = torch.Generator().manual_seed(0)
    if stock.main_input_name == "pixel_values":
        shape = (_ROWS, config.num_channels, config.image_size, config.image_size)
        yield "pixels", {"pixel_values": torch.randn(shape, generator=draw).to(stock.device)}
        return
    ids = torch.randint(config.vocab_size // 2, config.vocab_size, (_ROWS, _TOKENS), generator=draw)
    ids = ids.to(stock.device)
    yield "no mask", {"input_ids": ids}
    yield "a mask of ones", {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    lengths = torch.tensor((_TOKENS, 1, 2, 5, 9, _TOKENS - 1), device=ids.device)
    mask = (torch.arange(_TOKENS, device=ids.device) < lengths.unsqueeze(1)).long()
    padded = torch.where(mask == 1, ids, config.pad_token_id or 0)
    yield "padded", {"input_ids": padded, "attention_mask": mask}


def _hidden_states(stock: PreTrainedModel, batch: Batch, depth: int) -> list[Tensor]:
    """The stock model's hidden states: before layer 1, after layer 1, ..., after layer L."""
    states = stock(**batch, output_hidden_states=True).hidden_states
    # ALBERT reports every layer of a group; a layer of ours is a pass through the group
    stride, rest = divmod(len(states) - 1, depth)
    ensure(rest == 0, f"{type(stock).__name__} has {len(states)} states for {depth} layers.")
    return list(states[::stride])


def _check_stepping(stock: PreTrainedModel, backbone: Backbone, batch: Batch, who: str) -> None:
    wanted = _hidden_states(stock, batch, backbone.depth)
    flow = backbone.embed(batch)
    _exactly(flow.hidden, wanted[0], f"{who}: the embedding")
    for number in range(1, backbone.depth + 1):
        flow = backbone.layer(number, flow)
        viewed = flow.hidden if backbone.view is None else backbone.view(flow.hidden)
        # some models report their last state normed
        normed = number == backbone.depth and viewed.equal(wanted[number])
        state = viewed if normed else flow.hidden
        _exactly(state, wanted[number], f"{who}: the hidden state after layer {number}")
        width = backbone.width(number)
        ensure(
            viewed.shape[-1] == width,
            f"{who}: width({number}) says {width}, the hidden state has {viewed.shape[-1]}.",
        )
    _exactly(
        backbone.head(flow.hidden, flow.mask), stock(**batch).logits, f"{who}: the head's answer"
    )


def _check_take(stock: PreTrainedModel, backbone: Backbone, batch: Batch, who: str) -> None:
    """Rows taken between any two layers go on as if they had been alone all the time."""
    chosen = torch.tensor((4, 0, 3), device=stock.device)
    alone = stock(**{name: value[chosen] for name, value in batch.items()}).logits
    for after in range(backbone.depth):
        flow = backbone.embed(batch)
        for number in range(1, after + 1):
            flow = backbone.layer(number, flow)
        part = backbone.take(flow, chosen)
        _exactly(part.hidden, flow.hidden[chosen], f"{who}: take() after layer {after}")
        for number in range(after + 1, backbone.depth + 1):
            part = backbone.layer(number, part)
        gap = (backbone.head(part.hidden, part.mask) - alone).abs().max().item()
        ensure(
            gap <= BAND * max(1.0, alone.abs().max().item()),
            f"{who}: rows taken after layer {after} end {gap:.1e} away from their own answer.",
        )


def _check_join(backbone: Backbone, batch: Batch, who: str) -> None:
    """Takes, joined between any two layers, go on as the whole, difference 0."""
    order = torch.tensor((3, 0, 5, 1, 2, 4), device=next(iter(batch.values())).device)
    whole = backbone.embed({name: value[order] for name, value in batch.items()})
    flow = backbone.embed(batch)
    for number in range(1, backbone.depth + 1):
        flow = backbone.join([backbone.take(flow, part) for part in order.split([1, 3, 2])])
        _exactly(flow.hidden, whole.hidden, f"{who}: takes joined before layer {number}")
        flow, whole = backbone.layer(number, flow), backbone.layer(number, whole)
        _exactly(flow.hidden, whole.hidden, f"{who}: layer {number} of takes that were joined")
        flow = backbone.take(flow, order.argsort())


def _check_join_with_a_mask(
    stock: PreTrainedModel, backbone: Backbone, batches: dict[str, Batch], who: str
) -> None:
    """Rows with no mask may join rows with one, and the other way round; one row, many."""
    if "padded" not in batches:
        return
    one = {name: value[3:4] for name, value in batches["padded"].items()}
    parts = [batches["no mask"], batches["padded"], one]
    wanted = torch.cat([stock(**part).logits for part in parts])
    for turned in (False, True):
        flows = [backbone.embed(part) for part in parts]
        flow = backbone.join(flows[::-1] if turned else flows)
        for number in range(1, backbone.depth + 1):
            flow = backbone.layer(number, flow)
        logits = backbone.head(flow.hidden, flow.mask)
        if turned:
            logits = torch.cat(logits.split([1, _ROWS, _ROWS])[::-1])
        gap = (logits - wanted).abs().max().item()
        ensure(
            gap <= BAND * max(1.0, wanted.abs().max().item()),
            f"{who}: rows joined with and without a mask end {gap:.1e} away from their own answer.",
        )


def _check_threads(backbone: Backbone, batches: list[Batch], who: str) -> None:
    """Threads that share a backbone do not see each other's batches."""

    @torch.inference_mode()
    def through(batch: Batch) -> Tensor:
        flow: Flow = backbone.embed(batch)
        for number in range(1, backbone.depth + 1):
            flow = backbone.layer(number, flow)
        return flow.hidden

    serial = [through(batch) for batch in batches]
    with ThreadPoolExecutor(8) as pool:
        for wanted, given in zip(serial, pool.map(through, batches), strict=True):
            _exactly(given, wanted, f"{who}: a batch run beside others in threads")


def _portrait(stock: PreTrainedModel) -> Any:
    """What must not change: weights, modules, hooks, mode and config."""
    modules = [
        (name, id(part), part.training, len(part._forward_hooks), len(part._forward_pre_hooks))
        for name, part in stock.named_modules(remove_duplicate=False)
    ]
    weights = [(name, leaf.data_ptr(), leaf._version) for name, leaf in stock.state_dict().items()]
    return modules, weights, stock.config.to_json_string(use_diff=False)


def _exactly(given: Tensor, wanted: Tensor, what: str) -> None:
    same = given.shape == wanted.shape and torch.equal(given, wanted)
    if not same:
        shapes = f"{tuple(given.shape)} and {tuple(wanted.shape)}"
        gap = (given - wanted).abs().max().item() if given.shape == wanted.shape else shapes
        raise AssertionError(f"{what} differs from the stock model's: {gap}.")
