"""Straight layers say what the layers say, bit by bit, and hear what is done to these."""

from __future__ import annotations

import copy
import gc
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import prune
from transformers import PreTrainedModel
from transformers.models.bert.modeling_bert import BertIntermediate

from offramp.backbones import Backbone, example_rows, make_backbone
from offramp.engines import Budget, TorchEngine
from offramp.engines.calls import Varies, follow, written
from offramp.engines.straight import _TEXTS, Straight, _Watch, find
from offramp.exits import ExitSpec
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
    def cut(stock: PreTrainedModel) -> Backbone:
        made = Straight(make_backbone(stock))
        made.find()
        return made.backbone

    check_backbone(tiny_stock(arch), cut)


@pytest.mark.parametrize("arch", ARCHITECTURES + RELATIVES + IMAGE_ARCHITECTURES)
def test_every_layer_is_straight_whatever_it_is_called_with(arch: str) -> None:
    backbone: Any = make_backbone(tiny_stock(arch))
    watch = _Watch()
    watching = backbone.through(watch.over)
    for rows, tokens, padded in ((4, 7, False), (4, 7, True), (1, 9, False)):
        flow = watching.embed(example_rows(backbone, rows, tokens, padded=padded))
        for number in range(1, backbone.depth + 1):
            flow = watching.layer(number, flow)
    found = find(backbone)
    assert all(key in found[layer] for layer, key in watch.seen)


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


def warm(model: MultiExitModel, tokens: int = 9) -> TorchEngine:
    """An engine that makes its layers straight when it is asked next."""
    engine = TorchEngine(model)
    _answers(engine, tokens)
    return engine


def test_one_answer_alone_pays_for_no_examples(model: MultiExitModel, called: list[int]) -> None:
    _answers(TorchEngine(model))
    assert called == [9] * len(model.backbone.layers)


def test_modules_are_left_out_after_the_first_requests(
    model: MultiExitModel, called: list[int]
) -> None:
    engine = TorchEngine(model)
    first, second = _answers(engine), _answers(engine)
    called.clear()
    assert torch.equal(_answers(engine), first)
    assert torch.equal(second, first)
    assert not called


def test_a_stream_is_straight_from_its_start(model: MultiExitModel, called: list[int]) -> None:
    engine = TorchEngine(model)
    rows = [(place, tiny_batch(1, 9)) for place in range(20)]
    _, *_ = engine.stream(iter(rows), Full(), slots=2)
    seen = called.copy()
    _, *_ = engine.stream(iter(rows), Full(), slots=2)
    assert called == seen


