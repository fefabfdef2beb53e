"""Claims about mistakes: exit code 2, one paragraph that says what to do, nothing left behind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cli_support import Said, tree, write_csv

from offramp.cli.main import main
from offramp.testing import save_tiny

pytest_plugins = ("cli_fixtures",)


def mistake(said: Said, pattern: str) -> None:
    """Exit code 2 and one paragraph on stderr that says what is wrong."""
    assert said.code == 2, said
    error = said.err.splitlines()[-1]
    assert error.startswith("Error: ")
    assert re.search(pattern, error), error
    assert "Traceback" not in said.err
    assert said.out == ""


CSV_MISTAKES = {
    "empty file": ("", "the file is empty"),
    "only a header": ("text,label\n", "no rows"),
    "no text column": ("a,b\n1,2\n", "text"),
    "label outside the set": ("text,label\nfilm,label-0\nplot,great\n", "Row 1.*'great'.*label-0"),
    "mixed types": ("text,label\nfilm,label-0\nplot,3.7\n", "Row 1"),
    "missing label": ("text,label\nfilm,label-0\nplot,\n", "Row 1"),
    "ragged row": ("text,label\nfilm\n", "line 2 has 1 fields"),
    "not UTF-8": ("text,label\nfilm\udcff,label-0\n", "line 2 is not UTF-8"),
}


@pytest.mark.parametrize("name", CSV_MISTAKES)
def test_broken_rows_are_named(
    place: Path, tmp_path: Path, offramp: Callable[..., Said], name: str
) -> None:
    content, pattern = CSV_MISTAKES[name]
    path = tmp_path / "rows.csv"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    for command in (
        ["tune", place / "stock", "--max-drop", "1%"],
        ["record", place / "exits"],
        ["train", place / "stock"],
    ):
        before = tree(tmp_path)
        mistake(offramp(*command, "-d", path, "-o", tmp_path / "out"), pattern)
        assert tree(tmp_path) == before


@pytest.mark.parametrize("given", ["hidden", "=1", "hiden=true"])
def test_a_setting_that_is_none_is_named(
    place: Path, tmp_path: Path, offramp: Callable[..., Said], given: str
) -> None:
    data = write_csv(tmp_path / "rows.csv", [("film", "label-0"), ("plot", "label-1")])
    command = ["train", place / "stock", "-d", data, "-o", tmp_path / "out", "--set", given]
    mistake(offramp(*command, "--method", "deebert"), "NAME=VALUE|Did you mean 'hidden'")


def test_a_score_that_is_no_number_is_named(tmp_path: Path, offramp: Callable[..., Said]) -> None:
    save_tiny(tmp_path / "scorer", problem_type="regression")
    rows = write_csv(tmp_path / "rows.csv", [("film", "0.5"), ("plot", "nan")])
    mistake(offramp("record", tmp_path / "scorer", "-d", rows, "-o", tmp_path / "t"), "Row 1.*nan")


MISTAKES = {
    "missing file": (["record", "{exits}", "-d", "rosw.csv", "-o", "t"], r"rosw.csv: no such file"),
    "nearest file": (["record", "{exits}", "-d", "{place}/row.csv", "-o", "t"], "'rows.csv'"),
    "unknown column": (["record", "{exits}", "-d", "{rows}", "--text", "txet", "-o", "t"], "txet"),
    "unknown role": (["record", "{exits}", "-d", "{rows}", "--role", "tset", "-o", "t"], "role"),
    "unknown command": (["trian"], r"No such command 'trian'.*'train'.*--help"),
    "unknown option": (["info", "{exits}", "--jsno"], r"--jsno.*--json.*offramp info --help"),
    "no argument": (["info"], "Missing argument"),
    "not a number": (["calibrate", "{table}", "--target-speedup", "two"], "--target-speedup"),
    "unknown method": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--method", "pabbe"],
                       r"Unknown method 'pabbe'.*'pabee'"),
    "unknown policy": (["calibrate", "{table}", "--max-drop", "1%", "--policy", "patince"],
                       r"Unknown policy 'patince'.*'patience'"),
    "unknown metric": (["calibrate", "{table}", "--max-drop", "1%", "--metric", "acuracy"],
                       r"Unknown metric 'acuracy'.*'accuracy'"),
    "unknown pooling": (["attach", "{stock}", "-d", "{rows}", "-o", "m", "--pooling", "men"],
                        r"Unknown pooling 'men'.*'mean'"),
    "unknown point": (["predict", "{exits}", "film", "--point", "fst"], "no operating point 'fst'"),
    "unknown device": (["predict", "{exits}", "film", "--device", "gpu9"], "Device 'gpu9'"),
    "unknown dtype": (["predict", "{exits}", "film", "--dtype", "f32"], "Unknown dtype 'f32'"),
    "drop of 150%": (["tune", "{stock}", "-d", "{rows}", "-o", "m", "--max-drop", "150%"],
                     "max_drop=1.5"),
    "negative drop": (["calibrate", "{table}", "--max-drop", "-1%"], "'-1%' is not a share"),
    "speed-up below 1": (["calibrate", "{table}", "--target-speedup", "-2"], "must be above 1|-2"),
    "two targets": (["calibrate", "{table}", "--max-drop", "1%", "--target-speedup", "2"],
                    "exactly one"),
    "no target": (["tune", "{stock}", "-d", "{rows}", "-o", "m"], "exactly one"),
    "drop without labels": (["tune", "{stock}", "-d", "{texts}", "-o", "m", "--max-drop", "1%"],
                            "max_disagreement"),
    "negative epochs": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--epochs", "-1"],
                        "'epochs'.*greater than 0"),
    "negative rows": (["record", "{exits}", "-d", "{rows}", "-o", "t", "--max-rows", "-5"], "-5"),
    "share of 2": (["tune", "{stock}", "-d", "{rows}", "-o", "m", "--max-drop", "1%",
                    "--tune-share", "2"], "--tune-share"),
    "train without labels": (["train", "{stock}", "-d", "{texts}", "-o", "m"], "no labels"),
    "no name": (["predict", "", "film"], "The name of the model is empty"),
    "no folder": (["predict", "nowhere", "film"], "nowhere"),
    "a file as model": (["info", "{rows}"], "is a file"),
    "stock model": (["predict", "{stock}", "film"], "without exits"),
    "texts and data": (["predict", "{exits}", "film", "-d", "{rows}"], "either inputs or --data"),
    "unknown format": (["predict", "{exits}", "-d", "{rows}", "-o", "a.xlsx"], "unknown format"),
    "output below a file": (["record", "{exits}", "-d", "{rows}", "-o", "{rows}/t"],
                            "cannot be written"),
    "model below a file": (["tune", "{stock}", "-d", "{rows}", "-o", "{rows}/m", "--max-drop",
                            "1%"], "cannot be written"),
    "answers below a file": (["predict", "{exits}", "-d", "{rows}", "-o", "{rows}/a.csv"],
                             "cannot be written"),
    "demo below a file": (["demo", "-o", "{rows}/demo"], "cannot be written"),
    "demo over something": (["demo", "-o", "{place}"], "something else"),
    "no table": (["calibrate", "{exits}", "--max-drop", "1%"], "no exit table"),
    "table of another model": (["calibrate", "{table}", "--model", "{place}/other", "--max-drop",
                                "1%"], "recorded with model"),
    "model over itself": (["tune", "{stock}", "-d", "{rows}", "-o", "{stock}", "--max-drop", "1%"],
                          "is the model"),
    "output is where one stands": (["tune", "{stock}", "-d", "{rows}", "-o", ".", "--max-drop",
                                    "1%"], "the folder you are in"),
    "text that is not UTF-8": (["predict", "{exits}", "a\udcff"], "cannot be written as UTF-8"),
    "exits to elsewhere": (["tune", "{exits}", "-d", "{rows}", "-o", "m", "--max-drop", "1%"],
                           "has exits already"),
    "name with a slash": (["calibrate", "{table}", "--max-drop", "1%", "--name", "a/b"], "name"),
    "a point called full": (["calibrate", "{table}", "--max-drop", "1%", "--name", "full"],
                            "what full depth is called"),
    "a tuned point called full": (["tune", "{stock}", "-d", "{rows}", "-o", "m", "--max-drop", "1%",
                                   "--name", "full"], "what full depth is called"),
    "cache of nan": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--cache-limit", "nan"],
                     "--cache-limit is nan"),
    "endless cache": (["attach", "{stock}", "-d", "{rows}", "-o", "m", "--cache-limit", "inf"],
                      "--cache-limit is inf"),
    "a device without numbers": (["predict", "{exits}", "film", "--device", "meta"],
                                 "Device 'meta'"),
    "speed-up of nan": (["calibrate", "{table}", "--target-speedup", "nan"], "must be above 1"),
    "a table twice": (["calibrate", "{table}", "{table}", "--max-drop", "1%"], "the same rows"),
    "misspelt problem type": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--problem-type",
                               "regresion"], r"Unknown problem type 'regresion'.*'regression'"),
    "no model": (["info", "{place}"], "holds no model: there is no config.json"),
    "a label of none": (["record", "{exits}", "-d", "{place}/odd.csv", "-o", "t"],
                        r"odd\.csv: Row 0 .*'odd'"),
    "pooling of exits that are there": (["tune", "{exits}", "-d", "{rows}", "--max-drop", "1%",
                                         "--pooling", "cls"], "leave pooling out"),
    "epochs of exits that are there": (["tune", "{exits}", "-d", "{rows}", "--max-drop", "1%",
                                        "--epochs", "2"], "leave epochs out"),
    "a policy that is no JSON": (["calibrate", "{table}", "--max-drop", "1%", "--policy",
                                  "{{name: patience}}"], "not JSON"),
    "an option of no policy": (["calibrate", "{table}", "--max-drop", "1%", "--policy",
                                '{{"name": "patience", "depth": 3}}'], "option 'depth'"),
    "an engine that does not compute so": (["bench", "{exits}", "--backends", "torch",
                                            "--precisions", "int8"], "No engine computes as asked"),
    "one layer": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--layers", "1", "--method",
                   "pabee"], "A model of one layer has no exit"),
    "no joint stage": (["train", "{stock}", "-d", "{rows}", "-o", "m", "--set", "warm_up=1"],
                       "warm_up is 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_paragraph_and_leaves_nothing_behind(
    place: Path,
    tmp_path: Path,
    offramp: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given, pattern = MISTAKES[name]
    names = {
        "place": place,
        "stock": place / "stock",
        "exits": place / "exits",
        "rows": place / "rows.csv",
        "texts": place / "texts.csv",
        "table": place / "tune.table",
    }
    before = tree(place)
    mistake(offramp(*(argument.format(**names) for argument in given)), pattern)
    assert tree(tmp_path) == []
    assert tree(place) == before


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("file", ["config.json", "offramp.json", "points/default.json"])
@pytest.mark.parametrize("change", ["unknown key", "NaN", "cut"])
def test_a_document_that_was_changed_is_refused(
    place: Path, exits: Path, offramp: Callable[..., Said], file: str, change: str
) -> None:
    offramp("calibrate", place / "tune.table", "--model", exits, "--target-speedup", "2")
    path = exits / file
    if change == "cut":
        path.write_text(path.read_text()[:-10])
    else:
        change_json(path, **({"surprise": 1} if change == "unknown key" else {"cost": np.nan}))
    mistake(offramp("predict", exits, "a film"), path.name)


@pytest.mark.parametrize("change", ["missing", "truncated", "other bytes"])
def test_weights_that_are_broken_are_refused(
    exits: Path, offramp: Callable[..., Said], change: str
) -> None:
    path = exits / "model.safetensors"
    data = bytearray(path.read_bytes())
    if change == "missing":
        path.unlink()
    elif change == "truncated":
        path.write_bytes(data[:-100])
    else:
        data[-5] ^= 255
        path.write_bytes(data)
    mistake(offramp("info", exits), "safetensors")


@pytest.mark.parametrize("kind", ["stock", "exits"])
def test_a_model_without_its_vocabulary_is_refused(
    place: Path, tmp_path: Path, offramp: Callable[..., Said], kind: str
) -> None:
    model = shutil.copytree(place / kind, tmp_path / "model")
    for file in model.glob("tokenizer*"):
        file.unlink()
    rows, out = place / "rows.csv", tmp_path / "out"
    if kind == "stock":
        said = offramp("attach", model, "-d", rows, "-o", out)
    else:
        said = offramp("predict", model, "-d", rows)
    mistake(said, "no usable tokenizer")
    assert not out.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_answers_that_do_not_fit_on_the_disk_are_a_mistake(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        assert main(["info", str(place / "exits")]) == 2
        monkeypatch.undo()
    assert "stdout cannot be written" in capsys.readouterr().err


def test_a_closed_stdout_is_no_bug(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", None)
    assert main(["info", str(place / "exits")]) == 0


def test_bars_are_written_whatever_the_locale_says(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open(tmp_path / "said.txt", "w", encoding="ascii") as ascii_only:
        monkeypatch.setattr("sys.stdout", ascii_only)
        given = ["-d", str(place / "rows.csv"), "-o", str(tmp_path / "answers.csv")]
        assert main(["predict", str(place / "exits"), *given]) == 0
        monkeypatch.undo()
    assert "█" in (tmp_path / "said.txt").read_text(encoding="utf-8")


def test_a_point_of_other_weights_is_refused(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    offramp("calibrate", place / "tune.table", "--model", exits, "--target-speedup", "2")
    shutil.copytree(exits / "points", place / "other/points")
    try:
        mistake(offramp("predict", place / "other", "a film"), "was chosen for model")
    finally:
        shutil.rmtree(place / "other/points")


def test_a_text_of_100_000_tokens_is_cut_and_counted_once(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    rows = write_csv(tmp_path / "rows.csv", [("film " * 100_000,), ("a plot",)], ("text",))
    said = offramp("predict", place / "exits", "-d", rows, "--point", "full")
    assert said.code == 0
    assert said.err.count("1 of 2 texts are longer than 64 tokens and were cut") == 1
    assert len(said.out.splitlines()) == 2
