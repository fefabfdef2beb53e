"""Claims about the exit criteria of published systems: each against a plain loop or by hand."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.spatial.distance import jensenshannon
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import (
    POLICIES,
    Accumulated,
    Agreement,
    Averaged,
    Binned,
    Cap,
    ConfidentPatience,
    Energy,
    Entropy,
    EvidencePolicy,
    Gated,
    Learned,
    Patience,
    Policy,
    QExit,
    Rows,
    Sample,
    Tempered,
    Window,
    make_policy,
)
from offramp.testing import PROBLEM_TYPES, random_outputs, spread_policies, walk
from offramp.testing.reference import all_signals, rows_like
from offramp.testing.strategies import score_tables

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
TWO = score_tables().map(lambda scores: scores[..., :2])
SHARES = st.floats(0, 1, width=32)


def leaves(policy: Policy, scores: Tensor, **signals: Tensor) -> list[int]:
    """Exit layer of each row of scores (rows, layers, classes) and signals (rows, layers)."""
    outputs = [
        ExitOutput(layer, {name: leaf[:, n] for name, leaf in signals.items()})
        for n, layer in enumerate(scores.unbind(1))
    ]
    return walk(policy, outputs, rows_like(outputs)).exit_layers.tolist()


def by_signal(policy: Policy, *rows: list[float]) -> list[int]:
    """Exit layers where the policy's signal is as given."""
    signal = torch.tensor(rows)
    return leaves(policy, torch.zeros(*signal.shape, 2), **{policy.needs[0]: signal})


def as_scores(*rows: list[float]) -> Tensor:
    """Two classes whose first has these probabilities."""
    first = torch.tensor(rows, dtype=torch.float64)
    return torch.stack((first.log(), (1 - first).log()), dim=-1).float()


@st.composite
def signal_tables(draw: Any) -> Tensor:
    """Numbers in 0..1, (rows, layers), some of them 0 or 1."""
    rows, layers = draw(st.integers(1, 8)), draw(st.integers(2, 12))
    values = draw(st.lists(SHARES, min_size=rows * layers, max_size=rows * layers))
    return torch.tensor(values).reshape(rows, layers)


# what holds for all of them


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_evidence_is_the_same_bit_for_bit_in_any_company_at_every_layer(problem_type):
    outputs = random_outputs(problem_type, rows=100, depth=4, signals=all_signals())
    policies = [p for p in spread_policies(problem_type, outputs) if isinstance(p, EvidencePolicy)]
    assert {policy.name for policy in policies} >= {"averaged", "q_exit", "gated", "agreement"}
    for policy, rows in itertools.product(policies, (slice(3, 4), slice(50, 57), slice(1, 34))):
        whole, part = policy.start(_rows(slice(0, 100))), policy.start(_rows(rows))
        for layer, output in enumerate(outputs, start=1):
            cut = {name: leaf[rows].clone() for name, leaf in output.signals.items()}
            evidence, whole = policy.evidence(whole, layer, output)
            alone, part = policy.evidence(part, layer, ExitOutput(output.scores[rows].clone(), cut))
            assert torch.equal(alone, evidence[rows]), (policy, layer)


def _rows(part: slice) -> Rows:
    ids = torch.arange(100)[part]
    return Rows(ids, ids + 1)


BETWEEN = ("patience", "fixed", "full", "per_exit")
"""Whose evidence is whole numbers, with the bar between these."""


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_ties_go_on_under_every_policy(problem_type):
    outputs = random_outputs(problem_type, rows=20, depth=4, signals=all_signals())
    for policy in spread_policies(problem_type, outputs):
        if not isinstance(policy, EvidencePolicy) or policy.name in BETWEEN:
            continue
        evidence, _ = policy.evidence(policy.start(rows_like(outputs)), 1, outputs[0])
        for row, bar in enumerate(evidence.tolist()):
            if math.isfinite(bar):
                tied = policy.with_bar(bar)
                step = tied.step(tied.start(rows_like(outputs)), 1, outputs[0])
                assert not step.leave[row], policy


SURE = torch.tensor([[1000.0, -1000.0, -1000.0], [-3e38, 3e38, 0.0]])


