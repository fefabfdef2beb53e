"""Claims about the command line: help, the road from rows to answers, exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from cli_support import ROWS, Said, tree, write_csv
from datasets import Dataset

from offramp.calibration import OperatingPoint
from offramp.cli.options import specs
from offramp.data import load_examples, split_examples
from offramp.testing import save_tiny_stock, tiny_texts
from offramp.tuning import _cut

pytest_plugins = ("cli_fixtures",)

COMMANDS = (
    "tune",
    "predict",
    "train",
    "attach",
    "record",
    "calibrate",
    "evaluate",
    "report",
    "info",
    "demo",
)


# Help


def run_python(code: str, *arguments: str, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_help_loads_no_torch() -> None:
    code = (
        "import sys\n"
        "from offramp.cli.main import main\n"
        "assert main(['--help']) == 0\n"
        "heavy = {'torch', 'transformers', 'datasets', 'sklearn', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    run = run_python(code)
    assert run.returncode == 0, run.stderr
    assert all(command in run.stdout for command in COMMANDS)


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
    page = Path("stock-offramp.report.html")
    assert str(page) in first.out
    assert "Inputs, layer by layer" in page.read_text(encoding="utf-8")

    again = offramp("tune", place / "stock", "-d", place / "texts.csv", *wish, "--no-speed",
                    "--no-examples")  # fmt: skip
    assert "Inputs, layer by layer" not in page.read_text(encoding="utf-8")
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


def test_the_cut_of_tune_is_independent_of_other_cuts_with_the_same_seed() -> None:
    rows = load_examples(Dataset.from_dict({"text": [str(number) for number in range(2000)]}))
    part = split_examples(rows, {"train": 0.8, "test": 0.2}, seed=0)["train"]
    cut = _cut(part, 0.2, seed=0)
    assert 0.15 < len(cut["tune"]) / len(part) < 0.25
    assert not set(cut["tune"]["text"]) & set(cut["train"]["text"])


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
    rows = [("film", "label-0"), (tiny_texts(1, seed=3)[0], "label-1")]
    again = write_csv(tmp_path / "again.csv", rows)
    offramp("record", place / "exits", "-d", again, "-o", tmp_path / "again.table")
    twice = offramp(*one[:1], tmp_path / "more.table", tmp_path / "again.table", *one[2:])
    assert twice.code == 2
    assert "hold 1 of the same rows, which would count twice" in twice.err


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
    assert (info["method"], info["exits_read"]) == ("attach", "the mean of the tokens")


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


@pytest.mark.parametrize(
    "command",
    [
        (
            "train",
            "{place}/stock",
            "-d",
            "{place}/rows.csv",
            "--max-steps",
            "2",
            "--pooling",
            "cls",
        ),
        ("attach", "{place}/stock", "-d", "{place}/texts.csv", "--max-steps", "2"),
        ("record", "{exits}", "-d", "{place}/rows.csv"),
    ],
    ids=lambda command: command[0],
)
def test_what_was_made_is_told_to_scripts_as_info_tells_it(
    command: tuple[str, ...],
    place: Path,
    exits: Path,
    tmp_path: Path,
    offramp: Callable[..., Said],
) -> None:
    words, made = [word.format(exits=exits, place=place) for word in command], tmp_path / "made"
    said = offramp(*words, "-o", made, "--json")
    assert said.code == 0, said.err
    assert said.document == {"folder": str(made), **offramp("info", made, "--json").document}


@pytest.mark.parametrize(
    "command",
    [
        ("predict", "{exits}", "A film.", "--point", "full"),
        ("record", "{exits}", "-d", "{place}/rows.csv", "-o", "{new}/some.table"),
        ("evaluate", "{exits}", "-d", "{place}/rows.csv", "--point", "full", "--no-speed"),
    ],
    ids=lambda command: command[0],
)
def test_threads_are_as_many_as_asked(
    command: tuple[str, ...],
    place: Path,
    exits: Path,
    tmp_path: Path,
    offramp: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    words = [word.format(exits=exits, place=place, new=tmp_path) for word in command]
    said = offramp(*words, "--threads", 3)
    assert (said.code, asked) == (0, [3]), said.err
    assert offramp(*words, "--threads", 0).code == 2


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


def test_a_table_of_test_rows_is_not_offered_to_a_choice(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    new = tmp_path / "a table"
    said = offramp("record", exits, "-d", place / "rows.csv", "-o", new, "--role", "test")
    assert f"offramp report '{new}'" in said.out
    said = offramp("record", exits, "-d", place / "texts.csv", "-o", tmp_path / "more")
    assert "--max-disagreement 1%" in said.out


def test_a_regression_model_is_tuned_by_the_correlation_it_may_lose(
    tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    save_tiny_stock(tmp_path / "scorer", problem_type="regression")
    rows = [(text, f"{len(text) / 40:.2f}") for text in tiny_texts(120)]
    data = write_csv(tmp_path / "rows.csv", rows, ("text", "score"))
    given = ["--pooling", "mean", "--no-speed", "--epochs", 1, "-o", tmp_path / "out", "--quiet"]
    said = offramp("tune", tmp_path / "scorer", "-d", data, "--max-drop", "50%", *given, "--json")
    assert said.code in (0, 3), said.err
    assert (tmp_path / "out" / "points" / "default.json").is_file()


def test_a_policy_may_be_given_with_its_options(place: Path, offramp: Callable[..., Said]) -> None:
    policy = '{"name": "agreement", "divergence": "kl", "threshold": 9, "patience": 1}'
    given = ["calibrate", place / "tune.table", "--max-disagreement", "99%", "--policy", policy]
    found = offramp(*given, "--json").document["point"]["policy"]
    assert found["name"] == "fixed" or found["divergence"] == "kl"
    assert specs(["patience", policy]) == ["patience", json.loads(policy)]


def test_info_tells_of_sound_points_beside_one_that_is_broken(
    place: Path, exits: Path, tmp_path: Path, offramp: Callable[..., Said]
) -> None:
    model = Path(shutil.copytree(exits, tmp_path / "model"))
    offramp("calibrate", place / "tune.table", "--model", model, "--target-speedup", "2")
    OperatingPoint.load(model).model_copy(update={"name": "fast"}).save(model)
    file = model / "points" / "default.json"
    file.write_text(file.read_text().replace('"cost"', '"price"'))
    said = offramp("info", model)
    assert said.code == 0
    assert re.search(r"\n +fast +\w+ \(", said.out)
    assert re.search(r"default cannot be used: .*default\.json.*cost", said.out)
    points = offramp("info", model, "--json").document["points"]
    assert ["broken" in point for point in points] == [True, False]


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


INJECTED = """
import sys
import offramp.cli.info as command
from offramp.cli.main import main
command._facts = lambda folder: {}
sys.exit(main(["info", "."]))
"""


def test_a_bug_stays_a_traceback_and_exit_code_1() -> None:
    run = run_python(INJECTED.format("1 / 0"))
    assert run.returncode == 1
    assert "Traceback" in run.stderr
    assert "ZeroDivisionError" in run.stderr


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    code = INJECTED.format("{str(n): 'x' * 1000 for n in range(1000)}")
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 0


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
