"""Claims about files of answers: every format, every row once, whatever kills the run."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from offramp.errors import OutputError
from offramp.policies import Fixed, Full, MaxProbability, Policy
from offramp.prediction import Predictor, predict, predict_file
from offramp.prediction.partial import PartialFile
from offramp.testing import PROBLEM_TYPES, save_tiny, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(120, seed=3)
EARLY = MaxProbability(threshold=0.8)
# 1e-5 for scores of a trained model; tiny models are drawn wide and amplify the last bits more
BAND = 5e-5


def predictor(policy: Policy = EARLY, problem_type: str = PROBLEM_TYPES[0], **options) -> Predictor:
    return Predictor(tiny_model(problem_type=problem_type), tiny_tokenizer(), policy, **options)


def predictor_that_breaks_on(word: str, policy: Policy = EARLY) -> Predictor:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    with torch.no_grad():
        embeddings = model.stock.get_input_embeddings()
        embeddings.weight[tokenizer.convert_tokens_to_ids(word)] = torch.nan
    return Predictor(model, tokenizer, policy)


SHARED = predictor()


def source(folder: Path, texts: list[str] = TEXTS) -> Path:
    path = folder / "texts.csv"
    with open(path, "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerows([["text"], *([text] for text in texts)])
    return path


def text_lines(path: Path) -> list[str]:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode().splitlines()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in text_lines(path)]


def test_a_file_holds_what_the_stream_says_in_every_format(tmp_path: Path) -> None:
    expected = list(predict(SHARED, TEXTS, scores=True))
    readers: dict[str, Callable[[Path], list[dict]]] = {
        "a.jsonl": lines,
        "b.jsonl.gz": lines,
        "c.csv": lambda p: list(map(typed, csv.DictReader(text_lines(p)))),
        "d.csv.gz": lambda p: list(map(typed, csv.DictReader(text_lines(p)))),
        "e.parquet": lambda p: [without_empty(row) for row in pq.read_table(p).to_pylist()],
    }
    for name, read in readers.items():
        output = tmp_path / "out" / name
        summary = predict_file(SHARED, source(tmp_path), output, scores=True)
        assert read(output) == expected, name
        assert (summary.rows, summary.errors, summary.resumed) == (len(TEXTS), 0, 0)
        assert summary.mean_exit_layer == np.mean([entry["exit_layer"] for entry in expected])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(readers)


def typed(row: dict[str, str]) -> dict:
    numbers = {"row": int(row["row"]), "exit_layer": int(row["exit_layer"])}
    said = {**row, **numbers, "score": float(row["score"]), "scores": json.loads(row["scores"])}
    return without_empty(said)


def without_empty(row: dict) -> dict:
    return {name: value for name, value in row.items() if value not in (None, "")}


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES[1:])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_every_task_fits_every_format(tmp_path: Path, problem_type: str, name: str) -> None:
    shared = predictor(Full(), problem_type)
    summary = predict_file(shared, source(tmp_path), tmp_path / name, scores=True)
    assert summary.rows == len(TEXTS)


def test_rows_with_errors_are_in_the_file_and_counted(tmp_path: Path) -> None:
    hit = sum("never" in text.split() for text in TEXTS)
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        summary = predict_file(
            predictor_that_breaks_on("never"), source(tmp_path), tmp_path / name, scores=True
        )
        assert (summary.errors, summary.rows) == (hit, len(TEXTS))
        assert sum(summary.exit_histogram) == len(TEXTS) - hit
    assert sum(entry["error"] is not None for entry in pq.read_table(tmp_path / name).to_pylist())


SLOW_RUN = """
import sys, time
from offramp.policies import MaxProbability
from offramp.prediction import Predictor, partial, predict_file
usual = partial.PartialFile.append
def slow(self, entries):
    usual(self, entries)
    time.sleep(0.3)