@pytest.mark.parametrize(
    "policy",
    [
        Window(),
        ConfidentPatience(patience=1),
        Energy(),
        Energy(temperature=7.0),
        Cap(),
        Tempered(temperatures=(3.0,)),
        Binned(),
        Accumulated(threshold=0.9),
        Averaged(policy="entropy", average="probabilities", decide_on="average"),
    ],
)
def test_saturated_rows_leave_at_the_first_exit(policy):
    output = ExitOutput(SURE, {"nsp": torch.ones(2)})
    assert policy.step({}, 1, output).leave.all()


@pytest.mark.parametrize("divergence", ["js", "kl", "reverse_kl", "symmetric_kl"])
def test_divergences_of_saturated_scores_are_numbers_or_infinite(divergence):
    policy = Agreement(patience=1, divergence=divergence)
    _, state = policy.evidence({}, 1, ExitOutput(SURE))
    same, _ = policy.evidence(state, 2, ExitOutput(SURE))
    other, _ = policy.evidence(state, 2, ExitOutput(SURE.flip(0)))
    assert same.tolist() == [0, 0]
    assert not other.isnan().any()
    assert (other < -0.6).all()


@pytest.mark.parametrize(
    ("name", "problem_type", "why"),
    [
        ("energy", MULTI, "says nothing of a sure 'none'"),
        ("cap", REGRESSION, "Energy"),
        ("binned", REGRESSION, "neither right nor wrong"),
        ("window", REGRESSION, "no class probabilities"),
    ],
)
def test_a_policy_says_why_it_is_not_for_a_task(name, problem_type, why):
    with pytest.raises(ConfigError, match=why):
        make_policy(name).check(problem_type, 12)


@pytest.mark.parametrize("name", [name for name in POLICIES if POLICIES[name].signals])
def test_exits_without_the_signal_are_refused_by_its_name(name):
    policy = make_policy(name)
    output = ExitOutput(torch.zeros(2, 2), {"other": torch.zeros(2)})
    with pytest.raises(ConfigError, match=rf"'{policy.needs[0]}'.* they give: other"):
        policy.step(policy.start(Rows(torch.arange(2), torch.ones(2))), 1, output)


# window


@pytest.mark.parametrize(
    ("rule", "first_class", "layer"),
    [
        ("bias_1", [0.6, 0.4, 0.6, 0.7, 0.6, 0.6], 5),
        ("bias_1", [0.4, 0.3, 0.4, 0.7, 0.6, 0.6], 3),
        ("bias_1", [0.6, 0.5, 0.6, 0.7, 0.6, 0.6], 5),  # 0.5 is on neither side
        ("bias_2", [0.6, 0.7, 0.65, 0.65, 0.7, 0.6], 5),
        ("bias_2", [0.4, 0.3, 0.2, 0.7, 0.6, 0.6], 3),
        ("bias_3", [0.6, 0.75, 0.95, 0.9, 0.95, 0.9], 5),
        ("entropy", [0.6, 0.6, 0.6, 0.6, 0.6, 0.6], 6),
    ],
)
def test_the_windows_rules_by_hand(rule, first_class, layer):
    policy = Window(threshold=0, rule=rule, window=3, spread=0.15)
    assert leaves(policy, as_scores(first_class)) == [layer]


def test_a_margin_keeps_the_window_away_from_one_half():
    rows = as_scores([0.6, 0.8, 0.8, 0.8], [0.8, 0.8, 0.8, 0.8])
    assert leaves(Window(threshold=0, window=2, margin=0.2), rows) == [3, 2]


def test_the_windows_first_stage_is_the_normalised_entropy():
    rows = as_scores([0.9, 0.5, 0.5], [0.5, 0.9, 0.5])
    assert leaves(Window(threshold=0.5, window=3), rows) == [1, 2]
    assert stats.entropy([0.9, 0.1]) / math.log(2) < 0.5


@given(TWO, st.sampled_from(("bias_1", "bias_2", "bias_3")), st.integers(1, 5), SHARES)
@settings(deadline=None)
def test_the_window_equals_the_papers_loop_for_two_classes(scores, rule, length, spread):
    margin = spread / 4
    probabilities = torch.softmax(scores, dim=-1)

    def papers_loop(row: Tensor) -> int:
        for layer in range(length, len(row)):
            for values in row[layer - length : layer].T:
                steps = values[1:] >= values[:-1]
                if rule == "bias_2" and not steps.all():
                    continue
                if rule == "bias_3" and not values.max() - values.min() <= spread:
                    continue
                if (2 * values - 1 > 2 * margin).all():
                    return layer
        return len(row)

    policy = Window(threshold=0, rule=rule, window=length, margin=margin, spread=spread)
    found = leaves(policy, scores)
    # 2 p - 1 and p - (1 - p) may round to either side of the margin
    near = ((probabilities[..., 0] - 0.5).abs() - margin).abs().amin(dim=1) < 1e-6
    wanted = [papers_loop(row) for row in probabilities]
    assert all(a == b or close for a, b, close in zip(found, wanted, near, strict=True))


