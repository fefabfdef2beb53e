"""JEI-DNN: gates on how sure an exit is, the loss by turns, and sets that hold the right class."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.calibration.conformal import (
    busy_exits,
    conformal_limit,
    conformal_limits,
    conformal_sets,
)
from offramp.data import encode
from offramp.engines import TorchEngine, collate, record
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.exits.gated import GatedSpec, sureness
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import Clock, Stage
from offramp.objectives.gated import (
    Gated,
    balanced_loss,
    capped_masses,
    gate_targets,
)
from offramp.policies import make_policy
from offramp.table import replay
from offramp.testing import (
    check_engine,
    check_method,
    save_tiny_stock,
    tiny_batch_for,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import TrainOptions, train

SINGLE = "single_label_classification"
TURNS = Stage("turns", "exits")
SPEC = GatedSpec(pooling="mean")


def batch_at(step: int, labels: Tensor) -> dict[str, Any]:
    return {"labels": labels, "problem_type": SINGLE, "clock": Clock(step, 10_000)}


def random_outputs(
    rows: int = 6, depth: int = 4, seed: int = 0
) -> tuple[list[ExitOutput], list[Tensor], list[Tensor]]:
    """Outputs with leaves of their own: scores of every exit, gates of exits 1..L-1."""
    draw = torch.Generator().manual_seed(seed)
    scores = [torch.randn(rows, 3, generator=draw, requires_grad=True) for _ in range(depth)]
    gates = [torch.rand(rows, generator=draw, requires_grad=True) for _ in range(depth - 1)]
    signals = [*gates, torch.ones(rows)]
    outputs = [ExitOutput(s, {"gate": g}) for s, g in zip(scores, signals, strict=True)]
    return outputs, scores, gates


# --- what a gate reads ------------------------------------------------------------------------


def test_what_a_gate_reads_is_what_was_worked_out_by_hand() -> None:
    scores = torch.tensor([[0.7, 0.2, 0.1]]).log()
    squares = [0.49 / 0.54, 0.04 / 0.54, 0.01 / 0.54]
    wanted = [
        0.7,
        -sum(p * math.log(p) for p in (0.7, 0.2, 0.1)),
        0.5,
        -sum(p * math.log(p) for p in squares),
    ]
    assert torch.allclose(sureness(scores)[0], torch.tensor(wanted), atol=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), classes=st.integers(2, 9), scale=st.sampled_from((0, 1, 1e4)))
def test_what_a_gate_reads_is_finite_and_bounded(seed: int, classes: int, scale: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    top, entropy, margin, other = sureness(scale * torch.randn(5, classes, generator=draw)).T
    most = math.log(classes) + 1e-5
    assert ((top >= 1 / classes - 1e-6) & (top <= 1)).all()
    assert ((margin >= 0) & (margin <= top)).all()
    assert ((other >= 0) & (other <= entropy + 1e-5) & (entropy <= most)).all()


@pytest.mark.parametrize("arch", ["bert", "vit", "cifar_resnet"])
def test_each_exit_has_a_gate_and_full_depth_lets_everyone_go(arch: str) -> None:
    model = tiny_model(arch, spec=SPEC)
    with torch.inference_mode():
        outputs = model.all_exits(tiny_batch_for(model.stock, 5))
    for layer, output in enumerate(outputs[:-1], start=1):
        gate = model.exits.at(layer).gate  # type: ignore[attr-defined]
        wanted = gate(sureness(output.scores)).squeeze(-1).sigmoid()
        assert torch.allclose(output.signals["gate"], wanted, atol=1e-6)
    assert torch.equal(outputs[-1].signals["gate"], torch.ones(5))


def test_a_gate_sends_no_gradient_to_its_exit() -> None:
    model = tiny_model(spec=SPEC)
    outputs = model.all_exits(tiny_batch_for(model.stock, 5))
    torch.stack([output.signals["gate"].sum() for output in outputs[:-1]]).sum().backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None}
    assert reached == {f"exits.{n}.gate.{part}" for n in range(1, 6) for part in ("weight", "bias")}


def test_a_model_for_regression_is_refused_with_a_word_on_what_to_use() -> None:
    with pytest.raises(ConfigError, match=r"class probabilities.*'halting'"):
        tiny_model("bert", "regression", spec=SPEC)


# --- which share leaves where -----------------------------------------------------------------


def test_masses_are_those_worked_out_by_hand() -> None:
    gates = torch.tensor([[0.6, 0.3, 0.5, 1.0], [0.9, 0.4, 0.4, 1.0], [0.1, 0.1, 0.1, 1.0]])
    wanted = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.9, 0.1, 0.0, 0.0], [0.1, 0.1, 0.1, 0.7]])
    assert torch.allclose(capped_masses(gates), wanted, atol=1e-6)


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), depth=st.integers(2, 12))
def test_masses_add_up_to_one_with_full_depth_as_the_last(seed: int, depth: int) -> None:
    gates = torch.rand(6, depth, generator=torch.Generator().manual_seed(seed))
    gates[:, -1] = 1
    masses = capped_masses(gates)
    assert (masses >= 0).all()
    assert torch.allclose(masses.sum(dim=1), torch.ones(6), atol=1e-5)


# --- the loss -----------------------------------------------------------------------------------


def test_gates_are_to_open_from_the_cheapest_exit_on() -> None:
    price = torch.tensor([[3.0, 1.0, 2.0, 4.0], [4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    wanted = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    assert torch.equal(gate_targets(price), wanted)


@pytest.mark.parametrize(("trade_off", "cheapest"), [(0.0, 4), (0.5, 3), (2.0, 2), (100.0, 1)])
def test_a_dearer_full_depth_moves_the_cheapest_exit_forward(
    trade_off: float, cheapest: int
) -> None:
    price = Gated(trade_off=trade_off).price(torch.tensor([[3.0, 1.0, 0.6, 0.5]]))
    assert gate_targets(price)[0].tolist() == [float(n >= cheapest) for n in (1, 2, 3)]


def test_costs_that_are_handed_in_are_used_and_must_be_one_per_layer() -> None:
    outputs, _, _ = random_outputs(depth=4)
    labels = torch.arange(6) % 3
    own = Gated(costs=[0.1, 0.2, 0.4, 1.0], simplex=True, trade_off=1e4)
    plain = Gated(simplex=True, trade_off=1e4)
    one, other = (
        objective.losses(outputs, batch_at(0, labels), TURNS)["gates"] for objective in (own, plain)
    )
    assert one < other
    with pytest.raises(ConfigError, match="3 numbers, the model 4 layers"):
        Gated(costs=[0.1, 0.5, 1.0]).losses(outputs, batch_at(0, labels), TURNS)


def test_a_gates_ones_weigh_as_much_as_its_zeros_within_a_factor_of_five() -> None:
    gates = torch.full((4, 3), 0.5)
    targets = torch.tensor([[1.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [0.0, 0.0, 1.0]])
    # weights of ones: 3, 5 (no ones), 1/5 (no zeros)
    wanted = math.log(2) * ((3 + 3) + 4 + 4 / 5) / 12
    assert float(balanced_loss(gates, targets)) == pytest.approx(wanted, abs=1e-6)


def test_gates_and_heads_take_turns_and_each_leaves_the_other_alone() -> None:
    labels = torch.arange(6) % 3
    for step, name in ((0, "gates"), (4, "gates"), (5, "heads"), (9, "heads"), (10, "gates")):
        outputs, scores, gates = random_outputs()
        parts = Gated(every=5).losses(outputs, batch_at(step, labels), TURNS)
        assert list(parts) == [name]
        parts[name].backward()
        assert all((s.grad is not None) == (name == "heads") for s in scores[:-1])
        assert all((g.grad is not None) == (name == "gates") for g in gates)
        assert scores[-1].grad is None or not scores[-1].grad.any()


def test_each_part_has_its_turns_in_a_short_training_too() -> None:
    labels = torch.arange(6) % 3
    outputs, _, _ = random_outputs()
    turns = []
    for step in range(40):
        batch = {**batch_at(step, labels), "clock": Clock(step, 40)}
        turns += list(Gated().losses(outputs, batch, TURNS))
    assert turns == (["gates"] * 4 + ["heads"] * 4) * 5


def test_in_the_warm_up_the_first_head_weighs_most_and_no_gate_learns() -> None:
    outputs, scores, gates = random_outputs(depth=4)
    labels = torch.arange(6) % 3
    batch = batch_at(0, labels)
    (loss,) = Gated().losses(outputs, batch, Stage("heads", "exits")).values()
    of_heads = [torch.nn.functional.cross_entropy(s, labels) for s in scores[:-1]]
    wanted = (3 * of_heads[0] + 2 * of_heads[1] + of_heads[2]) / 6
    assert torch.allclose(loss, wanted)
    loss.backward()
    assert all(g.grad is None for g in gates)


def heads_loss(objective: Gated, outputs: list[ExitOutput]) -> Tensor:
    labels = torch.arange(len(outputs[0].scores)) % 3
    return objective.losses(outputs, batch_at(objective.every, labels), TURNS)["heads"]


def test_heads_learn_from_the_rows_that_would_leave_at_them() -> None:
    outputs, scores, gates = random_outputs()
    labels = torch.arange(6) % 3
    found = torch.stack(
        [torch.nn.functional.cross_entropy(s, labels, reduction="none") for s in scores[:-1]], 1
    )
    masses = capped_masses(torch.stack(gates, dim=1))
    weights = 0.9 * 3 * masses / masses.sum(dim=1, keepdim=True) + 0.1
    assert torch.allclose(heads_loss(Gated(), outputs), (weights * found).mean())
    assert torch.allclose(weights.mean(dim=1), torch.ones(6), atol=1e-6)


def test_as_released_the_gates_cancel_out_in_value_and_gradient() -> None:
    """P * CE, times sum(CE) / sum(P * CE) that is not detached, is the plain sum of CE."""
    outputs, scores, gates = random_outputs()
    labels = torch.arange(6) % 3
    found = torch.stack(
        [torch.nn.functional.cross_entropy(s, labels, reduction="none") for s in scores[:-1]], 1
    )
    weighted = capped_masses(torch.stack(gates, dim=1)).detach() * found
    released = weighted * (found.sum(1, keepdim=True) / weighted.sum(1, keepdim=True))
    detached = weighted * (found.sum(1, keepdim=True) / weighted.sum(1, keepdim=True)).detach()
    ours = heads_loss(Gated(as_released=True), outputs)
    assert torch.allclose(ours, released.mean())
    gradients = [
        torch.stack(torch.autograd.grad(loss, scores[:-1], retain_graph=True))
        for loss in (ours, released.mean(), detached.mean())
    ]
    assert torch.allclose(gradients[0], gradients[1], atol=1e-7)
    assert (gradients[0] - gradients[2]).abs().max() > 1e-2


def test_rows_that_no_gate_lets_go_keep_the_floor_and_are_a_number() -> None:
    outputs, _, _ = random_outputs()
    shut = [ExitOutput(o.scores, {"gate": torch.zeros(6)}) for o in outputs[:-1]] + outputs[-1:]
    plain = heads_loss(Gated(as_released=True), outputs)
    assert torch.allclose(heads_loss(Gated(), shut), 0.1 * plain)


def test_on_the_simplex_gates_learn_the_expected_loss_plus_cost() -> None:
    gates = torch.tensor([[0.5, 0.2]], requires_grad=True)
    found = torch.tensor([[3.0, 1.0, 0.5]])
    objective = Gated(simplex=True, trade_off=0.3)
    loss = objective._of_gates(found, torch.cat((gates, torch.ones(1, 1)), dim=1))
    wanted = 0.5 * (3 + 0.1) + 0.5 * 0.2 * (1 + 0.2) + 0.5 * 0.8 * (0.5 + 0.3)
    assert float(loss.detach()) == pytest.approx(wanted)
    loss.backward()
    # what opening gate 1 a little more costs: its price minus that of going on
    going_on = 0.2 * 1.2 + 0.8 * 0.8
    assert float(gates.grad[0, 0]) == pytest.approx(3.1 - going_on)  # type: ignore[index]


@pytest.mark.parametrize("simplex", [False, True])
def test_gates_learn_to_open_where_the_loss_is_small_enough(simplex: bool) -> None:
    logits = torch.zeros(4, 3, requires_grad=True)
    found = torch.tensor([[0.1, 0.1, 0.1, 0.1]] * 2 + [[3.0, 3.0, 0.1, 0.1]] * 2)
    learner = torch.optim.Adam([logits], lr=0.1)
    objective = Gated(simplex=simplex)
    for _ in range(200):
        learner.zero_grad()
        objective._of_gates(found, torch.cat((logits.sigmoid(), torch.ones(4, 1)), 1)).backward()
        learner.step()
    first = 1 + (logits.detach().sigmoid() <= 0.5).long().cumprod(dim=1).sum(dim=1)
    assert first.tolist() == [1, 1, 3, 3]


def test_stages_are_as_in_the_paper_where_the_model_is_finished() -> None:
    objective = Gated()
    assert [stage.name for stage in objective.ahead()] == ["stock", "heads", "turns"]
    objective.fine_tuned = True
    names = [(stage.name, stage.trainable) for stage in objective.ahead()]
    assert names == [("heads", "exits"), ("turns", "exits")]


@pytest.mark.parametrize("options", [{"every": 0}, {"floor": 1.5}, {"floor": torch.nan}])
def test_a_loss_that_makes_no_sense_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="Give every 1 or more"):
        Gated(**options)


def test_the_method_passes() -> None:
    check_method(METHODS["jei_dnn"])


def test_after_the_stock_model_has_learnt_only_heads_and_gates_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[tuple[str, ...]] = []
    learn = Gated.losses

    def watched(self: Gated, outputs: Any, batch: Any, stage: Stage) -> dict[str, Tensor]:
        parts = learn(self, outputs, batch, stage)
        turns.append((stage.name, *parts))
        return parts

    monkeypatch.setattr(Gated, "losses", watched)
    method = replace(METHODS["jei_dnn"], objective=partial(Gated, every=2))
    monkeypatch.setitem(METHODS._items, "jei_dnn", method)
    source = save_tiny_stock(tmp_path / "source")
    rows = Dataset.from_dict({"text": tiny_texts(40), "label": [n % 3 for n in range(40)]})
    options = TrainOptions(max_steps=4, batch_size=8, quiet=True)
    given = {"method": "jei_dnn", "pooling": "mean", "fine_tuned": True, "options": options}
    train(source, rows, tmp_path / "out", **given)
    assert turns[-4:] == [("turns", "gates"), ("turns", "heads")] * 2
    before = MultiExitModel.from_pretrained(source).stock.state_dict()
    after = MultiExitModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(leaf, before[n]) for n, leaf in after.stock.state_dict().items())
    assert all(after.exits[str(n)].gate.bias.abs() > 0 for n in range(1, 6))
    assert all(after.exits[str(n)].classifier.bias.abs().max() > 0 for n in range(1, 6))


@pytest.mark.parametrize("arch", ["bert", "vit", "cifar_resnet"])
def test_the_torch_engine_passes_on_exits_with_gates(arch: str) -> None:
    gated = [
        make_policy({"name": "gated", "threshold": bar, "masses": masses})
        for bar in (0.3, 0.5, 0.7)
        for masses in ("cut", "simplex")
    ]
    policies = [*gated, make_policy("patience")]
    check_engine(TorchEngine, tiny_model(arch, spec=SPEC), policies=policies, rows=16)


@pytest.mark.parametrize("masses", ["cut", "simplex"])
def test_a_replay_of_the_recorded_gates_is_the_live_engine(masses: str, tmp_path: Path) -> None:
    model, tokenizer = tiny_model(spec=SPEC), tiny_tokenizer()
    dataset, _ = encode(Dataset.from_dict({"text": tiny_texts(80)}), tokenizer)
    table = record(model, dataset, tmp_path / "t", "tune", processor=tokenizer, progress=False)
    assert list(table.header.signals) == ["gate"]
    gates = torch.from_numpy(np.array(table.columns["signals.gate"]))
    bar = float(gates[:, :-1].quantile(0.7))
    policy = make_policy({"name": "gated", "threshold": bar, "masses": masses})
    replayed = replay(table, policy)
    inputs = collate({"input_ids": dataset["input_ids"][:]}, 0)
    live = TorchEngine(model).run(inputs, policy)
    assert live.exit_layers.tolist() == replayed.exit_layers.tolist()
    assert len(set(replayed.exit_layers.tolist())) > 1
    if masses == "cut":  # a_i = P_i / what is left, from the masses that the loss uses
        found = capped_masses(gates)
        left = 1 - (found.cumsum(dim=1) - found)
        leaves = found[:, :-1] / left[:, :-1].clamp_min(1e-9) > bar
        first = 1 + (~leaves).long().cumprod(dim=1).sum(dim=1)
        assert first.tolist() == replayed.exit_layers.tolist()


# --- sets of classes ----------------------------------------------------------------------------


def test_the_limit_is_the_order_statistic_of_the_books() -> None:
    scores = np.arange(1, 100) / 100
    assert conformal_limit(scores, 0.1) == 0.90  # the 90th of 99
    assert conformal_limit(scores, 0.01) == 0.99
    assert conformal_limit(scores, 0.005) == math.inf
    assert conformal_limit([], 0.1) == math.inf
    with pytest.raises(ConfigError, match="0 to 1"):
        conformal_limit(scores, 1.0)


@settings(max_examples=80)
@given(count=st.integers(1, 200), alpha=st.floats(0.01, 0.5))
def test_at_least_the_asked_share_of_the_rows_themselves_is_within_the_limit(
    count: int, alpha: float
) -> None:
    scores = np.random.default_rng(count).random(count)
    assert (scores <= conformal_limit(scores, alpha)).mean() >= 1 - alpha - 1e-6


def simulated(rows: int, seed: int) -> tuple[Any, Any, Any]:
    """Answers of 5 classes, labels and exit layers; later exits of 4 answer harder rows."""
    draw = np.random.default_rng(seed)
    layers = draw.choice([1, 2, 4], size=rows, p=[0.55, 0.42, 0.03])
    labels = draw.integers(5, size=rows)
    sharpness = np.array([4.0, 2.0, 1.0, 0.5])[layers - 1]
    answers = draw.normal(size=(rows, 5))
    answers[np.arange(rows), labels] += sharpness
    return answers, labels, layers


def test_sets_hold_the_right_class_as_often_as_asked_at_every_exit_with_a_limit_of_its_own() -> (
    None
):
    alpha, found = 0.1, []
    for seed in range(200):
        limits = conformal_limits(*simulated(300, seed), own=[1, 1, 0, 0], alpha=alpha)
        answers, labels, layers = simulated(300, 10_000 + seed)
        sets = conformal_sets(answers, layers, limits)
        held = sets[np.arange(300), labels]
        found.append([held.mean(), held[layers == 1].mean(), held[layers == 2].mean()])
    of_all, of_first, of_second = np.mean(found, axis=0)
    for share in (of_first, of_second):
        assert 1 - alpha - 0.005 < share < 1 - alpha + 0.015
    # 3 % of the rows leave where too few did for a promise of their own; they share one
    assert 1 - alpha - 0.005 < of_all < 1 - alpha + 0.02


def test_exits_that_few_rows_leave_at_share_a_limit_of_their_own() -> None:
    answers, labels, layers = simulated(300, 0)
    own = busy_exits(simulated(300, 1)[2], depth=4)
    assert own.tolist() == [True, True, False, False]
    limits = conformal_limits(answers, labels, layers, own)
    few = np.isin(layers, (3, 4))
    assert 0 < few.sum() <= 20
    assert limits[2] == limits[3]
    assert len(set(limits[[0, 1, 3]])) == 3
    scores = 1 - np.exp(answers) / np.exp(answers).sum(axis=1, keepdims=True)
    wanted = conformal_limit(scores[few, labels[few]], 0.1)
    assert limits[3] == pytest.approx(wanted)


def test_easy_rows_do_not_vouch_for_hard_ones_that_leave_here_and_there() -> None:
    """Most rows leave at once and are right, the others at eleven layers and often wrong."""
    draw = np.random.default_rng(0)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        layers = np.where(draw.random(count) < 0.6, 1, draw.integers(2, 13, count))
        labels = draw.integers(0, 4, count)
        answers = draw.normal(size=(count, 4))
        answers[np.arange(count), labels] += np.where(layers == 1, 8.0, 0.5)
        return answers, labels, layers

    covered = []
    for _ in range(100):
        limits = conformal_limits(*rows(200), own=busy_exits(rows(200)[2], 12), alpha=0.1)
        answers, labels, layers = rows(500)
        covered.append(conformal_sets(answers, layers, limits)[np.arange(500), labels].mean())
    assert np.mean(covered) >= 0.9


def test_an_exit_does_not_get_its_limit_for_having_just_enough_of_the_rows() -> None:
    """One exit that about 20 rows leave at, whose answers are bad, and many rare ones."""
    draw = np.random.default_rng(1)

    def rows(count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        layers = np.where(draw.random(count) < 0.105, 1, draw.integers(2, 52, count))
        labels = draw.integers(0, 4, count)
        answers = draw.normal(size=(count, 4))
        answers[np.arange(count), labels] += np.where(layers == 1, 0.0, 3.0)
        return answers, labels, layers

    held = []
    for _ in range(300):
        own = busy_exits(rows(200)[2], 51)
        limits = conformal_limits(*rows(200), own=own, alpha=0.1)
        answers, labels, layers = rows(1000)
        held.append(conformal_sets(answers, layers, limits)[np.arange(1000), labels].mean())
    assert np.mean(held) >= 0.9


def test_a_row_whose_scores_are_broken_may_have_any_class() -> None:
    sets = conformal_sets([[math.nan, 0.0, 0.0], [9.0, 0.0, 0.0]], [1, 1], [0.5])
    assert sets.tolist() == [[True, True, True], [True, False, False]]
