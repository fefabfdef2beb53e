"""Claims about watching a point: alarms come where promises break, and hardly elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_certificates import table_of

from offramp.calibration import Monitor, OperatingPoint, certify, choose
from offramp.errors import ConfigError, PointError
from offramp.policies import Fixed


def point_of(limit: float = 0.05) -> OperatingPoint:
    found = certify(table_of(3000), max_disagreement=limit)
    assert found.pays
    return found.point


def watching(limit: float) -> Monitor:
    """Of a point with any promise: how it was made does not matter."""
    return Monitor.of(point_of()).model_copy(update={"limit": limit})


def streams(share: float, rows: int, seeds: int) -> np.ndarray:
    return (np.random.default_rng(0).random((seeds, rows)) < share).astype(float)


def test_a_point_at_its_limit_is_hardly_ever_called_broken() -> None:
    """1,000 audited rows are 1% of 100,000."""
    begun = watching(0.01)
    alarms = sum(begun.after(stream.tolist()).alarmed for stream in streams(0.01, 1000, 200))
    assert alarms / 200 <= 0.05


@pytest.mark.parametrize("share", [0.01, 0.2])
def test_the_mean_is_within_the_interval_however_often_one_looks(share: float) -> None:
    begun, missed = watching(0.01), 0
    for stream in streams(share, 600, 100):
        seen, within = begun, True
        for part in np.split(stream, 12):
            seen = seen.after(part.tolist())
            low, high = seen.interval
            within &= low <= share <= high
        missed += not within
    assert missed <= 5
    assert begun.interval == (0, 1)
    wide, narrow = (begun.after([0.0, 1.0] * n).interval for n in (10, 1000))
    assert wide[0] < narrow[0] < 0.5 < narrow[1] < wide[1]
    assert narrow[1] - narrow[0] < 0.1


def test_five_times_the_losses_are_noticed_within_500_audited_rows() -> None:
    begun = watching(0.01).after(streams(0.01, 300, 1)[0].tolist())
    assert not begun.alarmed
    seen = [begun.after(stream.tolist()).alarm_at for stream in streams(0.05, 500, 100)]
    assert sum(one is not None for one in seen) >= 95


@given(cut=st.integers(0, 400))
@settings(max_examples=20)
def test_a_restart_changes_nothing(cut: int) -> None:
    losses = streams(0.03, 400, 1)[0].tolist()
    layers = [1 + place % 6 for place in range(400)]
    begun = watching(0.01)
    whole = begun.after(losses, layers)
    halves = begun.after(losses[:cut], layers[:cut]).after(losses[cut:], layers[cut:])
    assert halves.model_dump(exclude={"lost"}) == whole.model_dump(exclude={"lost"})
    assert halves.lost == pytest.approx(whole.lost)


def test_what_was_seen_survives_in_a_file_of_that_point_alone(tmp_path: Path) -> None:
    point = point_of()
    seen = Monitor.of(point).after([0.0, 1.0, 0.0], [2, 3, 6])
    seen.save(tmp_path / "monitor.json")
    assert Monitor.load(tmp_path / "monitor.json", point) == seen
    other = point_of(limit=0.1)
    with pytest.raises(PointError, match="watches another point"):
        Monitor.load(tmp_path / "monitor.json", other)


@pytest.mark.parametrize("change", [{"bets": (0.1,)}, {"recent": (7,)}, {"expected": ()}])
def test_a_file_that_was_changed_by_hand_is_refused(
    tmp_path: Path, change: dict[str, object]
) -> None:
    point = point_of()
    Monitor.of(point).model_copy(update=change).save(tmp_path / "monitor.json")
    with pytest.raises(PointError):
        Monitor.load(tmp_path / "monitor.json", point)


def test_what_was_won_long_after_an_alarm_can_still_be_kept(tmp_path: Path) -> None:
    point = point_of()
    seen = Monitor.of(point).after([1.0] * 2000)
    seen.save(tmp_path / "monitor.json")
    assert Monitor.load(tmp_path / "monitor.json", point) == seen


def test_the_same_policy_chosen_on_other_rows_is_another_point(tmp_path: Path) -> None:
    first, again = (
        choose(table_of(500, seed), target_speedup=1.1, policies=[Fixed(layer=3)]).point
        for seed in (1, 2)
    )
    Monitor.of(first).save(tmp_path / "monitor.json")
    with pytest.raises(PointError, match="watches another point"):
        Monitor.load(tmp_path / "monitor.json", again)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"limit": 0.9}, "watches another point"),
        ({"risk": "hellinger"}, "watches another point"),
        ({"promised": False}, "watches another point"),
        ({"rows": 7}, "watches another point"),
        ({"lost": -5.0}, "greater than or equal to 0"),
        ({"lost": 30.0}, "do not fit each other"),
        ({"most": 1e9}, "do not fit each other"),
        ({"reserve": 1e-300, "bets": [0.0] * 16}, "do not fit each other"),
        ({"alarm_at": 3}, "do not fit each other"),
    ],
)
def test_a_file_of_other_terms_or_of_sums_that_cannot_be_is_refused(
    tmp_path: Path, changed: dict[str, Any], said: str
) -> None:
    path, point = tmp_path / "monitor.json", point_of()
    Monitor.of(point).after([0.0] * 20).save(path)
    Monitor.load(path, point)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(PointError, match=said):
        Monitor.load(path, point)


def test_what_is_said_of_an_estimate_is_true_of_it() -> None:
    watched = Monitor.of(point_of())
    assert ", within the limit" in watched.after([0.0] * 50).words()
    above = watched.after([0.0, 1.0])
    assert not above.alarmed
    assert ", above the limit" in above.words()
    assert "not proven yet" in above.words()


@pytest.mark.parametrize("rows", [50, 100, 1000])
def test_few_rows_of_a_point_are_no_drift_of_others(rows: int) -> None:
    """Shares that were counted on few rows are rough; that says nothing of rows to come."""
    draw, depth = np.random.default_rng(0), 12
    watched, drifted = Monitor.of(point_of()), 0
    for _ in range(100):
        expected = np.bincount(draw.integers(0, depth, rows), minlength=depth) / rows
        known = {"expected": tuple(expected.tolist()), "rows": rows}
        monitor = watched.model_copy(update=known)
        drifted += monitor.after(exit_layers=draw.integers(1, depth + 1, 1000).tolist()).drifted
    assert drifted <= 2


def test_a_point_that_holds_on_average_alone_is_watched_for_what_its_rows_leave_open() -> None:
    point = point_of()
    assert point.certificate is not None
    mean = point.certificate.model_copy(update={"confidence": None, "procedure": "expectation"})
    watched = Monitor.of(point.model_copy(update={"certificate": mean}))
    assert Monitor.of(point).limit == point.certificate.limit
    assert watched.limit != point.certificate.limit
    assert "is no longer what it was" in watched.after([1.0] * 500).words()
    assert "no longer holds" in Monitor.of(point).after([1.0] * 500).words()


def test_rows_that_leave_elsewhere_show_as_drift() -> None:
    point = point_of()
    shares = np.array(point.exit_histogram) / point.rows
    layers = np.random.default_rng(0).choice(np.arange(1, 7), size=1000, p=shares)
    same = Monitor.of(point).after(exit_layers=layers.tolist())
    assert same.drift is not None
    assert same.drift < 0.1
    deeper = Monitor.of(point).after(exit_layers=[6] * 1000)
    assert deeper.drift is not None
    assert deeper.drift > 0.25
    assert Monitor.of(point).after(exit_layers=[6] * 10).drift is None


def test_a_drop_is_watched_by_what_needs_no_labels() -> None:
    found = certify(table_of(3000), max_drop=0.05)
    seen = Monitor.of(found.point)
    assert seen.risk == "disagreement"
    assert found.point.disagreement < seen.limit < found.point.disagreement + 0.05


def test_a_risk_that_nothing_here_knows_cannot_be_watched() -> None:
    point = certify(table_of(2000), max_disagreement="5%").point
    assert point.certificate is not None
    gone = point.promising(point.certificate.model_copy(update={"risk": "mine"}))
    with pytest.raises(ConfigError, match=r"promises the risk 'mine'.*Import or install"):
        Monitor.of(gone)


def test_a_plain_choice_can_be_watched_too() -> None:
    plain = choose(table_of(3000), max_disagreement=0.05).point
    assert Monitor.of(plain).limit > plain.disagreement


def test_it_says_what_it_saw() -> None:
    seen = Monitor.of(point_of())
    assert "no row was audited yet" in seen.words()
    assert "within the limit of 5.00%" in seen.after([0.0] * 50).words()
    assert "no longer holds" in seen.after([1.0] * 50).words()


@pytest.mark.parametrize("level", [0, 1, -0.1])
def test_a_level_is_a_chance(level: float) -> None:
    with pytest.raises(ConfigError, match="is no chance"):
        Monitor.of(point_of(), level)
