"""The objective of `auto`: a fine-tune first, then rows weigh most where they would leave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import (
    Clock,
    SelfDistillation,
    SimulatedExits,
    Stage,
    correctness_loss,
    task_loss,
)
from offramp.objectives.auto import Auto, by_depth
from offramp.testing import save_tiny_stock, tiny_batch_for, tiny_model, tiny_texts
from offramp.training import TrainOptions, train
from offramp.training.batches import Rows
from offramp.training.preparing import Material
from offramp.training.running import fresh_parameters, make_trainer, trainee_for

JOINT = Stage("joint", "all")
SINGLE, MULTI, REGRESSION = KINDS = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)


def outputs(rows: int = 6, depth: int = 4, kind: str = SINGLE, seed: int = 0) -> list[ExitOutput]:
    draw = torch.Generator().manual_seed(seed)
    classes = 1 if kind == REGRESSION else 3
    scores = torch.randn(depth, rows, classes, generator=draw)
    return [ExitOutput(one.requires_grad_()) for one in scores]


def batch(kind: str = SINGLE, rows: int = 6, progress: float = 1.0) -> dict[str, Any]:
    labels: dict[str, Tensor] = {
        SINGLE: torch.arange(rows) % 3,
        MULTI: torch.ones(rows, 3),
        REGRESSION: torch.linspace(-1, 1, rows),
    }
    clock = Clock(step=int(100 * progress), steps=100)
    return {"labels": labels[kind], "problem_type": kind, "clock": clock}


def test_one_class_of_many_is_learned_as_cosee_learns_it_without_its_calibration() -> None:
    torch.manual_seed(3)
    theirs = SimulatedExits("entropy", calibration=0.0).losses(outputs(), batch(), JOINT)
    torch.manual_seed(3)
    ours = Auto().losses(outputs(), batch(), JOINT)
    assert set(ours) == {"exits"}
    torch.testing.assert_close(ours["exits"], theirs["exits"])


def test_at_the_start_all_exits_weigh_the_same() -> None:
    made = outputs()
    loss = Auto().losses(made, batch(progress=0.0), JOINT)["exits"]
    each = [task_loss(o.scores, batch()["labels"], SINGLE) for o in made]
    torch.testing.assert_close(loss, torch.stack(each).mean())


def test_exits_of_numbers_that_do_not_judge_themselves_weigh_by_depth() -> None:
    made = outputs(kind=REGRESSION)
    loss = Auto().losses(made, batch(REGRESSION), JOINT)["exits"]
    each = [task_loss(o.scores, batch(REGRESSION)["labels"], REGRESSION) for o in made]
    torch.testing.assert_close(loss, sum(n * one for n, one in enumerate(each, 1)) / 10)
    assert by_depth(4, torch.device("cpu")).tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])


def test_exits_of_numbers_learn_how_wrong_they_are_and_weigh_by_that() -> None:
    made = outputs(rows=2, kind=REGRESSION)
    near, far = torch.tensor([0.9, 0.1]), torch.tensor([0.2, 0.1])
    said = (near, far, near, far)
    judged = [ExitOutput(o.scores, {"correct": c}) for o, c in zip(made, said, strict=True)]
    numbers = batch(REGRESSION, rows=2)
    torch.manual_seed(0)
    parts = Auto().losses(judged, numbers, JOINT)
    assert set(parts) == {"exits", "correctness"}
    truth = [1 - torch.tanh(o.scores[:, 0] - numbers["labels"]).abs() for o in judged[:-1]]
    errors = [(o.signals["correct"] - one) ** 2 for o, one in zip(judged[:-1], truth, strict=True)]
    torch.testing.assert_close(parts["correctness"], torch.stack(errors).mean())
    losses = torch.stack([(o.scores[:, 0] - numbers["labels"]) ** 2 for o in judged], dim=1)
    torch.manual_seed(0)
    doubts = torch.stack([1 - o.signals["correct"] for o in judged[:-1]], dim=1)
    weights = Auto().weights(doubts, numbers["clock"])
    torch.testing.assert_close(parts["exits"], (weights * losses).sum(dim=1).mean())


def test_numbers_have_exits_and_a_rule_of_their_own() -> None:
    auto, pabee = METHODS["auto"], METHODS["pabee"]
    assert auto.policy_for(REGRESSION) == "learned"
    assert auto.policy_for(SINGLE) == "max_probability"
    assert pabee.exits_for(REGRESSION) == pabee.exits
    kinds = {kind: auto.with_settings({"hidden": True}).exits_for(kind) for kind in KINDS}
    assert {kind: (one.kind, one.to_dict()["hidden"]) for kind, one in kinds.items()} == {
        SINGLE: ("pooled", True),
        MULTI: ("pooled", True),
        REGRESSION: ("learned", True),
    }


def test_a_model_for_numbers_says_how_wrong_its_exits_are(tmp_path: Path) -> None:
    stock = save_tiny_stock(tmp_path / "stock", "bert", REGRESSION)
    model = MultiExitModel.from_pretrained(stock)
    assert model.config.exits["kind"] == "learned"
    with torch.inference_mode():
        said = model.all_exits(tiny_batch_for(model.stock, 3))
    correct = torch.stack([one.signals["correct"] for one in said])
    assert correct.shape == (model.depth, 3)
    assert ((correct >= 0) & (correct <= 1)).all()


@given(st.integers(2, 8), st.floats(0, 1), st.floats(0, 10), st.integers(0, 9))
def test_the_weights_of_every_row_add_up_to_one(
    depth: int, progress: float, sharpness: float, seed: int
) -> None:
    doubts = torch.rand(6, depth - 1, generator=torch.Generator().manual_seed(seed))
    clock = Clock(step=int(100 * progress), steps=100)
    weights = Auto(sharpness=sharpness).weights(doubts, clock)
    assert weights.shape == (6, depth)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))


def test_a_row_that_is_sure_early_weighs_most_at_early_exits() -> None:
    doubts = torch.tensor([[0.01, 0.01, 0.01], [0.9, 0.8, 0.7]])
    torch.manual_seed(0)
    sure, unsure = Auto(sharpness=5.0, thresholds=50).weights(doubts, Clock(99, 100))
    assert sure[0] == sure.max()
    assert sure[0] > unsure[0]
    assert unsure[-1] > sure[-1]


def test_a_set_of_labels_is_as_doubtful_as_its_least_sure_label() -> None:
    sure, half = [9.0, -9.0, 9.0], [9.0, -9.0, 0.0]
    made = [ExitOutput(torch.tensor([sure, half])) for _ in range(3)]
    seen: list[Tensor] = []

    class Watched(Auto):
        def weights(self, doubts: Tensor, clock: Clock) -> Tensor:
            seen.append(doubts)
            return super().weights(doubts, clock)

    Watched().losses(made, batch(MULTI, rows=2), JOINT)
    assert (seen[0][0] < 0.01).all()
    assert seen[0][1].tolist() == pytest.approx([1.0, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_exit_learns_in_every_task(kind: str) -> None:
    made = outputs(kind=kind)
    Auto().losses(made, batch(kind), JOINT)["exits"].backward()
    assert all(o.scores.grad is not None and o.scores.grad.abs().sum() > 0 for o in made)


def test_the_fine_tune_comes_first_and_is_left_out_where_it_was_done() -> None:
    stages = Auto(warm_up=0.5).stages()
    assert [(stage.trainable, stage.share) for stage in stages] == [("stock", 0.5), ("all", 0.5)]
    tuned = Auto(warm_up=0.5)
    tuned.fine_tuned = True
    assert [(stage.trainable, stage.share) for stage in tuned.ahead()] == [("all", 1.0)]


def test_exits_of_images_learn_alone_for_a_while_before_and_after_all_learn() -> None:
    ours = Auto(warm_up=0.5, exits_first=0.25, exits_last=0.125)
    ours.reads = "image"
    stages = [(stage.trainable, stage.share) for stage in ours.stages()]
    assert stages == [("stock", 0.5), ("exits", 0.125), ("all", 0.3125), ("exits", 0.0625)]
    for alone in (ours.stages()[1], ours.stages()[3]):
        made = outputs()
        theirs = SelfDistillation().losses(made, batch(), alone)
        found = ours.losses(made, batch(), alone)
        assert set(found) == {"distillation", "task"}
        torch.testing.assert_close(sum(found.values()), sum(theirs.values()))


def test_the_stage_of_the_stock_model_has_its_loss_alone() -> None:
    made = outputs()
    loss = Auto().losses(made[-1:], batch(), Stage("stock", "stock"))
    torch.testing.assert_close(loss["exits"], task_loss(made[-1].scores, batch()["labels"], SINGLE))


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
    joint = Auto(rate=3.0).ahead()[-1]
    model = tiny_model()
    trainee = trainee_for(model, Auto(), joint)
    fresh = fresh_parameters(trainee, model.stock, new_head=False)
    options = TrainOptions(learning_rate=1e-4, head_learning_rate=1e-3)
    rows = Rows([{}] * 4, torch.ones(4), list)
    trainer = make_trainer(trainee, rows, options, tmp_path, fresh)
    rates = {group["lr"] for group in trainer.create_optimizer().param_groups if group["params"]}
    assert sorted(rates) == pytest.approx([1e-4, 3e-3])


def test_how_wrong_numbers_are_is_measured_in_spreads_of_the_training_labels(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units: set[float] = set()

    def watched(*given: Any) -> Tensor:
        units.add(given[-1])
        return correctness_loss(*given)

    monkeypatch.setattr("offramp.objectives.auto.correctness_loss", watched)
    labels = [100.0 * (n % 3) for n in range(24)]
    rows = Dataset.from_dict({"text": tiny_texts(24), "label": labels})
    options = TrainOptions(epochs=1, batch_size=8, quiet=True)
    stock = save_tiny_stock(tmp_path / "stock", "bert", REGRESSION)
    train(stock, rows, tmp_path / "out", method="auto", options=options)
    (unit,) = units
    assert unit == pytest.approx(np.std(labels))


def test_labels_that_are_all_equal_are_measured_in_their_own_unit() -> None:
    # the deviation of equal numbers, such as tenths, need not be 0 to the last bit
    rows = Rows(Dataset.from_dict({"label": [0.1] * 24}), torch.ones(24), list)
    assert Material(tiny_model("bert", REGRESSION), rows, None, torch.float32).spread == 1.0
