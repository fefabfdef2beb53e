"""Claims about leaderboards: curves, choices on `tune` alone, intervals, and their Markdown."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration.fitting import fit_bins
from offramp.calibration.judge import Judge
from offramp.comparison import curves, statistics
from offramp.comparison.board import AREA, AT, TARGETS, Board, MethodRow, Missing
from offramp.comparison.families import best_family, choose, flattery, tune_scores
from offramp.comparison.leaderboard import (
    Run,
    build_board,
    choices,
    ground_of,
    places,
)
from offramp.comparison.markdown import to_markdown
from offramp.comparison.plan import REFERENCES
from offramp.comparison.statistics import Resamples, holm
from offramp.comparison.words import ABOVE, verdict
from offramp.errors import ConfigError, OfframpError
from offramp.methods import METHODS
from offramp.metrics import METRICS, MULTI, REGRESSION, SINGLE
from offramp.policies import Binned
from offramp.table import ExitTable, replay

DEPTH, CLASSES = 3, 3


def labels_of(problem_type: str, rows: int, seed: int) -> Any:
    random = np.random.default_rng(seed)
    if problem_type == REGRESSION:
        return random.normal(size=rows).astype(np.float32)
    if problem_type == MULTI:
        return (random.random((rows, CLASSES)) < 0.4).astype(np.float32)
    return random.integers(CLASSES, size=rows)


def table(labels: Any, problem_type: str = SINGLE, seed: int = 0, **fields: Any) -> ExitTable:
    """Exits that know more and more."""
    random = np.random.default_rng([seed, len(labels)])
    known = np.linspace(0.5, 2.5, DEPTH)[:, None]
    if problem_type == REGRESSION:
        truth = np.asarray(labels)[:, None]
    elif problem_type == MULTI:
        truth = 2 * np.asarray(labels) - 1
    else:
        truth = np.eye(CLASSES)[labels]
    noise = random.normal(size=(len(labels), DEPTH, truth.shape[1]))
    scores = truth[:, None] * known + noise
    return ExitTable.from_arrays(scores, problem_type=problem_type, labels=labels, **fields)


def run(
    method: str = "pabee",
    seed: int = 1,
    problem_type: str = SINGLE,
    rows: int = 60,
    noise: int | None = None,
    **changes: Any,
) -> Run:
    noise = seed * 100 + len(method) if noise is None else noise
    tune = table(labels_of(problem_type, rows, seed), problem_type, noise)
    test = table(labels_of(problem_type, rows, 0), problem_type, noise + 50, role="test")
    return dataclasses.replace(Run(method, seed, tune, test, 10.0, 1000, None), **changes)


def board(*runs: Run, **options: Any) -> Board:
    return build_board(runs, title="made up", facts={"model": "none"}, **options)


def test_the_area_of_a_curve_is_its_mean_height_between_a_fifth_and_full_cost():
    # from 0.2 to 0.6 the mean height is (0.4 + 0.8) / 2, from there to 1 it is 0.8
    cost, score = [1.0, 0.0, 0.6], [0.8, 0.2, 0.8]
    assert curves.area(cost, score) == pytest.approx((0.6 + 0.8) / 2)
    assert curves.score_at(cost, score, 0.3) == pytest.approx(0.5)


def test_a_hull_holds_no_corner_below_the_line_of_its_neighbours():
    places = [(0.0, 0.0), (0.5, 0.2), (0.5, 0.6), (0.7, 0.65), (1.0, 1.0)]
    assert curves.hull(places) == [0, 2, 4]


def test_thinning_keeps_both_ends_and_what_matters_most():
    places = [(0.0, 0.0), (0.1, 0.11), (0.4, 0.8), (1.0, 1.0)]
    assert curves.thinned(places, [0, 1, 2, 3], 3) == [0, 2, 3]


def test_what_is_chosen_does_not_depend_on_test_labels():
    here = run()
    shuffled = np.random.default_rng(1).permutation(np.asarray(here.test.labels))
    columns = {**here.test.columns, "labels": shuffled}
    other = dataclasses.replace(here, test=ExitTable(here.test.header, columns))
    assert policies(board(here)) == policies(board(other))


def policies(found: Board) -> Any:
    return [
        (row.chosen, family.name, [[point.policy for point in curve] for curve in family.curves])
        for row in found.methods
        for family in row.policies
    ]


def test_numbers_that_were_taken_from_the_rows_do_not_flatter_a_family():
    fresh, guess = Judge(table(labels_of(SINGLE, 5000, 0), role="test")), 1 / CLASSES
    flattered, told, at_targets = [], [], []
    for seed in range(1, 9):
        judge = Judge(table(labels_of(SINGLE, 300, seed), seed=seed))
        choice = choose(judge, [fit_bins(judge.table)], guess)
        corners = [fresh.measure(corner) for _, corner in choice.corners]
        costs = [0.0, *(one.cost for one in corners), 1.0]
        scores = [guess, *(one.score for one in corners), fresh.full_score]
        told.append(choice.tune_area - float(curves.area(costs, scores)))
        gained = flattery(judge, Binned.name, guess)
        flattered.append(told[-1] + gained[AREA])
        at_targets.append(max(gained[key] for key in AT))
    assert np.mean(flattered) > 0.01
    assert np.mean(at_targets) > 0.01
    assert abs(np.mean(told)) < np.mean(flattered) / 2, (np.mean(told), np.mean(flattered))


def test_a_target_is_read_by_the_family_that_is_best_there_on_tune():
    runs = [run("pabee", seed) for seed in (1, 2)]
    ground = ground_of(runs)
    on_tune = tune_scores([choices(one, ground.metric) for one in runs])
    (row,) = board(*runs).methods
    assert row.chosen == max(on_tune, key=lambda one: on_tune[one]["area"])
    for at in row.at:
        best = max(on_tune, key=lambda one: on_tune[one][f"{at.target:g}"])
        (family,) = (one for one in row.policies if one.name == best)
        assert row.family_at(at.target) == best
        assert at in family.at
    assert len(row.at) == len(TARGETS)


def held_against_fixed(row: MethodRow) -> set[str]:
    chosen = {AREA: row.chosen, **row.chosen_at}
    return {key for key, one in chosen.items() if one != "fixed"}


def test_a_target_at_which_fixed_is_best_is_not_held_against_it():
    (row,) = board(run("pabee", 2, MULTI)).methods
    assert "fixed" in row.chosen_at.values()
    assert row.chosen != "fixed"
    assert row.against_fixed.keys() == held_against_fixed(row)


def test_a_difference_at_a_target_is_that_of_the_family_chosen_there():
    found = board(run("pabee", 5), run("cosee", 5), run("plain", 5), reference="cosee")
    row, reference = sorted(found.methods, key=lambda one: one.name == "cosee")
    assert set(row.chosen_at.values()) != {row.chosen}
    for at, rival in zip(row.at, reference.at, strict=True):
        key, score = f"{at.target:g}", at.score.value
        assert row.against_plain[key].value == pytest.approx(score - found.plain.value)
        assert row.against[key].value == pytest.approx(score - rival.score.value)


def test_what_serves_at_a_target_alone_has_as_many_resamples_as_what_serves_throughout():
    runs = run("pabee", 5, REGRESSION), run("berxit", 5, REGRESSION)
    for row in board(*runs, metric="spearman").methods:
        # fewer would not subtract from what has more
        assert row.against_fixed.keys() == held_against_fixed(row)


def test_of_families_that_are_level_at_a_target_that_of_the_larger_area_serves():
    on_tune = {"margin": {"area": 0.7, "2": 0.8}, "window": {"area": 0.75, "2": 0.8}}
    assert best_family(on_tune, "2") == "window"


def test_a_board_keeps_what_a_family_was_chosen_by():
    (row,) = board(run("pabee", 5)).methods
    for column, target in zip(AT, TARGETS, strict=True):
        on_tune = {
            one.name: at.tune for one in row.policies for at in one.at if at.target == target
        }
        assert on_tune[row.chosen_at[column]] == max(on_tune.values())


def test_markdown_names_the_family_of_a_target_where_it_is_not_the_methods():
    found = board(run("pabee", 1))
    (row,) = found.methods
    alike = row.model_copy(update={"chosen_at": {}})
    other = row.model_copy(update={"chosen": "fixed", "chosen_at": {"2": "patience"}})
    said = [to_markdown(found.model_copy(update={"methods": (one,)})) for one in (alike, other)]
    assert [one.count(", patience |") for one in said] == [0, 1]


def test_where_fixed_is_best_for_a_target_there_is_no_difference_from_it():
    found = board(run("pabee", 1), run("sdn", 1))
    row, other = found.methods
    fewer = {key: one for key, one in row.against_fixed.items() if key != "4"}
    rows = row.model_copy(update={"against_fixed": fewer}), other
    said = to_markdown(found.model_copy(update={"methods": rows}))
    lines = said.split("(`fixed`):")[1].split("</details>")[0].strip().splitlines()
    assert [one.endswith("| - |") for one in lines[2:]] == [True, False]


def test_points_and_readings_are_what_a_replay_of_the_test_table_gives():
    from offramp.policies import make_policy

    here = run()
    for family in board(here).methods[0].policies:
        for point in family.curves[0]:
            if point.policy is not None:
                done = replay(here.test, make_policy(point.policy))
                right = (done.answers.argmax(1) == here.test.labels).mean()
                assert point.cost == pytest.approx(done.share, abs=1e-6)
                assert point.score == pytest.approx(right)
        for at in family.at:
            for reading in at.readings:
                done = replay(here.test, make_policy(reading.policy))
                assert reading.cost_reduction == pytest.approx(1 / done.share)


def test_a_curve_can_be_read_apart_from_a_leaderboard():
    here = run()
    ground = ground_of([here])
    for family in board(here).methods[0].policies:
        choice = choices(here, ground.metric)[family.name]
        reader = ground.reader(here)
        done = reader.read(choice.corners)
        corners = [done[policy] for _, policy in choice.corners]
        costs, scores = places(here, reader, corners, ground.metric, ground.resamples)
        found = sorted(zip(costs[0], scores[0], strict=True))
        assert found == sorted((point.cost, point.score) for point in family.curves[0])


def test_a_method_does_not_differ_from_itself():
    ours = [run("pabee", seed) for seed in (1, 2)]
    same = [dataclasses.replace(one, method="other", tune=one.tune) for one in ours]
    for row in board(*ours, *same).methods:
        # not of the same paper, so averaged around other rules, but chosen alike
        for found in row.against.values():
            assert (found.value, found.low, found.high, found.p_holm) == (0, 0, 0, 1)


def test_a_method_is_held_against_its_own_exits_without_a_policy():
    for row in board(*(run("pabee", seed) for seed in (1, 2))).methods:
        (fixed,) = (family for family in row.policies if family.name == "fixed")
        found = row.against_fixed
        assert found["area"].value == pytest.approx(row.row.area.value - fixed.area.value)
        for one, other in zip(row.at, fixed.at, strict=True):
            gap = one.score.value - other.score.value
            assert found[f"{one.target:g}"].value == pytest.approx(gap)


def test_holm_is_as_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.5]) == pytest.approx([0.04, 0.09, 0.09, 0.5])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_lowers_nothing(p: list[float]):
    corrected = holm(p)
    assert all(one <= other <= 1 for one, other in zip(p, corrected, strict=True))
    ordered = [corrected[one] for one in sorted(range(len(p)), key=lambda one: p[one])]
    assert ordered == sorted(ordered)


@pytest.mark.parametrize(("rows", "found"), [(2000, True), (40, False)])
def test_five_percent_more_right_rows_are_found_among_many_rows_only(rows: int, found: bool):
    ours = run("pabee", rows=rows, noise=7)
    scores = np.array(ours.test.scores)
    labels = np.asarray(ours.test.labels)
    wrong = np.flatnonzero(scores[:, -1].argmax(1) != labels)[: rows // 20]
    scores[wrong] = 0
    scores[wrong, :, labels[wrong]] = 5
    better = ExitTable(ours.test.header, {**ours.test.columns, "scores": scores})
    other = dataclasses.replace(ours, method="better", test=better)
    plain = dataclasses.replace(ours, method="plain")
    rows_of = {row.name: row for row in board(ours, other, plain).methods}
    difference = rows_of["better"].against_plain["full"]
    assert difference.value == pytest.approx(len(wrong) / rows)
    # 100 rows won are ten standard errors, two are one and a half
    assert (difference.p_holm < 0.05) == found


@given(st.floats(0.01, 1e6), st.floats(0, 1e-3), st.integers(2, 50))
def test_no_p_is_smaller_than_one_of_the_resamples(value: float, spread: float, resamples: int):
    values = np.array([value, *(value + spread * np.arange(resamples))])[:, None]
    assert statistics.p_value(values) >= 1 / (resamples + 1)


def test_the_least_p_is_still_significant_among_all_methods():
    others = [*METHODS, *REFERENCES][2:]  # all but `plain` and the reference
    values = np.array([1.0, *np.linspace(0.999, 1.001, statistics.FEW_RESAMPLES)])[:, None]
    found = statistics.differences(dict.fromkeys(others, values))
    assert all(verdict(one) == ABOVE for one in found.values())


@pytest.mark.parametrize(("rows", "said"), [(49, True), (50, False)])
def test_a_leaderboard_of_few_rows_warns_that_intervals_are_rough(rows: int, said: bool):
    facts = board(run(rows=rows)).facts
    assert facts.get("few rows", "").startswith("49 to rank on: intervals") == said


def test_intervals_over_rows_and_seeds_cover_the_truth():
    covered = 0
    for trial in range(40):
        random = np.random.default_rng(trial)
        rows, seeds = 150, 6
        truth = 0.7 + 0.05 * random.normal(size=seeds)
        hard = random.random(rows)
        right = (hard[:, None] < truth).T
        resamples = Resamples.draw(rows, 200)
        labels = np.ones(rows, dtype=int)
        every = resamples.scores(METRICS["accuracy"], right.astype(int), labels)
        found = statistics.figure(every)
        covered += found.low <= 0.7 <= found.high
    assert covered >= 34


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("of_seeds", [0.0, 1.0, 5.0])
def test_few_seeds_make_no_difference_where_there_is_none(seeds: int, of_seeds: float):
    """Of a difference of 0 that rows and trainings blur, one in twenty is found."""
    random, trials, rows = np.random.default_rng(0), 1000, 1.0
    found = 0
    for _ in range(trials):
        trained = of_seeds * random.normal(size=seeds)
        drawn = rows * random.normal(size=(101, 1))  # the data, and what resamples make of it
        drawn[1:] += drawn[0]
        found += statistics.p_value(trained + drawn) < 0.05
    assert found / trials < 0.05 + 3 * np.sqrt(0.05 * 0.95 / trials) + 0.01
    # without anything that trainings add, it is the test of rows
    assert of_seeds or found / trials > 0.02


@pytest.mark.parametrize("name", ["f1", "f1_micro", "matthews", "pearson", "spearman", "neg_mse"])
def test_a_resampled_metric_is_the_metric_of_the_resampled_rows(name: str):
    metric = METRICS[name]
    kind = metric.problem_types[0]
    labels = labels_of(kind, 50, 1)
    predicted = np.stack([labels_of(kind, 50, seed) for seed in (2, 3)]).round(1)
    predicted[0, :40] = labels[:40]
    if kind == MULTI:
        predicted = predicted > 0
    resamples = Resamples.draw(50, 10)
    rows = [np.repeat(np.arange(50), count.astype(int)) for count in resamples.counts]
    wanted = [[metric.compare(one[drawn], labels[drawn]) for one in predicted] for drawn in rows]
    assert resamples.scores(metric, predicted, labels) == pytest.approx(np.array(wanted), abs=1e-5)


@pytest.mark.parametrize("problem_type", [REGRESSION, MULTI])
def test_other_tasks_have_leaderboards_too(problem_type: str):
    runs = [run(name, problem_type=problem_type) for name in ("pabee", "deebert", "plain")]
    found = board(*runs)
    assert {row.name for row in found.methods} == {"pabee", "deebert"}
    assert found.plain is not None
    assert 0 < found.methods[0].row.area.value < 1
    for row in found.methods:
        assert all((auroc is None) == (problem_type == REGRESSION) for auroc in row.row.auroc)


def test_smaller_models_are_read_at_their_layers_only():
    found = board(run("truncated", layers=(1, 2)), run("pabee"))
    (row,) = [row for row in found.methods if row.name == "truncated"]
    assert [family.name for family in row.policies] == ["fixed"]
    layers = {
        point.policy["layer"]
        for point in row.row.curves[0]
        if point.policy and "layer" in point.policy
    }
    assert layers <= {1, 2}
    assert row.row.auroc == (None,) * (DEPTH - 1)


def test_runs_on_other_rows_are_refused_by_name():
    here, other = run("pabee"), run("deebert")
    turned = dataclasses.replace(other, test=other.test.take(np.arange(60)[::-1]))
    with pytest.raises(OfframpError, match=r"pabee \(seed 1\) and deebert \(seed 1\)"):
        board(here, turned)


def test_a_run_that_is_there_twice_and_an_unknown_reference_are_refused():
    with pytest.raises(ConfigError, match="twice"):
        board(run(), run())
    with pytest.raises(ConfigError, match="not among the methods"):
        board(run(), reference="deebert")
    with pytest.raises(ConfigError, match="no method"):
        board(run("plain"))


def test_seeds_that_are_missing_are_left_out_of_a_pair():
    runs = [run("pabee", 1), run("pabee", 2), run("deebert", 2)]
    found = board(*runs, reference="pabee", missing=[Missing(method="deebert", seed=1, why="no")])
    alone = board(*runs[1:], reference="pabee")
    (pair,), (wanted,) = (
        [row.against["area"] for row in one.methods if row.name == "deebert"]
        for one in (found, alone)
    )
    assert pair.value == pytest.approx(wanted.value, abs=0.05)
    assert found.seeds == (1, 2)


def test_a_method_that_lacks_a_seed_stands_after_the_others_and_is_marked():
    strong = [run("strong", seed, noise=9) for seed in (1, 2)]
    weak = run("weak", 1)
    alone = run("lucky", 2, test=always_right(run("lucky", 2).test))
    found = board(*strong, weak, run("weak", 2), alone)
    assert [row.name for row in found.methods][-1] == "lucky"
    assert found.methods[-1].row.area.value > found.methods[0].row.area.value
    assert "| lucky (1 of 2 seeds) |" in to_markdown(found)
    assert to_markdown(found).count("seeds)") == 1
    assert found.reference != "lucky"


def always_right(test: ExitTable) -> ExitTable:
    scores = np.array(test.scores)
    scores[np.arange(len(scores)), :, np.asarray(test.labels)] = 50
    return ExitTable(test.header, {**test.columns, "scores": scores})


def test_seconds_on_other_threads_than_those_of_the_plain_fine_tune_are_not_compared_with_them():
    plain = [run("plain", seed, seconds=10.0, threads=1) for seed in (1, 2)]
    alike = run("pabee", 1, seconds=12.0, threads=1)
    apart = run("pabee", 2, seconds=4.0, threads=4)
    assert board(*plain, alike, apart).methods[0].times_plain == pytest.approx(1.2)
    assert board(*plain, apart).methods[0].times_plain is None


def test_rows_without_finite_scores_count_for_nobody():
    here, other = run("pabee"), run("deebert")
    scores = np.array(here.test.scores)
    scores[3, 0, 0] = np.nan
    broken = ExitTable(here.test.header, {**here.test.columns, "scores": scores})
    found = board(dataclasses.replace(here, test=broken), other)
    assert found.test_rows == 59
    assert found.facts["test rows left out"].startswith("1,")


def test_markdown_names_every_method_and_holds_no_nan():
    runs = [run(name, seed) for name in ("pabee", "deebert", "plain") for seed in (1, 2)]
    found = board(*runs, missing=[Missing(method="auto", seed=1, why="out of memory")])
    text = to_markdown(found)
    assert all(f"| {row.name} |" in text for row in found.methods)
    assert "out of memory" in text
    assert "nan" not in text.lower()
    assert Board.model_validate_json(found.model_dump_json()) == found
