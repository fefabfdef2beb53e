"""Claims about the demo, on sizes that take seconds; the full one is `make demo`."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from offramp import demo
from offramp.cli.main import main
from offramp.demo import Demo, DemoSettings
from offramp.errors import ConfigError

TINY = DemoSettings(
    layers=4, width=32, pieces=400, epochs=2, batch_size=16, max_rows=200, learning_rate=3e-3
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


@pytest.fixture(scope="module")
def first(folder: Path) -> Demo:
    return demo.run(folder, TINY)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("offramp")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


def test_the_demo_trains_chooses_on_tune_and_reads_test(first: Demo) -> None:
    assert not first.resumed
    assert first.rows == {"train": 200, "tune": 200, "test": 200}
    assert first.calibration.point.role == "tune"
    assert first.calibration.point.disagreement <= TINY.max_disagreement
    assert first.evaluation.role == "test"
    assert 0 < first.baseline < 1
    assert first.speed.speed_up > 0
    assert 0 <= first.layers_saved < 1
    assert first.report.is_file()


def test_examples_leave_at_different_layers_early_ones_first(first: Demo) -> None:
    layers = [example.exit_layer for example in first.examples]
    assert layers == sorted(set(layers))
    used = [n for n, rows in enumerate(first.evaluation.outcome.exit_histogram, 1) if rows]
    assert (layers[0], layers[-1]) == (used[0], used[-1])


def test_a_second_run_uses_the_model_of_the_first_and_finds_the_same(
    folder: Path, first: Demo
) -> None:
    again = demo.run(folder, TINY)
    assert again.resumed
    assert again.evaluation.outcome == first.evaluation.outcome
    assert again.examples == first.examples


def test_the_command_prints_every_figure(
    folder: Path, first: Demo, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(demo, "run", partial(demo.run, settings=TINY))
    assert main(["demo", "--output", str(folder)]) == 0
    said = capsys.readouterr()
    for word in ("TF-IDF", "full depth", "chosen point", "at the point", "exit layers in use",
                 "layers saved", "cost reduction", "speed-up", "ideal", "layer  4",
                 "exit layer 1", str(folder / "model"), str(folder / "report.html"),
                 "offramp predict"):  # fmt: skip
        assert word in said.out, word
    assert "Using the model of an earlier run" in said.err
    assert main(["demo", "--output", str(folder), "--json", "--quiet"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["test"]["score"] == first.evaluation.outcome.score


def test_another_recipe_begins_anew_and_keeps_the_files_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = []
    monkeypatch.setattr(demo, "_train", lambda *given: trained.append(given) or 1 / 0)
    (tmp_path / "model").mkdir()
    (tmp_path / "demo.json").write_text("{}")
    (tmp_path / "answers.csv").write_text("mine")
    with pytest.raises(ZeroDivisionError):
        demo.run(tmp_path, TINY)
    assert len(trained) == 1
    assert not (tmp_path / "model").exists()
    assert (tmp_path / "answers.csv").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(ConfigError, match="something else"):
        demo.run(tmp_path, TINY)