@given(score_tables(), st.integers(1, 6))
@settings(deadline=None)
def test_an_unconditional_window_is_patience_for_any_number_of_classes(scores, patience):
    scores = scores + 0.01 * torch.arange(scores.shape[-1])  # no two classes tie
    window = Window(threshold=0, window=patience + 1)
    top = torch.softmax(scores, dim=-1).topk(2, dim=-1).values
    if (top[..., 0] > top[..., 1]).all():
        assert leaves(window, scores) == leaves(Patience(patience=patience), scores)


# halting


def test_the_cumulative_halting_rule_by_hand():
    # F = 0.2, 0.6, 0.8 and 0.5, 0.75: a tie goes on
    assert by_signal(QExit(), [0.2, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 1.0]) == [2, 2]
    assert by_signal(QExit(q=0.7), [0.2, 0.5, 0.5, 1.0], [0.5, 0.5, 0.5, 1.0]) == [3, 2]


@given(signal_tables())
def test_cumulative_halting_is_the_sum_of_the_papers_probabilities(halts):
    going, total, state = torch.ones(len(halts)).double(), 0.0, {}
    for layer, halt in enumerate(halts.T, start=1):
        evidence, state = QExit().evidence(
            state, layer, ExitOutput(torch.zeros(len(halts), 2), {"halt": halt})
        )
        total, going = total + going * halt, going * (1 - halt.double())
        torch.testing.assert_close(evidence.double(), total, atol=1e-6, rtol=0)


def test_a_draw_is_fixed_by_seed_row_and_layer():
    def mixed(number: int) -> int:
        for _ in range(2):
            number = (number ^ number >> 16) * 0x45D9F3B % 2**32
        return number ^ number >> 16

    def draw(seed: int, row: int, layer: int) -> float:
        key = mixed(mixed(mixed(seed) ^ row % 2**32) ^ (row >> 32) % 2**32)
        return (mixed(key ^ layer) >> 8) / 2**24

    ids = torch.tensor([0, 1, 2**62 + 12345, -7])
    for seed, layer in itertools.product((0, 5, 2**32 - 1), (1, 2, 12)):
        policy = Sample(seed=seed)
        state = policy.start(Rows(ids, torch.ones(4)))
        for row, chance in itertools.product(range(4), (0.0, 0.5, 1.0)):
            exact = draw(seed, int(ids[row]), layer)
            for halt in (chance, exact, math.nextafter(exact, 2)):
                halts = torch.full((4,), halt)
                step = policy.step(state, layer, ExitOutput(torch.zeros(4, 2), {"halt": halts}))
                assert bool(step.leave[row]) == (exact < np.float32(halt))


@pytest.mark.parametrize("first", [0, 2**40])
def test_draws_leave_at_the_rate_they_are_given_and_are_independent(first):
    ids = torch.arange(20_000) + first
    left = torch.stack([_draws(seed, layer, ids) for seed in (0, 1) for layer in (1, 2, 12)])
    assert (left.double().mean(dim=1) - 0.3).abs().max() < 4 * math.sqrt(0.21 / 20_000)
    correlation = torch.corrcoef(left.double()) - torch.eye(6)
    assert correlation.abs().max() < 5 / math.sqrt(20_000)
    lagged = torch.stack((left[0, 1:], left[0, :-1])).double()
    assert torch.corrcoef(lagged)[0, 1].abs() < 5 / math.sqrt(20_000)


def _draws(seed: int, layer: int, ids: Tensor) -> Tensor:
    policy, count = Sample(seed=seed), len(ids)
    output = ExitOutput(torch.zeros(count, 2), {"halt": torch.full((count,), 0.3)})
    return policy.step(policy.start(Rows(ids, ids)), layer, output).leave


