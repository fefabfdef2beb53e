"""Exits that say more than scores: being right, the subspace of the classes, coming layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.engines import TorchEngine, cost_model
from offramp.errors import ConfigError
from offramp.exits import ExitKind
from offramp.exits.imitating import ImitatingSpec
from offramp.exits.learned import LearnedSpec
from offramp.exits.subspace import NspSpec, class_space
from offramp.model import MultiExitModel
from offramp.policies import Fixed, MaxProbability
from offramp.testing import check_engine, tiny_batch, tiny_batch_for, tiny_model, tiny_stock

KINDS = (
    LearnedSpec(pooling="mean", hidden=True, correctness="own"),
    NspSpec(pooling="mean"),
    ImitatingSpec(pooling="mean"),
)


@pytest.mark.parametrize("arch", ["bert", "albert", "vit", "cifar_resnet"])
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_rows_leave_as_on_the_slow_road(spec: ExitKind, arch: str) -> None:
    policies = [MaxProbability(threshold=0.7), Fixed(layer=3)]
    check_engine(TorchEngine, tiny_model(arch, spec=spec), policies=policies, rows=16)


@pytest.mark.parametrize("arch", ["roberta", "vit", "cifar_resnet"])
@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.kind)
def test_a_copy_answers_and_costs_the_same_by_its_own_weights(spec: ExitKind, arch: str) -> None:
    model = tiny_model(arch, spec=spec)
    other = copy.deepcopy(model)
    batch = tiny_batch_for(model.stock, 5)
    before = [output.scores.clone() for output in other.all_exits(batch)]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(map(torch.equal, before, (output.scores for output in other.all_exits(batch))))
    assert (cost_model(model).exit == cost_model(other).exit).all()


@pytest.mark.parametrize("spec", [*KINDS, LearnedSpec()], ids=lambda spec: spec.kind)
def test_no_tensor_is_kept_twice(spec: ExitKind) -> None:
    model = tiny_model(spec=spec)
    places = [leaf.data_ptr() for leaf in model.state_dict().values()]
    assert len(set(places)) == len(places)


# --- learned ------------------------------------------------------------------------------


def test_one_layer_judges_all_exits_by_what_they_read() -> None:
    model = tiny_model(spec=LearnedSpec(pooling="cls", hidden=True))
    judge = model.exits["correctness"]
    hidden = torch.randn(3, 5, 32)
    for layer in range(1, 6):
        made = model.exits.at(layer)
        feature = torch.tanh(made.dense(hidden[:, 0]))
        said = made(hidden, None)[0].signals["correct"]
        assert torch.allclose(said, torch.sigmoid(judge(feature)[:, 0]))
        assert not any("correctness" in name for name, _ in made.named_parameters())


def test_each_exit_may_judge_itself() -> None:
    model = tiny_model(spec=LearnedSpec(correctness="own"))
    assert len({id(model.exits.at(layer).correctness) for layer in range(1, 6)}) == 5
    assert "correctness" not in model.exits


def test_full_depth_is_taken_to_be_right() -> None:
    *early, full = tiny_model(spec=LearnedSpec()).all_exits(tiny_batch(4))
    assert full.signals["correct"].tolist() == [1.0] * 4
    assert all(((o.signals["correct"] > 0) & (o.signals["correct"] < 1)).all() for o in early)


def test_where_widths_differ_each_exit_judges_itself() -> None:
    model = MultiExitModel.from_stock(tiny_stock("cifar_resnet"), LearnedSpec(pooling="mean"))
    assert "correctness" not in model.exits
    assert len({id(model.exits.at(n).correctness) for n in range(1, model.depth)}) > 1


# --- nsp ----------------------------------------------------------------------------------


def test_the_share_outside_the_classes_by_hand() -> None:
    model = tiny_model(spec=NspSpec(pooling="cls"), num_labels=2)
    made = model.exits.at(1)
    with torch.no_grad():
        made.classifier.weight.zero_()
        made.classifier.weight[0, 0] = 2.0
        made.classifier.weight[1, 1] = 3.0
        made.classifier.bias.copy_(torch.tensor([2.0, 6.0]))
    feature = torch.zeros(2, 32)
    feature[0, 2], feature[1, 0] = 2.0, 4.0
    # b W^+ is (1, 2, 0, ...); so (1, 2, 2) of length 3, and (5, 2, 0), inside
    assert made.outside(feature).tolist() == pytest.approx([2 / 3, 0.0], abs=1e-6)


def _released(feature: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The formula as written, with inverses, in double precision."""
    z, w = feature.double(), weight.double().T
    z = z + bias.double() @ torch.linalg.pinv(w)
    inside = z @ w @ torch.linalg.inv(w.T @ w) @ w.T
    share = inside.square().sum(dim=1) / z.square().sum(dim=1)
    return (1 - share).clamp_min(0).sqrt()


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), classes=st.integers(2, 6), scale=st.floats(0.01, 100))
def test_the_share_outside_is_that_of_the_formula(seed: int, classes: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    weight = scale * torch.randn(classes, 12, generator=draw)
    bias = torch.randn(classes, generator=draw)
    feature = torch.randn(5, 12, generator=draw)
    made: Any = tiny_model(spec=NspSpec(pooling="cls"), layers=2, num_labels=2).exits.at(1)
    made.classifier = torch.nn.Linear(12, classes)
    with torch.no_grad():
        made.classifier.weight.copy_(weight)
        made.classifier.bias.copy_(bias)
    found = made.outside(feature)
    assert torch.allclose(found.double(), _released(feature, weight, bias), atol=1e-4)


@pytest.mark.parametrize("weight", [torch.zeros(3, 8), torch.ones(3, 8), torch.randn(9, 8)])
def test_weights_of_any_rank_have_a_space(weight: Tensor) -> None:
    basis, shift = class_space(weight, torch.ones(len(weight)))
    assert torch.isfinite(basis).all()
    assert torch.isfinite(shift).all()
    rank = torch.linalg.matrix_rank(weight)
    assert torch.allclose((basis.T @ basis).diagonal().sum(), rank.float(), atol=1e-4)


def test_the_space_is_known_until_the_weights_change() -> None:
    model = tiny_model(spec=NspSpec(pooling="cls"))
    made = model.exits.at(1)
    feature = torch.randn(4, 32)
    with torch.inference_mode():
        before = made.outside(feature)
        assert made._space()[0] is made._space()[0]
    with torch.no_grad():
        made.classifier.weight.normal_()
    assert not torch.allclose(made.outside(feature), before)


def test_zero_features_and_training_give_no_trouble() -> None:
    model = tiny_model(spec=NspSpec(pooling="cls"))
    made = model.exits.at(1)
    with torch.no_grad():
        made.classifier.bias.zero_()
    assert made.outside(torch.zeros(2, 32)).tolist() == [0, 0]
    model.train()
    assert all(not output.signals for output in model.all_exits(tiny_batch(2)))


def test_one_column_of_weights_is_no_subspace_of_classes() -> None:
    with pytest.raises(ConfigError, match="one column of weights"):
        tiny_model("bert", "regression", spec=NspSpec(pooling="cls"))


# --- imitating ----------------------------------------------------------------------------


@torch.no_grad()
def _plainly(model: MultiExitModel, states: list[Tensor], layer: int) -> Tensor:
    """Scores of exit `layer` by the formulas, one vector at a time."""
    shared, width, classes = model.exits, 32, 3
    past, future, mood = torch.zeros(3), torch.zeros(3), torch.zeros(3)
    for k in range(1, model.depth + 1):
        if k <= layer:
            vector = states[k - 1]
        else:
            rows = slice((k - 2) * width, (k - 1) * width)
            vector = states[layer - 1] @ shared.future.weight[rows].T + shared.future.bias[rows]
            vector = torch.tanh(vector)
        rows = slice((k - 1) * 2 * classes, k * 2 * classes)
        votes = shared.votes.weight[rows] @ vector + shared.votes.bias[rows]
        if k <= layer:
            past, mood = past + votes[:classes], mood + votes[classes:]
        else:
            future = future + votes[:classes]
    gate = torch.sigmoid(shared.gate(torch.tanh(mood / layer)))
    return 2 * gate * past + (2 - 2 * gate) * future


def test_past_and_imitated_layers_vote_as_the_formulas_say() -> None:
    model = tiny_model(spec=ImitatingSpec())
    hidden = [torch.randn(1, 4, 32) for _ in range(5)]
    made = [model.exits.at(layer) for layer in range(1, 6)]
    states = [torch.tanh(m.dense(h[:, 0]))[0] for m, h in zip(made, hidden, strict=True)]
    carry = None
    for layer in range(1, 6):
        output, carry = made[layer - 1](hidden[layer - 1], None, carry)
        assert carry["past"].shape == (1, 6)
        wanted = _plainly(model, states, layer)
        assert torch.allclose(output.scores[0], wanted, atol=1e-5), layer


def test_training_and_evaluation_say_the_same_without_dropout() -> None:
    model = tiny_model(spec=ImitatingSpec(dropout=0.0))
    model.stock.config.hidden_dropout_prob = 0.0
    batch = tiny_batch(4)
    before = [output.scores for output in model.all_exits(batch)]
    model.exits.train()
    after = model.all_exits(batch)
    assert all(torch.allclose(o.scores, b, atol=1e-5) for o, b in zip(after, before, strict=True))
    assert [o.signals["imitated"].shape[1] for o in after[:-1]] == [5, 4, 3, 2, 1]
    pooled = model.stock.bert.pooler(model.stock.bert(**batch).last_hidden_state)
    assert torch.allclose(after[-1].signals["state"], pooled, atol=1e-5)


def test_a_later_exit_trains_earlier_votes_but_not_earlier_layers() -> None:
    model = tiny_model(spec=ImitatingSpec())
    model.train()
    first, second = torch.randn(2, 4, 32, requires_grad=True), torch.randn(2, 4, 32)
    _, carry = model.exits.at(1)(first, None)
    output, _ = model.exits.at(2)(second, None, carry)
    output.scores.sum().backward()
    assert first.grad is None
    assert model.exits.votes.weight.grad[:6].any()


def test_own_poolers_start_as_copies_of_the_pooler() -> None:
    model = MultiExitModel.from_stock(tiny_stock(), ImitatingSpec())
    dense = model.exits.at(2).dense
    assert torch.equal(dense.weight, model.stock.bert.pooler.dense.weight)
    assert dense.weight is not model.stock.bert.pooler.dense.weight
