"""Claims about choosing an operating point, and about its file."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offramp.calibration import (
    OperatingPoint,
    calibrate,
    frontier,
    list_points,
    measure,
    parse_share,
)
from offramp.errors import ConfigError, OfframpError, OutputError, PointError, TableError
from offramp.metrics import METRICS, disagreement
from offramp.policies import Entropy, Fixed, Patience, make_policy
from offramp.table import ExitTable, replay
from offramp.testing import PROBLEM_TYPES

SINGLE, MULTI, REGRESSION = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
DEPTH = 8
ROUNDING = 1e-9
# hundreds of candidates are scored per search: the quick metrics keep the tests quick
METRIC = {SINGLE: "accuracy", MULTI: "accuracy", REGRESSION: "neg_mae"}
TARGETS = [{"max_drop": 0.02}, {"target_speedup": 1.5}, {"max_disagreement": 0.05}]


def make_table(problem_type: str = SINGLE, rows: int = 600, seed: int = 0, **fields) -> ExitTable:
    """Exits that get better with depth, sooner on easy rows; reading an exit costs a little."""
    random = np.random.default_rng(seed)
    ease = random.exponential(size=(rows, 1)) * np.arange(1, DEPTH + 1)
    width = 1 if problem_type == REGRESSION else 3
    noise = random.normal(size=(rows, DEPTH, width))
    if problem_type == SINGLE:
        labels = random.integers(0, 3, rows)
        scores = noise + 2 * ease[..., None] * np.eye(3)[labels][:, None]
    elif problem_type == MULTI:
        labels = random.integers(0, 2, (rows, 3)).astype(np.float32)
        scores = noise + 3 * ease[..., None] * (2 * labels - 1)[:, None]
    else:
        labels = random.normal(size=rows)
        scores = labels[:, None, None] + noise * np.exp(-ease)[..., None]
    fields = {"labels": labels, "exit_cost": np.full((rows, DEPTH), 0.01), **fields}
    return ExitTable.from_arrays(scores, problem_type=problem_type, **fields)


def without_labels(table: ExitTable) -> ExitTable:
    return ExitTable.from_arrays(
        table.scores, problem_type=table.problem_type, exit_cost=table.columns["exit_cost"]
    )


def hopeless_table(rows: int = 400) -> ExitTable:
    """Every exit but the last guesses, and is as sure as the last."""
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, rows)
    guesses = random.integers(0, 3, (rows, DEPTH))
    guesses[:, -1] = labels
    return ExitTable.from_arrays(9 * np.eye(3)[guesses], problem_type=SINGLE, labels=labels)


def rarely_wrong_table() -> ExitTable:
    """Early exits are sure and right on class 0, sure and wrong on the rare class 1."""
    labels = np.r_[np.zeros(990, int), np.ones(10, int)]
    scores = np.zeros((1000, DEPTH, 2))
    scores[:, :, 0] = 9.0
    scores[990:, -1] = (0.0, 9.0)
    return ExitTable.from_arrays(
        scores, problem_type=SINGLE, labels=labels, label_names=("common", "rare")
    )


# what is chosen


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: next(iter(target)))
def test_the_figures_of_a_point_are_those_of_its_policy_replayed(problem_type, target):
    table = make_table(problem_type)
    point = calibrate(table, **target, metric=METRIC[problem_type]).point
    again = replay(table, point.build_policy())
    metric = METRICS[point.metric]
    assert point.exit_histogram == again.histogram
    assert point.cost == pytest.approx(again.share)
    assert point.score == pytest.approx(metric.score(again.answers, table.labels))
    assert point.full_score == pytest.approx(metric.score(table.scores[:, -1], table.labels))
    strayed = disagreement(again.answers, table.scores[:, -1], problem_type)
    assert point.disagreement == pytest.approx(strayed)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: next(iter(target)))
def test_no_candidate_that_meets_the_target_is_better_than_the_choice(problem_type, target):
    found = calibrate(make_table(problem_type), **target, metric=METRIC[problem_type])
    rivals = [outcome for outcome in found.frontier if outcome.policy.name != "fixed"]
    (kind, value), point = next(iter(target.items())), found.point
    assert found.pays
    if kind == "target_speedup":
        assert point.cost_reduction >= value
        assert point.score == max(o.score for o in rivals if o.cost_reduction >= value)
        return
    figure = kind.removeprefix("max_")
    limit = value + ROUNDING
    assert getattr(point, figure) <= limit
    assert point.cost == min(o.cost for o in rivals if getattr(o, figure) <= limit)


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_a_looser_drop_is_never_dearer(problem_type):
    table = make_table(problem_type)
    metric = METRIC[problem_type]
    costs = [calibrate(table, max_drop=d, metric=metric).point.cost for d in (0, 0.02, 0.5)]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0]


def test_a_drop_of_exactly_the_limit_is_allowed():
    table = make_table()
    drops = sorted({o.drop for o in frontier(table) if o.policy.name != "fixed" and o.drop > 0.01})
    assert calibrate(table, max_drop=drops[0]).point.drop == drops[0]


def test_between_equals_the_stricter_bar_is_chosen():
    scores = np.zeros((100, 4, 2))
    scores[:, :, 0] = 5.0
    table = ExitTable.from_arrays(scores, problem_type=SINGLE, labels=np.zeros(100, int))
    specs = [Entropy(threshold=t) for t in (0.3, 0.1, 0.2)]
    assert calibrate(table, max_drop=0, policies=specs).point.policy["threshold"] == 0.1


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
def test_the_drop_is_one_of_the_metric_that_was_asked_for(metric):
    point = calibrate(make_table(), max_drop=0.02, metric=metric).point
    assert point.metric == metric
    assert point.drop <= 0.02 + ROUNDING


def test_disagreement_and_speedup_need_no_labels():
    table = without_labels(make_table())
    for target in ({"max_disagreement": "5%"}, {"target_speedup": 1.5}):
        found = calibrate(table, **target)
        assert found.pays
        assert found.point.metric is None
        assert found.point.drop is None
    best = min(o.disagreement for o in found.frontier if o.cost_reduction >= 1.5)
    assert found.point.disagreement == best


def test_per_class_keeps_a_rare_class_that_the_mean_forgets():
    table = rarely_wrong_table()
    careless = calibrate(table, max_drop=0.02)
    assert careless.pays
    assert careless.point.class_drops == {"common": 0.0, "rare": 1.0}
    assert not calibrate(table, max_drop=0.02, per_class=True).pays


@pytest.mark.parametrize("problem_type", [SINGLE, MULTI])
def test_per_class_bounds_the_drop_of_every_class(problem_type):
    table, metric = make_table(problem_type), METRIC[problem_type]
    point = calibrate(table, max_drop=0.02, per_class=True, metric=metric).point
    assert len(point.class_drops) == 3
    assert max(point.class_drops.values()) <= 0.02 + ROUNDING


def test_multi_label_candidates_ask_about_label_sets():
    outcomes = frontier(make_table(MULTI, rows=50), "accuracy")
    flags = {getattr(outcome.policy, "multi_label", True) for outcome in outcomes}
    assert flags == {True}


def test_only_patience_full_and_fixed_apply_to_regression():
    names = {outcome.policy.name for outcome in frontier(make_table(REGRESSION))}
    assert names == {"patience", "full", "fixed"}


def test_the_fixed_baseline_is_measured_at_every_layer_but_not_chosen_unless_asked_for():
    table = make_table()
    found = calibrate(table, max_drop=0.5)
    layers = [o.policy.layer for o in found.frontier if o.policy.name == "fixed"]
    assert sorted(layers) == list(range(1, DEPTH + 1))
    assert found.point.policy["name"] != "fixed"
    asked = calibrate(table, max_drop=0.5, policies=["fixed"])
    assert asked.point.policy["name"] == "fixed"


def test_policies_may_be_named_or_given_with_options():
    table = make_table()
    named = calibrate(table, max_drop=0.05, policies=["patience"])
    assert {o.policy.name for o in named.frontier} == {"patience", "fixed", "full"}
    given_spec = {"name": "patience", "patience": 3}
    exact = calibrate(table, max_drop=0.5, policies=[given_spec])
    assert exact.point.policy == Patience(patience=3).to_dict()


def test_the_same_table_gives_the_same_point():
    assert (
        calibrate(make_table(), max_drop=0.01).point == calibrate(make_table(), max_drop=0.01).point
    )


def test_a_candidate_compares_with_numbers_that_every_engine_can_hold():
    for outcome in frontier(make_table()):
        threshold = getattr(outcome.policy, "threshold", 0.0)
        assert threshold == float(np.float32(threshold))


@given(seed=st.integers(0, 1000), kind=st.sampled_from(PROBLEM_TYPES))
@settings(max_examples=10, deadline=None)
def test_every_candidate_costs_and_scores_what_its_replay_says(seed, kind):
    table = make_table(kind, rows=60, seed=seed)
    for outcome in frontier(table, METRIC[kind])[::9]:
        again = measure(table, outcome.policy, METRIC[kind])
        assert again.exit_histogram == outcome.exit_histogram
        assert again.cost == pytest.approx(outcome.cost)
        assert again.score == pytest.approx(outcome.score)


# when it does not pay


@pytest.mark.parametrize("target", [{"max_drop": 0.01}, {"max_disagreement": 0.01}])
def test_a_model_that_cannot_exit_early_is_told_so_and_runs_at_full_depth(target):
    found = calibrate(hopeless_table(), **target)
    assert not found.pays
    assert found.point.policy == {"name": "full"}
    assert (found.point.cost, found.point.drop) == (1.0, 0.0)
    assert "will not pay" in found.messages[0]
    assert "cost reduction" in found.messages[1]


def test_a_speedup_out_of_reach_names_the_most_there_is():
    found = calibrate(make_table(), target_speedup=100)
    most = max(o.cost_reduction for o in found.frontier if o.policy.name != "fixed")
    assert found.point.policy == {"name": "full"}
    assert f"{most:.2f}x" in " ".join(found.messages)


def test_a_model_of_one_layer_runs_at_full_depth():
    table = ExitTable.from_arrays(np.eye(3)[:, None], problem_type=SINGLE, labels=[0, 1, 2])
    assert not calibrate(table, max_drop=0.1).pays


def test_a_choice_is_never_called_a_guarantee():
    for found in (calibrate(make_table(), max_drop=0.05), calibrate(hopeless_table(), max_drop=0)):
        assert "rows, not a guarantee" in found.messages[-1]


def test_few_rows_are_said_aloud():
    assert any("too few" in line for line in calibrate(make_table(rows=20), max_drop=0.1).messages)
    assert not any("too few" in line for line in calibrate(make_table(), max_drop=0.1).messages)


def test_broken_rows_are_left_out_and_counted():
    table = make_table()
    table.columns["scores"][[3, 5], 2, 0] = np.nan
    found = calibrate(table, max_drop=0.02)
    assert (found.point.rows, found.point.rows_excluded) == (598, 2)
    assert any("2 rows with NaN" in line for line in found.messages)
    clean = calibrate(make_table().take(np.delete(np.arange(600), [3, 5])), max_drop=0.02)
    assert found.point.policy == clean.point.policy


def test_a_table_of_broken_rows_only_is_refused():
    table = make_table()
    table.columns["scores"][:, 4] = np.inf
    with pytest.raises(TableError, match="All 600 rows"):
        calibrate(table, max_drop=0.02)


# what is refused


def test_a_test_table_may_be_measured_but_not_chosen_on():
    table = make_table(role="test")
    with pytest.raises(TableError, match="role 'test'"):
        calibrate(table, max_drop=0.01)
    assert measure(table, "full").cost == 1.0


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({}, "exactly one"),
        ({"max_drop": 0.1, "target_speedup": 2}, "exactly one"),
        ({"max_drop": -0.1}, "not a share"),
        ({"max_drop": math.nan}, "not a share"),
        ({"max_drop": "a little"}, "not a share"),
        ({"max_drop": 1}, "1%"),
        ({"max_disagreement": 2}, "1%"),
        ({"target_speedup": 1}, "above 1"),
        ({"max_disagreement": 0.1, "per_class": True}, "per_class"),
        ({"max_drop": 0.1, "metric": "pearson"}, "accuracy, f1, matthews"),
        ({"max_drop": 0.1, "metric": "acuracy"}, "Did you mean 'accuracy'"),
        ({"max_drop": 0.1, "policies": ["entropie"]}, "Did you mean 'entropy'"),
        ({"max_drop": 0.1, "policies": [Fixed(layer=99)]}, "1 to 8"),
        ({"max_drop": 0.1, "policies": [Patience(multi_label=True)]}, "multi_label=False"),
    ],
    ids=str,
)
def test_a_demand_that_makes_no_sense_is_refused(options, hint):
    with pytest.raises(ConfigError, match=hint):
        calibrate(make_table(), **options)


def test_a_drop_of_a_correlation_with_constant_labels_is_refused():
    table = make_table(REGRESSION, labels=np.ones(600))
    with pytest.raises(TableError, match="the same number"):
        calibrate(table, max_drop=0.01, metric="pearson")
    assert calibrate(table, max_drop=0.01, metric="neg_mae").point is not None


def test_a_drop_without_labels_points_to_disagreement():
    with pytest.raises(TableError, match="max_disagreement"):
        calibrate(without_labels(make_table()), max_drop=0.01)


def test_per_class_has_no_meaning_for_regression():
    with pytest.raises(ConfigError, match="regression"):
        calibrate(make_table(REGRESSION), max_drop=0.1, per_class=True)


def test_entropy_is_refused_for_regression():
    with pytest.raises(ConfigError, match="not for regression"):
        calibrate(make_table(REGRESSION), max_drop=0.1, policies=["entropy"])


@pytest.mark.parametrize(
    ("text", "value"),
    [("1%", 0.01), ("0.5 %", 0.005), ("0.01", 0.01), (0.25, 0.25), (" 3% ", 0.03)],
)
def test_a_share_may_be_written_in_percent(text, value):
    assert parse_share(text) == pytest.approx(value)


@given(st.text() | st.floats() | st.none())
@settings(deadline=None)
def test_a_share_is_a_finite_number_or_an_error_of_ours(text):
    try:
        share = parse_share(text)
    except ConfigError:
        return
    assert share >= 0
    assert math.isfinite(share)


# the file


@pytest.fixture(name="saved", scope="module")
def _saved(tmp_path_factory, point):
    """A point's file and its content."""
    path = point.save(tmp_path_factory.mktemp("fuzz"))
    return path, path.read_bytes()


