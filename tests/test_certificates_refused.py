"""Claims about what is not promised, and what is said then."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from certificate_support import table_of

from offramp import ExitTable
from offramp.calibration import RISKS, calibrate, certify
from offramp.calibration.certifying import proven_on
from offramp.calibration.risks import Answered, risk
from offramp.errors import ConfigError, PointError, TableError


def test_it_is_said_that_as_many_rows_as_are_needed_do_not_always_do() -> None:
    said = [certify(table_of(700, seed), max_disagreement="1%") for seed in range(8)]
    refused = [found.messages[1] for found in said if not found.pays]
    assert any(re.match(r"About [\d,]+ rows of the proof can do, but", why) for why in refused)


def test_sets_are_counted_among_the_rows_that_it_takes() -> None:
    found = certify(table_of(100), max_drop="1%", sets=0.9)
    assert "sets take as many again" in found.messages[1]


def test_how_many_rows_a_refusal_hangs_on_is_said() -> None:
    found = certify(table_of(700), max_disagreement="1%")
    assert found.point.policy["name"] == "full"
    assert any("to look harmless, a faster point would have been" in m for m in found.messages)


def test_a_risk_that_full_depth_takes_as_well_cannot_be_promised() -> None:
    kinds = ("single_label_classification",)

    @risk("wrong", "wrong answers", kinds, labelled=True, whole=True)
    def wrong(rows: Answered) -> np.ndarray:
        return (rows.early.argmax(axis=1) != rows.labels).astype(float)

    try:
        with pytest.raises(ConfigError, match=r"subtract what .rows.full. loses"):
            certify(table_of(400), max_risk=0.2, risk="wrong")
    finally:
        del RISKS._items["wrong"]


def test_rows_that_were_changed_after_they_were_recorded_are_refused(tmp_path: Path) -> None:
    table_of(400).save(tmp_path / "table")
    table = ExitTable.open(tmp_path / "table")
    certify(table, max_drop="20%")
    scores = np.load(tmp_path / "table" / "scores.npy")
    scores[:4] = 5
    np.save(tmp_path / "table" / "scores.npy", scores)
    again = ExitTable.open(tmp_path / "table")
    for choice in (calibrate, certify):
        with pytest.raises(TableError, match="changed since it was recorded"):
            choice(again, max_drop="20%")
    with pytest.raises(TableError, match="changed since it was recorded"):
        again.save(tmp_path / "laundered")


def test_a_table_whose_role_was_changed_is_refused(tmp_path: Path) -> None:
    table_of(400, role="test").save(tmp_path / "table")
    header = tmp_path / "table" / "header.json"
    header.write_text(header.read_text().replace('"test"', '"tune"'))
    with pytest.raises(TableError, match="changed since it was recorded"):
        certify(ExitTable.open(tmp_path / "table"), max_drop="20%")


def test_figures_are_of_the_rows_of_the_proof_alone() -> None:
    table = table_of(800)
    for options in ({}, {"sets": 0.9}):
        point = certify(table, max_drop="20%", **options).point  # type: ignore[arg-type]
        assert point.certificate is not None
        assert proven_on(table, point).rows == point.certificate.rows


def test_a_point_that_was_altered_in_memory_is_no_longer_what_was_certified() -> None:
    point = certify(table_of(2000), max_disagreement="20%").point
    point.model_copy(update={"name": "other"}).check(point.model_fingerprint)
    faster = point.model_copy(update={"policy": {"name": "fixed", "layer": 1}})
    with pytest.raises(PointError, match="certificate was made for has changed"):
        faster.check(point.model_fingerprint)
