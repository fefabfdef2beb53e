"""Claims about the picture of a model card: drawn from what was tried, dropped when untrue."""

from __future__ import annotations

import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path

import pytest
from card_support import (
    choose,
    rows_of,
    shows_picture,
)
from cli_support import Said, tree
from hypothesis import given
from hypothesis import strategies as st

from offramp.calibration import OperatingPoint
from offramp.calibration.listing import PICTURE
from offramp.errors import PointError
from offramp.model import MultiExitModel
from offramp.report import write_picture
from offramp.report.picture import ticks
from offramp.testing import PROBLEM_TYPES, tiny_model

pytest_plugins = ("card_fixtures", "cli_fixtures")


@pytest.mark.parametrize("kind", PROBLEM_TYPES)
@pytest.mark.parametrize("labelled", [True, False])
def test_the_picture_draws_policies_baseline_and_points(
    folder: Path, kind: str, labelled: bool
) -> None:
    choose(folder, "fast", 2, labelled=labelled, policies=["patience"])
    found = choose(folder, speed=1.2, labelled=labelled, policies=["patience"])
    path = write_picture(folder, found)
    assert path == folder / PICTURE
    root = ET.fromstring(path.read_text())
    texts = ["".join(node.itertext()) for node in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"default", "fast", "full depth", "fixed (baseline)"} <= set(texts)
    assert any(text.startswith("patience") for text in texts)
    assert found.point.policy["name"] in root[1].text
    assert "href" not in path.read_text()
    assert shows_picture(folder)
    for circle in root.iter("{http://www.w3.org/2000/svg}circle"):
        assert 64 <= float(circle.get("cx", 0)) <= 736
        assert 74 <= float(circle.get("cy", 0)) <= 400


def test_the_same_choice_draws_the_same_picture(folder: Path) -> None:
    found = choose(folder)
    write_picture(folder, found)
    before = (folder / PICTURE).read_bytes()
    write_picture(folder, found)
    assert (folder / PICTURE).read_bytes() == before


def test_a_picture_of_a_point_that_has_changed_is_dropped(folder: Path) -> None:
    write_picture(folder, choose(folder))
    choose(folder, "other", 2)
    assert shows_picture(folder)
    choose(folder, speed=2)
    assert not shows_picture(folder)
    assert PICTURE not in tree(folder)


def test_points_of_other_rows_are_not_drawn_among_these(folder: Path) -> None:
    choose(folder, "elsewhere", seed=1)
    write_picture(folder, choose(folder))
    assert ">elsewhere<" not in (folder / PICTURE).read_text()


def test_only_a_saved_point_is_drawn(folder: Path) -> None:
    found = choose(folder)
    shutil.rmtree(folder / "points")
    with pytest.raises(PointError, match="save it there"):
        write_picture(folder, found)


def test_a_picture_of_somebody_else_stays(folder: Path) -> None:
    (folder / PICTURE).write_text("<svg/>")
    assert write_picture(folder, choose(folder)) is None
    tiny_model(seed=3).save_pretrained(folder)
    assert (folder / PICTURE).read_text() == "<svg/>"
    assert not shows_picture(folder)


def test_calibrate_draws_it_and_a_save_keeps_it(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("calibrate", place / "tune.table", "--model", exits, "--max-disagreement", "90%")
    assert said.code == 0, said.err
    assert shows_picture(exits)
    assert OperatingPoint.load(exits).name in rows_of(exits)
    before = (exits / PICTURE).read_bytes()
    MultiExitModel.from_pretrained(exits).save_pretrained(exits)
    assert (exits / PICTURE).read_bytes() == before


@given(st.floats(-1e3, 1e3), st.floats(1e-6, 1e3), st.integers(2, 10))
def test_ticks_are_round_few_and_inside(low: float, wide: float, wanted: int) -> None:
    found = ticks(low, low + wide, wanted)
    assert len(found) <= wanted + 1
    for at, said in found:
        assert low - 1e-6 * wide <= at <= low + wide * (1 + 1e-6)
        assert abs(float(said) - at) <= 1e-9 * max(1, abs(at))
    assert len({said for _, said in found}) == len(found)
