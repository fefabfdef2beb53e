"""Claims about the report: one file that needs nothing and runs no text of others."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from certificate_support import table_of
from cli_support import Said, write_csv
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from page_support import Page, assert_asks_for_nothing, assert_named
from sklearn.metrics import roc_auc_score

from offramp.calibration import calibrate, certify, frontier
from offramp.data.hashing import dataset_ids
from offramp.errors import ConfigError, DataError, OutputError, PointError
from offramp.evaluation import Speed, evaluate
from offramp.policies import MaxProbability
from offramp.report import write_report
from offramp.report.figures import Figures, by_budget
from offramp.table import ExitTable, replay
from offramp.testing import PROBLEM_TYPES, tiny_texts

pytest_plugins = ("cli_fixtures",)

ROWS, DEPTH, CLASSES = 120, 4, 3
HOSTILE = '</script><img src=x onerror="alert(1)"><!--{{ 7 * 7 }}'
SPEED = Speed(2.0, "stock", 1.1, 0.1, 1.8, (1.7, 1.9), 0.5, 2.2, 100, 5)
SINGLE, MULTI, REGRESSION = PROBLEM_TYPES
CONFIDENT = MaxProbability(threshold=0.8)


def make_table(problem_type: str = SINGLE, labelled: bool = True, **fields: Any) -> ExitTable:
    """120 rows, 4 exits; later exits are mostly better."""
    draw = np.random.default_rng(0)
    trust = np.linspace(0.5, 3, DEPTH)[:, None]
    if problem_type == SINGLE:
        labels: Any = draw.integers(0, CLASSES, ROWS)
        truth = np.eye(CLASSES)[labels]
    elif problem_type == MULTI:
        labels = draw.integers(0, 2, (ROWS, CLASSES)).astype(np.float32)
        truth = labels - 0.5
    else:
        labels = draw.normal(size=ROWS).astype(np.float32)
        truth = labels[:, None]
    scores = truth[:, None, :] * trust + draw.normal(size=(ROWS, DEPTH, truth.shape[1]))
    fields = {"role": "test", "ids": dataset_ids(make_rows()), **fields}
    return ExitTable.from_arrays(
        scores, problem_type=problem_type, labels=labels if labelled else None, **fields
    )


def make_rows(mark: str = "") -> Dataset:
    return Dataset.from_dict({"text": [f"{mark}text of row {n}" for n in range(ROWS)]})


def marked(mark: str) -> dict[str, Any]:
    """Rows with a mark in every text, and the ids of their table."""
    rows = make_rows(mark)
    return {"rows": rows, "ids": dataset_ids(rows)}


def report(tmp_path: Path, *given: Any, **more: Any) -> Page:
    return Page(write_report(tmp_path / "report.html", *given, **more))


# One file that needs nothing


def test_the_page_asks_for_no_address_and_forbids_itself_to(tmp_path: Path) -> None:
    page = report(tmp_path, make_table(), CONFIDENT, rows=make_rows(), speed=SPEED)
    assert "http" not in page.source.replace("http-equiv", "")
    assert_asks_for_nothing(page)


def test_elements_are_named_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    page = report(tmp_path, make_table(), CONFIDENT, rows=make_rows(), speed=SPEED)
    assert_named(page)
    labelled = {attrs.get("for") for tag, attrs in page.tags if tag == "label"}
    assert labelled == {attrs["id"] for tag, attrs in page.tags if tag in ("input", "select")}


# Nothing that a text could run


def test_hostile_texts_labels_and_titles_stay_text(tmp_path: Path) -> None:
    given = marked(HOSTILE)
    table = make_table(ids=given["ids"], label_names=(HOSTILE, "b", "'\"&"))
    page = report(
        tmp_path, table, CONFIDENT, rows=given["rows"], title=HOSTILE, made={"by": HOSTILE}
    )
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert len([text for text in page.texts if HOSTILE in text]) > 4
    assert page.data["rows"] == ROWS


@settings(max_examples=12, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40))
def test_every_text_comes_back_as_it_was(text: str, tmp_path_factory: Any) -> None:
    rows = Dataset.from_dict({"text": [text] * ROWS})
    table = make_table(ids=dataset_ids(rows))
    page = report(tmp_path_factory.mktemp("any"), table, CONFIDENT, rows=rows)
    assert text in "".join(page.texts)


def test_a_lone_surrogate_is_no_reason_to_fail(tmp_path: Path) -> None:
    assert "a?b" in report(tmp_path, make_table(), CONFIDENT, title="a\ud800b").text


def test_without_examples_no_text_is_in_it(tmp_path: Path) -> None:
    given = marked("secret ")
    table = make_table(ids=given["ids"])
    page = report(tmp_path, table, CONFIDENT, rows=given["rows"], examples=False)
    assert "secret" not in page.source
    assert "Inputs, layer by layer" not in page.headings
    assert "secret" in report(tmp_path, table, CONFIDENT, rows=given["rows"]).source


# Every kind of table


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_every_task_has_its_report_and_leaves_out_what_means_nothing(
    tmp_path: Path, problem_type: str, labelled: bool
) -> None:
    table = make_table(problem_type, labelled)
    policy = {"name": "patience", "patience": 1}
    policy |= {SINGLE: {}, MULTI: {"multi_label": True}, REGRESSION: {"tolerance": 0.8}}[
        problem_type
    ]
    page = report(tmp_path, table, policy, rows=make_rows())
    heads = set(page.headings)
    assert ("Overthinking" in heads) == labelled
    assert ("Score against cost" in heads) == labelled
    assert ("Drop per class" in heads) == (labelled and problem_type != REGRESSION)
    assert ("AUROC" in page.text) == (problem_type != REGRESSION)
    assert "Wall clock" not in heads
    assert not re.search(r"\b(None|nan|NaN%|inf)\b", page.text)
    assert {"patience", "fixed"} <= {curve["name"].split()[0] for curve in page.data["curves"]}


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_full_depth_has_a_report_too(tmp_path: Path, problem_type: str) -> None:
    page = report(tmp_path, make_table(problem_type, role="tune"))
    assert "Nobody leaves early" in page.text
    assert page.data["chosen"] is None


def test_a_model_of_one_layer_and_of_one_row_has_a_report(tmp_path: Path) -> None:
    one = ExitTable.from_arrays([[[0.0, 1.0]]], problem_type=SINGLE, labels=[1])
    assert "1 layers" in report(tmp_path, one).text


def test_test_rows_are_said_to_be_for_reading_only(tmp_path: Path) -> None:
    assert "not to choose on" in report(tmp_path, make_table(), CONFIDENT).text
    point = calibrate(make_table(role="tune"), max_disagreement=0.2).point
    said = report(tmp_path, make_table(role="tune"), point).text
    assert "chosen on these very rows" in said
    assert "disagreement of at most 0.2" in said


# The figures


@pytest.mark.parametrize(
    ("procedure", "basis", "rest"),
    [("fixed_sequence", "Proven on", "promised"), ("expectation", "Taken from", "estimated")],
)
def test_rows_of_the_search_are_told_from_those_of_the_proof(
    tmp_path: Path, procedure: Any, basis: str, rest: str
) -> None:
    proof, plain = table_of(600, seed=2, role="calibrate"), table_of(400, seed=1)
    search = ExitTable.from_arrays(
        plain.scores, ids=plain.ids, problem_type=SINGLE, data_fingerprint="searched"
    )
    chosen = certify(search, proof, max_disagreement="10%", procedure=procedure).point
    flattered = f"searched on these rows, which flatters it a little; what is {rest} rests on"
    for table, told in ((search, True), (proof, False)):
        page = " ".join(write_report(tmp_path / "page.html", table, chosen).read_text().split())
        assert f"{basis} rows that the policy was not searched on" in page
        assert (flattered in page) == told


def test_figures_are_those_of_evaluate_and_replay(tmp_path: Path) -> None:
    table = make_table()
    done, replayed = evaluate(table, CONFIDENT).outcome, replay(table, CONFIDENT)
    page = report(tmp_path, table, CONFIDENT)
    chosen = page.data["chosen"]
    assert (chosen["cost"], chosen["score"]) == (done.cost, done.score)
    assert chosen["disagreement"] == done.disagreement
    assert tuple(chosen["left"]) == replayed.histogram
    assert f"{done.score:.4f} full depth {done.full_score:.4f}" in page.text
    assert f"mean exit layer is {replayed.exit_layers.mean():.2f}" in page.text
    tried = {(one.cost, one.score, one.disagreement) for one in frontier(table)}
    for curve in page.data["curves"]:
        for dot in curve["dots"]:
            assert (dot["cost"], dot["score"], dot["disagreement"]) in tried


def test_exits_tell_right_from_wrong_as_scikit_learn_counts_it() -> None:
    table = make_table()
    exits = Figures(table, CONFIDENT).exits()
    odds = np.exp(table.scores)
    sure = (odds / odds.sum(axis=-1, keepdims=True)).max(axis=-1)
    right = table.scores.argmax(axis=-1) == np.asarray(table.labels)[:, None]
    for layer, exit in enumerate(exits):
        assert exit.auroc == pytest.approx(roc_auc_score(right[:, layer], sure[:, layer]))
        assert exit.better == (right[:, layer] & ~right[:, -1]).sum()
        assert exit.worse == (~right[:, layer] & right[:, -1]).sum()
    over = Figures(table, CONFIDENT).overthinking()
    assert over is not None
    assert over.ever == (right[:, :-1].any(axis=1) & ~right[:, -1]).sum()
    here = right[np.arange(ROWS), replay(table, CONFIDENT).exit_layers - 1]
    assert (over.gained - over.lost) == int(here.sum()) - int(right[:, -1].sum())


def test_without_labels_exits_are_judged_by_full_depth() -> None:
    exits = Figures(make_table(labelled=False), CONFIDENT).exits()
    assert exits[0].auroc is not None
    assert exits[-1].auroc is None  # it always agrees with itself
    assert exits[0].better is None


def test_drops_per_class_are_those_of_evaluate() -> None:
    for problem_type in (SINGLE, MULTI):
        table = make_table(problem_type, label_names=("a", "b", "c"))
        policy = MaxProbability(threshold=0.7, multi_label=problem_type == MULTI)
        rows = Figures(table, policy).classes()
        found = {row.name: row.drop for row in rows}
        assert found == pytest.approx(evaluate(table, policy).outcome.class_drops)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_the_table_of_the_curves_names_the_best_within_each_cost() -> None:
    curves = Figures(make_table(), CONFIDENT).curves()
    for budget, found in by_budget(curves):
        for curve, best in zip(curves, found, strict=True):
            scores = [one.score for one in curve.outcomes if one.cost <= budget + 1e-9]
            assert (best.score if best else None) == max(scores, default=None)


def test_broken_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    table = make_table()
    table.columns["scores"][:5, 1] = np.nan
    page = report(tmp_path, table, CONFIDENT)
    assert page.data["rows"] == ROWS - 5
    assert "5, whose scores are NaN" in page.text


def test_examples_show_what_each_exit_says(tmp_path: Path) -> None:
    table = make_table(label_names=("north", "south", "west"))
    page = report(tmp_path, table, CONFIDENT, rows=make_rows())
    assert all(title in page.text for title in ("Lost by leaving early", "Left first"))
    (row, truth, left), *_ = re.findall(r"Row (\d+), 1 tokens; label (\w+) ; left after layer (\d)",
                                        page.text)  # fmt: skip
    assert f"text of row {row}" in page.text
    assert truth == table.header.label_names[np.asarray(table.labels)[int(row)]]
    assert int(left) == replay(table, CONFIDENT).exit_layers[int(row)]


# Clock and price


def test_the_clock_stands_beside_the_ideal_and_gives_the_price(tmp_path: Path) -> None:
    page = report(tmp_path, make_table(), CONFIDENT, speed=SPEED, price_per_hour=3.6)
    assert f"early exit, ideal {2 / SPEED.ideal:.2f} s" in page.text
    assert f"{SPEED.realised_share:.0%}".rstrip("%") + " % of it is realised" in page.text
    # 2 s for 100 rows are 20,000 s for a million, at 0.001 a second
    assert "Full depth 20 0.0 % measured Early exit 11 45.0 % measured" in page.text


def test_without_a_clock_the_price_follows_the_cost(tmp_path: Path) -> None:
    page = report(tmp_path, make_table(), CONFIDENT, price_per_million=50000)
    cost = evaluate(make_table(), CONFIDENT).outcome.cost
    assert f"Early exit {float(f'{50000 * cost:.4g}'):,.10g} {100 * (1 - cost):.1f} %" in page.text


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"price_per_hour": 1.0}, "needs measured times"),
        ({"price_per_million": 0.0}, "above 0"),
        ({"price_per_million": float("nan")}, "above 0"),
        ({"price_per_hour": 1.0, "price_per_million": 1.0, "speed": SPEED}, "not both"),
    ],
)
def test_prices_that_are_none_are_refused(tmp_path: Path, wish: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        report(tmp_path, make_table(), CONFIDENT, **wish)
    assert not list(tmp_path.iterdir())


def test_what_does_not_belong_to_the_table_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="None of these rows"):
        report(tmp_path, make_table(), CONFIDENT, rows=make_rows("other "))
    point = calibrate(make_table(role="tune"), max_disagreement=0.2).point
    with pytest.raises(PointError, match="was chosen for model"):
        report(tmp_path, make_table(model_fingerprint="another"), point)
    with pytest.raises(OutputError, match="is a folder"):
        write_report(tmp_path, make_table(), CONFIDENT)


# On the command line


def test_a_model_and_rows_make_a_report(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    offramp("calibrate", place / "tune.table", "--model", exits, "--target-speedup", "1.3")
    output = tmp_path / "made.html"
    said = offramp("report", exits, "-d", place / "rows.csv", "-o", output,
                   "--price-per-hour", "2")  # fmt: skip
    assert (said.code, said.out) == (0, f"Written to {output}.\n"), said.err
    page = Page(output)
    assert {"Wall clock", "Overthinking", "Drop per class"} <= set(page.headings)
    assert sum(text in page.text for text in tiny_texts(20)) > 0
    assert "bert" in page.text


def test_tables_make_a_report_with_and_without_a_model(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    table = place / "tune.table"
    assert offramp("report", table).code == 0
    assert "Nobody leaves early" in Page(tmp_path / "report.html").text
    found = offramp("calibrate", table, "--model", exits, "--target-speedup", "1.3", "--json",
                    "--name", "fast").document  # fmt: skip
    rows = ("-d", place / "rows.csv")
    said = offramp("report", table, "--model", exits, "--point", "fast", *rows)
    assert said.code == 0, said.err
    page = Page(tmp_path / "report.html")
    assert page.data["chosen"]["score"] == found["point"]["score"]
    texts = [text for text in tiny_texts(160) if f">{text}<" in page.source]
    assert texts
    said = offramp("report", table, "--model", exits, "--point", "fast", *rows, "--no-examples")
    assert said.code == 0, said.err
    without = Page(tmp_path / "report.html").source
    assert not [text for text in texts if text in without]


def test_mistakes_end_with_one_paragraph_and_no_file(
    place: Path, tmp_path: Path, offramp: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    table, exits, rows = place / "tune.table", place / "exits", ("-d", place / "rows.csv")
    other = write_csv(tmp_path / "other.csv", [("never seen",)], ("text",))
    for arguments, word in (
        ([exits], "give --data"),
        ([tmp_path / "nowhere", *rows], "nowhere"),
        ([table, exits], "no exit table"),
        ([table, "--model", place / "other"], "recorded with model"),
        ([table, "--model", exits, "--point", "fats"], "no operating point"),
        ([table, "--point", "fast"], "--model"),
        ([exits, *rows, "--model", exits], "brings its own"),
        ([table, "--price-per-hour", "1"], "measured"),
        ([table, "--price-per-million", "-1"], "above 0"),
        ([table, "--metric", "pearson"], "pearson"),
        ([table, "-d", other], "None of these rows"),
        ([table, "-o", tmp_path], "is a folder"),
        ([], "MODEL|TABLE"),
    ):
        said = offramp("report", *arguments)
        assert said.code == 2, arguments
        assert word in said.err, (arguments, said.err)
        assert "Traceback" not in said.err
    assert [path.name for path in tmp_path.iterdir()] == ["other.csv"]
