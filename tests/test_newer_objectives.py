"""Losses of BERxiT, COSEE, CAP and GPFEE, by hand on small tensors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.exits.imitating import ImitatingSpec
from offramp.objectives import Clock, DepthWeighted, task_loss
from offramp.objectives.alternating import Alternating, correctness_loss, rightness
from offramp.objectives.equal import EqualWeights
from offramp.objectives.imitation import Imitating, imitation_loss
from offramp.objectives.simulated import (
    SimulatedExits,
    doubt,
    exit_layers,
    nearness,
    separation,
)
from offramp.testing import tiny_batch, tiny_model

SINGLE, MULTI = "single_label_classification", "multi_label_classification"


def outputs_of(*scores: Any, **signals: list[Any]) -> list[ExitOutput]:
    """One output per score tensor; a signal has an entry per output, None for none."""
    return [
        ExitOutput(
            torch.tensor(score, requires_grad=True),
            {n: torch.tensor(v[i]) for n, v in signals.items() if v[i] is not None},
        )
        for i, score in enumerate(scores)
    ]


def parts(objective: Any, outputs: list[ExitOutput], labels: Any, kind: str, **clock: int) -> Any:
    batch = {"labels": torch.tensor(labels), "problem_type": kind, "clock": Clock(**clock)}
    return objective.losses(outputs, batch, objective.stages()[0])


# --- BERxiT -------------------------------------------------------------------------------

THREE = ([[1.0, 0.0]], [[0.0, 0.0]], [[0.0, 2.0]])
CORRECT = {"correct": [[0.9], [0.3], [1.0]]}


def test_even_steps_train_full_depth_and_odd_steps_all() -> None:
    each = [task_loss(torch.tensor(score), torch.tensor([1]), SINGLE) for score in THREE]
    plain = outputs_of(*THREE)
    assert torch.equal(parts(Alternating(), plain, [1], SINGLE, step=4)["exits"], each[2])
    odd = parts(Alternating(), plain, [1], SINGLE, step=5)
    assert odd["exits"].item() == pytest.approx(sum(each).item())
    assert list(odd) == ["exits"]


def test_exits_learn_when_they_are_right_at_every_step() -> None:
    # the first is wrong and the second, whose first score is the largest, too
    wanted = (0.9**2 + 0.3**2) / 2
    for step in (0, 1):
        found = parts(Alternating(), outputs_of(*THREE, **CORRECT), [1], SINGLE, step=step)
        assert found["correctness"].item() == pytest.approx(wanted)


def test_the_released_odd_step_misses_full_depth() -> None:
    outputs = outputs_of(*THREE, **CORRECT)
    mended = parts(Alternating(), outputs, [1], SINGLE, step=1)["exits"]
    released = parts(Alternating(as_released=True), outputs, [1], SINGLE, step=1)["exits"]
    last = task_loss(outputs[2].scores, torch.tensor([1]), SINGLE)
    assert (mended - released).item() == pytest.approx(last.item())


def test_rightness_of_labels_sets_and_numbers() -> None:
    scores = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    assert rightness(scores, torch.tensor([0, 0]), SINGLE).tolist() == [1, 0]
    sets = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    assert rightness(scores, sets, MULTI).tolist() == [1, 0]
    close = rightness(torch.tensor([[1.5], [9.0]]), torch.tensor([1.0, -9.0]), "regression")
    assert close.tolist() == pytest.approx([1 - math.tanh(0.5), 0.0])


@given(st.floats(0.01, 1000))
def test_how_wrong_a_number_is_does_not_depend_on_its_unit(unit: float) -> None:
    scores, labels = torch.tensor([[1.5], [-2.0]]), torch.tensor([1.0, 0.0])
    found = rightness(unit * scores, unit * labels, "regression", unit)
    torch.testing.assert_close(found, rightness(scores, labels, "regression"))


def test_what_is_right_gets_no_gradient_through_its_scores() -> None:
    outputs = outputs_of([[0.3]], correct=[[0.5]])
    loss = correctness_loss(outputs, torch.tensor([0.1]), "regression")
    assert not loss.requires_grad


# --- CAP ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [SINGLE, MULTI, "regression"])
def test_equal_weights_are_a_plain_mean(kind: str) -> None:
    shape = (4, 1) if kind == "regression" else (4, 3)
    scores = [torch.randn(shape).tolist() for _ in range(3)]
    labels = torch.tensor([0, 2, 1, 0]) if kind == SINGLE else torch.ones(shape)
    each = [task_loss(torch.tensor(score), labels, kind).item() for score in scores]
    found = parts(EqualWeights(), outputs_of(*scores), labels.tolist(), kind)["exits"]
    assert found.item() == pytest.approx(sum(each) / 3)


# --- COSEE --------------------------------------------------------------------------------


def test_doubt_by_hand() -> None:
    scores = torch.log(torch.tensor([[1.0, 3.0], [2.0, 2.0]]))
    assert doubt(scores, "energy").tolist() == pytest.approx([1 / 5, 1 / 5])
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    assert doubt(scores, "entropy").tolist() == pytest.approx([entropy, 1.0])
    assert doubt(scores, "max_probability").tolist() == pytest.approx([0.25, 0.5])


@pytest.mark.parametrize("kind", ["energy", "entropy", "max_probability"])
def test_saturated_scores_are_sure_and_no_trouble(kind: Any) -> None:
    scores = torch.tensor([[500.0, -500.0]], requires_grad=True)
    found = doubt(scores, kind)
    found.sum().backward()
    assert found.item() == 0
    assert torch.isfinite(scores.grad).all()


def test_rows_leave_below_the_threshold_or_at_full_depth() -> None:
    doubts = torch.tensor([[0.5, 0.2], [0.1, 0.9], [0.7, 0.7]])
    layers = exit_layers(doubts, torch.tensor([0.3, 0.5, 0.8]))
    # strictly below: 0.5 is not below 0.5
    assert layers.tolist() == [[2, 1, 3], [2, 1, 3], [1, 1, 1]]


@pytest.mark.parametrize(
    ("sharpness", "peak"), [(0.0, 1 / 12), (0.05, 0.099), (0.2, 0.151), (1, 0.468), (10, 1.0)]
)
def test_the_peak_of_the_weights_is_the_papers(sharpness: float, peak: float) -> None:
    weights = nearness(12, sharpness, torch.device("cpu"))
    assert weights[3].sum().item() == pytest.approx(1)
    assert weights[3].argmax().item() == 3 or sharpness == 0
    assert weights[3, 3].item() == pytest.approx(peak, abs=6e-4)


def test_right_rows_shall_be_less_in_doubt_than_wrong_ones() -> None:
    doubts = torch.tensor([[0.2, 0.1, 0.5], [0.3, 0.2, 0.6], [0.4, 0.9, 0.7]])
    right = torch.tensor([[True, True, True], [False, True, True], [True, False, True]])
    # 0.3 - 0.3 + 0.3 at the first, 0.15 - 0.9 + 0.3 < 0 at the second, none wrong at the third
    assert separation(doubts, right, 0.3).item() == pytest.approx(0.15)
    assert separation(doubts, torch.ones(3, 3).bool(), 0.3).item() == 0


def _slowly(objective: SimulatedExits, scores: Tensor, labels: Tensor, beta: float) -> float:
    """The weighted loss with loops; thresholds are drawn as the objective draws them."""
    depth, rows, _ = scores.shape
    doubts = [[doubt(s[None], objective.doubt).item() for s in layer] for layer in scores[:-1]]
    drawn = torch.rand(objective.thresholds)
    every = torch.tensor(doubts).T.flatten()
    total = 0.0
    for threshold in torch.quantile(every, drawn).tolist():
        for n in range(rows):
            leave = [m for m in range(depth - 1) if doubts[m][n] < threshold]
            star = leave[0] if leave else depth - 1
            weights = [math.exp(-beta * abs(m - star)) for m in range(depth)]
            losses = [functional.cross_entropy(scores[m, n], labels[n]) for m in range(depth)]
            near = sum(w * x.item() for w, x in zip(weights, losses, strict=True))
            total += near / sum(weights)
    return total / objective.thresholds / rows


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), kind=st.sampled_from(["energy", "entropy", "max_probability"]))
def test_the_weighted_loss_is_that_of_the_loops(seed: int, kind: Any) -> None:
    scores = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(5) % 3
    objective = SimulatedExits(doubt=kind, thresholds=3, sharpness=2.0)
    torch.manual_seed(seed)
    found = parts(objective, outputs_of(*scores.tolist()), labels.tolist(), SINGLE, step=6, steps=8)
    torch.manual_seed(seed)
    assert found["exits"].item() == pytest.approx(_slowly(objective, scores, labels, 1.5), rel=1e-4)


def test_at_the_start_all_exits_weigh_the_same() -> None:
    scores = torch.randn(4, 6, 3).tolist()
    labels = [0, 1, 2, 0, 1, 2]
    found = parts(SimulatedExits(sharpness=10), outputs_of(*scores), labels, SINGLE)["exits"]
    equal = parts(EqualWeights(), outputs_of(*scores), labels, SINGLE)["exits"]
    assert found.item() == pytest.approx(equal.item(), rel=1e-5)


def test_the_calibration_has_its_weight_and_a_gradient() -> None:
    scores = [[[1.0, 0.0], [1.0, 0.0]], [[1.0, 0.0], [1.0, 0.0]]]
    outputs = outputs_of(*scores)
    found = parts(SimulatedExits(calibration=0.5), outputs, [0, 1], SINGLE)["calibration"]
    assert found.item() == pytest.approx(0.5 * 0.3)
    found.backward()
    assert outputs[0].scores.grad.any()
    assert outputs[1].scores.grad is None


def released() -> SimulatedExits:
    torch.manual_seed(0)
    return SimulatedExits(draw="last_epoch", thresholds=64)


def test_the_released_thresholds_span_the_epoch_before() -> None:
    objective = released()
    low, high = torch.full((3, 2), 0.2), torch.full((3, 2), 0.4)
    first = [objective._thresholds(doubts, Clock(epoch=0)) for doubts in (low, high)]
    assert torch.cat(first).min() < 0.1
    assert torch.cat(first).max() > 0.9
    second = objective._thresholds(torch.full((3, 2), 0.7), Clock(epoch=1))
    assert 0.2 <= second.min() <= second.max() <= 0.4
    third = objective._thresholds(low, Clock(epoch=2))
    assert third.tolist() == pytest.approx([0.7] * 64)


def test_the_released_thresholds_go_on_after_a_stop() -> None:
    objective, again = released(), released()
    objective._thresholds(torch.full((3, 2), 0.2), Clock(epoch=0))
    objective._thresholds(torch.full((3, 2), 0.5), Clock(epoch=1))
    again.load_state_dict(objective.state_dict())
    torch.manual_seed(1)
    one = objective._thresholds(torch.rand(3, 2), Clock(epoch=2))
    torch.manual_seed(1)
    assert torch.equal(one, again._thresholds(torch.rand(3, 2), Clock(epoch=2)))
    assert not SimulatedExits().state_dict()


def test_simulated_exits_are_for_one_class_of_many() -> None:
    with pytest.raises(ConfigError, match="one class of many"):
        parts(SimulatedExits(), outputs_of([[1.0]], [[1.0]]), [1.0], "regression")


# --- GPFEE --------------------------------------------------------------------------------


def test_imitation_by_hand() -> None:
    outputs = outputs_of(
        *[[[1.0, 0.0]]] * 3,
        state=[[[1.0, 0.0]], [[0.0, 1.0]], [[3.0, 4.0]]],
        imitated=[[[[0.0, 2.0], [1.0, 0.0]]], [[[0.0, 1.0]]], None],
    )
    # from layer 1: cosines 1 and 0.6; from layer 2: 0.8
    assert imitation_loss(outputs).item() == pytest.approx((0.2 + 0.2) / 2)
    found = parts(Imitating(), outputs, [0], SINGLE)
    task = parts(DepthWeighted(), outputs, [0], SINGLE)["exits"]
    assert found["exits"].item() == pytest.approx(task.item() / 2)
    assert found["imitation"].item() == pytest.approx(0.1)


def test_imitations_learn_and_what_they_imitate_does_not() -> None:
    states = [torch.randn(2, 4, requires_grad=True) for _ in range(2)]
    imitated = torch.randn(2, 1, 4, requires_grad=True)
    outputs = [
        ExitOutput(torch.zeros(2, 2), {"state": states[0], "imitated": imitated}),
        ExitOutput(torch.zeros(2, 2), {"state": states[1]}),
    ]
    imitation_loss(outputs).backward()
    assert imitated.grad.any()
    assert all(state.grad is None for state in states)


def _reached(objective: Imitating, step: int) -> list[str]:
    model = tiny_model(spec=ImitatingSpec(), layers=3)
    model.train()
    batch = {
        "labels": torch.arange(4) % 3,
        "problem_type": SINGLE,
        "clock": Clock(step=step, steps=10),
    }
    losses = objective.training_step(model, tiny_batch(4), batch, objective.stages()[0])
    torch.stack(list(losses.values())).sum().backward()
    return [name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()]


def test_lower_layers_are_cut_off_at_first_and_not_at_the_end() -> None:
    objective = Imitating(detached=2)
    early, late = _reached(objective, step=0), _reached(objective, step=10)
    for layer in (0, 1):
        assert not any(f"encoder.layer.{layer}." in name for name in early)
        assert any(f"encoder.layer.{layer}." in name for name in late)
    assert any("encoder.layer.2." in name for name in early)
    assert late == _reached(Imitating(), step=0)
