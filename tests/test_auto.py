"""The objective of `auto`: what exits learn, from whom, and where rows weigh."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.objectives import Clock, Stage, distillation_loss, task_loss
from offramp.objectives.blended import Blended, Weighting, divergence
from offramp.testing import save_tiny_stock, tiny_model, tiny_texts
from offramp.training import TrainOptions, train
from offramp.training.batches import Rows
from offramp.training.running import fresh_parameters, make_trainer, trainee_for

JOINT = Stage("joint", "all")
SINGLE = "single_label_classification"
KINDS = (SINGLE, "multi_label_classification", "regression")


def outputs(rows: int = 6, depth: int = 4, classes: int = 3, seed: int = 0) -> list[ExitOutput]:
    draw = torch.Generator().manual_seed(seed)
    scores = torch.randn(depth, rows, classes, generator=draw)
    correct = torch.rand(depth, rows, generator=draw)
    return [
        ExitOutput(s.requires_grad_(), {"correct": c}) for s, c in zip(scores, correct, strict=True)
    ]


def batch(kind: str = SINGLE, rows: int = 6, progress: float = 1.0) -> dict[str, Any]:
    labels: dict[str, Tensor] = {
        SINGLE: torch.arange(rows) % 3,
        "multi_label_classification": torch.ones(rows, 3),
        "regression": torch.linspace(-1, 1, rows),
    }
    clock = Clock(step=int(100 * progress), steps=100)
    return {"labels": labels[kind], "problem_type": kind, "clock": clock}


def test_with_equal_weights_and_nothing_else_it_is_the_mean_of_the_exits_losses() -> None:
    made = outputs()
    loss = Blended(weighting="equal", distillation=0, correctness=0).losses(made, batch(), JOINT)
    each = [task_loss(o.scores, batch()["labels"], SINGLE) for o in made]
    assert set(loss) == {"exits"}
    torch.testing.assert_close(loss["exits"], torch.stack(each).mean())


def test_weights_by_depth_are_those_of_pabee() -> None:
    made = outputs()
    loss = Blended(weighting="depth", distillation=0).losses(made, batch(), JOINT)["exits"]
    each = [task_loss(o.scores, batch()["labels"], SINGLE) for o in made]
    torch.testing.assert_close(loss, sum(n * one for n, one in enumerate(each, 1)) / 10)


@given(
    st.sampled_from(["simulated", "depth", "equal"]), st.integers(2, 8), st.floats(0, 1),
    st.floats(0, 10), st.sampled_from(KINDS), st.booleans(),
)  # fmt: skip
def test_the_weights_of_every_row_add_up_to_one(
    weighting: Weighting, depth: int, progress: float, sharpness: float, kind: str, judged: bool
) -> None:
    classes = 1 if kind == "regression" else 3
    made = outputs(depth=depth, classes=classes)
    early = [ExitOutput(o.scores, o.signals if judged else {}) for o in made[:-1]]
    clock = Clock(step=int(100 * progress), steps=100)
    weights = Blended(weighting=weighting, sharpness=sharpness)._weights(early, kind, clock)
    assert weights.shape == (6, depth)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))


def test_a_row_that_is_sure_early_weighs_most_at_early_exits() -> None:
    scores = torch.zeros(2, 3)
    correct = [torch.tensor([0.99, 0.1]), torch.tensor([0.99, 0.2]), torch.tensor([0.99, 0.3])]
    early = [ExitOutput(scores, {"correct": one}) for one in correct]
    torch.manual_seed(0)
    sure, unsure = Blended(sharpness=5.0, thresholds=50)._weights(early, SINGLE, Clock(99, 100))
    assert sure[0] == sure.max()
    assert sure[0] > unsure[0]
    assert unsure[-1] > sure[-1]


def test_the_teacher_learns_nothing_from_its_pupils() -> None:
    made = outputs()
    Blended().losses(made, batch(), JOINT)["distillation"].backward()
    assert made[-1].scores.grad is None
    assert all(o.scores.grad is not None for o in made[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_apart_from_itself_and_the_mean_over_rows_is_that_of_the_other_methods(
    kind: str,
) -> None:
    classes = 1 if kind == "regression" else 3
    (scores, teacher) = (o.scores.detach() for o in outputs(depth=2, classes=classes))
    assert divergence(scores, scores, kind, 2.0).abs().max() < 1e-6
    torch.testing.assert_close(
        divergence(scores, teacher, kind, 1.0).mean(), distillation_loss(scores, teacher, kind)
    )


def test_the_divergence_of_two_classes_by_hand() -> None:
    scores, teacher = torch.tensor([[0.0, 0.0]]), torch.tensor([[2 * math.log(3), 0.0]])
    # at temperature 2 the teacher says 3/4, 1/4
    expected = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert divergence(scores, teacher, SINGLE, 2.0).item() == pytest.approx(expected)


def test_the_fine_tune_comes_first_and_is_left_out_where_it_was_done() -> None:
    stages = Blended(warm_up=0.5).stages()
    assert [(stage.trainable, stage.share) for stage in stages] == [("stock", 0.5), ("all", 0.5)]
    tuned = Blended(warm_up=0.5)
    tuned.fine_tuned = True
    assert [(stage.trainable, stage.share) for stage in tuned.ahead()] == [("all", 1.0)]


def test_the_stage_of_the_stock_model_has_its_loss_alone() -> None:
    made = outputs()
    loss = Blended().losses(made[-1:], batch(), Stage("stock", "stock"))
    torch.testing.assert_close(loss["exits"], task_loss(made[-1].scores, batch()["labels"], SINGLE))
    assert set(loss) == {"exits"}


def test_auto_learns_where_to_look_and_asks_no_rehearsal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a rehearsal")

    monkeypatch.setattr("offramp.training.finetune.rehearse", refuse)
    texts = tiny_texts(24)
    rows = Dataset.from_dict({"text": texts, "label": [f"label-{n % 3}" for n in range(24)]})
    options = TrainOptions(epochs=1, batch_size=8, quiet=True)
    stock = save_tiny_stock(tmp_path / "stock")
    model = train(stock, rows, tmp_path / "out", method="auto", options=options)
    assert model.config.exits["pooling"] == "attention"


def test_a_stage_may_teach_exits_faster_than_the_rest(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in Blended(rate=3.0, exits_first=0.5).ahead()}
    assert (stages["exits"].rate, stages["joint"].rate) == (10.0, 3.0)
    model = tiny_model()
    trainee = trainee_for(model, Blended(), stages["joint"])
    fresh = fresh_parameters(trainee, model.stock, new_head=False)
    options = TrainOptions(learning_rate=1e-4, head_learning_rate=1e-3)
    rows = Rows([{}] * 4, torch.ones(4), list)
    trainer = make_trainer(trainee, rows, options, tmp_path, fresh)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]}
    assert sorted(rates) == pytest.approx([1e-4, 3e-3])
