"""Claims about policies on recorded rows: sweeps, searches, signals, fits, and the live model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.calibration import (
    calibrate,
    fit_bins,
    fit_temperatures,
    frontier,
    measure,
)
from offramp.calibration.frontier import applicable
from offramp.calibration.judge import Judge
from offramp.calibration.sentences import policy_text
from offramp.engines import TorchEngine, rows_of
from offramp.errors import ConfigError, TableError
from offramp.evaluation import evaluate
from offramp.exits import EXITS, ExitKind, ExitOutput, Exits, Host
from offramp.exits.pooled import ExitSpec
from offramp.policies import (
    POLICIES,
    Averaged,
    Binned,
    EvidencePolicy,
    MaxProbability,
    QExit,
    Sample,
    Tempered,
    make_policy,
)
from offramp.table import ExitTable, replay, sweep
from offramp.testing import (
    PROBLEM_TYPES,
    check_engine,
    random_outputs,
    spread_policies,
    tiny_batch,
    tiny_model,
)
from offramp.testing.reference import all_signals

SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
SIGNALS = ("correct", "gate", "halt", "nsp")


@pytest.fixture(autouse=True)
def registered_for_this_test_only():
    before = dict(EXITS._items)
    yield
    EXITS._items.clear()
    EXITS._items.update(before)


def made_up(problem_type: str = SINGLE, rows: int = 300, signals: Any = (), **fields) -> ExitTable:
    outputs = random_outputs(problem_type, rows=rows, depth=6, signals=signals)
    columns = {n: torch.stack([o.signals[n] for o in outputs], 1).numpy() for n in signals}
    scores = torch.stack([output.scores for output in outputs], 1).numpy()
    return ExitTable.from_arrays(
        scores, problem_type=problem_type, labels=_labels(scores), signals=columns, **fields
    )


def _labels(scores: np.ndarray) -> np.ndarray:
    noise = np.random.default_rng(0).normal(size=scores[:, -1].shape)
    late = scores[:, -1] + noise
    if late.shape[1] == 1:
        return late[:, 0]
    return late.argmax(1)


def table_for(problem_type: str, signals: Any = ()) -> ExitTable:
    if problem_type != MULTI:
        return made_up(problem_type, signals=signals)
    single = made_up(signals=signals)
    sets = (single.scores[:, -1] > 0.3).astype(np.float32)
    extras = {name: single.columns[f"signals.{name}"] for name in signals}
    return ExitTable.from_arrays(single.scores, problem_type=MULTI, labels=sets, signals=extras)


def outputs_of(table: ExitTable) -> list[ExitOutput]:
    return [table.output(np.arange(table.rows), n) for n in range(1, table.depth + 1)]


# sweeps


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_sweep_gives_the_exits_of_a_replay_under_every_policy(problem_type):
    table = table_for(problem_type, SIGNALS)
    seen = set()
    for policy in spread_policies(problem_type, outputs_of(table)):
        if isinstance(policy, EvidencePolicy):
            seen.add(policy.name)
            (found,) = sweep(table, policy, [policy.bar])
            assert found.tolist() == replay(table, policy).exit_layers.tolist(), policy
    wanted = {name for name in POLICIES if problem_type in POLICIES[name].problem_types}
    assert seen == wanted - {"sample"}


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("name", ["averaged", "q_exit", "window", "agreement"])
def test_a_search_measures_as_a_replay_does(problem_type, name):
    if problem_type not in POLICIES[name].problem_types:
        return
    table = table_for(problem_type, SIGNALS).take(np.arange(100))
    judge = Judge(table)
    for start in POLICIES[name].variants(problem_type, table.depth):
        for outcome in list(judge.search(start))[::40]:
            assert outcome == judge.measure(outcome.policy)


def test_averages_are_scored_by_their_own_answers():
    table = made_up()
    everything = {"name": "averaged", "policy": "full", "average": "probabilities"}
    found = measure(table, everything)
    mean = torch.softmax(torch.from_numpy(table.scores), -1).mean(1).argmax(-1).numpy()
    assert found.score == pytest.approx((mean == table.labels).mean())
    assert found.score != found.full_score


def test_a_policy_with_a_step_of_its_own_is_measured_by_it():
    class Stubborn(MaxProbability):
        name = "stubborn"

        def step(self, state, layer, output):
            return super().step(state, layer, output)._replace(answer=-output.scores)

    table = made_up()
    judge = Judge(table)
    (found,) = judge.search(Stubborn())
    assert found == judge.measure(Stubborn())


# signals


def test_a_search_that_names_no_policy_takes_those_whose_signals_are_there():
    plain = ["entropy", "full", "margin", "max_probability", "patience"]
    assert applicable(made_up()) == plain
    assert applicable(made_up(signals=["halt"])) == sorted([*plain, "q_exit"])
    assert applicable(made_up(signals=SIGNALS)) == sorted(
        [*plain, "cap", "gated", "learned", "q_exit"]
    )
    assert applicable(table_for(REGRESSION, SIGNALS)) == [
        "full", "gated", "learned", "patience", "q_exit",
    ]  # fmt: skip
    assert set(SIGNALS) == set(all_signals())


@pytest.mark.parametrize("spec", ["q_exit", QExit(), {"name": "averaged", "policy": "q_exit"}])
def test_a_table_without_the_signal_is_refused(spec):
    table = made_up(signals=["gate"])
    for attempt in (
        lambda: calibrate(table, target_speedup=2, policies=[spec]),
        lambda: frontier(table, policies=[spec]),
        lambda: measure(table, spec),
        lambda: evaluate(table, spec),
    ):
        with pytest.raises(ConfigError, match=r"reads the signal 'halt'.* they give: gate"):
            attempt()


def test_a_policy_by_name_says_why_it_is_not_for_the_task():
    with pytest.raises(ConfigError, match=r"'energy' is not for regression\. Energy is"):
        calibrate(table_for(REGRESSION), target_speedup=2, policies=["energy"])


def test_rules_without_a_bar_can_be_searched():
    table = made_up(signals=["halt"])
    found = calibrate(table, target_speedup=1.1, policies=["sample", Sample(seed=3)])
    assert {Sample(), Sample(seed=3)} <= {outcome.policy for outcome in found.frontier}


# fits


def test_bins_hold_how_often_an_exit_is_right():
    table = made_up(rows=4000)
    policy = fit_bins(table, bins=5)
    policy.check(SINGLE, table.depth)
    for layer in (1, 3, 5):
        scores = torch.from_numpy(table.scores[:, layer - 1])
        sure, answer = torch.softmax(scores, -1).max(-1)
        right = (answer.numpy() == table.labels).astype(float)
        evidence, _ = policy.evidence({}, layer, ExitOutput(scores))
        for value in evidence.unique():
            here = (evidence == value).numpy()
            assert right[here].mean() == pytest.approx(float(value), abs=1e-6)
            assert 0.1 < here.mean() < 0.3
    assert sure.shape == evidence.shape


def test_without_labels_an_exit_is_right_where_it_says_what_full_depth_says():
    table = made_up(rows=500)
    silent = ExitTable.from_arrays(table.scores, problem_type=SINGLE)
    told = ExitTable.from_arrays(
        table.scores, problem_type=SINGLE, labels=table.scores[:, -1].argmax(-1)
    )
    assert fit_bins(silent) == fit_bins(told) != fit_bins(table)
    assert fit_temperatures(silent) == fit_temperatures(told)


@pytest.mark.parametrize("multi_label", [False, True])
def test_the_temperature_that_was_put_in_is_found(multi_label):
    random = np.random.default_rng(0)
    true = random.normal(size=(20_000, 3)) * 1.5
    if multi_label:
        labels = (random.random(true.shape) < 1 / (1 + np.exp(-true))).astype(np.float32)
    else:
        labels = (true + random.gumbel(size=true.shape)).argmax(1)
    put_in = (4.0, 0.5, 1.0)
    scores = np.stack([true * temperature for temperature in put_in], axis=1)
    kind = MULTI if multi_label else SINGLE
    table = ExitTable.from_arrays(scores, problem_type=kind, labels=labels)
    policy = fit_temperatures(table)
    policy.check(kind, 3)
    assert policy.temperatures == pytest.approx(put_in[:2], rel=0.05)


@pytest.mark.parametrize("fit", [fit_bins, fit_temperatures])
def test_fits_refuse_test_rows_and_regression_and_leave_broken_rows_out(fit):
    with pytest.raises(TableError, match="test"):
        fit(made_up(role="test"))
    with pytest.raises(ConfigError, match="not for regression"):
        fit(table_for(REGRESSION))
    table = made_up(rows=50)
    scores = np.concatenate((table.scores, np.full_like(table.scores[:1], np.nan)))
    labels = np.append(table.labels, 0)
    assert fit(ExitTable.from_arrays(scores, problem_type=SINGLE, labels=labels)) == fit(table)


@pytest.mark.parametrize(("name", "fit"), [("binned", fit_bins), ("tempered", fit_temperatures)])
@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_a_search_by_name_fits_on_its_table(name, fit, problem_type):
    table = table_for(problem_type)
    found = calibrate(table, target_speedup=1.3, policies=[name])
    fitted = fit(table)
    tried = [o.policy for o in found.frontier if o.policy.name == name]
    assert len(tried) > 5
    assert all(fitted.with_bar(policy.bar) == policy for policy in tried)
    assert found.point.build_policy() in tried


def test_fitted_numbers_are_left_out_where_a_policy_is_named():
    assert policy_text(Binned().to_dict()) == "binned (target 0.9)"
    said = policy_text(Tempered(temperatures=(2.0,)).to_dict())
    assert said == "tempered (threshold 0.9, measure probability)"
    said = policy_text(Averaged(policy=MaxProbability(threshold=0.7)).to_dict())
    assert (
        said == "averaged (policy max_probability (threshold 0.7), average scores, decide_on exit)"
    )


# the live model


@EXITS.register("telling")
class TellingSpec(ExitKind):
    """Pooled exits with every signal, each from a linear layer shared by all exits."""

    kind = "telling"

    def build(self, host: Host, num_scores: int) -> Exits:
        plain = ExitSpec().build(host, num_scores)
        tell = nn.Linear(host.width(1), len(SIGNALS))
        return TellingExits({**{n: Telling(plain[n], tell) for n in plain}, "tell": tell})


class Telling(nn.Module):
    def __init__(self, plain: nn.Module, tell: nn.Linear) -> None:
        super().__init__()
        self.plain, self._tell = plain, tell.forward

    def forward(self, hidden: Tensor, mask: Tensor | None, carry: Any = None) -> Any:
        output, carry = self.plain(hidden, mask, carry)
        said = torch.softmax(torch.stack((self._tell(hidden[:, 0]), hidden[:, 0, :4]), -1), -1)
        signals = {name: said[:, n, 0] for n, name in enumerate(SIGNALS)}
        return ExitOutput(output.scores, signals), carry


class TellingExits(Exits):
    def full(self, scores: Tensor, hidden: Tensor, carry: Any) -> Any:
        return ExitOutput(scores, {name: torch.ones(len(scores)) for name in SIGNALS}), carry


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_live_exits_are_those_of_a_replay_for_every_policy_and_signal(problem_type):
    model = tiny_model("bert", problem_type, spec=TellingSpec())
    with torch.inference_mode():
        outputs = list(model.all_exits(tiny_batch(24)))
    usual = set(applicable(table_for(problem_type)))  # checked on every architecture
    chosen = {policy.name: policy for policy in spread_policies(problem_type, outputs)}
    assert chosen.keys() == {n for n in POLICIES if problem_type in POLICIES[n].problem_types}
    others = [policy for name, policy in chosen.items() if name not in usual]
    check_engine(TorchEngine, model, policies=others, rows=12)


def test_a_model_without_the_signal_is_refused_by_its_engine():
    batch = tiny_batch(4)
    with pytest.raises(ConfigError, match=r"reads the signal 'halt'.* they give: none"):
        TorchEngine(tiny_model()).run(batch, QExit(), rows_of(batch))


@pytest.mark.parametrize("name", list(POLICIES))
def test_a_policy_of_any_kind_is_stored_in_a_point_and_read_again(name, tmp_path):
    table = made_up(signals=SIGNALS)
    options = {"fixed": {"layer": 2}, "averaged": {"policy": "patience"}}
    policy = make_policy({"name": name, **options.get(name, {})})
    found = calibrate(table, target_speedup=1.0001, policies=[policy])
    found.point.save(tmp_path)
    again = type(found.point).load(tmp_path)
    assert again.build_policy() == found.point.build_policy()


@pytest.mark.parametrize("name", ["entropy", "max_probability", "margin"])
def test_no_row_stands_on_the_edge_of_a_bar(name: str) -> None:
    """Another batch or engine moves scores by their last bits, and that moves no row."""
    table = made_up(rows=40)
    scores = np.asarray(table.scores)
    others = [
        ExitTable.from_arrays(scores * np.float32(factor), problem_type=SINGLE, labels=table.labels)
        for factor in (1 - 1e-6, 1 + 1e-6)
    ]
    for tried in Judge(table).search(make_policy(name)):
        here, *there = [replay(one, tried.policy).exit_layers.tolist() for one in (table, *others)]
        assert there == [here, here]
