"""Claims about bins, temperatures and averages: policies with fitted numbers or another inside."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import (
    POLICIES,
    Averaged,
    Binned,
    Full,
    MaxProbability,
    Patience,
    Policy,
    State,
    Step,
    Tempered,
    make_policy,
)
from offramp.testing import PROBLEM_TYPES, check_policy, random_outputs, walk
from offramp.testing.reference import all_signals, rows_like
from offramp.testing.strategies import score_tables

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
SHARES = st.floats(0, 1, width=32)


def leaves(policy: Policy, scores: Tensor) -> list[int]:
    """Exit layer of each row of scores (rows, layers, classes)."""
    outputs = [ExitOutput(layer) for layer in scores.unbind(1)]
    return walk(policy, outputs, rows_like(outputs)).exit_layers.tolist()


def as_scores(*rows: list[float]) -> Tensor:
    """Two classes whose first has these probabilities."""
    first = torch.tensor(rows, dtype=torch.float64)
    return torch.stack((first.log(), (1 - first).log()), dim=-1).float()


# bins and temperatures


def test_bins_without_measured_accuracy_take_the_confidence_for_it():
    rows = as_scores([0.85, 0.89, 0.91, 0.5])
    assert leaves(Binned(target=0.9), rows) == [3]
    assert leaves(Binned(target=0.8), rows) == [1]


def test_each_exit_has_bins_of_its_own():
    policy = Binned(target=0.7, edges=((0.8,), (0.6,)), accuracy=((0.9, 0.4), (0.2, 0.8)))
    policy.check(SINGLE, 3)
    # the first exit is right where it is unsure; an edge belongs to the bin below it
    rows = as_scores([0.7, 0.5, 0.5], [0.9, 0.7, 0.5], [0.9, 0.55, 0.5])
    assert leaves(policy, rows) == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"edges": ((0.5,),), "accuracy": ((0.5,),)}, "one accuracy more"),
        ({"edges": ((0.5, 0.4),), "accuracy": ((0.1, 0.2, 0.3),)}, "ascend"),
        ({"edges": (), "accuracy": ()}, "edges"),
    ],
)
def test_bins_that_make_no_sense_are_refused(options, hint):
    with pytest.raises(ConfigError, match=hint):
        make_policy({"name": "binned", **options})


@given(score_tables(), SHARES)
@settings(deadline=None)
def test_a_temperature_of_one_changes_nothing(scores, threshold):
    plain = MaxProbability(threshold=threshold)
    assert leaves(Tempered(threshold=threshold), scores) == leaves(plain, scores)


def test_each_exit_has_its_temperature():
    rows = as_scores([0.9, 0.9, 0.9])
    assert leaves(Tempered(threshold=0.8, temperatures=(2.0, 1.0)), rows) == [2]


# averages


def test_answers_are_averages_of_all_exits_so_far():
    scores = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [-3.0, 5.0]]])
    outputs = [ExitOutput(layer) for layer in scores.unbind(1)]
    rows = rows_like(outputs)
    found = walk(Averaged(policy={"name": "fixed", "layer": 2}), outputs, rows)
    assert found.scores.tolist() == [[1.0, 0.5]]
    mixture = walk(Averaged(policy="full", average="probabilities"), outputs, rows)
    wanted = torch.softmax(scores, dim=-1).mean(dim=1)
    torch.testing.assert_close(torch.softmax(mixture.scores, dim=-1), wanted)


def test_the_average_of_scores_is_that_of_log_probabilities():
    outputs = random_outputs(SINGLE, rows=30, depth=5)
    found = walk(Averaged(policy="full"), outputs, rows_like(outputs)).scores
    logs = torch.stack([torch.log_softmax(one.scores, -1) for one in outputs]).mean(0)
    torch.testing.assert_close(torch.softmax(found, -1), torch.softmax(logs, -1))


def test_a_mixture_of_label_sets_averages_each_labels_probability():
    outputs = random_outputs(MULTI, rows=30, depth=5)
    policy = Averaged(policy="full", average="probabilities", multi_label=True)
    found = walk(policy, outputs, rows_like(outputs)).scores
    wanted = torch.stack([torch.sigmoid(one.scores) for one in outputs]).mean(0)
    torch.testing.assert_close(torch.sigmoid(found), wanted, atol=1e-5, rtol=1e-4)


INSIDE = {name: make_policy({"name": name, **({"layer": 3} if name == "fixed" else {})})
          for name in POLICIES if name != "averaged"}  # fmt: skip


class Falling(MaxProbability):
    """Asks less of later exits."""

    def bar_at(self, layer: int) -> float:
        return self.threshold - 0.05 * layer


class Doubled(MaxProbability):
    """Leaves by a step of its own."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return self.step_at(min(1.0, 2 * self.threshold), state, layer, output)


@pytest.mark.parametrize("policy", [*INSIDE.values(), Falling(), Doubled(threshold=0.4)], ids=str)
def test_rows_leave_where_the_policy_inside_says(policy):
    outputs = random_outputs(SINGLE, rows=40, signals=all_signals())
    rows = rows_like(outputs)
    if POLICIES[policy.name] is type(policy):  # others do not come back from JSON
        check_policy(Averaged(policy=policy), SINGLE, outputs)
    found = walk(Averaged(policy=policy), outputs, rows)
    assert torch.equal(found.exit_layers, walk(policy, outputs, rows).exit_layers)


def test_the_policy_inside_may_look_at_the_average():
    rows = as_scores([0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9])
    policy = Averaged(policy=Patience(patience=1), decide_on="average")
    # the average of 0.9 and 0.1 is a tie, which the first class wins
    assert leaves(policy, rows) == [2, 2]
    assert leaves(Averaged(policy=Patience(patience=1)), rows) == [4, 2]


@pytest.mark.parametrize(
    ("spec", "problem_type", "hint"),
    [
        ({"policy": "entrpy"}, SINGLE, "Did you mean 'entropy'"),
        ({"policy": {"name": "averaged", "policy": "full"}}, SINGLE, "average of averages"),
        ({}, SINGLE, "policy"),
        ({"policy": "entropy"}, REGRESSION, "not for regression"),
        ({"policy": "full", "average": "probabilities"}, REGRESSION, "average='scores'"),
        ({"policy": "full"}, MULTI, "multi_label=True"),
    ],
)
def test_an_average_that_cannot_be_is_refused(spec, problem_type, hint):
    with pytest.raises(ConfigError, match=hint):
        make_policy({"name": "averaged", **spec}).check(problem_type, 12)


def test_an_average_needs_the_signals_of_the_policy_inside():
    assert Averaged(policy="q_exit").needs == ("halt",)
    assert Averaged(policy=Full()).needs == ()
