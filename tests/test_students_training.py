"""FastBERT, ELBERT and RomeBERT: how their training goes, from gradients to a saved model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st
from test_training_resume import Stopped, examples, run, same, stop_every, weights
from torch import Tensor, nn

from offramp.calibration import calibrate
from offramp.data import load_examples
from offramp.engines import load_processor, record
from offramp.errors import DataError
from offramp.exits import ExitSpec
from offramp.exits.own_head import OwnHeadSpec
from offramp.exits.student import StudentSpec
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import LearnedWeights, Objective, RobustExits
from offramp.objectives.robust import LAST
from offramp.prediction import predict
from offramp.table import replay
from offramp.testing import (
    check_method,
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_pictures,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import TrainOptions, attach, train
from offramp.training.batches import Rows
from offramp.training.gradients import KeptApart, gradients_apart
from offramp.training.preparing import encoded_rows
from offramp.training.running import run_stages
from offramp.training.trainer import Trainee
from offramp.training.work import WorkFolder

__all__ = ["stop_every"]

SINGLE = "single_label_classification"
FEW = TrainOptions(max_steps=2, batch_size=8, quiet=True)
STUDENT = StudentSpec(width=16)


# --- gradients that meet ------------------------------------------------------------------


class Layers(nn.Module):
    """What `combine` knows of a model: two layers of a matrix and a bias, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.backbone = SimpleNamespace(layers=self.layers)
        self.head = nn.Linear(2, 2)


