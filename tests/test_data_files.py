"""Reading files: what is in them survives, what is wrong with them is said."""

from __future__ import annotations

import csv
import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from offramp.data import load_examples
from offramp.errors import ConfigError, DataError

quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Everything but the characters that UTF-8 cannot hold.
any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward = any_text | st.sampled_from(
    [
        "NA",
        "null",
        "nan",
        "None",
        "",
        ' a "stray quote',
        "a\rb",
        "\r",
        "a\u2028b",
        "\ufeffa",
        "\x00",
    ]
)


@pytest.mark.parametrize(
    ("file", "rows", "columns"),
    [
        ("sst2/train.tsv.gz", 67_349, {"text", "label", "row"}),
        ("sst2/dev.tsv.gz", 872, {"text", "label", "row"}),
        ("mrpc/train.tsv.gz", 3_668, {"text", "text_pair", "label", "row"}),
        ("mrpc/dev.tsv.gz", 408, {"text", "text_pair", "label", "row"}),
        ("stsb/train.tsv.gz", 5_749, {"text", "text_pair", "label", "row"}),
        ("stsb/dev.tsv.gz", 1_500, {"text", "text_pair", "label", "row"}),
        ("uspto_50k/train.tsv.gz", 40_029, {"text", "label", "row"}),
        ("uspto_50k/dev.tsv.gz", 5_004, {"text", "label", "row"}),
        ("qnli/dev.tsv.gz", 5_463, {"text", "text_pair", "label", "row"}),
        ("movie_reviews/all.jsonl.gz", 2_000, {"text", "label", "row"}),
        ("truthfulqa/TruthfulQA.csv.gz", 817, {"text", "label", "row"}),
    ],
)
def test_a_real_file_has_the_rows_its_readme_states(
    shared_path: Callable[..., Path], file: str, rows: int, columns: set[str]
) -> None:
    dataset = load_examples(shared_path("data", *file.split("/")))
    assert len(dataset) == rows
    assert set(dataset.column_names) == columns


@pytest.mark.parametrize("name", ["sst2/train", "mrpc/train", "stsb/dev"])
def test_a_real_tsv_has_one_row_per_line_after_the_header(
    shared_path: Callable[..., Path], name: str
) -> None:
    path = shared_path("data", *f"{name}.tsv.gz".split("/"))
    lines = gzip.decompress(path.read_bytes()).count(b"\n")
    assert len(load_examples(path)) == lines - 1


@quick
@given(
    cells=st.lists(
        st.tuples(*[awkward.map(lambda t: re.sub(r"[\t\n]", " ", t))] * 2), min_size=1, max_size=20
    ),
    windows=st.booleans(),
    final=st.booleans(),
)
def test_a_tsv_gives_back_every_character(
    tmp_path: Path, cells: list[tuple[str, str]], windows: bool, final: bool
) -> None:
    end = "\r\n" if windows else "\n"
    text = end.join("\t".join(row) for row in [("sentence1", "sentence2"), *cells])
    (tmp_path / "a.tsv").write_bytes((text + end * final).encode())
    dataset = load_examples(tmp_path / "a.tsv")
    assert list(zip(dataset["text"], dataset["text_pair"], strict=True)) == cells
    assert dataset["row"][:] == list(range(len(cells)))


@quick
@given(cells=st.lists(st.tuples(awkward, awkward), min_size=1, max_size=20))
def test_a_csv_gives_back_every_character(tmp_path: Path, cells: list[tuple[str, str]]) -> None:
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as handle:
        writer = csv.writer(handle, quoting=csv.QUOTE_ALL)
        writer.writerows([("text", "text_pair"), *cells])
    dataset = load_examples(tmp_path / "a.csv")
    assert list(zip(dataset["text"], dataset["text_pair"], strict=True)) == cells


@quick
@given(texts=st.lists(awkward, min_size=1, max_size=20), ascii_only=st.booleans())
def test_jsonl_and_parquet_give_back_every_character(
    tmp_path: Path, texts: list[str], ascii_only: bool
) -> None:
    lines = [json.dumps({"text": text}, ensure_ascii=ascii_only) for text in texts]
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    assert load_examples(tmp_path / "a.jsonl")["text"][:] == texts
    assert load_examples(tmp_path / "a.parquet")["text"][:] == texts


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\nhello,1\n")
    assert load_examples(tmp_path / "a.csv")[0] == {"text": "hello", "label": 1, "row": 0}


