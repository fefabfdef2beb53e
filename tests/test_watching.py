"""Claims about watching a point while rows are answered."""

from __future__ import annotations

import contextlib
import logging
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from cli_support import write_csv
from datasets import Dataset

from offramp.calibration import Monitor, OperatingPoint, calibrate
from offramp.cli.main import main
from offramp.data import encode
from offramp.engines import Budget, make_engine, record
from offramp.errors import ConfigError, PointError
from offramp.policies import Fixed, Full
from offramp.prediction import Predictor, predict, predict_file
from offramp.prediction.partial import PartialFile
from offramp.prediction.watching import Watch
from offramp.testing import save_tiny, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(200, seed=3)


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random exits: `default` differs from full depth often, `never` does not."""
    folder = save_tiny(tmp_path_factory.mktemp("watched") / "tiny")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    dataset, _ = encode(Dataset.from_dict({"text": tiny_texts(300)}), tokenizer)
    table = record(model, dataset, folder.parent / "table", "tune", processor=tokenizer)
    for name, policy in (("default", Fixed(layer=1)), ("never", Full())):
        found = calibrate(table, target_speedup=1.01, policies=[policy], name=name).point
        found.save(folder)
    return folder


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Points are watched as if their rows had left less open than they do."""
    monkeypatch.setattr(
        "offramp.calibration.monitor._watched", lambda point: ("disagreement", 0.01, False)
    )


def test_an_audited_row_is_answered_as_if_it_were_not(folder: Path) -> None:
    plain, watched = Predictor.load(folder), Predictor.load(folder)
    watched.watch(share=1)
    assert list(predict(watched, TEXTS)) == list(predict(plain, TEXTS))


def test_what_is_lost_is_what_full_depth_says(folder: Path) -> None:
    predictor = Predictor.load(folder)
    seen = predictor.watch(share=1)
    early = [entry["label"] for entry in predict(predictor, TEXTS)]
    full = [entry["label"] for entry in predict(predictor, TEXTS, point="full")]
    others = sum(one != other for one, other in zip(early, full, strict=True))
    assert seen.monitor.audited == len(TEXTS)  # those of another point are not counted
    assert seen.monitor.lost == others > 0


@pytest.mark.parametrize("budget", [Budget(depth=1), Budget(seconds=1e-9)])
def test_a_point_is_not_judged_by_answers_that_a_budget_forced(
    folder: Path, tmp_path: Path, budget: Budget
) -> None:
    place = shutil.copytree(folder, tmp_path / "tiny")
    point = OperatingPoint.load(folder)
    point.model_copy(update={"policy": Fixed(layer=4).to_dict()}).save(place)
    free, bound = Predictor.load(place), Predictor.load(place)
    seen, wanted = bound.watch(share=1), free.watch(share=1)
    list(predict(free, TEXTS))
    forced = list(predict(bound, TEXTS, budget=budget))
    assert all(entry["forced"] and entry["exit_layer"] == 1 for entry in forced)
    assert seen.monitor == wanted.monitor
    assert set(seen.monitor.recent) == {4}


@pytest.mark.parametrize("point", ["never", "default"])
def test_a_run_that_was_interrupted_counts_no_row_twice(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: None, point: str
) -> None:
    """Nor after an alarm, which `default` gives at once."""
    file, seen = tmp_path / "rows.csv", tmp_path / "watch.json"
    write_csv(file, [(text,) for text in TEXTS], ("text",))
    usual = PartialFile.append

    def stop(self: PartialFile, entries: list) -> None:
        if self.rows:
            raise KeyboardInterrupt  # answered, audited, and not kept
        usual(self, entries)

    def run() -> Watch:
        predictor = Predictor.load(folder, point, max_rows=8)
        watch = predictor.watch(1, seen)
        try:
            predict_file(predictor, file, tmp_path / "out.jsonl", progress=False)
        finally:
            watch.close()
        return watch

    with monkeypatch.context() as patch:
        patch.setattr(PartialFile, "append", stop)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert 0 < Monitor.load(seen, OperatingPoint.load(folder, point)).audited < len(TEXTS)
    seen_at_last = run().monitor
    assert seen_at_last.audited == len(TEXTS)
    assert seen_at_last.alarmed == (point == "default")