partial.PartialFile.append = slow
shared = Predictor.load(sys.argv[1], MaxProbability(threshold=0.8), device="cpu", max_rows=1)
predict_file(shared, sys.argv[2], sys.argv[3])
"""


def test_a_run_that_was_killed_goes_on_and_loses_and_repeats_no_row(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    data, output = source(tmp_path), tmp_path / "out.jsonl"
    part = tmp_path / "out.jsonl.part.jsonl"
    run = subprocess.Popen([sys.executable, "-c", SLOW_RUN, str(folder), str(data), str(output)])
    give_up = time.monotonic() + 60
    while time.monotonic() < give_up and not (
        part.exists() and part.read_bytes().count(b"\n") > 30
    ):
        time.sleep(0.02)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not output.exists()
    done = lines(part)[1:]
    assert 30 <= len(done) < len(TEXTS)
    with open(part, "a") as handle:
        handle.write('{"row": 48, "label": "torn')
    summary = predict_file(folder, data, output, point=EARLY, device="cpu")
    assert (summary.resumed, summary.rows) == (len(done), len(TEXTS))
    assert not part.exists()
    answers = lines(output)
    assert answers[: len(done)] == done
    whole = list(predict(folder, TEXTS, point=EARLY, device="cpu"))
    for entry, expected in zip(answers, whole, strict=True):
        assert entry["score"] == pytest.approx(expected["score"], abs=BAND)
        assert {**entry, "score": 0} == {**expected, "score": 0}


def interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Leaves a part with 32 rows done."""
    usual = Predictor.answer

    def stop(self, texts, *rest):
        if texts[0]["text"] == TEXTS[32]:
            raise KeyboardInterrupt
        return usual(self, texts, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Predictor, "answer", stop)
        with pytest.raises(KeyboardInterrupt):
            predict_file(predictor(max_rows=2), source(tmp_path), tmp_path / "out.jsonl")
    return tmp_path / "out.jsonl.part.jsonl"


@pytest.mark.parametrize(
    ("model", "texts", "options"),
    [
        (predictor(), TEXTS, {"point": Fixed(layer=2)}),
        (predictor(), TEXTS, {"scores": True}),
        (predictor(max_length=20), TEXTS, {}),
        (Predictor(tiny_model(seed=4), tiny_tokenizer(), EARLY), TEXTS, {}),
        (predictor(), [*TEXTS, "one more"], {}),
    ],
    ids=["point", "scores", "max_length", "weights", "data"],
)
def test_a_run_with_other_settings_starts_anew(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    model: Predictor,
    texts: list[str],
    options: dict,
) -> None:
    part = interrupted(tmp_path, monkeypatch)
    assert len(lines(part)) == 1 + 32
    with caplog.at_level(logging.WARNING, "offramp"):
        summary = predict_file(model, source(tmp_path, texts), tmp_path / "out.jsonl", **options)
    assert summary.resumed == 0
    assert "done anew" in caplog.text
    assert lines(tmp_path / "out.jsonl") == list(predict(model, texts, **options))


def test_a_run_that_died_after_its_last_row_only_finishes_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("no space")))
        with pytest.raises(OutputError, match="no space"):
            predict_file(SHARED, source(tmp_path), tmp_path / "out.jsonl")
    monkeypatch.setattr(Predictor, "answer", None)
    summary = predict_file(SHARED, source(tmp_path), tmp_path / "out.jsonl")
    assert summary.resumed == summary.rows == len(TEXTS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "texts.csv"]


def test_an_interrupted_run_resumes_in_this_process_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(tmp_path, monkeypatch)
    summary = predict_file(predictor(), source(tmp_path), tmp_path / "out.jsonl")
    assert summary.resumed == 32
    assert [entry["row"] for entry in lines(tmp_path / "out.jsonl")] == list(range(len(TEXTS)))


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with PartialFile(output, {}), pytest.raises(OutputError, match="another run is writing"):
        predict_file(SHARED, source(tmp_path), output)


@pytest.mark.parametrize("name", ["out.json", "out", "out.parquet.gz", "out.xlsx", "out.csv.zip"])
def test_an_unknown_format_is_refused_before_any_work(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError, match=r"Known: \.jsonl, \.csv, \.parquet"):
        predict_file("no-model", "no-data.csv", tmp_path / name)


def test_a_place_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    data = source(tmp_path)
    with pytest.raises(OutputError, match="cannot be written"):
        predict_file(SHARED, data, data / "out.jsonl")
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        predict_file(SHARED, data, tmp_path / "folder.csv")


def test_a_broken_part_is_named_and_not_repaired_by_guessing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = interrupted(tmp_path, monkeypatch)
    content = part.read_bytes().split(b"\n")
    content[5] = b"\0" * 20
    part.write_bytes(b"\n".join(content))
    with pytest.raises(OutputError, match="line 6 is broken"):
        predict_file(predictor(), source(tmp_path), tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_row_numbers_are_those_of_the_source_when_rows_are_sampled(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    predict_file(SHARED, source(tmp_path), output, max_rows=20)
    rows = [entry["row"] for entry in lines(output)]
    assert len(rows) == 20
    for entry in lines(output):
        (alone,), _ = SHARED.answer([TEXTS[entry["row"]]])
        assert entry["exit_layer"] == alone.exit_layer


def test_a_file_of_texts_is_never_written_over(tmp_path: Path) -> None:
    data = source(tmp_path)
    before = data.read_bytes()
    with pytest.raises(OutputError, match="holds the examples"):
        predict_file(SHARED, data, tmp_path / "." / data.name, progress=False)
    assert data.read_bytes() == before
