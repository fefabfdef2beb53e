"""Claims about how the papers' claims are answered: rules, calibration error, whole studies."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from claims import CLAIMS, GATES, TRAINED, answers_of
from claims_page import interval, write_page
from claims_study import (
    RULES,
    Answers,
    Curve,
    above_all,
    apart,
    at_equal_cost,
    at_equal_coverage,
    ece,
    joined,
)

from offramp.comparison.board import Difference, Figure
from offramp.comparison.plan import PLAIN, PLAN, RESULT, START, Plan, Result
from offramp.storage import read_document, write_document
from offramp.table import ExitTable

DEPTH, CLASSES, ROWS = 4, 3, 70
SOME = ("deebert", "pabee", "fastbert", "elbert", "pondernet", "palbert", "romebert", "jei_dnn")
SIGNALS = ("gate", "halt", "nsp", "correct")


def between(low: float, high: float) -> Figure:
    return Figure(value=(low + high) / 2, low=low, high=high)


@pytest.mark.parametrize(
    ("rule", "low", "high", "answer"),
    [
        ("at least level", -0.004, 0.02, "yes"),
        ("at least level", -0.004, -0.001, "yes"),  # below, by less than the margin
        ("at least level", -0.006, 0.02, "undecided"),
        ("at least level", -0.02, -0.001, "no"),
        ("above", 0.001, 0.02, "yes"),
        ("above", 0.0, 0.0, "no"),
        ("above", -0.01, 0.001, "undecided"),
        ("far above", 0.001, 0.015, "no"),
        ("far above", 0.021, 0.05, "yes"),
        ("within 1 point", -0.009, 0.0, "yes"),
        ("within 1 point", -0.02, -0.005, "undecided"),
        ("within 1 point", -0.03, -0.011, "no"),
    ],
)
def test_an_interval_says_yes_no_or_undecided(rule: str, low: float, high: float, answer: str):
    assert RULES[rule].answer(between(low, high)) == answer


def test_a_claim_is_yes_if_all_parts_are_and_no_if_one_is():
    assert joined(["yes", "yes"]) == "yes"
    assert joined(["yes", "undecided"]) == "undecided"
    assert joined(["yes", "undecided", "no"]) == "no"


def test_above_all_needs_every_difference_after_holm():
    def difference(value: float, p_holm: float) -> Difference:
        return Difference(value=value, low=value, high=value, p=p_holm, p_holm=p_holm)

    assert above_all([difference(0.1, 0.01), difference(0.02, 0.04)]) == "yes"
    assert above_all([difference(0.1, 0.01), difference(0.02, 0.06)]) == "undecided"
    assert above_all([difference(0.1, 0.01), difference(-0.02, 0.04)]) == "no"


def test_smaller_sets_that_cover_less_decide_nothing():
    assert at_equal_coverage("yes", between(-0.03, -0.01)) == "undecided"
    assert at_equal_coverage("yes", between(-0.03, 0.01)) == "yes"
    assert at_equal_coverage("yes", between(0.01, 0.03)) == "yes"
    assert at_equal_coverage("no", between(0.01, 0.03)) == "undecided"
    assert at_equal_coverage("no", between(-0.03, -0.01)) == "no"


def test_answers_at_unequal_costs_decide_nothing():
    assert at_equal_cost("yes", [2.0, 2.1], [2.0, 1.9]) == "yes"
    assert at_equal_cost("yes", [3.9], [2.0]) == at_equal_cost("no", [2.0], [3.9]) == "undecided"


def test_the_calibration_error_is_how_far_confidence_is_from_being_right():
    right = np.arange(150) % 5 < 3
    sure = np.full(150, 0.8)
    assert ece(sure, right, np.ones((1, 150))) == pytest.approx([0.2])
    assert ece(right.astype(float), right, np.ones((1, 150))) == pytest.approx([0.0])


@given(st.integers(0, 1000), st.integers(15, 80))
def test_the_calibration_error_is_as_by_hand_in_bins_of_equal_mass(seed: int, rows: int):
    random = np.random.default_rng(seed)
    sure, right = random.random(rows), random.random(rows) < 0.5
    counts = random.integers(0, 3, size=(4, rows))
    counts[:, 0] += 1
    place = np.argsort(np.argsort(sure))
    for count, found in zip(counts, ece(sure, right, counts), strict=True):
        gaps = [abs((count * (sure - right))[place * 15 // rows == one].sum()) for one in range(15)]
        assert found == pytest.approx(sum(gaps) / count.sum())


def test_a_curve_is_read_at_the_cost_of_each_resample():
    cost = np.array([[0.0, 0.5, 1.0]] * 2)
    score = np.array([[0.2, 0.6, 0.8], [0.0, 0.5, 1.0]])
    curve = Curve({1: (cost, score), 2: (cost, score)})
    found = curve.at_costs({2: np.array([0.25, 1.2])})
    assert found.keys() == {2}
    assert found[2] == pytest.approx([0.4, 1.0])  # 1.2 is beyond full depth
    assert apart(curve.at(2.0), found)[2] == pytest.approx([0.2, -0.5])


def make_study(folder: Path, methods: tuple[str, ...], seeds: tuple[int, ...] = (1, 2)) -> Path:
    """What `compare` leaves, with made-up tables in which exits know more and more."""
    plan: dict[str, Any] = {
        "model": "none",
        "title": folder.name,
        "model_fingerprint": "none",
        "rows": {},
        "counts": {},
        "problem_type": "single_label_classification",
        "max_length": None,
        "fresh_head": False,
        "fine_tunes": False,
        "start_epochs": 1.0,
        "epochs": 1.0,
        "batch_size": 8,
        "rates": (0.001,),
        "pooling": None,
    }
    plan |= {name: False for name in Plan.model_fields if name not in {*plan, "schema_version"}}
    write_document(folder / PLAN, Plan.model_validate(plan))
    for place, method in enumerate((START, *methods)):
        for seed in seeds if method != START else seeds[:1]:
            make_run(folder, method, seed, place)
    return folder


def make_run(folder: Path, method: str, seed: int, place: int) -> None:
    result: dict[str, Any] = dict.fromkeys(Result.model_fields, 1)
    result |= {"method": method, "seed": seed, "rate": None if method == START else 0.001}
    result |= {"pooling": None, "layers": None, "recipe": None}
    cell = Result.model_validate(result)
    for role, noise in (("tune", 0), ("test", 1)):
        random = np.random.default_rng([place, seed, noise])
        labels = np.random.default_rng(noise).integers(CLASSES, size=ROWS)
        scores = random.normal(size=(ROWS, DEPTH, CLASSES))
        scores += np.eye(CLASSES)[labels][:, None] * np.linspace(1, 3, DEPTH)[:, None]
        table = ExitTable.from_arrays(
            scores,
            problem_type="single_label_classification",
            labels=labels,
            signals={name: random.random((ROWS, DEPTH)) for name in SIGNALS},
            role=role,
        )
        table.save(folder / "cells" / cell.cell.name / role)
    write_document(folder / "cells" / cell.cell.name / RESULT, cell)


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Answers:
    folder = tmp_path_factory.mktemp("work") / "all"
    found = answers_of(make_study(folder, (PLAIN, *SOME, TRAINED, "cosee", "cap")))
    assert found is not None
    return found


def test_a_full_study_answers_every_claim(everything: Answers):
    assert everything.missing == {}
    assert everything.claims.keys() == CLAIMS.keys()
    assert everything.learned
    for parts in everything.claims.values():
        assert parts
        assert all(part.figure.low <= part.figure.high for part in parts)
        assert all(part.seeds == (1, 2) for part in parts)


def test_the_newest_are_held_against_every_older_one_that_was_run(everything: Answers):
    for key in ("7a", "7b"):
        assert {part.by for part in everything.claims[key]} == {"paper", "tune"}
        for part in everything.claims[key]:
            assert {name.split()[0] for name in part.others} == set(SOME)
            assert "not run: sdn, berxit, f_pabee, pcee_bert, gpfee" in part.note


def test_gates_are_read_however_they_were_trained(everything: Answers, tmp_path: Path):
    for key in ("6a", "6b", "6c"):
        assert {part.by for part in everything.claims[key]} == set(GATES)
    without = answers_of(make_study(tmp_path / "without", ("jei_dnn",)))
    assert without is not None
    assert {part.by for part in without.claims["6a"]} == set(GATES) - {"trained"}


def test_conformal_sets_cover_what_they_promise(everything: Answers):
    for part in everything.claims["6c"]:
        shares = [float(share) for share in re.findall(r"([\d.]+)%", part.note)]
        assert len(shares) == 2
        assert all(share > 80 for share in shares)
        gap = part.others["thresholds"].value - part.others["gates"].value
        assert part.figure.value == pytest.approx(gap)


def test_drawing_that_never_leaves_early_decides_nothing(tmp_path: Path):
    make_study(tmp_path / "all", ("palbert",))
    for table in (tmp_path / "all").glob("cells/palbert*/t*st"):
        signal = np.load(table / "signals.halt.npy")
        np.save(table / "signals.halt.npy", np.zeros_like(signal))
    found = answers_of(tmp_path / "all")
    assert found is not None
    (part,) = found.claims["5a"]
    assert (part.figure.low, part.figure.high, part.answer) == (0, 0, "undecided")


def test_the_page_is_made_from_the_files_and_says_what_was_not_run(
    everything: Answers, tmp_path: Path
):
    few = answers_of(make_study(tmp_path / "few", (PLAIN, "pabee", "deebert"), seeds=(1,)))
    assert few is not None
    assert set(few.claims) == {"1a", "1b"}
    for one in (everything, few):
        write_document(tmp_path / "claims" / f"{one.title}.json", one)
        assert read_document(Answers, tmp_path / "claims" / f"{one.title}.json") == one
    write_page(tmp_path / "claims", tmp_path / "claims.md")
    text = (tmp_path / "claims.md").read_text()
    assert "not run: romebert" in text
    assert "nan" not in text.lower()
    lines = text.split("\n")
    first = next(line for line in lines if line.startswith("| 1b."))
    assert first.split(" | ")[-1].startswith("(")  # one seed: in brackets


def test_a_study_that_has_hardly_begun_has_no_answers(tmp_path: Path):
    assert answers_of(make_study(tmp_path / "begun", ())) is None


def test_figures_are_in_points_or_classes_and_never_minus_zero():
    assert interval(between(-0.0004, 0.0002), "points") == "+0.0 [+0.0, +0.0]"
    assert interval(between(-0.25, 0.75), "classes") == "+0.25 [-0.25, +0.75]"