def test_rows_of_another_thread_are_noted_at_once_and_stay(folder: Path) -> None:
    predictor = Predictor.load(folder)
    seen = predictor.watch(share=1)
    with contextlib.suppress(KeyboardInterrupt), seen.when_kept() as keep:
        list(predict(predictor, TEXTS[:20]))
        assert seen.monitor.audited == 0
        keep()
        other = threading.Thread(target=lambda: list(predict(predictor, TEXTS[:50])))
        other.start()
        other.join()
        list(predict(predictor, TEXTS[:30]))
        raise KeyboardInterrupt
    assert seen.monitor.audited == 70


def test_a_share_is_audited(folder: Path) -> None:
    predictor = Predictor.load(folder)
    seen = predictor.watch(share="20%")
    list(predict(predictor, TEXTS))
    assert 10 < seen.monitor.audited < 80
    assert len(seen.monitor.recent) == len(TEXTS)


@pytest.mark.parametrize(("on_alarm", "layer"), [("warn", 1), ("full", 6), ("never", 6)])
def test_an_alarm_is_said_once_and_acted_on(
    folder: Path,
    tmp_path: Path,
    broken: None,
    caplog: pytest.LogCaptureFixture,
    on_alarm: str,
    layer: int,
) -> None:
    predictor = Predictor.load(folder)
    predictor.watch(1, tmp_path / "watch.json", on_alarm)
    with caplog.at_level(logging.WARNING, "offramp"):
        list(predict(predictor, TEXTS * 2))
        after = list(predict(predictor, TEXTS[:5]))
    assert sum("is no longer what" in record.message for record in caplog.records) == 1
    assert {entry["exit_layer"] for entry in after} == {layer}


