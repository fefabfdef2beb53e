"""Straight layers say what the layers say, bit by bit, and hear what is done to these."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.models.bert.modeling_bert import BertIntermediate, BertLayer

from offramp.backbones import make_backbone
from offramp.engines import TorchEngine
from offramp.engines.straight import Varies, find, follow, straight, written
from offramp.model import MultiExitModel
from offramp.policies import Full
from offramp.testing import check_backbone, tiny_batch
from offramp.testing.pictures import IMAGE_ARCHITECTURES
from offramp.testing.tiny import ARCHITECTURES, RELATIVES, tiny_model, tiny_stock


@pytest.fixture
def model() -> MultiExitModel:
    return tiny_model(layers=2)


@pytest.mark.parametrize("arch", ARCHITECTURES + RELATIVES + IMAGE_ARCHITECTURES)
def test_straight_layers_equal_the_stock_models_bit_by_bit(arch: str) -> None:
    check_backbone(tiny_stock(arch), cut=lambda stock: straight(make_backbone(stock)))


@pytest.mark.parametrize("arch", ARCHITECTURES + RELATIVES + IMAGE_ARCHITECTURES)
def test_every_layer_is_straight(arch: str) -> None:
    backbone = make_backbone(tiny_stock(arch))
    layers = {layer for layer, _ in find(backbone)}
    assert len(layers) == len(backbone.layers)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of what goes through a module of BERT's layers."""
    lengths: list[int] = []
    own = BertIntermediate.forward

    def forward(self: BertIntermediate, hidden: Tensor) -> Tensor:
        lengths.append(hidden.shape[1])
        return own(self, hidden)

    monkeypatch.setattr(BertIntermediate, "forward", forward)
    return lengths


def _answers(engine: TorchEngine, tokens: int = 9) -> Tensor:
    return engine.run(tiny_batch(3, tokens), Full()).scores


def test_modules_are_left_out_from_the_second_batch_on(
    model: MultiExitModel, called: list[int]
) -> None:
    engine = TorchEngine(model)
    first = _answers(engine)
    called.clear()
    assert torch.equal(_answers(engine), first)
    assert not called


def test_inputs_longer_than_the_examples_go_through_the_modules(
    called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.engines.straight._SIZES", ((3, 5), (1, 12)))
    engine = TorchEngine(tiny_model(layers=2))
    _answers(engine)
    called.clear()
    for tokens in (11, 12, 13):
        _answers(engine, tokens)
    assert called == [13, 13]


def test_a_size_that_was_the_same_in_all_examples_is_the_only_one(
    called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.engines.straight._SIZES", ((3, 7), (1, 7)))
    engine = TorchEngine(tiny_model(layers=2))
    _answers(engine)
    called.clear()
    for tokens in (6, 7):
        _answers(engine, tokens)
    assert called == [6, 6]


def _hook(layer: BertLayer) -> None:
    layer.attention.output.dense.register_forward_hook(lambda *given: given[-1] * 2)


def _swap_part(layer: BertLayer) -> None:
    layer.output.dense = nn.Linear(layer.output.dense.in_features, layer.output.dense.out_features)


def _swap_weight(layer: BertLayer) -> None:
    layer.intermediate.dense.bias = nn.Parameter(torch.ones_like(layer.intermediate.dense.bias))


def _change_weight(layer: BertLayer) -> None:
    layer.intermediate.dense.bias.data.add_(1)


def _prune(layer: BertLayer) -> None:
    prune.l1_unstructured(layer.output.dense, "weight", amount=0.5)


@pytest.mark.parametrize("change", [_hook, _swap_part, _swap_weight, _change_weight, _prune])
def test_what_is_done_to_a_layer_later_is_heard(
    model: MultiExitModel, change: Callable[[Any], None]
) -> None:
    engine = TorchEngine(model)
    before = _answers(engine)
    change(model.backbone.layers[1])
    after = _answers(engine)
    assert not torch.equal(after, before)
    assert torch.equal(after, _answers(TorchEngine(model)))


def test_a_model_that_is_moved_answers_as_one_that_was_there_before(model: MultiExitModel) -> None:
    engine = TorchEngine(model)
    _answers(engine)
    model.double()
    assert torch.equal(_answers(engine), _answers(TorchEngine(model)))


def test_threads_that_come_first_together_get_the_same_answers(model: MultiExitModel) -> None:
    wanted = _answers(TorchEngine(model))
    engine = TorchEngine(model)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: _answers(engine), range(16)):
            assert torch.equal(found, wanted)


def test_a_wrapper_keeps_its_own_layers(model: MultiExitModel) -> None:
    class Wrapper:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.backbone, name)

    wrapper: Any = Wrapper()
    assert straight(wrapper) is wrapper


# What cannot be straight


class Scaled(nn.Module):
    """By a number that the layer makes of what it is given."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.number(hidden)


def _two_courses(layer: nn.Module) -> list[Any]:
    return [follow(layer, torch.ones(rows, size, 2), {})[0] for rows, size in ((3, 11), (1, 128))]


@pytest.mark.parametrize(
    "number",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: 2 if hidden.sum() > 0 else 1,
        lambda hidden: 2 if hidden.shape[1] > 50 else 1,
        lambda hidden: hidden.shape[1] - 1,
        lambda hidden: hidden.numpy().max(),
        lambda hidden: hidden + 1 if hidden.shape[0] > 1 else 1,
        lambda hidden: torch.tensor(len(hidden.tolist())),
    ],
)
def test_layers_that_look_at_values_or_make_numbers_of_sizes_are_refused(
    number: Callable[[Tensor], Any],
) -> None:
    with pytest.raises(Varies):
        written(_two_courses(Scaled(number)))


@pytest.mark.parametrize(
    "number",
    [
        lambda hidden: hidden.shape[1],
        lambda hidden: hidden.shape[0] * 4,
        lambda hidden: hidden.mean(dim=(1, 2), keepdim=True),
        lambda hidden: hidden[:, : hidden.shape[1]].split(1, dim=2)[1],
        lambda hidden: torch.arange(hidden.shape[1], dtype=torch.float32)[None, :, None],
        lambda hidden: hidden.clone().add_(3.5),
    ],
)
def test_other_layers_do_what_they_did_on_any_size(number: Callable[[Tensor], Any]) -> None:
    layer = Scaled(number)
    fits, run = written(_two_courses(layer))
    hidden = torch.randn(5, 17, 2)
    assert fits(hidden, {})
    assert torch.equal(run(hidden, {}), layer(hidden))