# gates


def test_both_exit_models_of_the_gates_by_hand():
    gates = [0.3, 0.4, 0.5, 1.0]
    # cut: 0.3 / 1, 0.4 / 0.7, all that is left; simplex: the gates themselves
    assert by_signal(Gated(), gates) == [2]
    assert by_signal(Gated(threshold=0.6), gates) == [3]
    assert by_signal(Gated(masses="simplex"), gates) == [4]


@given(signal_tables())
def test_the_cut_gates_give_the_papers_masses(gates):
    """P_l = max(0, min(g_l, 1 - earlier gates)), a_l = P_l / prod(1 - a_j)."""
    state, zeros = {}, torch.zeros(len(gates), 2)
    earlier, staying = torch.zeros(len(gates)).double(), torch.ones(len(gates)).double()
    for layer, gate in enumerate(gates.T, start=1):
        found, state = Gated().evidence(state, layer, ExitOutput(zeros, {"gate": gate}))
        mass = torch.minimum(gate.double(), 1 - earlier).clamp_min(0)
        # where hardly anything is left the quotient of two rounded numbers is of no use
        sure = staying > 1e-3
        torch.testing.assert_close(
            found.double()[sure], (mass / staying)[sure].clamp(0, 1), atol=1e-3, rtol=0
        )
        earlier, staying = earlier + gate, (staying - mass).clamp_min(0)


def test_an_exit_that_believes_it_is_right_lets_go():
    assert by_signal(Learned(threshold=0.8), [0.5, 0.8, 0.9, 0.1], [0.9, 0.1, 0.1, 0.1]) == [3, 1]


# agreement


@pytest.mark.parametrize("classes", [2, 3, 7])
def test_divergences_are_what_scipy_says(classes):
    before, now = (torch.randn(50, classes, generator=_seeded(n)) * 2 for n in (0, 1))
    p, q = (torch.softmax(x.double(), -1).numpy() for x in (before, now))
    expected = {
        "js": jensenshannon(p, q, axis=1) ** 2,
        "kl": stats.entropy(p, q, axis=1),
        "reverse_kl": stats.entropy(q, p, axis=1),
        "symmetric_kl": (stats.entropy(p, q, axis=1) + stats.entropy(q, p, axis=1)) / 2,
    }
    for divergence, wanted in expected.items():
        policy = Agreement(patience=1, divergence=divergence)
        _, state = policy.evidence({}, 1, ExitOutput(before))
        found, _ = policy.evidence(state, 2, ExitOutput(now))
        np.testing.assert_allclose(-found, wanted, atol=2e-6)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_label_sets_differ_by_the_sum_over_their_labels():
    before, now = torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[0.0, -1.0, 0.5]])
    policy = Agreement(patience=1, multi_label=True)
    _, state = policy.evidence({}, 1, ExitOutput(before))
    found = -policy.evidence(state, 2, ExitOutput(now))[0].item()
    yes = [torch.sigmoid(x.double())[0].numpy() for x in (before, now)]
    pairs = [(np.array([a, 1 - a]), np.array([b, 1 - b])) for a, b in zip(*yes, strict=True)]
    assert found == pytest.approx(sum(jensenshannon(p, q) ** 2 for p, q in pairs), abs=1e-6)


@given(score_tables(), st.integers(1, 5), st.sampled_from((0.0, 1e-4, 0.01, 0.3)))
@settings(deadline=None)
def test_agreement_equals_the_papers_counter(scores, patience, threshold):
    policy = Agreement(patience=patience, threshold=threshold)
    one = Agreement(patience=1, threshold=threshold)
    changes = []
    for before, now in itertools.pairwise(scores.unbind(1)):
        _, state = one.evidence({}, 1, ExitOutput(before))
        changes.append(-one.evidence(state, 2, ExitOutput(now))[0])

    def papers_loop(row: Tensor) -> int:
        counter = 0
        for layer, change in enumerate(row, start=2):
            counter = counter + 1 if change < torch.tensor(threshold) else 0
            if counter == patience:
                return layer
        return len(row) + 1

    assert leaves(policy, scores) == [papers_loop(row) for row in torch.stack(changes, 1)]


