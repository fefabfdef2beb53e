"""Claims about what a call, or one row, may ask for: another point, a budget, a certificate."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from offramp.calibration import calibrate
from offramp.cli.main import main
from offramp.data import encode
from offramp.engines import Budget, record
from offramp.errors import ConfigError, DataError, PointError
from offramp.policies import Fixed, Full
from offramp.prediction import Predictor, predict, predict_file
from offramp.prediction.pipeline import pipeline
from offramp.testing import save_tiny, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(60, seed=3)
TIERS = [("fast", None, "safe")[row % 3] for row in range(len(TEXTS))]
DEPTH = 6


@pytest.fixture(scope="module", name="folder")
def folder_fixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`default` leaves after layer 4, `fast` after 2, and `safe` never."""
    folder = save_tiny(tmp_path_factory.mktemp("rows") / "tiny")
    model, tokenizer = tiny_model(), tiny_tokenizer()
    dataset, _ = encode(Dataset.from_dict({"text": tiny_texts(300)}), tokenizer)
    table = record(model, dataset, folder.parent / "table", "tune", processor=tokenizer)
    policies = {"default": Fixed(layer=4), "fast": Fixed(layer=2), "safe": Full()}
    for name, policy in policies.items():
        calibrate(table, target_speedup=1.01, policies=[policy], name=name).point.save(folder)
    return folder


