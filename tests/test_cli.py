"""Claims about the command line: words, output, exit codes, and every mistake in one paragraph."""

from __future__ import annotations

import csv
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from offramp.cli.main import main
from offramp.testing import save_tiny, save_tiny_stock, tiny_texts

ROWS = 160
COMMANDS = (
    "tune",
    "predict",
    "train",
    "attach",
    "record",
    "calibrate",
    "evaluate",
    "info",
    "demo",
)


class Said(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def document(self) -> dict:
        return json.loads(self.out)


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("offramp")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def offramp(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


def write_csv(path: Path, rows: list[tuple], head: tuple[str, ...] = ("text", "label")) -> Path:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([head, *rows])
    return path


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows and a table that tests read and never change."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_stock(folder / "stock")
    save_tiny(folder / "exits")
    save_tiny(folder / "other", seed=5)
    texts = tiny_texts(ROWS)
    write_csv(folder / "rows.csv", [(t, f"label-{n % 3}") for n, t in enumerate(texts)])
    write_csv(folder / "texts.csv", [(text,) for text in texts], ("text",))
    quiet = ["--quiet", "--output"]
    assert main(["record", str(folder / "exits"), "-d", str(folder / "rows.csv"), *quiet,
                 str(folder / "tune.table")]) == 0  # fmt: skip
    return folder


@pytest.fixture
def exits(place: Path, tmp_path: Path) -> Path:
    """A multi-exit model that a test may change."""
    return Path(shutil.copytree(place / "exits", tmp_path / "exits"))


# Help


def run_python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, **options)  # type: ignore[call-overload]


def test_help_is_fast_and_loads_no_torch() -> None:
    code = (
        "import sys, time; start = time.process_time()\n"
        "from offramp.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy; print(time.process_time() - start, file=sys.stderr)"
    )

    def seconds() -> float:
        run = run_python(code)
        assert run.returncode == 0, run.stderr
        assert all(command in run.stdout for command in COMMANDS)
        return float(run.stderr)

    assert min(seconds() for _ in range(3)) < 1


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples_and_exit_codes(
    offramp: Callable[..., Said], command: str
) -> None:
    said = offramp(command, "--help")
    assert said.code == 0
    assert len(re.findall(rf"^ *offramp {command}\b", said.out, re.MULTILINE)) in (2, 3, 4)
    assert all(word in said.out for word in ("Exit codes: 0 done", "130", "--quiet"))


def test_without_a_command_the_help_is_shown(offramp: Callable[..., Said]) -> None:
    assert offramp().out == offramp("--help").out


def test_the_version_is_said(offramp: Callable[..., Said]) -> None:
    from offramp import __version__

    assert offramp("--version") == (0, f"{__version__}\n", "")


# The road


def test_tune_takes_a_classifier_without_labels_to_answers(
    place: Path, tmp_path: Path, offramp: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    wish = ["--max-disagreement", "10%", "--epochs", "3", "--pooling", "mean"]
    first = offramp("tune", place / "stock", "-d", place / "texts.csv", *wish)
    assert first.code in (0, 3), first.err
    assert "stock-offramp is ready" in first.out
    assert re.search(r"layer  6 +\d+ +[\d.]+%", first.out)
    assert "speed-up" in first.out or first.code == 3
    assert "ideal" in first.out or first.code == 3
    assert "offramp predict stock-offramp --data NEW.csv" in first.out
    assert "not a guarantee" in first.out

    again = offramp("tune", place / "stock", "-d", place / "texts.csv", *wish, "--no-speed")
    assert "has these exits already" in again.err
    assert "holds these rows already" in again.err

    said = offramp("predict", "stock-offramp", "a dull film", "a bright story")
    answers = [json.loads(line) for line in said.out.splitlines()]
    assert [answer["row"] for answer in answers] == [0, 1]
    assert all(1 <= answer["exit_layer"] <= 6 for answer in answers)


def test_tune_trains_and_chooses_on_different_rows(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    from offramp.table import ExitTable

    said = offramp("tune", place / "stock", "-d", place / "rows.csv", "-o", tmp_path / "made",
                   "--max-drop", "5%", "--epochs", "2", "--pooling", "mean", "--no-speed",
                   "--tune-share", "0.25", "--json")  # fmt: skip
    assert said.code in (0, 3), said.err
    table = ExitTable.open(tmp_path / "made.tune")
    assert table.header.role == "tune"
    assert 0.1 * ROWS < table.rows < 0.4 * ROWS
    recipe = json.loads((tmp_path / "made/tune.json").read_text())
    assert (recipe["tune_share"], recipe["seed"]) == (0.25, 0)
    assert said.document["point"]["rows"] == table.rows


def test_tune_keeps_the_exits_of_a_model_that_has_some(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    before = (exits / "model.safetensors").read_bytes()
    said = offramp("tune", exits, "-d", place / "rows.csv", "--target-speedup", "2",
                   "--name", "fast", "--no-speed", "--json")  # fmt: skip
    assert said.code == 0, said.err
    assert said.document["point"]["cost_reduction"] >= 2
    assert said.document["point"]["rows"] == ROWS
    assert (exits / "points/fast.json").is_file()
    assert (exits / "model.safetensors").read_bytes() == before


def test_tune_chooses_on_rows_given_apart_and_drops_those_it_trained_on(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    other = [(text, "label-0") for text in tiny_texts(20) + tiny_texts(60, seed=9)]
    said = offramp("tune", place / "stock", "-d", place / "rows.csv", "-o", tmp_path / "made",
                   "--eval-data", write_csv(tmp_path / "eval.csv", other), "--max-drop", "20%",
                   "--epochs", "2", "--pooling", "mean", "--no-speed", "--json")  # fmt: skip
    assert said.code in (0, 3), said.err
    assert "20 rows to choose on are also trained on" in said.err
    assert said.document["point"]["rows"] == 60


def test_record_calibrate_and_evaluate_go_hand_in_hand(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("calibrate", place / "tune.table", "--model", exits, "--max-drop", "30%")
    assert said.code == 0, said.err
    assert "Chosen for a drop of at most 0.3" in said.out
    assert (exits / "points/default.json").is_file()
    judged = offramp("evaluate", exits, "-d", place / "rows.csv", "--no-speed", "--json").document
    point = json.loads((exits / "points/default.json").read_text())
    for figure in ("score", "full_score", "cost", "disagreement", "exit_histogram"):
        assert judged[figure] == pytest.approx(point[figure])
    assert [exit["layer"] for exit in judged["exits"]] == [1, 2, 3, 4, 5, 6]


def test_evaluate_measures_the_clock_beside_the_ideal(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("evaluate", exits, "-d", place / "rows.csv", "--point", "full")
    assert said.code == 0, said.err
    assert re.search(r"speed-up +[\d.]+x measured", said.out)
    assert re.search(r"ideal +[\d.]+x on these rows", said.out)
    assert "Everyone leaving at one exit" in said.out


def test_tables_of_one_model_are_joined(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    more = write_csv(tmp_path / "more.csv", [(t, "label-1") for t in tiny_texts(50, seed=3)])
    offramp("record", place / "exits", "-d", more, "-o", tmp_path / "more.table")
    one = ["calibrate", place / "tune.table", "--target-speedup", "1.5", "--json"]
    assert offramp(*one).document["point"]["rows"] == ROWS
    said = offramp(*one[:2], tmp_path / "more.table", *one[2:])
    assert said.code == 0, said.err
    assert said.document["point"]["rows"] == ROWS + 50


def test_train_fine_tunes_with_exits_and_the_result_can_be_tuned(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    made = tmp_path / "made"
    said = offramp("train", place / "stock", "-d", place / "rows.csv", "-o", made, "--method",
                   "pabee", "--pooling", "mean", "--max-steps", "3", "--seed", "7")  # fmt: skip
    assert said.code == 0, said.err
    assert f"offramp tune {made}" in said.out
    assert offramp("info", made, "--json").document["method"] == "pabee"


def test_attach_leaves_the_classifier_as_it_is(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    made = tmp_path / "made"
    said = offramp("attach", place / "stock", "-d", place / "texts.csv", "-o", made, "--epochs",
                   "1", "--pooling", "mean", "--quiet")  # fmt: skip
    assert said.code == 0, said.err
    info = offramp("info", made, "--json").document
    assert (info["method"], info["pooling"], info["depth"]) == ("attach", "mean", 6)


def test_predict_writes_a_file_and_says_what_it_did(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    answers = tmp_path / "answers.csv"
    said = offramp("predict", exits, "-d", place / "texts.csv", "-o", answers, "--json",
                   "--point", "full")  # fmt: skip
    assert said.code == 0, said.err
    assert said.document["rows"] == ROWS
    assert said.document["exit_histogram"] == [0, 0, 0, 0, 0, ROWS]
    with open(answers, encoding="utf-8") as handle:
        assert len(list(csv.DictReader(handle))) == ROWS


def test_info_describes_models_and_tables(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    offramp("calibrate", place / "tune.table", "--model", exits, "--target-speedup", "2")
    ours = offramp("info", exits, "--json").document
    assert ours["is"] == "multi-exit model"
    assert ours["architecture"] == "bert"
    assert ours["parameters_added"] == 5 * (32 * 3 + 3)
    assert [point["name"] for point in ours["points"]] == ["default"]
    assert re.search(r"default +\w+ \(.*\) +160 rows +accuracy", offramp("info", exits).out)
    stock = offramp("info", place / "stock", "--json").document
    assert (stock["is"], stock["supported"]) == ("stock model", True)
    table = offramp("info", place / "tune.table", "--json").document
    assert (table["is"], table["rows"], table["role"]) == ("exit table", ROWS, "tune")


def test_info_says_why_a_model_is_not_supported(
    tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    config = AutoConfig.for_model(
        "mobilebert", vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=16, embedding_size=16, intra_bottleneck_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    said = offramp("info", tmp_path, "--json").document
    assert said["supported"] is False
    assert "mobilebert" in said["why"]


# Exit codes


def test_a_target_that_cannot_be_met_gives_full_depth_and_exit_code_3(
    place: Path, exits: Path, offramp: Callable[..., Said]
) -> None:
    said = offramp("calibrate", place / "tune.table", "--model", exits, "--max-disagreement", "0")
    assert said.code == 3
    assert "will not pay" in said.out
    point = json.loads((exits / "points/default.json").read_text())
    assert point["policy"] == {"name": "full"}


BUG = """
import sys
import offramp.calibration as room
from offramp.cli.main import main
def broken(*given, **options): raise ZeroDivisionError("a bug")
room.calibrate = broken
sys.exit(main(sys.argv[1:]))
"""


def test_a_bug_stays_a_traceback_and_exit_code_1(place: Path) -> None:
    run = run_python(BUG, "calibrate", str(place / "tune.table"), "--max-drop", "1%")
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ZeroDivisionError: a bug" in run.stderr


def test_a_missing_extra_prints_the_line_that_installs_it(
    place: Path, offramp: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    from offramp.errors import MissingExtraError
    from offramp.prediction import Predictor

    def missing(*given: object, **options: object) -> None:
        raise MissingExtraError("onnxruntime", "onnx")

    monkeypatch.setattr(Predictor, "load", missing)
    said = offramp("predict", place / "exits", "a film")
    assert said.code == 2
    assert "pip install 'offramp[onnx]'" in said.err


def test_a_reader_that_has_seen_enough_is_no_error(place: Path) -> None:
    code = "import sys; from offramp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "predict", str(place / "exits"), "-d",
               str(place / "texts.csv"), "--quiet"]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()
        assert process.wait(60) == 0


def test_ctrl_c_in_the_middle_of_training_says_how_to_go_on_and_it_does(
    place: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    made = tmp_path / "made"
    arguments = ["train", place / "stock", "-d", place / "rows.csv", "-o", made, "--epochs", "6",
                 "--pooling", "mean", "--batch-size", "8"]  # fmt: skip
    process = subprocess.Popen(
        [sys.executable, "-m", "offramp", *map(str, arguments), "--checkpoint-minutes", "0.001"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    work = tmp_path / "made.work"
    until = time.monotonic() + 60
    while not list(work.glob("*/checkpoint-*/trainer_state.json")):
        assert time.monotonic() < until
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "Stopped with Ctrl-C" in err
    assert not made.exists()
    said = offramp(*arguments)
    assert said.code == 0, said.err
    assert "continues from checkpoint-" in said.err
    assert tree(tmp_path)[0] == "made"
    assert not work.exists()


def test_other_libraries_are_silent_unless_asked(place: Path) -> None:
    code = "import sys; from offramp.cli.main import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": ""}
    environment.pop("HF_HUB_DISABLE_PROGRESS_BARS")
    arguments = ["predict", str(place / "exits"), "a film", "--point", "full"]
    run = run_python(code, *arguments, env=environment)
    assert run.returncode == 0
    assert run.stderr == ""
    assert len(run.stdout.splitlines()) == 1


# Mistakes


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
    "no folder": (["predict", "nowhere", "film"], "nowhere"),
    "a file as model": (["info", "{rows}"], "is a file"),
    "stock model": (["predict", "{stock}", "film"], "without exits"),
    "texts and data": (["predict", "{exits}", "film", "-d", "{rows}"], "either texts or --data"),
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
    "exits to elsewhere": (["tune", "{exits}", "-d", "{rows}", "-o", "m", "--max-drop", "1%"],
                           "has exits already"),
    "name with a slash": (["calibrate", "{table}", "--max-drop", "1%", "--name", "a/b"], "name"),
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