@given(score_tables(REGRESSION), st.integers(1, 4), st.sampled_from((0.0, 0.1, 1.0)))
@settings(deadline=None)
def test_agreement_of_regression_scores_is_patience_with_a_tolerance(scores, patience, threshold):
    agreement = Agreement(patience=patience, threshold=threshold)
    assert leaves(agreement, scores) == leaves(
        Patience(patience=patience, tolerance=threshold), scores
    )


def test_confident_exits_are_counted_and_need_not_agree():
    sure, other, unsure = 0.99, 0.01, 0.6
    rows = as_scores([sure, other, sure, unsure], [sure, unsure, sure, other])
    assert leaves(ConfidentPatience(patience=2), rows) == [2, 4]
    assert leaves(ConfidentPatience(patience=3), rows) == [3, 4]


@given(score_tables(), SHARES)
@settings(deadline=None)
def test_one_confident_exit_is_the_normalised_entropy_rule(scores, threshold):
    one = ConfidentPatience(patience=1, threshold=threshold)
    assert leaves(one, scores) == leaves(Entropy(threshold=threshold, normalised=True), scores)


# accumulated sureness


def test_sureness_adds_up_and_starts_again_with_another_answer():
    rows = as_scores([0.6, 0.7, 0.2, 0.3, 0.9])
    # by depth: 0.6, 2.0 | 2.4, 5.2 | 4.5
    sums = [0.6, 2.0, 2.4, 5.2, 4.5]
    policy, state = Accumulated(), {}
    for layer, wanted in enumerate(sums, start=1):
        found, state = policy.evidence(state, layer, ExitOutput(rows[:, layer - 1]))
        assert found.item() == pytest.approx(wanted)
    assert leaves(Accumulated(threshold=2.2), rows) == [3]
    assert leaves(Accumulated(threshold=1.2, weights="equal"), rows) == [2]
    assert leaves(Accumulated(threshold=1.2, weights=(0.0, 0.0, 0.5, 3.0)), rows) == [4]


@given(score_tables(), st.floats(0, 20))
@settings(deadline=None)
def test_accumulated_sureness_equals_the_papers_loop(scores, threshold):
    def papers_loop(row: Tensor) -> int:
        total, last = torch.zeros(()), None
        for layer, one in enumerate(row, start=1):
            sure, label = torch.softmax(one, -1).max(-1)[0], int(one.argmax())
            total = layer * sure + (total if label == last else 0)
            last = label
            if total > threshold:
                return layer
        return len(row)

    found = leaves(Accumulated(threshold=threshold), scores)
    assert found == [papers_loop(row) for row in scores]


@pytest.mark.parametrize(
    "policy",
    [Accumulated(weights=(1.0, 2.0)), Tempered(temperatures=(1.0, 2.0))],
)
def test_numbers_per_exit_must_be_as_many_as_exits(policy):
    with pytest.raises(ConfigError, match="11: one for each exit before the last"):
        policy.check(SINGLE, 12)
    policy.check(SINGLE, 3)


# energy


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_normalised_energy_is_the_papers_formula(temperature):
    scores = torch.randn(100, 5, generator=_seeded(0)) * 3
    sums = (scores.double() / temperature).exp().sum(-1) ** temperature
    found, _ = Energy(temperature=temperature).evidence({}, 1, ExitOutput(scores))
    torch.testing.assert_close(-found.double(), 1 / (1 + sums), atol=1e-6, rtol=1e-5)


def test_cap_is_the_last_of_a_softmax_with_one_score_more():
    scores, nsp = torch.randn(100, 3, generator=_seeded(0)), torch.rand(100, generator=_seeded(1))
    wanted = torch.softmax(torch.cat((scores, 0.7 * nsp[:, None]), dim=1), dim=1)[:, -1]
    found, _ = Cap(alpha=0.7).evidence({}, 1, ExitOutput(scores, {"nsp": nsp}))
    torch.testing.assert_close(-found, wanted, atol=1e-6, rtol=1e-5)


@given(score_tables())
@settings(deadline=None)
def test_cap_without_its_term_is_energy_bit_for_bit(scores):
    shape = scores.shape[:1]
    for alpha, nsp in ((0.0, torch.ones(shape)), (0.5, torch.zeros(shape))):
        output = ExitOutput(scores[:, 0], {"nsp": nsp})
        assert torch.equal(
            Cap(alpha=alpha).evidence({}, 1, output)[0], Energy().evidence({}, 1, output)[0]
        )