def test_inputs_longer_than_the_examples_go_through_the_modules(
    called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.engines.straight._PADDED", ((3, 5), (1, 12)))
    engine = warm(tiny_model(layers=2))
    _answers(engine)
    called.clear()
    for tokens in (11, 12, 13):
        _answers(engine, tokens)
    assert called == [13, 13]


def test_a_size_that_was_the_same_in_all_examples_is_the_only_one(
    called: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.engines.straight._PADDED", ((3, 7), (1, 7)))
    engine = warm(tiny_model(layers=2))
    _answers(engine)
    called.clear()
    for tokens in (6, 7):
        _answers(engine, tokens)
    assert called == [6, 6]


def _hook(layer: Any) -> None:
    layer.attention.output.dense.register_forward_hook(lambda *given: given[-1] * 2)


def _swap_part(layer: Any) -> None:
    layer.output.dense = nn.Linear(layer.output.dense.in_features, layer.output.dense.out_features)


def _swap_weight(layer: Any) -> None:
    layer.intermediate.dense.bias = nn.Parameter(torch.ones_like(layer.intermediate.dense.bias))


def _change_weight(layer: Any) -> None:
    layer.intermediate.dense.bias.data.add_(1)


def _prune(layer: Any) -> None:
    prune.l1_unstructured(layer.output.dense, "weight", amount=0.5)


def _replace_forward(layer: Any) -> None:
    own = layer.output.dense.forward
    layer.output.dense.forward = lambda given: own(given) * 2


def _change_number(layer: Any) -> None:
    layer.output.LayerNorm.eps = 0.5


@pytest.mark.parametrize(
    "change",
    [_hook, _swap_part, _swap_weight, _change_weight, _prune, _replace_forward, _change_number],
)
def test_what_is_done_to_a_layer_later_is_heard(
    model: MultiExitModel, change: Callable[[Any], None]
) -> None:
    engine = warm(model)
    before = _answers(engine)
    change(model.backbone.layers[1])
    after = _answers(engine)
    assert not torch.equal(after, before)
    assert torch.equal(after, _answers(TorchEngine(model)))


def test_a_hook_that_was_there_before_sees_every_row_and_no_example(model: MultiExitModel) -> None:
    seen: list[tuple[int, ...]] = []
    dense = model.backbone.layers[1].output.dense
    first = dense.register_forward_hook(lambda *given: seen.append(tuple(given[-1].shape[:2])))
    engine = warm(model)
    _answers(engine)
    first.remove()
    dense.register_forward_hook(lambda *given: seen.append((0, 0)))
    _answers(engine)
    assert seen == [(3, 9), (3, 9), (0, 0)]


def _listen_everywhere(model: MultiExitModel, heard: Callable[..., None]) -> Any:
    return register_module_forward_hook(heard)


def _listen_to_the_embedding(model: MultiExitModel, heard: Callable[..., None]) -> Any:
    return model.stock.bert.embeddings.register_forward_hook(heard)


@pytest.mark.parametrize("listen", [_listen_everywhere, _listen_to_the_embedding])
def test_who_listens_around_the_layers_hears_of_no_example(
    model: MultiExitModel, listen: Callable[..., Any]
) -> None:
    shapes: list[tuple[int, ...]] = []

    def heard(*given: Any) -> None:
        if isinstance(given[-1], Tensor):
            shapes.append(tuple(given[-1].shape[:2]))

    handle = listen(model, heard)
    try:
        engine = warm(model)
        first, shapes[:] = shapes[:], []
        _answers(engine)
    finally:
        handle.remove()
    assert first == shapes
    assert shapes


class Adapter(nn.Module):
    """A part that may be switched off within, as adapters may."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.options = inner, {"scale": 2.0}

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given) * self.options["scale"]


def test_a_part_that_is_not_of_transformers_is_called_as_it_is(model: MultiExitModel) -> None:
    output = model.backbone.layers[1].output
    output.dense = Adapter(output.dense)
    engine = warm(model)
    before = _answers(engine)
    output.dense.options["scale"] = 1.0
    assert not torch.equal(_answers(engine), before)


def test_another_attention_is_heard(model: MultiExitModel) -> None:
    engine = warm(model)
    _answers(engine)
    model.stock.set_attn_implementation("eager")
    assert torch.equal(_answers(engine), _answers(TorchEngine(model)))


@pytest.mark.parametrize("arch", ["deberta-v2", "modernbert"])
@pytest.mark.parametrize("first", [False, True])
def test_under_autocast_layers_run_as_they_are(arch: str, first: bool) -> None:
    model = tiny_model(arch, layers=3)
    engine = warm(model)
    for mixed in (first, not first):
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed), torch.inference_mode():
            wanted = model.all_exits(tiny_batch(3, 9))[-1].scores.float()
            assert torch.equal(_answers(engine), wanted)


def test_a_layer_that_refuses_the_examples_stays_as_it_is() -> None:
    stock = tiny_stock("bert", layers=2)
    for layer in stock.bert.encoder.layer:
        layer.chunk_size_feed_forward = 2  # no example may be of odd length
    model = MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval()
    with torch.inference_mode():
        wanted = model.all_exits(tiny_batch(3, 10))[-1].scores
    assert torch.equal(_answers(warm(model, 10), 10), wanted)


def test_every_batch_has_all_of_its_time_and_takes_no_random_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slow(backbone: Any) -> dict[Any, Any]:
        time.sleep(0.5)
        return find(backbone)

    monkeypatch.setattr("offramp.engines.straight.find", slow)
    engine, before = warm(tiny_model(layers=3)), torch.random.get_rng_state()
    left = engine.run(tiny_batch(3), Full(), budget=Budget(seconds=0.4)).exit_layers
    assert left.tolist() == [3, 3, 3]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_straight_layers_are_those_of_the_backbone_and_not_of_a_later_list(
    model: MultiExitModel,
) -> None:
    model.stock.bert.encoder.layer[0] = tiny_stock("bert", seed=5).bert.encoder.layer[0]
    engine = warm(model)
    with torch.inference_mode():
        wanted = engine.all_exits(tiny_batch(3, 9))[-1].scores
    assert torch.equal(_answers(engine), wanted)


def test_the_embedding_too_is_that_of_the_backbone(model: MultiExitModel) -> None:
    model.stock.bert.embeddings = tiny_stock("bert", seed=5).bert.embeddings
    engine = warm(model)
    with torch.inference_mode():
        wanted = engine.all_exits(tiny_batch(3, 9))[-1].scores
    assert torch.equal(_answers(engine), wanted)


def test_an_engine_can_be_copied(model: MultiExitModel) -> None:
    engine = warm(model)
    assert torch.equal(_answers(copy.deepcopy(engine)), _answers(engine))


def test_layers_without_parameters_and_layers_elsewhere_run(model: MultiExitModel) -> None:
    wanted = _answers(TorchEngine(model))
    cpu_offload(model.stock.bert.encoder, torch.device("cpu"))
    assert torch.equal(_answers(warm(model)), wanted)
    frozen = tiny_model(layers=2)
    for part in frozen.backbone.layers.modules():
        for name, weight in list(part._parameters.items()):
            del part._parameters[name]
            part.register_buffer(name, None if weight is None else weight.data)
    assert torch.equal(_answers(warm(frozen)), wanted)


def test_weights_that_were_replaced_are_let_go(model: MultiExitModel) -> None:
    engine = warm(model)
    _answers(engine)
    old = weakref.ref(model.backbone.layers[1].output.dense.weight)
    copies = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    model.load_state_dict(copies, assign=True)
    _answers(engine)
    engine._weights.clear()  # which CUDA graphs are told by
    gc.collect()
    assert old() is None


def test_a_model_that_is_moved_answers_as_one_that_was_there_before(model: MultiExitModel) -> None:
    engine = warm(model)
    _answers(engine)
    model.double()
    assert torch.equal(_answers(engine), _answers(TorchEngine(model)))


def test_threads_that_come_first_together_get_the_same_answers(model: MultiExitModel) -> None:
    wanted = _answers(TorchEngine(model))
    engine = warm(model)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: _answers(engine), range(16)):
            assert torch.equal(found, wanted)


def test_a_wrapper_keeps_its_own_layers(model: MultiExitModel) -> None:
    class Wrapper:
        def __getattr__(self, name: str) -> Any:
            return getattr(model.backbone, name)

    wrapper: Any = Wrapper()
    assert Straight(wrapper).backbone is wrapper


# What cannot be straight


class Scaled(nn.Module):
    """By a number that the layer makes of what it is given."""

    def __init__(self, number: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.number = number

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * self.number(hidden)


def _courses(layer: nn.Module) -> list[Any]:
    return [follow(layer, torch.ones(rows, tokens, 2), {})[0] for rows, tokens in _TEXTS]


@pytest.mark.parametrize(
    "number",
    [
        lambda hidden: hidden.sum().item(),
        lambda hidden: 2 if hidden.sum() > 0 else 1,
        lambda hidden: 2 if hidden.shape[1] > 50 else 1,
        lambda hidden: 2 if hidden.shape[1] < 8 else 1,
        lambda hidden: 2 if hidden.shape[0] > 4 else 1,
        lambda hidden: 1 + hidden.shape[0] % 2,
        lambda hidden: min(8, hidden.shape[1]),
        lambda hidden: hidden.sum(1, True) if hidden.shape[0] > 1 else hidden.sum(),
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
        written(_courses(Scaled(number)))


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
    fits, run = written(_courses(layer))
    hidden = torch.randn(5, 17, 2)
    assert fits(hidden, {})
    assert not fits(hidden[:, :1], {})  # no example was as short
    assert torch.equal(run(hidden, {}), layer(hidden))
