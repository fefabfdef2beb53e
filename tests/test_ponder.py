"""PonderNet and PALBERT: exits that halt, their loss, and the answers of the original."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_golden import GOLDEN, _model
from torch import Tensor

from offramp.data import encode
from offramp.engines import TorchEngine, collate, record
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.exits.halting import HaltingSpec
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import Stage, row_losses, task_loss
from offramp.objectives.ponder import Ponder, divergence, geometric_prior, halting_masses
from offramp.policies import Rows, make_policy
from offramp.table import replay
from offramp.testing import (
    PROBLEM_TYPES,
    check_engine,
    check_method,
    save_tiny_stock,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import TrainOptions, attach, train
from offramp.training.running import fresh_parameters
from offramp.training.trainer import Trainee

SINGLE = "single_label_classification"
STAGE = Stage("joint", "all")
needs_golden = pytest.mark.skipif(
    not (GOLDEN / "palbert.json").is_file(), reason=f"no golden answers in {GOLDEN}"
)


def outputs_of(halts: Tensor, scores: Tensor) -> list[ExitOutput]:
    """One output per column of `halts` (rows, layers), from scores (rows, layers, classes)."""
    return [ExitOutput(scores[:, n], {"halt": halts[:, n]}) for n in range(halts.shape[1])]


# --- the distribution and the prior -------------------------------------------------------


def test_masses_are_those_worked_out_by_hand_and_the_last_takes_what_is_left() -> None:
    masses = halting_masses(torch.tensor([[0.5, 0.2, 0.9], [0.0, 1.0, 0.3]]))
    assert torch.allclose(masses, torch.tensor([[0.5, 0.1, 0.4], [0.0, 1.0, 0.0]]))


@settings(max_examples=60)
@given(seed=st.integers(0, 2**31), depth=st.integers(2, 24), saturated=st.booleans())
def test_masses_are_a_distribution_over_layers(seed: int, depth: int, saturated: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    halts = torch.rand(8, depth, generator=draw)
    halts = halts.round() if saturated else halts
    masses = halting_masses(halts)
    assert (masses >= 0).all()
    assert torch.allclose(masses.sum(dim=1), torch.ones(8), atol=1e-5)
    gone = 1 - torch.cumprod(1 - halts[:, :-1], dim=1)
    assert torch.allclose(masses.cumsum(dim=1)[:, :-1], gone, atol=1e-5)


def test_the_prior_with_its_tail_on_the_last_layer_is_that_of_the_released_code() -> None:
    wanted = [
        0.1,
        0.09,
        0.081,
        0.0729,
        0.0656,
        0.059,
        0.0531,
        0.0478,
        0.043,
        0.0387,
        0.0349,
        0.3138,
    ]
    assert torch.allclose(geometric_prior(0.1, 12, "last"), torch.tensor(wanted), atol=1e-4)


@settings(max_examples=40)
@given(
    rate=st.floats(0.01, 0.9), depth=st.integers(2, 24), tail=st.sampled_from(("spread", "last"))
)
def test_a_prior_adds_up_to_one_and_falls_by_the_same_share_each_layer(
    rate: float, depth: int, tail: Any
) -> None:
    prior = geometric_prior(rate, depth, tail)
    assert float(prior.sum()) == pytest.approx(1, abs=1e-5)
    falls = prior[1:-1] / prior[:-2]
    assert torch.allclose(falls, torch.full_like(falls, 1 - rate), rtol=1e-4)


def test_the_divergence_is_from_the_first_to_the_second() -> None:
    one, other = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    assert float(divergence(one, other)) == pytest.approx(0.5108, abs=1e-4)
    assert float(divergence(other, one)) == pytest.approx(0.3681, abs=1e-4)
    assert float(divergence(torch.tensor([1.0, 0.0]), one)) == pytest.approx(0.6931, abs=1e-4)


# --- the loss -----------------------------------------------------------------------------


def test_the_loss_is_the_one_worked_out_by_hand() -> None:
    halts = torch.tensor([[0.5, 1.0]])
    scores = torch.tensor([[[1.0], [3.0]]])
    batch = {"labels": torch.tensor([0.0]), "problem_type": "regression"}
    parts = Ponder(beta=2.0, prior=0.5).losses(outputs_of(halts, scores), batch, STAGE)
    assert float(parts["task"]) == pytest.approx(0.5 * 1 + 0.5 * 9)
    # prior 2/3, 1/3: KL(p || prior) = .5 ln .75 + .5 ln 1.5; the other way it would be .0566
    assert float(parts["prior"]) == pytest.approx(2 * 0.0588915, abs=1e-5)


def test_as_released_the_divergence_is_the_other_way_round_and_halted_rows_keep_a_little() -> None:
    halts = torch.tensor([[0.96, 0.5, 1.0], [0.5, 0.5, 1.0]])
    scores = torch.tensor([[[1.0], [2.0], [3.0]]] * 2)
    batch = {"labels": torch.zeros(2), "problem_type": "regression"}
    loss = Ponder(beta=1.0, prior=0.5, tail="last", as_released=True)
    parts = loss.losses(outputs_of(halts, scores), batch, STAGE)
    little = 0.05 / 3
    masses = torch.tensor([[0.96, little, little], [0.5, 0.25, 0.25]])
    assert float(parts["task"]) == pytest.approx(
        float((masses * torch.tensor([1.0, 4.0, 9.0])).sum(dim=1).mean())
    )
    prior = torch.tensor([0.5, 0.25, 0.25])
    wanted = (prior * (prior.log() - masses.log())).sum(dim=1).mean()
    assert float(parts["prior"]) == pytest.approx(float(wanted), rel=1e-5)


def test_as_released_layers_that_no_row_of_the_batch_reaches_add_no_loss() -> None:
    halts = torch.tensor([[0.96, 0.5, 1.0]])
    scores = torch.tensor([[[1.0], [2.0], [3.0]]])
    batch = {"labels": torch.zeros(1), "problem_type": "regression"}
    parts = Ponder(as_released=True).losses(outputs_of(halts, scores), batch, STAGE)
    assert float(parts["task"]) == pytest.approx(0.96)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_losses_of_rows_have_the_tasks_loss_as_their_mean(problem_type: str) -> None:
    scores = torch.randn(6, 1 if problem_type == "regression" else 3)
    labels = {
        "regression": torch.randn(6),
        SINGLE: torch.arange(6) % 3,
        "multi_label_classification": torch.randint(2, (6, 3)),
    }[problem_type]
    rows = row_losses(scores, labels, problem_type)
    assert rows.shape == (6,)
    assert torch.allclose(rows.mean(), task_loss(scores, labels, problem_type))


@pytest.mark.parametrize("value", [0.0, 1.0, 1e-30])
def test_a_net_that_is_dead_certain_still_has_a_finite_gradient(value: float) -> None:
    for as_released in (False, True):
        halts = torch.full((2, 4), value, requires_grad=True)
        scores = torch.randn(2, 4, 3, requires_grad=True)
        batch = {"labels": torch.tensor([0, 1]), "problem_type": SINGLE}
        parts = Ponder(as_released=as_released).losses(outputs_of(halts, scores), batch, STAGE)
        sum(parts.values()).backward()  # type: ignore[union-attr]
        assert torch.isfinite(halts.grad).all()  # type: ignore[arg-type]
        assert torch.isfinite(scores.grad).all()  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"beta": -1}, {"prior": 0}, {"prior": 1}, {"beta": torch.nan}])
def test_a_loss_that_makes_no_sense_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="prior between 0 and 1"):
        Ponder(**options)


def test_a_strong_prior_teaches_the_net_the_priors_distribution() -> None:
    logits = torch.zeros(1, 5, requires_grad=True)
    learner = torch.optim.Adam([logits], lr=0.1)
    loss, batch = Ponder(beta=100.0, prior=0.3), {"labels": torch.zeros(1), "problem_type": SINGLE}
    for _ in range(300):
        outputs = outputs_of(logits.sigmoid(), torch.zeros(1, 5, 2))
        learner.zero_grad()
        sum(loss.losses(outputs, batch, STAGE).values()).backward()  # type: ignore[union-attr]
        learner.step()
    found = halting_masses(logits.detach().sigmoid())[0]
    assert torch.allclose(found, geometric_prior(0.3, 5, "spread"), atol=0.01)


# --- the exits ----------------------------------------------------------------------------

KINDS = [
    HaltingSpec(),
    HaltingSpec(input="difference", layers=2),
    HaltingSpec(input="both", layers=3),
]


@pytest.mark.parametrize("spec", KINDS, ids=lambda spec: spec.input)
@pytest.mark.parametrize("arch", ["albert", "vit"])
def test_every_layer_is_answered_by_the_models_own_head_and_one_net(
    arch: str, spec: HaltingSpec
) -> None:
    model = tiny_model(arch, spec=spec, layers=4)
    batch = tiny_batch_for(model.stock, 5)
    back, before = model.backbone, None
    with torch.inference_mode():
        outputs = model.all_exits(batch)
        flow = back.embed(batch)
        for layer, output in enumerate(outputs, start=1):
            flow = back.layer(layer, flow)
            assert torch.allclose(output.scores, back.head(flow.hidden, flow.mask), atol=1e-6)
            hidden = flow.hidden if back.view is None else back.view(flow.hidden)
            now = back.pool(hidden, flow.mask)
            zero = torch.zeros_like(now) if before is None else before
            seen = {"current": now, "difference": now - zero, "both": torch.cat((now, zero), 1)}
            net = model.exits["shared"].net
            halt = net(seen[spec.input]).squeeze(-1).sigmoid()
            wanted = halt if layer < model.depth else torch.ones(5)
            assert torch.allclose(output.signals["halt"], wanted, atol=1e-6)
            before = now
    weights = [name for name, _ in net.named_parameters() if name.endswith("weight")]
    assert len(weights) == (1 if spec.layers == 1 else spec.layers + 1)


def test_the_net_belongs_to_the_exits_once_and_the_head_to_the_stock_model() -> None:
    model = tiny_model(spec=KINDS[2])
    own = [name for name in model.state_dict() if name.startswith("exits.")]
    assert len(own) == 8
    assert all(name.startswith("exits.shared.net.") for name in own)


def test_where_widths_differ_each_smaller_one_has_a_layer_to_the_width_of_the_head() -> None:
    model = tiny_model("cifar_resnet", spec=HaltingSpec())
    widened = model.exits["shared"].widened
    assert {n: tuple(leaf.weight.shape) for n, leaf in widened.items()} == {
        "8": (32, 8),
        "16": (32, 16),
    }
    assert not len(tiny_model("bert", spec=HaltingSpec()).exits["shared"].widened)


CASES = [("bert", KINDS[0]), ("albert", KINDS[1]), ("roberta", KINDS[2]), ("vit", KINDS[2])]


def undecided(arch: str, spec: HaltingSpec) -> MultiExitModel:
    """A tiny model whose net wants some rows to halt and others not."""
    model = tiny_model(arch, spec=spec)
    with torch.no_grad():
        model.exits["shared"].net[-1].weight.mul_(8)  # type: ignore[index, operator]
    return model


@pytest.mark.parametrize(("arch", "spec"), CASES)
def test_the_torch_engine_passes_on_exits_that_halt(arch: str, spec: HaltingSpec) -> None:
    halting = [make_policy({"name": "q_exit", "q": q}) for q in (0.3, 0.6, 0.9)]
    policies = [*halting, make_policy("sample"), make_policy("max_probability")]
    check_engine(TorchEngine, undecided(arch, spec), policies=policies, rows=16)


@pytest.mark.parametrize("policy", [{"name": "q_exit", "q": 0.8}, "sample"])
def test_a_replay_of_the_recorded_halting_is_the_live_engine(policy: Any, tmp_path: Path) -> None:
    model = undecided("bert", KINDS[2])
    dataset, _ = encode(Dataset.from_dict({"text": tiny_texts(80)}), tiny_tokenizer())
    processor = tiny_tokenizer()
    table = record(model, dataset, tmp_path / "t", "tune", processor=processor, progress=False)
    assert list(table.header.signals) == ["halt"]
    replayed = replay(table, make_policy(policy))
    ids, lengths = torch.from_numpy(table.ids.copy()), torch.tensor(dataset["length"][:])
    live = TorchEngine(model).run(
        collate({"input_ids": dataset["input_ids"][:]}, 0), make_policy(policy), Rows(ids, lengths)
    )
    assert live.exit_layers.tolist() == replayed.exit_layers.tolist()
    assert len(set(replayed.exit_layers.tolist())) > 3
    torch.testing.assert_close(live.scores, torch.from_numpy(replayed.answers), atol=5e-5, rtol=0)


@pytest.mark.parametrize("name", ["pondernet", "palbert"])
def test_the_methods_pass(name: str) -> None:
    check_method(METHODS[name])


# --- the original -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def original() -> MultiExitModel:
    renamed = {}
    for name, tensor in load_file(GOLDEN / "palbert.safetensors").items():
        if name.startswith("albert.layer_positional"):  # off by default, and off here
            continue
        head, _, part = name.partition("classifiers.cls_head.")
        if part:
            renamed[f"stock.classifier.{part}"] = tensor
        elif "feature_extractor" in name:
            *_, number, _, part = name.split(".")
            renamed[f"exits.shared.net.{2 * int(number)}.{part}"] = tensor
        elif "exit_head.cls" in name:
            renamed[f"exits.shared.net.6.{name.rpartition('.')[2]}"] = tensor
        else:
            renamed[f"stock.{head}"] = tensor
    return _model(renamed, "palbert", METHODS["palbert"].exits).eval()  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def rows() -> dict[str, Tensor]:
    return load_file(GOLDEN / "inputs.safetensors")


@pytest.fixture(scope="module")
def answers() -> dict[str, Any]:
    return json.loads((GOLDEN / "palbert.json").read_text())


@needs_golden
@pytest.mark.parametrize("batch_size", [1, 64])
def test_golden_exit_layers_and_logits_are_those_of_the_original(
    original: MultiExitModel, rows: dict[str, Tensor], answers: dict[str, Any], batch_size: int
) -> None:
    engine = TorchEngine(original)
    inputs = {name: leaf for name, leaf in rows.items() if name != "labels"}
    for setting, wanted in answers["runs"].items():
        policy = make_policy({"name": "q_exit", "q": float(setting)})
        parts = [
            engine.run({n: leaf[at : at + batch_size] for n, leaf in inputs.items()}, policy)
            for at in range(0, 64, batch_size)
        ]
        layers = torch.cat([part.exit_layers for part in parts])
        assert layers.tolist() == wanted["layers"], f"q = {setting}"
        scores = torch.cat([part.scores for part in parts])
        torch.testing.assert_close(scores, torch.tensor(wanted["logits"]), atol=1e-4, rtol=0)


@needs_golden
def test_golden_losses_and_masses_are_those_of_the_original(
    original: MultiExitModel, rows: dict[str, Tensor], answers: dict[str, Any]
) -> None:
    inputs = {name: leaf for name, leaf in rows.items() if name != "labels"}
    with torch.no_grad():
        outputs = original(**inputs).exits
    batch = {"labels": rows["labels"], "problem_type": SINGLE}
    as_released = Ponder(beta=1.0, prior=0.1, tail="last", as_released=True)
    parts = as_released.losses(outputs, batch, STAGE)
    assert float(parts["task"]) == pytest.approx(answers["task_loss"], rel=1e-4)
    assert float(parts["prior"]) == pytest.approx(answers["reg_loss"], rel=1e-4)
    halts = torch.stack([output.signals["halt"] for output in outputs], dim=1)
    masses, wanted = halting_masses(halts), torch.tensor(answers["train_pdf"])
    gone = masses.cumsum(dim=1) - masses > 0.95
    assert torch.allclose(masses[~gone], wanted[~gone], atol=1e-4)
    assert torch.allclose(wanted[gone], torch.tensor(0.05 / 12), atol=1e-7)


# --- training -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pondernet", "palbert"])
def test_training_moves_the_net_and_the_backbone(name: str, tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "source")
    rows = Dataset.from_dict({"text": tiny_texts(40), "label": [n % 3 for n in range(40)]})
    options = TrainOptions(max_steps=3, batch_size=8, quiet=True)
    model = train(source, rows, tmp_path / "out", method=name, options=options)
    again = MultiExitModel.from_pretrained(tmp_path / "out")
    assert again.config.method == name
    assert again.fingerprint() == model.fingerprint()  # type: ignore[operator]
    before = MultiExitModel.from_pretrained(source, exits=METHODS[name].exits).state_dict()
    after = again.state_dict()
    moved = {key for key in after if key not in before or not torch.equal(after[key], before[key])}
    assert any(key.startswith("stock.bert.encoder") for key in moved)
    assert after["exits.shared.net.0.bias"].abs().max() > 0


def test_attaching_exits_that_halt_is_refused_since_their_answers_are_the_models_own(
    tmp_path: Path,
) -> None:
    source = save_tiny_stock(tmp_path / "source")
    rows = Dataset.from_dict({"text": tiny_texts(8)})
    with pytest.raises(ConfigError, match="Use `train`"):
        attach(source, rows, tmp_path / "out", exits=HaltingSpec())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["pondernet", "palbert"])
def test_before_anything_is_learnt_rows_halt_as_the_prior_has_it(name: str) -> None:
    """From one half at every layer, the first updates drive the probabilities to 0 for good."""
    method = METHODS[name]
    model = MultiExitModel.from_stock(tiny_stock(layers=6), method.exits).eval()
    with torch.inference_mode():
        outputs = model.all_exits(tiny_batch(16))
    halts = torch.stack([output.signals["halt"] for output in outputs], dim=1)
    objective = method.objective()
    assert isinstance(objective, Ponder)
    wanted = objective.prior * (1 - objective.prior) ** torch.arange(5)
    assert torch.allclose(halting_masses(halts)[:, :5], wanted.expand(16, 5), rtol=0.3)


def test_the_net_of_halting_learns_at_the_rate_of_the_model_and_no_other_exits_do() -> None:
    """At ten times the rate no row ever halts early: the first updates see to that."""
    for name, of_the_model in (("palbert", True), ("pondernet", True), ("pabee", False)):
        model = tiny_model(spec=METHODS[name].exits)
        trainee = Trainee(model, Ponder(), STAGE, SINGLE)
        for new_head in (False, True):
            fresh = fresh_parameters(trainee, model.stock, new_head)
            assert any(leaf.startswith("model.exits.") for leaf in fresh) is not of_the_model
            assert any(leaf.startswith("model.stock.classifier") for leaf in fresh) is new_head