@pytest.fixture(name="point", scope="module")
def _point() -> OperatingPoint:
    return calibrate(
        make_table(model_fingerprint="m1", processor_fingerprint="t1"), max_drop="2%"
    ).point


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: next(iter(target)))
def test_a_point_comes_back_from_its_file(tmp_path, problem_type, target):
    table, metric = make_table(problem_type, rows=100), METRIC[problem_type]
    point = calibrate(table, **target, metric=metric, name="fast-1").point
    path = point.save(tmp_path)
    assert path == tmp_path / "points" / "fast-1.json"
    again = OperatingPoint.load(tmp_path, "fast-1")
    assert again == point
    assert again.build_policy() == make_policy(point.policy)
    assert list_points(tmp_path) == ["fast-1"]


def test_a_point_for_another_model_or_tokenizer_is_refused(point):
    point.check("m1")
    point.check("m1", "t1")
    with pytest.raises(PointError, match="model m1, not for m2"):
        point.check("m2", "t1")
    with pytest.raises(PointError, match="processor t1, not for t2"):
        point.check("m1", "t2")


def test_a_missing_point_names_those_that_are_there(tmp_path, point):
    with pytest.raises(PointError, match="offramp calibrate"):
        OperatingPoint.load(tmp_path)
    point.save(tmp_path)
    with pytest.raises(PointError, match="Did you mean 'default'"):
        OperatingPoint.load(tmp_path, "defalt")


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".hidden", "a\\b", "x" * 65, "a\n", "ä"])
def test_a_name_that_is_no_plain_file_name_is_refused(tmp_path, name):
    with pytest.raises(PointError, match="name"):
        OperatingPoint.load(tmp_path, name)
    with pytest.raises(PointError, match="name"):
        calibrate(make_table(), max_drop=0.1, name=name)


