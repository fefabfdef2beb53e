"""Claims about the exit criteria, each checked on plain arrays."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import (
    POLICIES,
    Entropy,
    EvidencePolicy,
    Fixed,
    Full,
    Margin,
    MaxProbability,
    Patience,
    Policy,
    Step,
    decide,
    make_policy,
)
from offramp.testing import PROBLEM_TYPES
from offramp.testing.policies import check_policy
from offramp.testing.reference import random_outputs, rows_like, spread_policies, walk
from offramp.testing.strategies import policies, score_tables

CONFIDENT = (Entropy, Margin, MaxProbability)


def leaves(policy: Policy, scores: Tensor) -> list[int]:
    """Exit layer of each row of scores (rows, layers, classes)."""
    outputs = [ExitOutput(layer) for layer in scores.unbind(1)]
    return walk(policy, outputs, rows_like(outputs)).exit_layers.tolist()


def labels_as_scores(*rows: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(rows), 3).float()


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("classes", [2, 3, 9])
def test_evidence_is_the_same_bit_for_bit_alone_or_anywhere_in_a_batch(problem_type, classes):
    outputs = random_outputs(problem_type, rows=200, depth=3, num_scores=classes)
    for policy in spread_policies(problem_type, outputs):
        whole, _ = policy.evidence({}, 1, outputs[0])
        for first, count in itertools.product((0, 1, 77), (1, 2, 3, 7, 8, 33)):
            rows = slice(first, first + count)
            part, _ = policy.evidence({}, 1, ExitOutput(outputs[0].scores[rows].clone()))
            assert torch.equal(part, whole[rows]), policy


def test_a_policy_that_looks_at_the_whole_batch_fails_the_check():
    class BatchMean(EvidencePolicy):
        name = "batch_mean"
        threshold: float = 1.0
        bar = property(lambda self: self.threshold)

        def with_bar(self, bar):
            return self._with(threshold=bar)

        def evidence(self, state, layer, output):
            mean = output.scores.amax(dim=-1).mean()
            return mean.expand(output.scores.shape[0]), state

    with pytest.raises(AssertionError, match="neighbours"):
        check_policy(BatchMean(), PROBLEM_TYPES[0])


@pytest.mark.parametrize("kind", CONFIDENT)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("multi_label", [False, True])
def test_saturated_scores_leave_at_the_first_exit(kind, dtype, multi_label):
    scores = torch.tensor([[1000.0, -1000.0, -1000.0], [-1000.0, -1000.0, 1000.0]], dtype=dtype)
    policy = kind(multi_label=multi_label)
    decision = decide(policy, {}, 1, ExitOutput(scores))
    assert decision.leave.all()
    assert decision.bad is None


@pytest.mark.parametrize("kind", CONFIDENT)
def test_scores_near_the_end_of_float32_are_neither_nan_nor_undecided(kind):
    scores = torch.tensor([[3e38, -3e38], [1e38, 0.0], [0.0, 0.0]])
    evidence, _ = kind().evidence({}, 1, ExitOutput(scores))
    assert torch.isfinite(evidence).all()
    assert (evidence > kind().bar).tolist() == [True, True, False]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "policy", [Entropy(), Margin(), MaxProbability(), Patience(), Fixed(layer=1)]
)
def test_a_broken_row_leaves_as_bad_and_its_neighbours_are_bit_equal(policy, value):
    clean = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    for row in range(8):
        broken = clean.clone()
        broken[row, 1] = value
        expected = decide(policy, {}, 1, ExitOutput(clean))
        found = decide(policy, {}, 1, ExitOutput(broken))
        others = [other for other in range(8) if other != row]
        assert found.bad.tolist() == [other == row for other in range(8)]
        assert found.leave[row]
        assert torch.equal(found.leave[others], expected.leave[others])
        assert torch.equal(found.answer[others], expected.answer[others])


def test_decisions_are_made_in_float32_whatever_the_scores_are():
    scores = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    for policy in (Entropy(threshold=0.7), Margin(threshold=0.3), MaxProbability(threshold=0.6)):
        half = decide(policy, {}, 1, ExitOutput(scores))
        single = decide(policy, {}, 1, ExitOutput(scores.float()))
        assert torch.equal(half.leave, single.leave)
        assert half.answer.dtype == torch.float32


class _Sure(EvidencePolicy):
    name = "sure"

    @property
    def bar(self):
        return 0.901  # the nearest bf16 number is 0.90234375

    def evidence(self, state, layer, output):
        return output.signals["sure"], state


def test_signals_are_compared_in_float32_as_the_table_holds_them():
    sure = torch.tensor([0.8984375, 0.90234375], dtype=torch.bfloat16)
    output = ExitOutput(torch.zeros(2, 2, dtype=torch.bfloat16), {"sure": sure})
    assert decide(_Sure(), {}, 1, output).leave.tolist() == [False, True]


@given(score_tables())
@settings(deadline=None)
def test_full_never_leaves_before_the_last_layer(scores):
    depth = scores.shape[1]
    assert set(leaves(Full(), scores)) == {depth}
    assert not any(Full().reads(layer) for layer in range(1, depth + 1))


@given(score_tables(), st.integers(1, 14))
@settings(deadline=None)
def test_fixed_leaves_after_its_layer_and_reads_no_exit_before(scores, layer):
    depth = scores.shape[1]
    assert set(leaves(Fixed(layer=layer), scores)) == {min(layer, depth)}
    assert next(n for n in range(1, 15) if Fixed(layer=layer).reads(n)) == layer


@given(score_tables(), st.data())
@settings(deadline=None)
def test_an_exit_that_is_not_read_could_not_have_stopped_a_row(scores, data):
    policy = data.draw(policies(depth=scores.shape[1]))
    state = policy.start(rows_like([ExitOutput(scores[:, 0])]))
    for layer in range(1, scores.shape[1] + 1):
        step = policy.step(state, layer, ExitOutput(scores[:, layer - 1]))
        assert policy.reads(layer) or not step.leave.any()
        state = step.state


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@given(data=st.data())
@settings(max_examples=50, deadline=None)
def test_a_stricter_bar_never_leaves_earlier(problem_type, data):
    scores = data.draw(score_tables(problem_type))
    one = data.draw(policies(problem_type, scores.shape[1]))
    if not isinstance(one, EvidencePolicy):
        return
    other = one.with_bar(data.draw(st.floats(-3, 3)))
    loose, strict = sorted((one, other), key=lambda policy: policy.bar)
    pairs = zip(leaves(loose, scores), leaves(strict, scores), strict=True)
    assert all(early <= late for early, late in pairs)


# patience


class _Peeks(Full):
    """Would leave at an exit that it does not read, and would remember it."""

    def step(self, state, layer, output):
        leave = torch.ones(len(output.scores), dtype=torch.bool)
        return Step(leave, -output.scores, {"seen": leave})


def test_a_policy_is_not_asked_about_an_exit_that_it_does_not_read():
    scores = torch.tensor([[1.0, 2.0], [3.0, math.nan]])
    found = decide(_Peeks(), {}, 1, ExitOutput(scores))
    assert found.leave.tolist() == [False, True]  # scores that are broken are never gone on with
    assert found.answer is scores
    assert found.state == {}


def test_patience_leaves_after_one_layer_more_than_it_waits():
    always = labels_as_scores([1] * 12)
    assert [leaves(Patience(patience=t), always) for t in (1, 2, 5, 11, 12)] == [
        [2],
        [3],
        [6],
        [12],
        [12],
    ]


def test_the_patience_counter_starts_again_when_the_answer_changes():
    rows = labels_as_scores([0, 0, 1, 1, 1, 0], [0, 1, 0, 1, 0, 1], [2, 2, 2, 0, 0, 0])
    assert leaves(Patience(patience=2), rows) == [5, 6, 3]


@given(score_tables(), st.integers(1, 12))
@settings(deadline=None)
def test_patience_equals_the_papers_loop_over_single_rows(scores, patience):
    def papers_loop(row: Tensor) -> int:
        counter, last = 0, None
        for layer, label in enumerate(row.argmax(-1).tolist(), start=1):
            counter = counter + 1 if label == last else 0
            last = label
            if counter == patience:
                return layer
        return len(row)

    assert leaves(Patience(patience=patience), scores) == [papers_loop(row) for row in scores]


@given(score_tables("regression"), st.integers(1, 5), st.sampled_from((0.0, 0.1, 1.0, 3.0)))
@settings(deadline=None)
def test_patience_for_regression_equals_the_papers_loop(scores, patience, tolerance):
    def papers_loop(row: Tensor) -> int:
        counter = 0
        for layer, (last, now) in enumerate(itertools.pairwise(row), start=2):
            counter = counter + 1 if (now - last).abs() < tolerance else 0
            if counter == patience:
                return layer
        return len(row)

    policy = Patience(patience=patience, tolerance=tolerance)
    assert leaves(policy, scores) == [papers_loop(row) for row in scores]


def test_a_change_of_exactly_the_tolerance_does_not_count_as_agreement():
    scores = torch.tensor([[[0.0], [0.5], [1.0], [1.5]], [[0.0], [0.4], [0.8], [1.2]]])
    assert leaves(Patience(patience=1, tolerance=0.5), scores) == [4, 2]


def test_multi_label_patience_waits_for_the_whole_label_set():
    scores = torch.tensor([[[2.0, -1], [2, 1], [2, 1]], [[2.0, -1], [1, -2], [2, 1]]])
    assert leaves(Patience(patience=1, multi_label=True), scores) == [3, 2]


# confidence


def test_confidence_is_what_numpy_and_scipy_say():
    scores = torch.randn(100, 5, generator=torch.Generator().manual_seed(0)) * 3
    output, probability = ExitOutput(scores), torch.softmax(scores.double(), -1).numpy()
    top = np.sort(probability, axis=1)
    expected = {
        Entropy: -stats.entropy(probability, axis=1),
        Margin: top[:, -1] - top[:, -2],
        MaxProbability: top[:, -1],
    }
    for kind, values in expected.items():
        np.testing.assert_allclose(kind().evidence({}, 1, output)[0], values, atol=1e-6)


def test_multi_label_rows_are_as_sure_as_their_least_sure_label():
    scores = torch.tensor([[5.0, -5.0, 5.0], [5.0, 0.1, -5.0]])
    for kind in CONFIDENT:
        policy = kind(multi_label=True)
        assert decide(policy, {}, 1, ExitOutput(scores)).leave.tolist() == [True, False]


@pytest.mark.parametrize("kind", CONFIDENT)
def test_ties_go_on(kind):
    output = ExitOutput(torch.tensor([[1.0, 0.25, -2.0]]))
    evidence = kind().evidence({}, 1, output)[0].item()
    assert not kind().with_bar(evidence).step({}, 1, output).leave.any()
    looser = float(np.nextafter(np.float32(evidence), np.float32(-np.inf)))
    assert kind().with_bar(looser).step({}, 1, output).leave.all()


# options


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@given(data=st.data())
@settings(deadline=None)
def test_any_bar_gives_a_policy_that_is_valid_and_comes_back_from_json(problem_type, data):
    policy = data.draw(policies(problem_type))
    assert make_policy(json.loads(json.dumps(policy.to_dict(), allow_nan=False))) == policy
    policy.check(problem_type, depth=max(12, getattr(policy, "layer", 1)))


@pytest.mark.parametrize(
    ("policy", "bar", "nearest"),
    [
        (Entropy(), 0.5, Entropy(threshold=0)),
        (Margin(), -0.5, Margin(threshold=0)),
        (Patience(), -3.0, Patience(patience=1)),
        (Patience(), 1e9, Patience(patience=1000)),
        (Patience(tolerance=1), 2.0, Patience(tolerance=0)),
        (Fixed(layer=3), -1.0, Fixed(layer=1)),
    ],
)
def test_a_bar_that_no_option_gives_becomes_the_nearest_that_one_does(policy, bar, nearest):
    assert policy.with_bar(bar) == nearest


@pytest.mark.parametrize("name", POLICIES.names())
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_search_starts_only_from_policies_that_fit_the_task(name, problem_type):
    for depth in (1, 2, 12):
        for policy in POLICIES[name].variants(problem_type, depth):
            policy.check(problem_type, depth)


@pytest.mark.parametrize(
    ("policy", "problem_type", "hint"),
    [
        (Patience(), "regression", "tolerance"),
        (Entropy(), "regression", "not for regression"),
        (Entropy(), "multi_label_classification", "multi_label=True"),
        (Patience(multi_label=True), "single_label_classification", "multi_label=False"),
        (Fixed(layer=13), "single_label_classification", "1 to 12"),
    ],
)
def test_a_policy_that_does_not_fit_the_task_is_refused(policy, problem_type, hint):
    with pytest.raises(ConfigError, match=hint):
        policy.check(problem_type, 12)


@pytest.mark.parametrize(
    ("spec", "hint"),
    [
        ("entrpy", "Did you mean 'entropy'"),
        ({"name": "entropy", "treshold": 0.1}, "Its options: .*threshold"),
        ({"name": "entropy", "threshold": math.nan}, "threshold"),
        ({"name": "entropy", "threshold": math.inf}, "threshold"),
        ({"name": "entropy", "threshold": -0.1}, "threshold"),
        ({"name": "patience", "patience": 0}, "patience"),
        ({"name": "patience", "patience": 10**9, "tolerance": 0.1}, "patience"),
        ({"name": "fixed"}, "layer"),
        ({"threshold": 0.1}, "needs a 'name'"),
        ({"name": 3}, "needs a 'name'"),
    ],
)
def test_a_policy_that_cannot_be_built_names_what_is_wrong(spec, hint):
    with pytest.raises(ConfigError, match=hint):
        make_policy(spec)


def test_a_policy_of_a_third_party_decides_like_ours(monkeypatch):
    class Late(Policy):
        name = "late"

        def step(self, state, layer, output):
            count = state.get("count", torch.zeros(len(output.scores))) + 1
            return Step(count > 2, output.scores, {"count": count})

    monkeypatch.setitem(POLICIES._items, "late", Late)
    check_policy(Late(), PROBLEM_TYPES[0])
    assert leaves(Late(), torch.zeros(2, 5, 3)) == [3, 3]
