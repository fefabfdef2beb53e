"""Backbones: stepping all layers is the stock model, exactly; and anyone may add one."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    RobertaPreLayerNormConfig,
)

from offramp import registry
from offramp.backbones import (
    BACKBONES,
    Backbone,
    EncoderBackbone,
    Flow,
    Layout,
    make_backbone,
    register_layout,
)
from offramp.backbones.encoders import LAYOUTS
from offramp.engines import TorchEngine
from offramp.errors import ConfigError, ModelError
from offramp.exits import ExitSpec
from offramp.model import MultiExitModel
from offramp.policies import Full
from offramp.testing import (
    ARCHITECTURES,
    IMAGE_ARCHITECTURES,
    PROBLEM_TYPES,
    RELATIVES,
    check_backbone,
    tiny_batch,
    tiny_stock,
)


@pytest.fixture(autouse=True)
def registered_for_this_test_only() -> Iterator[None]:
    before = dict(BACKBONES._items)
    yield
    BACKBONES._items.clear()
    BACKBONES._items.update(before)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_backbone_passes_the_conformance_check(arch: str, problem_type: str) -> None:
    check_backbone(tiny_stock(arch, problem_type))


@pytest.mark.parametrize("arch", RELATIVES + IMAGE_ARCHITECTURES)
def test_every_relative_passes_the_conformance_check(arch: str) -> None:
    check_backbone(tiny_stock(arch))


def test_a_modernbert_answers_from_the_pooling_its_config_names() -> None:
    scores = []
    for pooling in ("cls", "mean"):
        stock = tiny_stock("modernbert")
        stock.config.classifier_pooling = pooling
        check_backbone(stock)
        scores.append(stock(**tiny_batch(3)).logits)
    assert not torch.equal(*scores)


def test_exits_of_a_pre_norm_encoder_read_what_its_own_norm_leaves() -> None:
    stock = tiny_stock("modernbert")
    model = MultiExitModel.from_stock(stock, ExitSpec(pooling="cls")).eval()
    flow = model.backbone.layer(1, model.backbone.embed(tiny_batch(3)))
    read = model.exits["1"].pool(flow.hidden, flow.mask)
    assert torch.equal(read, stock.model.final_norm(flow.hidden[:, 0]))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_stepping_is_exact_in_every_dtype_and_kind_of_attention(
    arch: str, dtype: torch.dtype, attention: str
) -> None:
    stock = tiny_stock(arch).to(dtype)
    stock.set_attn_implementation(attention)
    backbone = make_backbone(stock)
    with torch.inference_mode():
        for padded in (True, False):
            batch = tiny_batch(5, padded=padded)
            flow = backbone.embed(batch)
            for number in range(1, backbone.depth + 1):
                flow = backbone.layer(number, flow)
            assert torch.equal(backbone.head(flow.hidden), stock(**batch).logits)


def test_segments_of_a_text_pair_count() -> None:
    stock = tiny_stock("bert")
    backbone = make_backbone(stock)
    batch = dict(tiny_batch(3, padded=False))
    with torch.inference_mode():
        plain = backbone.embed(batch).hidden
        batch["token_type_ids"] = torch.ones_like(batch["input_ids"])
        typed = backbone.embed(batch).hidden
        wanted = stock.bert.embeddings(**batch)
    assert torch.equal(typed, wanted)
    assert not torch.equal(typed, plain)


def test_what_a_model_does_not_take_is_left_out() -> None:
    backbone = make_backbone(tiny_stock("distilbert"))
    batch = dict(tiny_batch(2), token_type_ids=torch.zeros(2, 16, dtype=torch.long), label="x")
    assert backbone.embed(batch).hidden.shape == (2, 16, 32)  # type: ignore[arg-type]


def test_an_albert_layer_is_one_pass_through_a_group() -> None:
    stock = tiny_stock("albert", layers=6)
    backbone = make_backbone(stock)
    assert (stock.config.num_hidden_groups, stock.config.inner_group_num) == (2, 2)
    assert backbone.depth == 6
    assert backbone.shared_weights
    assert not make_backbone(tiny_stock("bert")).shared_weights
    groups = [call.run for call in backbone.embed(tiny_batch(2)).constants]
    assert [groups.index(group) for group in groups] == [0, 0, 0, 3, 3, 3]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_gradients_reach_the_embedding_through_stepping(arch: str) -> None:
    stock = tiny_stock(arch).train()
    backbone = make_backbone(stock)
    flow = backbone.embed(tiny_batch(2))
    for number in range(1, backbone.depth + 1):
        flow = backbone.layer(number, flow)
    backbone.head(flow.hidden).sum().backward()
    missing = [name for name, leaf in stock.named_parameters() if leaf.grad is None]
    assert missing == []


def test_dropout_is_on_in_training_and_off_in_evaluation() -> None:
    stock = tiny_stock("bert")
    backbone = make_backbone(stock)
    batch = tiny_batch(2)
    same = [torch.equal(backbone.embed(batch).hidden, backbone.embed(batch).hidden)]
    stock.train()
    same += [torch.equal(backbone.embed(batch).hidden, backbone.embed(batch).hidden)]
    assert same == [True, False]


# --- somebody else's architectures --------------------------------------------------------


def _foreign() -> PreTrainedModel:
    torch.manual_seed(0)
    config = RobertaPreLayerNormConfig(
        vocab_size=176,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=70,
        num_labels=3,
    )
    return AutoModelForSequenceClassification.from_config(config).eval()


def _pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.tanh(model.classifier.dense(hidden[:, 0]))


def _head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier.out_proj(pooled)


FOREIGN = Layout(
    "roberta_prelayernorm.encoder.layer",
    _pool,
    _head,
    "classifier.dense",
    norm="roberta_prelayernorm.LayerNorm",
    positions_from_padding=True,
)


def test_an_encoder_is_added_by_saying_where_it_keeps_its_parts() -> None:
    name = "roberta-prelayernorm"
    with pytest.raises(ModelError, match=rf"'{name}' is not supported.*docs/howto/backbone.md"):
        make_backbone(_foreign())
    register_layout(name, FOREIGN)
    check_backbone(_foreign())
    model = MultiExitModel.from_stock(_foreign()).eval()
    answers = TorchEngine(model).run(tiny_batch(4), Full())
    assert answers.exit_layers.tolist() == [3] * 4


def test_an_installed_package_adds_one_by_its_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint("roberta-prelayernorm", f"{__name__}:cut_foreign", "offramp.backbone")

    def installed(group: str) -> list[EntryPoint]:
        return [entry] if group == "offramp.backbone" else []

    monkeypatch.setattr(registry, "installed", installed)
    assert "roberta-prelayernorm" in BACKBONES.names()
    assert isinstance(make_backbone(_foreign()), EncoderBackbone)
    assert "roberta-prelayernorm" not in registry.Registry("policy").names()


def cut_foreign(stock: PreTrainedModel) -> Backbone:
    return EncoderBackbone(stock, FOREIGN)


def test_a_name_is_taken_only_once() -> None:
    with pytest.raises(ConfigError, match="'bert' is already registered"):
        register_layout("bert", FOREIGN)


def test_a_layout_that_does_not_fit_says_what_is_wrong() -> None:
    wrong = Layout("bert.encoder.layer", _pool, _head, "classifier.dense")
    with pytest.raises((ModelError, AttributeError), match=r"bert"):
        EncoderBackbone(_foreign(), wrong)


def test_a_tensor_that_a_layout_does_not_describe_is_refused() -> None:
    layout = Layout(
        "bert.encoder.layer",
        lambda model, hidden, mask: hidden[:, 0],
        lambda model, pooled: model.classifier(pooled),
        "bert.pooler.dense",
        row_inputs=(),
    )
    with pytest.raises(ModelError, match=r"takes a tensor 'attention_mask'.*row_inputs"):
        EncoderBackbone(tiny_stock("bert"), layout).embed(tiny_batch(3))


# --- the check bites ----------------------------------------------------------------------


class _Skips(EncoderBackbone):
    """Leaves out a layer."""

    def layer(self, number: int, flow: Flow) -> Flow:
        return flow if number == 2 else super().layer(number, flow)


class _Muddles(EncoderBackbone):
    """Hands out the first rows, whichever were asked for."""

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        return super().take(flow, torch.arange(len(rows)))


class _ForgetsMasks(EncoderBackbone):
    """Takes the hidden rows and leaves the masks of the first ones."""

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        part = super().take(flow, rows)
        masks = {name: leaf[: len(rows)] for name, leaf in flow.inputs.items()}
        return part._replace(inputs=masks)


class _Writes(EncoderBackbone):
    """Changes the stock model while it runs."""

    def embed(self, batch: Any) -> Flow:
        self._stock.config.hidden_dropout_prob = 0.5
        return super().embed(batch)


class _Remembers(EncoderBackbone):
    """Keeps the last batch's arguments on itself, where other threads find them."""

    def embed(self, batch: Any) -> Flow:
        flow = super().embed(batch)
        self.inputs = flow.inputs
        return flow

    def layer(self, number: int, flow: Flow) -> Flow:
        inputs = {name: self.inputs.get(name, leaf) for name, leaf in flow.inputs.items()}
        try:
            return super().layer(number, flow._replace(inputs=inputs))
        except RuntimeError as problem:
            raise AssertionError("threads met") from problem


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (_Skips, "hidden state after layer 2"),
        (_Muddles, "take\\(\\) after layer 0"),
        (_ForgetsMasks, "away from their own answer"),
        (_Writes, "changes the stock model"),
        (_Remembers, "threads|away from their own"),
    ],
)
def test_the_check_finds_a_broken_backbone(broken: type[EncoderBackbone], said: str) -> None:
    BACKBONES._items["bert"] = lambda stock: broken(stock, LAYOUTS["bert"])
    with pytest.raises(AssertionError, match=said):
        check_backbone(tiny_stock("bert"))


def test_the_check_asks_for_evaluation_mode() -> None:
    with pytest.raises(AssertionError, match=r"call eval\(\) first"):
        check_backbone(tiny_stock("bert").train())