def test_a_csv_field_may_be_longer_than_the_csv_modules_default(tmp_path: Path) -> None:
    long = "word " * 100_000
    (tmp_path / "a.csv").write_text(f'text,label\n"{long}",0\n')
    assert load_examples(tmp_path / "a.csv")["text"][0] == long


def test_a_gzipped_file_is_read_like_the_plain_one(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", "b"], "label": [0.5, 1.5]})
    pq.write_table(table, tmp_path / "a.parquet")
    for name, plain in [
        ("a.tsv", b"text\tlabel\na\t0.5\nb\t1.5\n"),
        ("a.csv", b"text,label\na,0.5\nb,1.5\n"),
        ("a.jsonl", b'{"text":"a","label":0.5}\n\n{"text":"b","label":1.5}'),
        ("a.parquet", (tmp_path / "a.parquet").read_bytes()),
    ]:
        (tmp_path / name).write_bytes(plain)
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(plain, mtime=0))
        rows = load_examples(tmp_path / name).to_list()
        assert rows == load_examples(tmp_path / f"{name}.gz").to_list()
        assert rows[1] == {"text": "b", "label": 1.5, "row": 1}


def test_a_changed_file_is_read_anew(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\nold\n")
    assert load_examples(file)["text"][:] == ["old"]
    file.write_text("text\nnew\n")
    assert load_examples(file)["text"][:] == ["new"]


def test_no_file_is_written_and_no_home_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    monkeypatch.setenv("HOME", "/nowhere")
    monkeypatch.chdir(tmp_path)
    load_examples("a.csv", max_rows=1)
    assert [file.name for file in tmp_path.iterdir()] == ["a.csv"]


# --- columns --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "text", "pair", "label"),
    [
        ("text,label", "text", None, "label"),
        ("Text,Label", "Text", None, "Label"),
        ("label,rating,id,text", "text", None, "label"),
        ("sentence,label", "sentence", None, "label"),
        ("reaction,class", "reaction", None, "class"),
        ("sentence1,sentence2,score,genre", "sentence1", "sentence2", "score"),
        ("premise,hypothesis,label", "premise", "hypothesis", "label"),
        ("question,sentence,label,fold", "question", "sentence", "label"),
        ("text,sentence1,sentence2,labels,score", "text", None, "labels"),
        ("id,review", "review", None, None),
    ],
)
def test_columns_are_found_by_convention(
    tmp_path: Path, header: str, text: str, pair: str | None, label: str | None
) -> None:
    names = header.split(",")
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join(f'in {name}' for name in names)}\n")
    row = load_examples(tmp_path / "a.csv")[0]
    found = [row.get(name) for name in ("text", "text_pair", "label")]
    assert found == [None if name is None else f"in {name}" for name in (text, pair, label)]


@pytest.mark.parametrize(
    ("header", "named", "said"),
    [
        ("title,body", {}, "reads 'body'"),
        ("body,rating", {}, "reads 'body', 'rating'"),
        ("title,body", {"text": "body"}, ""),
        ("text,label", {}, ""),
    ],
)
def test_a_column_that_was_guessed_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, header: str, named: dict[str, str], said: str
) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(f"{header}\none,1\nother,2\n")
    with caplog.at_level(logging.INFO, "offramp"):
        load_examples(path, **named)
    assert ("reads" in caplog.text) == bool(said)
    assert said in caplog.text


