"""Claims about the leaderboard's page: one file that needs nothing and says who wins."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from board_support import NAMES, difference, make_board, make_curve
from page_support import Page, assert_asks_for_nothing, assert_named

from offramp.comparison.board import Board, Point
from offramp.comparison.chart import COLOURED, Chart, mean_curve
from offramp.comparison.page import write_page
from offramp.comparison.words import ABOVE, BELOW, OPEN, count, duration, headline, signed, verdict
from offramp.errors import OutputError

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)"><!--{{ 7 * 7 }}'
ERROR = {"metric": "negative_rmse", "high": -0.43, "spread": 0.9}


def page_of(tmp_path: Path, board: Board) -> Page:
    return Page(write_page(board, tmp_path / "compare.html"))


def changed(board: Board, place: int, **fields: Any) -> Board:
    """The board with other fields of one method."""
    methods = list(board.methods)
    methods[place] = methods[place].model_copy(update=fields)
    return board.model_copy(update={"methods": tuple(methods)})


def test_where_a_target_has_a_policy_of_its_own_it_is_named(tmp_path: Path) -> None:
    board = make_board()
    other = changed(board, 0, chosen_at={"2": "patience"})
    (score,) = (
        one.score.value
        for row in board.methods[0].policies
        if row.name == "patience"
        for one in row.at
        if one.target == 2
    )
    assert other.methods[0].at[1].score.value == score != board.methods[0].at[1].score.value
    before, after = (page_of(tmp_path, one).text.count("patience") for one in (board, other))
    assert after == before + 1 + len(board.seeds)  # there, and in what each seed chose


# One file that needs nothing


def test_the_page_asks_for_no_address_and_forbids_itself_to(tmp_path: Path) -> None:
    assert_asks_for_nothing(page_of(tmp_path, make_board()))


def test_an_address_in_a_text_stays_text(tmp_path: Path) -> None:
    board = changed(make_board(), 0, paper="Leaving early, https://example.org/early")
    page = page_of(tmp_path, board)
    assert_asks_for_nothing(page)
    assert "https://example.org/early" in page.text


def test_parts_are_named_for_those_who_do_not_see_them(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_board())
    assert_named(page)
    assert next(a for tag, a in page.tags if tag == "svg" and a.get("role") == "img")["aria-label"]


def test_hostile_titles_facts_names_and_reasons_stay_text(tmp_path: Path) -> None:
    names = (HOSTILE, *NAMES[1:])
    missing = make_board().missing[0].model_copy(update={"why": HOSTILE})
    board = make_board(names, title=HOSTILE, facts={HOSTILE: HOSTILE}, missing=(missing,))
    page = page_of(tmp_path, board)
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert len([text for text in page.texts if HOSTILE in text]) > 5


def test_the_page_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "compare.html"
    path.write_text("before")

    def broken(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("offramp.storage.os.replace", broken)
    with pytest.raises(OutputError, match="disk full"):
        write_page(make_board(["pabee"]), path)
    assert [file.name for file in tmp_path.iterdir()] == ["compare.html"]
    assert path.read_text() == "before"


def test_a_folder_is_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"is a folder; give the name of a file"):
        write_page(make_board(["pabee"]), tmp_path)


# What it says


@pytest.mark.parametrize("scores", [{}, ERROR], ids=["accuracy", "error"])
def test_every_method_verdict_and_family_is_in_it(tmp_path: Path, scores: dict[str, Any]) -> None:
    board = make_board(**scores)
    page = page_of(tmp_path, board)
    for method in board.methods:
        assert page.texts.count(method.name) >= 3, "legend, table and its own part"
        assert method.paper in page.text
    said = [verdict(one.against["area"]) for one in board.methods[1:]]
    shown = re.findall(rf"\b({ABOVE}|{OPEN}|{BELOW})\b", _table(page))
    assert shown == said
    assert page.text.count("max_probability") >= 2 * len(NAMES)
    assert page.text.count("2 of 3 seeds") == 1
    assert "out of memory after 2 epochs" in page.text


def _table(page: Page) -> str:
    inside = page.source.split('id="ranks"')[1].split("</table>")[0]
    return re.sub(r"<thead>.*?</thead>|<.*?>", " ", inside, flags=re.DOTALL)


@pytest.mark.parametrize("scores", [{}, ERROR], ids=["accuracy", "error"])
def test_what_is_not_known_is_a_dash_and_no_word_of_python(
    tmp_path: Path, scores: dict[str, Any]
) -> None:
    page = page_of(tmp_path, make_board(plain=None, **scores))
    assert not re.search(r"\b(NaN|nan|None|inf|undefined|null)\b", page.text)
    assert not re.search(r"\b(NaN|nan|None|inf|undefined)\b", page.source.split("<script")[0])
    assert "\N{EN DASH}" in page.text
    assert "no setting reached it on tune" in page.text


@pytest.mark.parametrize("plain", [True, False])
def test_one_method_and_one_seed_have_a_page(tmp_path: Path, plain: bool) -> None:
    board = make_board(["pabee"], seeds=(0,), missing=(), **({} if plain else {"plain": None}))
    page = page_of(
        tmp_path, changed(board, 0, against_plain={}, policies=board.methods[0].policies[:1])
    )
    assert "no other method was run" in page.text
    assert "What is missing" not in page.headings
    assert ("plain fine-tune, full depth" in page.text) == plain


def test_a_board_without_a_finished_run_says_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_board().model_copy(update={"methods": ()}))
    assert "No run has finished" in page.text
    assert page.headings[:1] == ["What is missing"]


def test_the_script_is_given_the_curves_that_are_drawn(tmp_path: Path) -> None:
    board = make_board()
    page = page_of(tmp_path, board)
    names = [line["name"] for line in page.data["lines"]]
    assert names == [*NAMES, "fixed exits of auto"]
    half = page.data["costs"].index(0.5)
    expected = np.mean([_interpolated(curve, 0.5) for curve in board.methods[0].row.curves])
    assert page.data["lines"][0]["scores"][half] == pytest.approx(expected, abs=1e-5)


def _interpolated(curve: tuple[Point, ...], cost: float) -> float:
    return float(np.interp(cost, [dot.cost for dot in curve], [dot.score for dot in curve]))


# Who wins


def test_the_reference_wins_where_the_next_is_significantly_below_it() -> None:
    board = changed(make_board(), 1, against={"area": difference(-0.012, 0.001, 0.004)})
    said = headline(board)
    assert said.startswith("auto wins")
    assert "significantly above cosee: +0.0120 (95 % interval +0.0047 to +0.0193" in said


def test_another_wins_only_where_it_is_significantly_above_the_reference() -> None:
    board = make_board(reference="cap")
    for p_holm, begin in [(0.01, "auto wins"), (0.4, "auto has the best mean accuracy")]:
        said = headline(changed(board, 0, against={"area": difference(0.01, 0.01, p_holm)}))
        assert said.startswith(begin)
        assert "significantly above cap: +0.0100" in said
        assert ("but is not significantly" in said) == (p_holm > 0.05)


def test_a_method_that_lacks_a_seed_does_not_win() -> None:
    board = make_board(("elbert", "pabee"))
    said = headline(board.model_copy(update={"methods": board.methods[:1]}))
    assert said.startswith("No method has all seeds yet. elbert has the best mean accuracy")
    assert said.endswith("with 2 of 3 seeds.")


def test_what_was_not_tested_is_not_called_a_win() -> None:
    said = headline(changed(make_board(), 1, against={}))
    assert "was not tested" in said
    assert "wins" not in said


def test_verdicts_need_significance_after_holm() -> None:
    cases = [(0.01, 0.04), (0.01, 0.05), (-0.01, 0.04), (-0.01, 0.9)]
    found = [verdict(difference(value, 0.001, p_holm)) for value, p_holm in cases]
    assert found == [ABOVE, OPEN, BELOW, OPEN]


def test_figures_are_written_short_and_without_a_sign_for_nothing() -> None:
    assert [signed(value) for value in (0.012, -0.0004, -0.00001)] == [
        "+0.0120",
        "\N{MINUS SIGN}0.0004",
        "0.0000",
    ]
    assert [duration(s) for s in (4.21, 48.0, 183.0, 7300.0)] == ["4.2 s", "48 s", "3 min", "2.0 h"]
    assert [count(n) for n in (0, 830, 12_345, 999_700)] == ["0", "830", "12.3 k", "1 M"]


# The chart


def test_the_best_five_are_coloured_and_baselines_are_dashed() -> None:
    lines = Chart(make_board()).lines
    shown = [line.name for line in lines if line.shown]
    assert shown == [*NAMES[:COLOURED], "truncated", "fixed exits of auto"]
    assert {line.name for line in lines if line.style == "base"} == set(shown[COLOURED:])


def test_no_two_methods_look_alike() -> None:
    styles = [line.style for line in Chart(make_board()).lines if line.style != "base"]
    assert len(set(styles)) == len(styles)


def test_every_curve_has_its_number_in_sight() -> None:
    chart = Chart(make_board())
    places = [chart.place(line) for line in chart.lines]
    assert all(line.where is not None for line in chart.lines)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places)


def test_a_mean_curve_does_not_reach_below_its_cheapest_point() -> None:
    first, other = make_curve(0.5, 0.9, 0.3, 0)[2:], make_curve(0.5, 0.9, 0.3, 1)[3:]
    found = mean_curve([first, other], np.array([0.1, 0.2, 0.5, 1.2]))
    assert np.isnan(found).tolist() == [True, True, False, True]
    assert found[2] == pytest.approx((_interpolated(first, 0.5) + _interpolated(other, 0.5)) / 2)


def test_a_flat_board_can_be_drawn(tmp_path: Path) -> None:
    page_of(tmp_path, make_board(["pabee"], high=0.5, spread=0.0, plain=None))