def test_an_alarm_is_said_again_after_a_restart(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    begun = Monitor.of(OperatingPoint.load(folder))
    begun.after([1.0] * 100).save(tmp_path / "watch.json")
    with caplog.at_level(logging.WARNING, "offramp"):
        Predictor.load(folder).watch(path=tmp_path / "watch.json")
    assert sum("is no longer what" in record.message for record in caplog.records) == 1


def test_a_broken_answer_is_lost_where_full_depth_has_one(folder: Path) -> None:
    seen = Predictor.load(folder).watch(share=1)
    full = np.array([[1, 0], [1, 0], [np.nan, 0]], dtype=np.float32)
    early = np.array([[np.nan, 0], [1, 0], [1, 0]], dtype=np.float32)
    seen.saw([None] * 3, early, [1, 1, 1], lambda rows: full)  # type: ignore[list-item]
    assert (seen.monitor.audited, seen.monitor.lost) == (2, 1)


def test_what_was_seen_survives_a_restart(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "watch.json"
    for _ in range(2):
        predictor = Predictor.load(folder)
        predictor.watch(share=1, path=path)
        list(predict(predictor, TEXTS))
    assert Monitor.load(path, OperatingPoint.load(folder)).audited == 2 * len(TEXTS)


def test_rows_are_answered_where_what_was_seen_cannot_be_kept(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "watch"
    place.mkdir()
    predictor = Predictor.load(folder)
    seen = predictor.watch(share=1, path=place / "watch.json")
    shutil.rmtree(place)
    place.write_text("a file now")
    assert len(list(predict(predictor, TEXTS))) == len(TEXTS)
    assert sum("is not kept" in record.message for record in caplog.records) == 1
    assert seen.monitor.audited == len(TEXTS)


def test_a_stream_is_watched_too(folder: Path) -> None:
    predictor = Predictor.load(folder)
    seen = predictor.watch(share=1)
    assert len(list(predictor.stream(TEXTS))) == len(TEXTS)
    assert seen.monitor.audited == len(TEXTS)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_what_is_watched_depends_on_the_rows_before(folder: Path, backend: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    predictor = Predictor.load(folder)
    predictor.watch(share=1)
    predictor.engine = make_engine(predictor.model, backend, progress=False)
    with pytest.raises(ConfigError, match="not for rows that are watched"):
        predictor.stream(TEXTS, determinism="shape")


def test_a_file_keeps_the_level_it_was_begun_with(folder: Path, tmp_path: Path) -> None:
    predictor, path = Predictor.load(folder), tmp_path / "watch.json"
    predictor.watch(path=path).close()
    with pytest.raises(ConfigError, match="begun with level"):
        predictor.watch(path=path, level=0.01)


def test_a_file_is_kept_by_one_watcher_at_a_time(folder: Path, tmp_path: Path) -> None:
    path, first, second = tmp_path / "w.json", Predictor.load(folder), Predictor.load(folder)
    kept = first.watch(share=1, path=path)
    list(predict(first, TEXTS[:20]))
    with pytest.raises(ConfigError, match=r"Somebody else watches with .*w\.json"):
        second.watch(share=1, path=path)
    kept.close()
    mine = second.watch(share=1, path=path)
    assert mine.monitor.audited == 20
    list(predict(second, TEXTS[:30]))
    list(predict(first, TEXTS[:5]))  # is still watched, but no longer kept
    kept.close()
    mine.close()
    assert Monitor.load(path, OperatingPoint.load(folder)).audited == 50


def test_a_file_that_is_refused_is_free_for_others(folder: Path, tmp_path: Path) -> None:
    predictor, path = Predictor.load(folder), tmp_path / "w.json"
    predictor.watch(path=path).close()
    with pytest.raises(ConfigError, match="begun with level"):
        predictor.watch(path=path, level=0.01)
    Predictor.load(folder).watch(path=path)


def test_the_watched_point_is_no_way_out(folder: Path) -> None:
    with pytest.raises(ConfigError, match="'default', which is what is watched"):
        Predictor.load(folder).watch(on_alarm="default")


def test_full_depth_is_nothing_to_watch(folder: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to watch"):
        Predictor.load(folder, "full").watch()
    with pytest.raises(ConfigError, match="No share of the rows is 0"):
        Predictor.load(folder).watch(share=0)


def test_the_command_line_watches(folder: Path, tmp_path: Path) -> None:
    data, path = tmp_path / "rows.csv", tmp_path / "watch.json"
    data.write_text("text\n" + "\n".join(TEXTS[:50]) + "\n")
    arguments = ["predict", str(folder), "-d", str(data), "-o", str(tmp_path / "a.csv"), "-q"]
    assert main([*arguments, "--watch", str(path), "--audit", "100%"]) == 0
    assert Monitor.load(path, OperatingPoint.load(folder)).audited == 50
    path.write_text("{}")
    again = ["predict", str(folder), "a", "--watch", str(path)]
    assert main(again) == 2
    assert main(["predict", str(folder), "a", "--on-alarm", "full"]) == 2


def test_the_command_line_promises_or_says_how_many_rows_it_takes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    promise = ["--confidence", "95%", "--policy", "fixed", "--max-disagreement"]
    table = str(folder.parent / "table")
    assert main(["calibrate", table, *promise, "99%"]) == 0
    assert "Guaranteed with 95% confidence" in capsys.readouterr().out
    assert main(["calibrate", table, *promise, "0.1%"]) == 4
    assert "No early exit is certified" in capsys.readouterr().out
    data = tmp_path / "rows.csv"
    data.write_text("text\n" + "\n".join(tiny_texts(200, seed=5)) + "\n")
    made = save_tiny(tmp_path / "tiny")
    assert main(["tune", str(made), "-d", str(data), "--no-speed", "-q", *promise, "99%"]) == 0
    point = OperatingPoint.load(made, certified=True)
    shown = (tmp_path / "tiny.report.html").read_text()
    assert f"figures of {point.rows} rows (role tune" in " ".join(shown.split())
    assert "Guaranteed with 95% confidence" in shown
    capsys.readouterr()
    assert main(["info", str(made)]) == 0
    assert "Guaranteed with 95% confidence" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(PointError, match=r"cuts them to 6\. Leave max_length out"):
        Predictor.load(made, certified=True, max_length=6)
    assert main(["evaluate", str(made), "-d", str(data), "--no-speed", "-q"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "promised at most 99%; " in said
    assert "in the rows given here" in said
    assert "Guaranteed with 95% confidence" in said
