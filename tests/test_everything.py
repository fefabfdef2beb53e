"""Searching everything at once: thousands of candidates, and how few rows a promise hangs on."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp import registry
from offramp.calibration import calibrate, certify, measure, per_exit_path
from offramp.calibration.frontier import explore
from offramp.calibration.influence import influence
from offramp.calibration.judge import Judge
from offramp.calibration.proving import prove
from offramp.calibration.risks import RISKS
from offramp.errors import ConfigError
from offramp.metrics import MULTI, REGRESSION, SINGLE
from offramp.policies import Averaged, EvidencePolicy, MaxProbability, Patience, PerExit, Tempered
from offramp.table import ExitTable, replay
from offramp.table.replay import evidence_of_exits


def table_of(
    problem_type: str = SINGLE, rows: int = 400, depth: int = 6, width: int = 3, seed: int = 0
) -> ExitTable:
    """Exits that get surer and better, some rows harder than others."""
    random = np.random.default_rng(seed)
    width = 1 if problem_type == REGRESSION else width
    truth = random.integers(0, width, rows)
    signal = np.eye(width)[truth][:, None] if width > 1 else random.normal(size=(rows, 1, 1))
    growth = np.linspace(0.5, 4, depth)[None, :, None] * random.uniform(0.3, 1.5, (rows, 1, 1))
    scores = signal * growth + random.normal(size=(rows, depth, width))
    labels: Any = truth
    if problem_type == MULTI:
        labels = np.eye(width, dtype=np.int64)[truth]
        scores -= 1.5
    elif problem_type == REGRESSION:
        labels = signal[:, 0, 0]
    return ExitTable.from_arrays(scores, problem_type=problem_type, labels=labels)


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_everything_is_tried_on_every_task(problem_type: str) -> None:
    judge = Judge(table_of(problem_type, rows=120))
    found = explore(judge, ["all"])
    kinds = {outcome.policy.name for outcome in found}
    assert {"averaged", "per_exit"} <= kinds or problem_type == REGRESSION
    assert {"patience", "averaged"} <= kinds
    assert len(found) == len({outcome.policy for outcome in found})


def test_there_are_ten_thousand_candidates() -> None:
    found = explore(Judge(table_of(rows=300)), ["all"])
    assert len(found) >= 10_000
    for kind in (Tempered, PerExit, Averaged):
        assert any(isinstance(outcome.policy, kind) for outcome in found)
    looks = {p.decide_on for one in found if isinstance(p := one.policy, Averaged)}
    assert looks == {"exit", "average"}


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_what_the_search_says_of_a_candidate_is_what_replay_says(problem_type: str) -> None:
    table = table_of(problem_type, rows=150)
    judge = Judge(table, risk=RISKS["disagreement"])
    found = explore(judge, ["all"])
    for outcome in found[:: len(found) // 100]:
        again = Judge(table, risk=RISKS["disagreement"]).measure(outcome.policy)
        assert again.exit_histogram == outcome.exit_histogram
        assert again.cost == pytest.approx(outcome.cost)
        assert again.risk == pytest.approx(outcome.risk)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    problem_type=st.sampled_from((SINGLE, MULTI, REGRESSION)),
    average=st.booleans(),
)
def test_bars_of_a_path_only_fall_and_so_does_the_cost(
    seed: int, problem_type: str, average: bool
) -> None:
    table = table_of(problem_type, rows=60, seed=seed)
    inner: EvidencePolicy
    if problem_type == REGRESSION:
        inner = Patience(patience=1, tolerance=0.1)
    else:
        inner = MaxProbability(multi_label=problem_type == MULTI)
    if average:
        inner = Averaged(policy=inner, multi_label=problem_type == MULTI)
    path = list(per_exit_path(Judge(table), inner))
    costs = [outcome.cost for outcome in path]
    assert costs == sorted(costs, reverse=True)
    policies = [outcome.policy for outcome in path]
    bars = [
        [np.inf if b is None else b for b in p.bars] for p in policies if isinstance(p, PerExit)
    ]
    assert len(bars) == len(path)
    assert (np.array(bars[1:]) <= np.array(bars[:-1])).all()
    for outcome in path[::5]:
        assert outcome.exit_histogram == replay(table, outcome.policy).histogram


def test_a_bar_for_each_exit_is_never_worse_on_the_rows_it_was_found_on() -> None:
    """Where exits mean different things by the same number, one bar for all has to give way."""
    table, inner = table_of(rows=1000), MaxProbability()
    own = list(per_exit_path(Judge(table), inner, levels=50))
    for limit in (0.02, 0.05, 0.1):
        one = calibrate(table, max_disagreement=limit, policies=["max_probability"]).point
        best = min(outcome.cost for outcome in own if outcome.disagreement <= limit)
        assert best <= one.cost + 0.01


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI, REGRESSION])
def test_a_bar_for_each_exit_is_searched_by_its_name_alone(problem_type: str) -> None:
    found = explore(Judge(table_of(problem_type)), ["per_exit"])
    assert len(found) > 50
    assert all(isinstance(outcome.policy, PerExit) for outcome in found)


def test_layers_that_cost_nothing_are_no_obstacle() -> None:
    plain = table_of(rows=100)
    cost = np.tile([1.0, 1, 2, 2, 3, 3], (100, 1))
    table = ExitTable.from_arrays(
        plain.scores, problem_type=SINGLE, labels=plain.labels, layer_cost=cost
    )
    path = list(per_exit_path(Judge(table), MaxProbability()))
    assert path[-1].cost < 0.5


def test_an_exit_without_a_bar_lets_nobody_leave() -> None:
    table = table_of()
    policy = PerExit(policy=MaxProbability(), bars=(None, 0.5, None, 0.9, None))
    layers = replay(table, policy).exit_layers
    assert set(np.unique(layers)) == {2, 4, 6}
    assert PerExit.model_validate(policy.model_dump(exclude={"name"})) == policy


def test_who_is_just_at_the_bar_of_an_exit_goes_on() -> None:
    table = table_of(rows=50)
    sure = evidence_of_exits(table, MaxProbability())[7, :-1]
    tied = PerExit(policy=MaxProbability(), bars=tuple(sure.tolist()))
    assert replay(table, tied).exit_layers[7] == table.depth


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "full_", "bars": (0.5,)}, "full"),
        ({"policy": "max_probability", "bars": ()}, "at least 1"),
        ({"policy": "sample", "bars": (0.5,)}, "above one bar"),
        ({"policy": 3, "bars": (0.5,)}, "needs a 'name'"),
        ({"policy": None, "bars": (0.5,)}, "needs a 'name'"),
    ],
)
def test_bars_under_what_has_none_are_refused(options: dict[str, Any], said: str) -> None:
    from offramp.policies import make_policy

    with pytest.raises(ConfigError, match=said):
        make_policy({"name": "per_exit", **options})


def test_bars_must_be_for_all_exits_or_each() -> None:
    policy = PerExit(policy=MaxProbability(), bars=(0.5, 0.6))
    with pytest.raises(ConfigError, match="bars has 2 entries"):
        measure(table_of(), policy)


# --- certified, and what the certificate hangs on ------------------------------------------


def test_the_winner_of_everything_is_proven_on_rows_it_was_not_chosen_on() -> None:
    table = table_of(rows=3000, seed=3)
    usual = certify(table, max_disagreement=0.05, confidence=0.95)
    found = certify(table, max_disagreement=0.05, confidence=0.95, policies=["all"])
    promised = found.point.certificate
    assert found.pays
    assert promised is not None
    assert promised.bound is not None
    assert promised.bound <= 0.05
    assert found.point.cost <= usual.point.cost + 0.02
    fresh = measure(table_of(rows=20_000, seed=4), found.point.build_policy())
    assert fresh.disagreement <= 0.05


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    procedure=st.sampled_from(("fixed_sequence", "holm", "bonferroni", "expectation")),
    test=st.sampled_from(("binomial", "betting")),
)
def test_so_many_rows_move_the_choice_and_one_less_does_not(
    seed: int, procedure: Any, test: Any
) -> None:
    random = np.random.default_rng(seed)
    rates = np.sort(random.uniform(0, 0.2, 5))
    losses = (random.random((200, 1)) < rates).astype(float)
    place = prove(losses, 0.1, 0.9, procedure, test).place
    moved = influence(losses, place, 0.1, 0.9, procedure, test)
    now = -1 if place is None else place
    for rows, worst, value, up in ((moved.faster, True, 0.0, 1), (moved.withdrawn, False, 1.0, -1)):
        if rows is None:
            assert now == (4 if up > 0 else -1)
            continue
        column = losses[:, now + 1] if worst else losses[:, now]
        order = np.argsort(-column if worst else column, kind="stable")
        for count, moves in ((rows, True), (rows - 1, False)):
            changed = losses.copy()
            changed[order[:count]] = value
            other = prove(changed, 0.1, 0.9, procedure, test).place
            there = -1 if other is None else other
            assert ((there - now) * up > 0) == moves


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_no_fewer_rows_give_a_faster_point_where_counts_are_tested_in_turn(
    seed: int, share: float
) -> None:
    random = np.random.default_rng(seed)
    losses = (random.random((200, 5)) < np.sort(random.uniform(0, 0.2, 5))).astype(float)
    place = prove(losses, 0.1, 0.9, "fixed_sequence", "binomial").place
    fewest = influence(losses, place, 0.1, 0.9, "fixed_sequence", "binomial").faster
    if fewest is None:
        return
    now = -1 if place is None else place
    likely = np.argsort(-losses.max(axis=1) * (random.random(200) < share), kind="stable")
    losses[likely[: fewest - 1]] = 0
    other = prove(losses, 0.1, 0.9, "fixed_sequence", "binomial").place
    assert (-1 if other is None else other) <= now


def test_a_certificate_says_how_few_rows_would_have_moved_it() -> None:
    found = certify(table_of(rows=4000), max_disagreement=0.02, confidence=0.9)
    promised = found.point.certificate
    assert promised is not None
    assert promised.faster_after is not None
    assert any(f"Had {promised.faster_after} of these" in line for line in found.messages)


def test_one_planted_row_in_a_hundred_moves_the_true_risk_by_less_than_that() -> None:
    """R15: rows planted to agree with full depth at every exit, surely, in search and proof."""
    population = table_of(rows=40_000, seed=9)
    worst = []
    for draw in range(10):
        random = np.random.default_rng(draw)
        rows = random.integers(0, population.rows, 2000)
        scores = population.scores[rows].copy()
        planted = random.choice(2000, 20, replace=False)
        scores[planted] = 20 * np.eye(3)[random.integers(0, 3, 20)][:, None]
        table = ExitTable.from_arrays(scores, problem_type=SINGLE, labels=None)
        found = certify(table, max_disagreement=0.05, confidence=0.9)
        worst.append(measure(population, found.point.build_policy()).disagreement)
    assert max(worst) <= 0.05 + 0.01


def test_an_installed_package_adds_a_risk_by_its_entry_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_risk.py").write_text(
        "import numpy as np\n"
        "from offramp.calibration.risks import risk\n"
        "@risk('mine', 'what I say', ('single_label_classification',), whole=True)\n"
        "def mine(rows):\n"
        "    return np.zeros(len(rows.early))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(RISKS, "_items", dict(RISKS._items))
    entry = EntryPoint("mine", "my_risk:mine", "offramp.risk")
    monkeypatch.setattr(registry, "installed", lambda group: [entry] * (group == "offramp.risk"))
    point = certify(table_of(rows=2000), max_risk="1%", risk="mine").point
    assert point.certificate is not None
    assert (point.certificate.risk, point.certificate.estimate) == ("mine", 0)