def drawn(model: nn.Module, seed: int) -> dict[nn.Parameter, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return {leaf: torch.randn(leaf.shape, generator=draw) for leaf in model.parameters()}


def dot(one: Any, other: Any, chosen: list[nn.Parameter]) -> float:
    return sum(float((one[leaf] * other[leaf]).sum()) for leaf in chosen)


@given(seed=st.integers(0, 10_000), reference=st.sampled_from(["exits", "last"]))
def test_no_gradient_points_against_the_reference_and_the_reference_stays(
    seed: int, reference: Any
) -> None:
    model, objective = Layers(), RobustExits(reference=reference)
    first, second = model.layers
    last, exits = drawn(model, 2 * seed), drawn(model, 2 * seed + 1)
    for leaf in second.parameters():
        del exits[leaf]  # no exit reaches the last layer
    found = objective.combine({LAST: last}, exits, model)
    met = [first.weight]
    kept, moved = (exits, last) if reference == "exits" else (last, exits)
    rest = {leaf: found[leaf] - kept[leaf] for leaf in met}
    before = dot(moved, kept, met)
    after = dot(rest, kept, met)
    assert after == pytest.approx(max(before, 0), abs=1e-4)
    if before >= 0:
        torch.testing.assert_close(rest[first.weight], moved[first.weight])
    for leaf in (first.bias, model.head.weight, model.head.bias):
        torch.testing.assert_close(found[leaf], last[leaf] + exits[leaf])
    assert torch.equal(found[second.weight], last[second.weight])


def test_without_a_reference_nothing_is_kept_apart() -> None:
    assert RobustExits(reference=None).apart == ()
    assert RobustExits().apart == (LAST,)


def quiet_model() -> MultiExitModel:
    """Without dropout, so that a batch and its halves have the same gradient."""
    model = tiny_model(spec=ExitSpec(hidden=True, dropout=0.0))
    return model.eval()


def test_halves_of_a_batch_meet_as_the_whole_batch_would() -> None:
    model, objective = quiet_model(), RobustExits()
    trainee = Trainee(model, objective, *objective.stages(), SINGLE)
    batch = {**tiny_batch(8), "labels": torch.arange(8) % 3}
    one_process: Any = SimpleNamespace(num_processes=1)
    found = []
    for pieces in (1, 2):
        kept = KeptApart()
        for part in range(pieces):
            rows = slice(part * 8 // pieces, (part + 1) * 8 // pieces)
            parts = trainee(**{name: leaf[rows] for name, leaf in batch.items()})
            kept.add(trainee, {name: part / pieces for name, part in parts.items()})
        model.zero_grad()
        kept.meet(trainee, one_process)
        found.append([leaf.grad for leaf in model.parameters() if leaf.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_the_gradients_apart_add_up_to_the_gradient_of_the_loss() -> None:
    model, objective = quiet_model(), RobustExits()
    trainee = Trainee(model, objective, *objective.stages(), SINGLE)
    batch = {**tiny_batch(8), "labels": torch.arange(8) % 3}
    found = gradients_apart(trainee, trainee(**batch))
    total = Objective().combine({LAST: found[LAST]}, found[""], model)
    sum(trainee(**batch).values()).backward()  # type: ignore[union-attr]
    assert set(total) == {leaf for leaf in model.parameters() if leaf.grad is not None}
    for leaf, gradient in total.items():
        torch.testing.assert_close(gradient, leaf.grad, atol=1e-5, rtol=1e-4)


class SumApart(RobustExits):
    """Kept apart, but added as they are."""

    combine = Objective.combine


def test_a_trainer_that_keeps_gradients_apart_steps_like_one_that_does_not(tmp_path: Path) -> None:
    found = []
    for objective in (SumApart(), RobustExits(reference=None)):
        model = tiny_model(spec=ExitSpec(hidden=True))
        options = TrainOptions(
            max_steps=3, batch_size=4, gradient_accumulation=2, learning_rate=1e-3, quiet=True
        )
        torch.manual_seed(1)
        work = WorkFolder(tmp_path / type(objective).__name__)
        run_stages(model, objective, rows_for(model), options, work)
        found.append(model.state_dict())
    start = tiny_model(spec=ExitSpec(hidden=True)).state_dict()

    def apart(one: Any, other: Any) -> float:
        return sum(float((leaf - other[name]).square().sum()) for name, leaf in one.items())

    # not each weight by itself: Adam makes a whole step of a gradient that is nothing but rounding
    assert apart(*found) < 1e-3 * apart(start, found[1])


def rows_for(model: MultiExitModel) -> Rows:
    return encoded_rows(examples(24), model, tiny_tokenizer(), None)


# --- training -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fastbert", "elbert", "romebert"])
def test_the_presets_pass(name: str) -> None:
    check_method(METHODS[name])


def _data(arch: str, seed: int = 0) -> Dataset:
    images = arch in ("vit", "cifar_resnet")
    inputs = {"image": tiny_pictures(24, seed)} if images else {"text": tiny_texts(24, seed)}
    return Dataset.from_dict({**inputs, "label": [row % 3 for row in range(24)]})


@pytest.mark.parametrize(
    ("method", "arch"),
    [
        *((method, "bert") for method in ("fastbert", "elbert", "romebert")),
        ("fastbert", "cifar_resnet"),
        ("romebert", "cifar_resnet"),
        ("fastbert", "vit"),
        ("elbert", "vit"),
    ],
)
def test_a_trained_model_is_recorded_replayed_saved_and_asked(
    method: str, arch: str, tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock", arch)
    pooling = "mean" if method == "romebert" else None
    train(source, _data(arch), tmp_path / "out", method=method, pooling=pooling, options=FEW)
    model = MultiExitModel.from_pretrained(tmp_path / "out")
    assert model.config.exits["kind"] == METHODS[method].exits.kind
    rows = load_examples(_data(arch, seed=1))
    processor = load_processor(tmp_path / "out", model.backbone.reads)
    table = record(model, rows, tmp_path / "t", "tune", processor=processor, progress=False)
    point = calibrate(table, target_speedup=1.3).point
    point.save(tmp_path / "out")
    items = next(iter(_data(arch, seed=1).remove_columns("label").to_dict().values()))
    if arch != "bert":
        items = tiny_pictures(24, 1)
    layers = [answer["exit_layer"] for answer in predict(tmp_path / "out", items)]
    assert layers == replay(table, point.build_policy()).exit_layers.tolist()


@pytest.mark.parametrize("arch", ["bert", "cifar_resnet"])
def test_students_are_attached_to_a_classifier_from_inputs_without_labels(
    arch: str, tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock", arch)
    data = _data(arch).remove_columns("label")
    model = attach(source, data, tmp_path / "out", exits=STUDENT, options=FEW)
    before = tiny_stock(arch).state_dict()
    assert same(before, model.stock.state_dict())
    assert MultiExitModel.from_pretrained(tmp_path / "out").config.exit_kind() == STUDENT


@pytest.mark.parametrize("how", ["elbert", "romebert"])
def test_a_run_stopped_again_and_again_ends_in_the_weights_of_one_that_was_not(
    how: str, tmp_path: Path, stop_every: Callable[[int], None]
) -> None:
    source = save_tiny_stock(tmp_path / "stock", "albert")
    options = TrainOptions(
        epochs=1,
        batch_size=4,
        gradient_accumulation=2,
        learning_rate=1e-3,
        save_steps=2,
        quiet=True,
    )
    run(how, source, tmp_path / "whole", options)
    stop_every(4)
    stops = 0
    while not (tmp_path / "cut").exists():
        try:
            run(how, source, tmp_path / "cut", options)
        except Stopped:
            stops += 1
    assert stops >= 1
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_learned_weights_move_at_their_own_rate_without_decay_and_are_checkpointed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, objective = tiny_model(spec=OwnHeadSpec()), LearnedWeights()
    objective.prepare(model.depth)
    groups: list[Any] = []
    update = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        groups[:] = [
            {**group, "names": len(group["params"])}
            for group in self.param_groups
            if any(leaf is objective.raw for leaf in group["params"])
        ]
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    work = WorkFolder(tmp_path / "out")
    run_stages(model, objective, rows_for(model), FEW, work)
    ((group),) = groups
    assert group["names"] == 1
    assert group["initial_lr"] == 1e-2
    assert group["weight_decay"] == 0
    kept = work.finished("joint")
    assert kept is not None
    assert objective.raw is not None
    assert torch.equal(kept["objective.raw"], objective.raw)
    assert (objective.raw != 4.0).all()


def test_students_learn_the_same_from_text_without_labels(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "source")
    options = TrainOptions(max_steps=3, batch_size=8, quiet=True)
    given: dict[str, Any] = {"method": "fastbert", "fine_tuned": True, "options": options}
    labelled = train(source, examples(), tmp_path / "labelled", **given)
    texts = examples().remove_columns("label")
    unlabelled = train(source, texts, tmp_path / "unlabelled", **given)
    assert same(labelled.state_dict(), unlabelled.state_dict())
    given["fine_tuned"] = False
    with pytest.raises(DataError, match="no labels, which method 'fastbert' needs"):
        train(source, texts, tmp_path / "no", **given)
