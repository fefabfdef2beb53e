"""Claims about columns of the data that stand beside the answers."""

from __future__ import annotations

import csv
import datetime
import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from offramp.cli.main import main
from offramp.errors import ConfigError, DataError
from offramp.policies import MaxProbability
from offramp.prediction import Predictor, predict, predict_file
from offramp.testing import save_tiny, tiny_model, tiny_texts, tiny_tokenizer

TEXTS = tiny_texts(40, seed=5)
SHARED = Predictor(tiny_model(), tiny_tokenizer(), MaxProbability(threshold=0.8))
IDS = [f"row-{number}" for number in range(len(TEXTS))]


def data(**columns: Any) -> Dataset:
    return Dataset.from_dict({"text": TEXTS, "id": IDS, **columns})


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_what_is_kept_stands_beside_its_rows_answer(tmp_path: Path, name: str) -> None:
    bare, full = tmp_path / name, tmp_path / f"kept-{name}"
    predict_file(SHARED, data(), bare)
    predict_file(SHARED, data(), full, keep=["id"])
    found = rows(full)
    assert [list(row)[:2] for row in found] == [["row", "id"]] * len(TEXTS)
    assert [row.pop("id") for row in found] == IDS
    assert found == rows(bare)


def rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    lines = path.read_text().splitlines()
    return [*csv.DictReader(lines)] if path.suffix == ".csv" else list(map(json.loads, lines))


def test_the_stream_keeps_columns_as_the_file_does(tmp_path: Path) -> None:
    output = tmp_path / "a.jsonl"
    predict_file(SHARED, data(), output, keep=["id"], max_rows=9)
    written = rows(output)
    assert list(predict(SHARED, data(), keep=["id"], max_rows=9)) == written
    assert [row["id"] for row in written] == [IDS[row["row"]] for row in written]


def test_numbers_stay_numbers_and_what_json_does_not_know_becomes_null_or_text() -> None:
    count = len(TEXTS)
    given = data(
        price=[math.nan, math.inf, *([1.5] * (count - 2))],
        day=[datetime.date(2024, 1, 2)] * count,
        seen=[True] * count,
        number=list(range(count)),
    )
    names = ["price", "day", "seen", "number"]
    found = list(predict(SHARED, given, keep=names))
    assert [row["price"] for row in found] == [None, None, *([1.5] * (count - 2))]
    assert found[7]["day"] == "2024-01-02"
    assert (found[7]["seen"], found[7]["number"]) == (True, 7)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("score", ConfigError, "the answers have a 'score' of their own"),
        ("idd", DataError, "no column 'idd' (--keep). Did you mean 'id'?"),
        ("parts", DataError, "what is kept is text, numbers or truth values"),
    ],
)
def test_a_column_that_cannot_be_kept_is_named_before_the_work(
    tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    given = data(score=[0.5] * len(TEXTS), parts=[[1, 2]] * len(TEXTS))
    with pytest.raises(error) as caught:
        predict_file(SHARED, given, tmp_path / "a.jsonl", keep=[name])
    assert says in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_columns_of_files_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_tiny(tmp_path / "model")
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n007,good\n008,bad\n")
    given = ["predict", str(folder), "-d", str(path), "--keep", "id", "-q"]
    assert main(given) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["id"] for row in said] == ["007", "008"]
    assert main(["predict", str(folder), "good", "--keep", "id", "-q"]) == 2
    assert "--keep names a column of --data FILE." in capsys.readouterr().err