@pytest.fixture(name="csv_file")
def csv_fixture(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    with open(path, "w", newline="") as handle:
        rows = csv.writer(handle)
        rows.writerow(["text", "plan"])
        rows.writerows(zip(TEXTS, [tier or "" for tier in TIERS], strict=True))
    return path


def items() -> list[dict[str, Any]]:
    return [{"text": text, "point": tier} for text, tier in zip(TEXTS, TIERS, strict=True)]


def layers(entries: Any) -> list[int]:
    return [entry["exit_layer"] for entry in entries]


WANTED = [{"fast": 2, None: 4, "safe": DEPTH}[tier] for tier in TIERS]


def test_each_row_is_answered_at_the_point_it_names(folder: Path) -> None:
    predictor = Predictor.load(folder)
    found = list(predict(predictor, items()))
    assert layers(found) == WANTED
    for name in ("fast", "default", "safe"):
        alone = list(predict(predictor, TEXTS, point=name))
        same = [row for row, tier in enumerate(TIERS) if (tier or "default") == name]
        assert [found[row]["label"] for row in same] == [alone[row]["label"] for row in same]


def test_a_column_names_points_for_files_of_all_kinds(
    folder: Path, csv_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "answers.jsonl"
    options = ["--data", str(csv_file), "--output", str(out), "--point-column", "plan", "-q"]
    assert main(["predict", str(folder), *options]) == 0
    assert layers(map(json.loads, out.read_text().splitlines())) == WANTED


def test_lines_of_json_name_points(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    pairs = zip(TEXTS, [tier or (None, "")[row % 2] for row, tier in enumerate(TIERS)], strict=True)
    lines = "".join(json.dumps({"text": text, "plan": tier}) + "\n" for text, tier in pairs)
    source = tmp_path / "lines"
    source.write_text(lines)
    with open(source, "rb") as handle:
        monkeypatch.setattr("offramp.cli.predict._STDIN", handle.fileno())
        assert main(["predict", str(folder), "-", "--point-column", "plan", "-q"]) == 0
    assert layers(map(json.loads, capsys.readouterr().out.splitlines())) == WANTED


def test_rows_may_have_budgets_of_their_own(folder: Path) -> None:
    classify = pipeline(str(folder))
    asked = [{"text": text, "max_depth": 1 + row % 6} for row, text in enumerate(TEXTS)]
    found = classify(asked)
    assert layers(found) == [min(4, 1 + row % 6) for row in range(len(TEXTS))]
    assert ["forced" in entry for entry in found] == [row % 6 < 3 for row in range(len(TEXTS))]


def test_a_row_cannot_ask_for_more_than_the_call_allows(folder: Path) -> None:
    predictor, allowed = Predictor.load(folder, "full"), Budget(depth=3, seconds=600)
    asked = [{"text": text, "max_depth": depth} for depth, text in enumerate(TEXTS[:6], start=1)]
    assert layers(predict(predictor, asked, budget=allowed)) == [1, 2, 3, 3, 3, 3]


def test_a_stream_refuses_rows_that_ask_for_themselves(folder: Path) -> None:
    predictor = Predictor.load(folder)
    with pytest.raises(ConfigError, match="one asks for max_depth"):
        list(predictor.stream([{"text": "fine"}, {"text": "a", "max_depth": 1}]))


@pytest.fixture(scope="module", name="tempered")
def tempered_fixture(folder: Path) -> Path:
    """Points of one policy, `plain` and with temperatures, `true`; and `deep` of full depth."""
    rows = {"text": tiny_texts(300), "label": [row % 3 for row in range(300)]}
    dataset, _ = encode(Dataset.from_dict(rows), tiny_tokenizer())
    place = folder.parent / "labelled"
    table = record(tiny_model(), dataset, place, "tune", processor=tiny_tokenizer())
    for name, policy, more in (
        ("plain", Fixed(layer=4), {"sets": 0.9}),
        ("true", Fixed(layer=4), {"temperatures": True}),
        ("deep", Full(), {"temperatures": True}),
    ):
        found = calibrate(table, max_disagreement=0.99, policies=[policy], name=name, **more)
        found.point.save(folder)
    return folder


def scores(entries: Any) -> list[float]:
    return [entry["score"] for entry in entries]


def test_points_of_one_policy_keep_their_own_temperatures(tempered: Path) -> None:
    names, texts = ("plain", "true", "full", "deep"), TEXTS[:5]
    fresh = {name: scores(predict(tempered, texts, point=name)) for name in names}
    assert fresh["plain"] != fresh["true"]
    assert fresh["full"] != fresh["deep"]
    shared = Predictor.load(tempered)
    for name in (*names, *reversed(names)):
        assert scores(predict(shared, texts, point=name)) == pytest.approx(fresh[name])
    mixed = [{"text": text, "point": name} for text in texts for name in names]
    wanted = [fresh[name][row] for row in range(len(texts)) for name in names]
    assert scores(predict(shared, mixed)) == pytest.approx(wanted)


def test_sets_are_of_one_point(tempered: Path, tmp_path: Path) -> None:
    asked = [{"text": "a", "point": "fast"}]
    with pytest.raises(ConfigError, match="Sets belong to one point"):
        list(predict(tempered, asked, point="plain", sets=True))
    rows = Dataset.from_list([{"text": "a", "plan": "fast"}])
    out = tmp_path / "out.csv"
    with pytest.raises(ConfigError, match="Sets belong to one point"):
        predict_file(tempered, rows, out, point="plain", sets=True, points="plan")
    assert not list(tmp_path.iterdir())


def test_the_set_of_a_forced_answer_leaves_nothing_out(tempered: Path) -> None:
    said = predict(tempered, TEXTS, point="plain", sets=True, budget=Budget(depth=2))
    assert {len(entry["set"]) for entry in said} == {3}


def test_a_budget_of_the_call_is_kept_and_told(folder: Path, tmp_path: Path) -> None:
    rows = Dataset.from_dict({"text": TEXTS})
    out = tmp_path / "answers.csv"
    summary = predict_file(folder, rows, out, budget=Budget(depth=3), progress=False)
    assert summary.exit_histogram == [0, 0, 60, 0, 0, 0]
    with open(out, newline="") as handle:
        assert {row["forced"] for row in csv.DictReader(handle)} == {"True"}


def test_a_budget_that_nobody_reaches_changes_no_answer(folder: Path) -> None:
    predictor = Predictor.load(folder)
    plain = list(predict(predictor, TEXTS))
    wide = list(predict(predictor, TEXTS, budget=Budget(depth=5, seconds=600)))
    assert [{k: v for k, v in entry.items() if k != "forced"} for entry in wide] == plain
    assert not any(entry["forced"] for entry in wide)


def test_a_killed_run_does_not_go_on_under_another_budget(folder: Path, tmp_path: Path) -> None:
    rows, out = Dataset.from_dict({"text": TEXTS}), tmp_path / "answers.jsonl"
    predictor, seen = Predictor.load(folder, max_rows=8), 0

    def die(answers: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == 3:
            raise KeyboardInterrupt

    run = predictor._along
    predictor._along = lambda course, part, note: run(course, part, die)  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        predict_file(predictor, rows, out, progress=False)
    again = predict_file(folder, rows, out, budget=Budget(depth=2), progress=False)
    assert again.resumed == 0
    assert again.exit_histogram[1] == 60


@pytest.mark.parametrize(
    ("item", "error", "said"),
    [
        ({"text": "a", "point": "fats"}, PointError, "no operating point 'fats'"),
        ({"text": "a", "max_depth": 0}, ConfigError, "runs no layer"),
        ({"text": "a", "max_depth": "3"}, ConfigError, "runs no layer"),
        ({"text": "a", "max_seconds": -1}, ConfigError, "no time"),
        ({"text": "a", "point": 5}, PointError, "Not an operating point: 5"),
        ({"text": "a", "depth": 3}, DataError, "Not a text"),
    ],
)
def test_a_wish_that_makes_no_sense_is_refused(
    folder: Path, item: Any, error: type[Exception], said: str
) -> None:
    with pytest.raises(error, match=said):
        Predictor.load(folder).answer(["fine", item])


def test_an_unknown_point_in_a_column_is_found_before_the_work(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text("text,plan\nfine,fast\nalso,fats\n")
    options = ["--data", str(path), "-o", str(tmp_path / "out.csv"), "--point-column", "plan"]
    assert main(["predict", str(folder), *options]) == 2
    assert "no operating point 'fats'. Did you mean 'fast'?" in capsys.readouterr().err
    assert not (tmp_path / "out.csv").exists()


def test_points_stand_in_a_column_of_names(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["predict", str(folder), "a text", "--point-column", "plan"]) == 2
    assert "--point-column is for --data" in capsys.readouterr().err
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "plan": ["fast"]}\n')
    assert main(["predict", str(folder), "--data", str(path), "--point-column", "plan"]) == 2
    assert "column 'plan' holds no names" in capsys.readouterr().err


def test_only_certified_points_are_run_where_that_is_asked(
    folder: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(["predict", str(folder), "a text", "--certified"]) == 2
    assert "a choice without a certificate" in capsys.readouterr().err
    assert main(["predict", str(folder), "a text", "--certified", "--point", "full"]) == 0
    with pytest.raises(PointError, match="no certificate"):
        Predictor.load(folder, Fixed(layer=2), certified=True)