def test_columns_are_named_by_options(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,z,text,label\n1,2,3,4,5\n")
    dataset = load_examples(tmp_path / "a.csv", text="x", text_pair="y", label="z")
    assert dataset[0] == {"text": "1", "text_pair": "2", "label": 3, "row": 0}


@pytest.mark.parametrize(
    ("header", "options", "words"),
    [
        ("phrase,label", {}, ["phrase, label", "--text"]),
        ("sentences,label", {}, ["Did you mean 'sentences'?", "--text"]),
        ("review,comment", {}, ["more than one", "review, comment", "--text"]),
        ("premise,hypothesis,question1,question2", {}, ["premise + hypothesis", "--text-pair"]),
        ("text,score,rating", {}, ["more than one", "score, rating", "--label"]),
        ("text,label", {"text": "txt"}, ["'txt'", "--text", "Did you mean 'text'?"]),
        ("text,label", {"label": "lable"}, ["--label", "Did you mean 'label'?"]),
        ("text,label", {"text": "text", "text_pair": "text2"}, ["'text2'", "--text-pair"]),
        ("text,label", {"label": "text"}, ["named twice"]),
        ("text,text", {}, ["'text' twice"]),
    ],
)
def test_columns_that_are_missing_or_ambiguous_are_named(
    tmp_path: Path, header: str, options: dict[str, str], words: list[str]
) -> None:
    (tmp_path / "a.csv").write_text(f"{header}\n{','.join('x' for _ in header.split(','))}\n")
    with pytest.raises(DataError) as problem:
        load_examples(tmp_path / "a.csv", **options)  # type: ignore[arg-type]
    for word in ["a.csv", *words]:
        assert word in str(problem.value)


def test_a_pair_without_a_first_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,other\na,b\n")
    with pytest.raises(ConfigError, match="--text must name the first"):
        load_examples(tmp_path / "a.csv", text_pair="other")


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", b"", ["empty"]),
        ("a.csv", b"\n\n", ["empty"]),
        ("a.tsv", b"text\tlabel\n", ["no rows"]),
        ("a.csv", b"text,label\n", ["no rows"]),
        ("a.jsonl", b" \n\n", ["no rows"]),
        ("a.csv", b"text,label\na,1\n\xff\xfe,1\n", ["line 3", "UTF-8"]),
        ("a.tsv", b"text\tlabel\na\t1\nb\nc\t1\nd\t1\t2\n", ["line 3", "1 fields", "2 such"]),
        ("a.tsv", b"text\tlabel\na\t1\n\n", ["line 3"]),
        ("a.csv", b'text,label\n"a\nb",1\nc\n', ["line 4", "1 fields"]),
        ("a.csv", b'text,label\na,1\n"b,1\nc,1\n', ["line 3", "not valid CSV"]),
        ("a.csv", b'text,label\n"a" b,1\n', ["line 2", "not valid CSV"]),
        ("a.csv.gz", b"text\nnot gzipped\n", ["cannot be read"]),
        ("a.csv.gz", gzip.compress(b"text\n" + b"a\n" * 999, mtime=0)[:-9], ["cannot be read"]),
        ("a.parquet", b"PAR1 and nothing else", ["Parquet"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', ["line 2", "list"]),
        ("a.jsonl", b"[" * 100_000, ["line 1", "not JSON"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"label": 1}\n', ["row 1 (line 3)", "'text' is missing"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": null}\n', ["row 1 (line 2)", "missing"]),
        ("a.jsonl", b'{"text": null}\n', ["missing in every row"]),
        ("a.jsonl", b'{"text": 7}\n{"text": "a"}\n{"text": "b"}', ["row 0", "a number", "text"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n{"text": NaN}', ["row 2", "a number"]),
        ("a.jsonl", b'{"text": 7}\n', ["int64, not text"]),
        ("a.jsonl", b'{"text": {"a": 1}}\n', ["not text"]),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\\ud800"}\n', ["row 1", "'text'"]),
        ("a.jsonl", b'{"text": "a", "label": 1}\n{"text": "b", "label": "x"}', ["row 1", "text"]),
        ("a.jsonl", b'{"text": "a", "label": [1]}\n{"text": "b", "label": 1}', ["row 1", "list"]),
        ("a.jsonl", b'{"text": "a", "label": [1, "x"]}', ["label"]),
        ("a.jsonl", b'{"text": "a", "label": {"x": 1}}', ["struct", "--label"]),
        ("a.jsonl", b'{"text": "a", "label": 99999999999999999999}', ["row 0", "'label'"]),
        ("a.json", b'[{"text": "a"}]', [".jsonl"]),
        ("a.xlsx", b"anything", ["Allowed: .csv, .tsv, .jsonl, .parquet"]),
    ],
)
def test_a_bad_file_is_one_clear_error(
    tmp_path: Path, name: str, content: bytes, words: list[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as problem:
        load_examples(tmp_path / name)
    for word in [name, *words]:
        assert word in str(problem.value)


def test_a_truncated_parquet_file_is_one_clear_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["some text"] * 1000}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    for end in range(1, len(whole), 7):
        (tmp_path / "a.parquet").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"a\.parquet"):
            load_examples(tmp_path / "a.parquet")


def test_a_missing_file_offers_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("text\na\n")
    with pytest.raises(DataError, match=r"no such file\. Did you mean 'train\.csv'\?"):
        load_examples(str(tmp_path / "trian.csv"))
    with pytest.raises(DataError, match="no such file"):
        load_examples("nowhere/at/all.tsv")
    with pytest.raises(DataError, match="holds no images"):
        load_examples(tmp_path)
    with pytest.raises(DataError):
        load_examples("x" * 5000)


def test_a_hub_set_that_cannot_be_reached_is_one_clear_error() -> None:
    with pytest.raises(DataError, match="neither a file nor a dataset"):
        load_examples("nobody/nothing:config")


def test_a_hub_id_may_name_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    found = DatasetDict(train=Dataset.from_dict({"sentence": ["a"]}))
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *given: asked.append(given) or found)
    assert load_examples("owner/name:sst2", split="train")["text"][:] == ["a"]
    assert len(load_examples("owner/name")) == 1
    assert asked == [("owner/name", "sst2"), ("owner/name", None)]


def test_a_source_of_another_type_is_refused() -> None:
    with pytest.raises(DataError, match="list"):
        load_examples(["a"])  # type: ignore[arg-type]


# --- Dataset and DatasetDict ----------------------------------------------------------


def test_a_dataset_is_taken_as_it_is_selected() -> None:
    given = Dataset.from_dict({"sentence": ["a", "b", "c"], "label": [0, 1, 0]})
    dataset = load_examples(given.select([2, 0]).with_format("torch"))
    assert dataset.to_list() == [
        {"text": "c", "label": 0, "row": 0},
        {"text": "a", "label": 0, "row": 1},
    ]


def test_splits_are_named_where_there_are_several() -> None:
    part = Dataset.from_dict({"text": ["a"]})
    assert len(load_examples(DatasetDict(train=part))) == 1
    both = DatasetDict(train=part, test=part)
    assert len(load_examples(both, split="test")) == 1
    with pytest.raises(DataError, match=r"splits train, test and no split was given.*--split"):
        load_examples(both)
    with pytest.raises(DataError, match="Did you mean 'train'"):
        load_examples(both, split="trian")
    with pytest.raises(DataError, match="has no splits"):
        load_examples(part, split="train")


def test_class_names_survive_a_dataset_and_its_parquet_file(tmp_path: Path) -> None:
    names = ClassLabel(names=["no", "yes"])
    features = Features({"text": Value("string"), "label": names})
    given = Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    given.to_parquet(tmp_path / "a.parquet")
    for source in (given, tmp_path / "a.parquet"):
        assert load_examples(source).features["label"] == names
    sets = Features({"text": Value("string"), "label": List(names)})
    several = Dataset.from_dict({"text": ["a", "b"], "label": [[1, 0], []]}, features=sets)
    assert load_examples(several).features["label"] == List(names)


def test_a_test_split_without_its_labels_has_no_label_column() -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    hidden = Dataset.from_dict({"text": ["a", "b"], "label": [-1, -1]}, features=features)
    assert "label" not in load_examples(hidden).column_names
    missing = Dataset.from_dict({"text": ["a", "b"], "label": [None, None]})
    assert "label" not in load_examples(missing).column_names


def test_texts_in_other_arrow_types_are_text() -> None:
    values = pa.array(["a", "b", "a"])
    for column in (values.cast(pa.large_string()), values.dictionary_encode()):
        source = Dataset(pa.table({"text": column}))
        assert load_examples(source)["text"][:] == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("cells", "labels"),
    [
        (["0", "1", "-2"], [0, 1, -2]),
        (["0", "1.5", "1e3"], [0.0, 1.5, 1000.0]),
        (["01", "02"], ["01", "02"]),
        (["1_0", "2"], ["1_0", "2"]),
        (["a", "1"], ["a", "1"]),
        (["1", ""], [1, None]),
        (["99999999999999999999", "1"], [1e20, 1.0]),
    ],
)
def test_labels_in_text_files_are_read_as_numbers_where_all_are(
    tmp_path: Path, cells: list[str], labels: list[object]
) -> None:
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(f"t\t{cell}\n" for cell in cells))
    assert load_examples(tmp_path / "a.tsv")["label"][:] == labels
