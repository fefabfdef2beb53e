"""FastBERT, ELBERT and RomeBERT: their exits, and their losses by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_training_resume import examples
from torch import Tensor, nn

from offramp.engines import TorchEngine, cost_model
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.exits.own_head import OwnHeadSpec
from offramp.exits.student import StudentExit, StudentSpec
from offramp.model import MultiExitModel
from offramp.objectives import LearnedWeights, Objective, RobustExits, Stage, TeachStudents
from offramp.objectives.robust import LAST
from offramp.policies import Entropy, Fixed, Patience
from offramp.testing import (
    check_engine,
    save_tiny_stock,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_stock,
)
from offramp.training import TrainOptions, attach
from offramp.training.trainer import Trainee

SINGLE = "single_label_classification"
MULTI = "multi_label_classification"
FEW = TrainOptions(max_steps=2, batch_size=8, quiet=True)
STUDENT = StudentSpec(width=16)


# --- students -----------------------------------------------------------------------------


@st.composite
def padded(draw: Any) -> tuple[Tensor, Tensor]:
    """Hidden states (rows, tokens, 8) and a mask, at least one real token per row."""
    rows, tokens = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    lengths = draw(st.lists(st.integers(1, tokens), min_size=rows, max_size=rows))
    random = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    hidden = torch.randn(rows, tokens, 8, generator=random)
    return hidden, (torch.arange(tokens) < torch.tensor(lengths).unsqueeze(1)).long()


def student(heads: int = 2, poolings: tuple[str, ...] = ("cls",)) -> StudentExit:
    torch.manual_seed(0)
    host: Any = SimpleNamespace(view=None, poolings=poolings)
    made = StudentExit(StudentSpec(width=12, heads=heads), 8, 3, host).eval()
    for leaf in made.parameters():
        nn.init.normal_(leaf)
    return made


def as_written(made: StudentExit, hidden: Tensor, mask: Tensor) -> Tensor:
    """The paper's head to the letter: every token asks, the first one's answer is read."""
    tokens = torch.tanh(made.squeeze(hidden))
    heads = made.spec.heads
    query, key, value = (
        part(tokens).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in (made.query, made.key, made.value)
    )
    logits = query @ key.transpose(-1, -2) / math.sqrt(12 // heads)
    found = torch.softmax(logits - 1e4 * (1 - mask[:, None, None]), dim=-1) @ value
    first = made.out(found.transpose(1, 2).flatten(2))[:, 0]
    scores: Tensor = made.classifier(torch.tanh(made.dense(first)))
    return scores


@settings(max_examples=60)
@given(given_=padded(), heads=st.sampled_from([1, 2, 3]))
def test_a_student_answers_as_if_every_token_had_asked(
    given_: tuple[Tensor, Tensor], heads: int
) -> None:
    made = student(heads)
    found = made(*given_)[0].scores
    torch.testing.assert_close(found, as_written(made, *given_), atol=1e-4, rtol=1e-4)


@settings(max_examples=40)
@given(given_=padded(), more=st.integers(0, 9), poolings=st.sampled_from([("cls",), ("mean",)]))
def test_padding_says_nothing_to_a_student(
    given_: tuple[Tensor, Tensor], more: int, poolings: tuple[str, ...]
) -> None:
    hidden, mask = given_
    made = student(poolings=poolings)
    garbage = torch.where(mask.unsqueeze(-1) == 1, hidden, torch.tensor(7.0))
    longer = torch.cat((garbage, torch.full((len(hidden), more, 8), -3.0)), dim=1)
    longer_mask = torch.cat((mask, torch.zeros(len(mask), more, dtype=torch.long)), dim=1)
    one, other = made(hidden, mask)[0].scores, made(longer, longer_mask)[0].scores
    torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_without_a_first_token_the_mean_of_the_tokens_asks() -> None:
    made, hidden = student(poolings=("mean",)), torch.randn(3, 5, 8)
    order = torch.randperm(5)
    torch.testing.assert_close(made(hidden, None)[0].scores, made(hidden[:, order], None)[0].scores)


def test_a_student_of_a_network_without_tokens_reads_its_pixels() -> None:
    model = tiny_model("cifar_resnet", spec=STUDENT)
    pixels = tiny_batch_for(model.stock, 2)
    outputs = model.all_exits(pixels)
    assert [output.scores.shape for output in outputs] == [(2, 3)] * model.depth
    assert model.exits.at(1).squeeze.in_features == model.backbone.width(1)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "options", [{"width": 10, "heads": 3}, {"heads": 0}, {"dropout": 1.0}, {"pooling": "cls"}]
)
def test_students_that_make_no_sense_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        StudentSpec(**options)


def test_a_students_attention_drops_out_in_training_only() -> None:
    made, hidden = student(), torch.randn(3, 9, 8)
    assert torch.equal(made(hidden, None)[0].scores, made(hidden, None)[0].scores)
    made.train()
    assert not torch.equal(made(hidden, None)[0].scores, made(hidden, None)[0].scores)


def test_the_cost_of_a_student_is_linear_in_the_tokens() -> None:
    costs = cost_model(tiny_model(spec=StudentSpec(width=16, heads=2)))
    constant, each_token, square = costs.exit[0]
    # squeezed to 16 numbers, and two products with 16 of them for each of two heads
    assert each_token == pytest.approx(2 * (32 * 16 + 2 * 2 * 16))
    assert square == pytest.approx(0, abs=1e-6)
    # query, key, value, out, dense, classifier
    assert constant == pytest.approx(2 * (5 * 16 * 16 + 16 * 3))


@pytest.mark.parametrize("arch", ["bert", "vit", "cifar_resnet"])
def test_the_engine_passes_with_students(arch: str) -> None:
    policies = [Entropy(threshold=0.5, normalised=True), Patience(patience=1), Fixed(layer=2)]
    check_engine(TorchEngine, tiny_model(arch, spec=STUDENT), policies, rows=12)


# --- the model's own head -----------------------------------------------------------------


@pytest.mark.parametrize("arch", ["bert", "vit"])
def test_own_heads_answer_as_the_stock_model_would_with_fewer_layers(arch: str) -> None:
    stock = tiny_stock(arch)
    model = MultiExitModel.from_stock(stock, OwnHeadSpec())
    batch = tiny_batch_for(stock, 3)
    fewer = tiny_stock(arch, layers=2)
    shared = {name: leaf for name, leaf in stock.state_dict().items() if name in fewer.state_dict()}
    fewer.load_state_dict(shared)
    torch.testing.assert_close(model.all_exits(batch)[1].scores, fewer(**batch).logits)
    assert list(model.exits.parameters()) == []
    assert model.state_dict().keys() == {f"stock.{name}" for name in stock.state_dict()}


@pytest.mark.parametrize("arch", ["albert", "vit"])
def test_the_engine_passes_with_own_heads(arch: str) -> None:
    policies = [Entropy(threshold=0.3), Patience(patience=1), Fixed(layer=2)]
    check_engine(TorchEngine, tiny_model(arch, spec=OwnHeadSpec()), policies, rows=12)


def test_in_a_network_of_several_widths_each_has_one_layer_to_the_head() -> None:
    model = tiny_model("cifar_resnet", spec=OwnHeadSpec())
    assert [name for name, _ in model.exits.named_parameters()] == [
        f"widened.{width}.{leaf}" for width in (8, 16) for leaf in ("weight", "bias")
    ]


def test_exits_without_weights_cannot_be_attached(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    with pytest.raises(ConfigError, match="nothing to attach"):
        attach(source, examples(), tmp_path / "out", exits=OwnHeadSpec(), options=FEW)
    assert not (tmp_path / "out.work").exists()


# --- losses by hand -----------------------------------------------------------------------


def outputs(*scores: Any) -> list[ExitOutput]:
    return [ExitOutput(torch.tensor(one)) for one in scores]


def loss_of(objective: Objective, given_: list[ExitOutput], stage: Stage, **batch: Any) -> Any:
    return objective.losses(given_, {"problem_type": SINGLE, **batch}, stage)


def log_odds(p: float) -> list[float]:
    """Scores of two classes whose probabilities are p and 1 - p."""
    return [math.log(p), math.log(1 - p)]


@pytest.mark.parametrize("reverse", [False, True])
def test_students_learn_by_the_sum_of_their_divergences_without_labels(reverse: bool) -> None:
    objective = TeachStudents(reverse=reverse)
    _, exits = objective.stages()
    found = loss_of(objective, outputs([log_odds(0.5)], [log_odds(0.2)], [log_odds(0.8)]), exits)

    def divergence(p: float, q: float) -> float:
        return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))

    pairs = [(0.5, 0.8), (0.2, 0.8)] if reverse else [(0.8, 0.5), (0.8, 0.2)]
    assert float(found["exits"]) == pytest.approx(sum(divergence(*pair) for pair in pairs))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, "regression"])
def test_a_student_that_answers_like_its_teacher_has_nothing_to_learn(
    problem_type: str, reverse: bool
) -> None:
    objective = TeachStudents(reverse=reverse)
    scores = torch.randn(5, 1 if problem_type == "regression" else 3, requires_grad=True)
    given_ = [ExitOutput(scores), ExitOutput(scores.detach().clone())]
    batch = {"problem_type": problem_type}
    (loss,) = objective.losses(given_, batch, objective.stages()[1]).values()
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    torch.testing.assert_close(scores.grad, torch.zeros_like(scores), atol=1e-6, rtol=0)


def test_the_teacher_is_frozen_and_without_dropout_while_students_learn() -> None:
    model, objective = tiny_model(spec=STUDENT), TeachStudents()
    trainee = Trainee(model, objective, objective.stages()[1], SINGLE).train()
    seen = [model(**tiny_batch(4)).logits for _ in range(2)]
    assert torch.equal(*seen)
    sum(trainee(**tiny_batch(4)).values()).backward()  # type: ignore[union-attr]
    assert all(leaf.grad is None for leaf in model.stock.parameters())
    assert all(leaf.grad is not None for leaf in model.exits.parameters())


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30))
def test_learned_weights_add_up_to_the_number_of_exits(raw: list[float]) -> None:
    objective = LearnedWeights()
    objective.prepare(len(raw) + 1)
    objective.raw = nn.Parameter(torch.tensor(raw))
    found = objective.weights(len(raw) + 1)
    assert float(found.detach().sum()) == pytest.approx(len(raw) + 1, rel=1e-5)
    assert (found[:-1] >= 0).all() and (found[:-1] <= 1).all()  # noqa: PT018
    assert found[-1] >= 1 - 1e-4


def test_an_exit_loses_weight_to_the_last_by_the_formula() -> None:
    objective = LearnedWeights(start=0.5)
    objective.prepare(3)
    answers = outputs([log_odds(0.5)], [log_odds(0.9)], [log_odds(0.8)])
    labels = torch.tensor([0])
    loss = loss_of(objective, answers, Stage("joint", "all"), labels=labels)["exits"]
    w = 1 / (1 + math.exp(-0.5))
    l1, l2, l3 = (-math.log(p) for p in (0.5, 0.9, 0.8))
    assert float(loss.detach()) == pytest.approx(w * l1 + w * l2 + (3 - 2 * w) * l3)
    loss.backward()
    assert objective.raw is not None
    assert objective.raw.grad is not None
    slope = w * (1 - w)
    assert objective.raw.grad.tolist() == pytest.approx([slope * (l1 - l3), slope * (l2 - l3)])


def test_equal_weights_are_the_plain_sum_and_nothing_is_learned() -> None:
    objective = LearnedWeights(equal=True)
    objective.prepare(2)
    answers = outputs([log_odds(0.5)], [log_odds(0.8)])
    found = loss_of(objective, answers, Stage("joint", "all"), labels=torch.tensor([0]))
    assert float(found["exits"]) == pytest.approx(-math.log(0.5) - math.log(0.8))
    assert list(objective.parameters()) == []


def test_learned_weights_of_another_depth_are_refused() -> None:
    objective = LearnedWeights()
    with pytest.raises(ConfigError, match=r"prepare\(12\)"):
        objective.weights(12)
    objective.prepare(6)
    with pytest.raises(ConfigError, match=r"prepare\(12\)"):
        objective.weights(12)


def test_the_robust_loss_by_hand() -> None:
    objective = RobustExits(temperature=2.0, gamma=0.75)
    # at temperature 2 scores of 2 ln p are probabilities p
    early, full = [[2 * x for x in log_odds(p)] for p in (0.5, 0.8)]
    found = loss_of(objective, outputs([early], [full]), *objective.stages(), labels=torch.ones(1))
    sure = 0.04 / (0.64 + 0.04)
    assert float(found[LAST]) == pytest.approx(-math.log(sure))
    assert float(found["labels"]) == pytest.approx(0.25 * math.log(2))
    divergence = 0.8 * math.log(1.6) + 0.2 * math.log(0.4)
    assert float(found["distillation"]) == pytest.approx(0.75 * 4 * divergence)


def test_the_released_reduction_divides_by_the_number_of_classes() -> None:
    answers = outputs(torch.randn(4, 5).tolist(), torch.randn(4, 5).tolist())
    parts = [
        loss_of(RobustExits(reduction=how), answers, Stage("joint", "all"), labels=torch.arange(4))
        for how in ("mean", "batchmean")  # type: ignore[arg-type]
    ]
    assert float(parts[0]["distillation"]) == pytest.approx(float(parts[1]["distillation"]) / 5)