def test_a_point_is_saved_only_beside_a_model(tmp_path, point):
    with pytest.raises(OutputError, match="no such model folder"):
        point.save(tmp_path / "nowhere")


def test_a_renamed_point_is_refused(tmp_path, point):
    path = point.save(tmp_path)
    path.rename(path.with_name("other.json"))
    with pytest.raises(PointError, match="named 'default'"):
        OperatingPoint.load(tmp_path, "other")


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": 0.5},
        {"schema_version": 2},
        {"cost": math.nan},
        {"cost": math.inf},
        {"cost": 0},
        {"policy": {"name": "entropy", "threshold": math.nan}},
        {"policy": {"name": "entropy", "treshold": 0.1}},
        {"policy": {"name": "entropie"}},
        {"policy": {"name": "fixed", "layer": 99}},
        {"policy": {"name": "entropy", "multi_label": True}},
        {"policy": "entropy"},
        {"exit_histogram": [1, 2, 3]},
        {"certificate": {"delta": 0.1}},
        {"role": "test"},
        {"target": {"kind": "max_drop", "value": -1}},
    ],
    ids=str,
)
def test_a_tampered_point_is_refused_by_its_file_name(tmp_path, point, change):
    path = point.save(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(PointError, match=r"default\.json"):
        OperatingPoint.load(tmp_path)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def load_changed(path, content: bytes) -> None:
    """Load a changed point; anything but an OfframpError is a failure."""
    path.write_bytes(content)
    try:
        OperatingPoint.load(path.parent.parent).build_policy()
    except OfframpError:
        return


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_a_point_with_any_value_changed_raises_nothing_but_our_errors(saved, data):
    path, content = saved
    document = json.loads(content)
    place = document[data.draw(st.sampled_from(("policy", "target")))]
    if data.draw(st.booleans()):
        place = document
    key = data.draw(st.sampled_from(sorted(place)) | st.text(max_size=5))
    place[key] = data.draw(json_values)
    load_changed(path, json.dumps(document).encode())


@given(data=st.data())
@settings(max_examples=200, deadline=None)
def test_a_point_with_any_bytes_changed_raises_nothing_but_our_errors(saved, data):
    path, content = saved
    changed = bytearray(content)
    at = data.draw(st.integers(0, len(content) - 1))
    changed[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=8))
    load_changed(path, bytes(changed))
