"""Which task labels pose, and what they become."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, Dataset, Features, List, Value
from pydantic import ValidationError

from offramp.data import Task, encode_labels, infer_task, load_examples, majority_share
from offramp.errors import ConfigError, DataError

SINGLE, MULTI, SCORE = (
    "single_label_classification",
    "multi_label_classification",
    "regression",
)
NAMES = {0: "negative", 1: "positive"}


def labelled(labels: list[Any], names: list[str] | None = None) -> Dataset:
    columns = {"text": [f"text {row}" for row in range(len(labels))], "label": labels}
    if names is None:
        return load_examples(Dataset.from_dict(columns))
    features = Features({"text": Value("string"), "label": ClassLabel(names=names)})
    return load_examples(Dataset.from_dict(columns, features=features))


def encoded(labels: list[Any], task: Task, names: list[str] | None = None) -> list[Any]:
    return list(encode_labels(labelled(labels, names), task)["label"])


@pytest.mark.parametrize(
    ("labels", "kind", "names"),
    [
        (["pos", "neg", "pos"], SINGLE, ("neg", "pos")),
        ([10, 2, 2], SINGLE, ("2", "10")),
        (["10", "2"], SINGLE, ("2", "10")),
        ([True, False], SINGLE, ("0", "1")),
        ([1.0, 2.5], SCORE, ()),
        ([["a"], ["b", "a"]], MULTI, ("a", "b")),
        ([[0, 2], [1]], MULTI, ("0", "1", "2")),
        ([[0, 1, 1], [1, 0, 0]], MULTI, ("0", "1", "2")),
    ],
)
def test_labels_tell_the_task(labels: list[Any], kind: str, names: tuple[str, ...]) -> None:
    task = infer_task(labelled(labels))
    assert task == Task(problem_type=kind, labels=names)
    assert task.num_labels == max(1, len(names))


def test_a_model_tells_the_task() -> None:
    rows = labelled(["a", "b"])
    assert infer_task(rows, id2label=NAMES).labels == ("negative", "positive")
    assert infer_task(rows, id2label={"1": "b", "0": "a"}).labels == ("a", "b")  # type: ignore[dict-item]
    assert infer_task(labelled([1, 2]), id2label={0: "LABEL_0"}).problem_type == SCORE
    assert infer_task(labelled([1.0, 0.0]), id2label=NAMES).problem_type == SINGLE
    unlabelled = load_examples(Dataset.from_dict({"text": ["a"]}))
    assert infer_task(unlabelled, id2label=NAMES).num_labels == 2


def test_a_given_problem_type_overrules() -> None:
    assert infer_task(labelled([1, 2]), problem_type=SCORE).num_labels == 1
    assert infer_task(labelled([1.0, 0.0]), problem_type=SINGLE).labels == ("0", "1")
    with pytest.raises(ConfigError, match="Did you mean 'regression'"):
        infer_task(labelled([1]), problem_type="regresion")


def test_named_classes_of_a_dataset_keep_their_order() -> None:
    task = infer_task(labelled([1, 1, 0], names=["yes", "no"]))
    assert task.labels == ("yes", "no")
    assert task.id2label == {0: "yes", 1: "no"}


def test_labels_that_pose_no_task_are_refused() -> None:
    with pytest.raises(DataError, match=r"no labels.*--label"):
        infer_task(load_examples(Dataset.from_dict({"text": ["a"]})))
    with pytest.raises(DataError, match="All labels are 'a'"):
        infer_task(labelled(["a", "a"]))
    with pytest.raises(DataError, match="mix numbers"):
        infer_task(labelled(["1", "2", "n/a"]))
    with pytest.raises(DataError, match=r"Row 0.*list per row"):
        infer_task(labelled(["a", "b"]), problem_type=MULTI)


def test_a_task_is_strict_and_frozen() -> None:
    with pytest.raises(ValidationError):
        Task(problem_type="tagging")  # type: ignore[arg-type]
    with pytest.raises(ValidationError):
        Task(problem_type=SCORE).labels = ("a",)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["positive", "negative"], [1, 0]),
        (["Positive", "NEGATIVE"], [1, 0]),
        ([1, 0], [1, 0]),
        (["1", "0"], [1, 0]),
        ([1.0, 0.0], [1, 0]),
        (["LABEL_1", "label_0"], [1, 0]),
    ],
)
def test_class_labels_are_read_by_name_or_number(labels: list[Any], classes: list[int]) -> None:
    task = Task(problem_type=SINGLE, labels=("negative", "positive"))
    assert encoded(labels, task) == classes


def test_a_class_named_by_a_number_is_not_mistaken_for_that_number() -> None:
    stars = Task(problem_type=SINGLE, labels=("1", "2", "3"))
    assert encoded([1, 2, 3], stars) == [0, 1, 2]
    assert encoded([0, 1, 2], stars) == [0, 1, 2]
    assert encoded(["a", "A"], Task(problem_type=SINGLE, labels=("A", "a"))) == [1, 0]


@pytest.mark.parametrize(
    ("labels", "task"),
    [
        (["3", "1", "2"], infer_task(labelled([1, 2, 3]))),
        ([[1], [0, 2]], infer_task(labelled([[0, 1, 2], [1]]))),
        ([1, 2], Task(problem_type=SCORE)),
    ],
)
def test_encoding_twice_changes_nothing(labels: list[Any], task: Task) -> None:
    once = encode_labels(labelled(labels), task)
    assert encode_labels(once, task)["label"][:] == once["label"][:]


def test_named_classes_go_to_the_model_by_name_whatever_their_order() -> None:
    task = Task(problem_type=SINGLE, labels=("contradiction", "entailment", "neutral"))
    names = ["entailment", "neutral", "contradiction"]
    assert encoded([0, 1, 2], task, names) == [1, 2, 0]


def test_classes_matched_by_number_for_want_of_names_are_said_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    task = Task(problem_type=SINGLE, labels=("LABEL_0", "LABEL_1"))
    with caplog.at_level(logging.WARNING, logger="offramp"):
        assert encoded([0, 1, 1], task, ["no", "yes"]) == [0, 1, 1]
    assert [record.message for record in caplog.records] == [
        "The data calls its classes no, yes, the model LABEL_0, LABEL_1: "
        "classes are matched by number."
    ]


@pytest.mark.parametrize(
    ("labels", "rows"),
    [
        ([["b"], ["a", "c"], []], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        ([[1], [0, 2], []], [[0, 1, 0], [1, 0, 1], [0, 0, 0]]),
        ([[0, 1, 0], [1, 0, 1]], [[0, 1, 0], [1, 0, 1]]),
        ([[0.0, 1.0, 0.0]], [[0, 1, 0]]),
    ],
)
def test_label_sets_are_lists_of_classes_or_of_flags(
    labels: list[Any], rows: list[list[int]]
) -> None:
    assert encoded(labels, Task(problem_type=MULTI, labels=("a", "b", "c"))) == rows


def test_label_sets_of_named_classes_go_by_name() -> None:
    features = Features({"text": Value("string"), "label": List(ClassLabel(names=["x", "y"]))})
    given = Dataset.from_dict({"text": ["a", "b"], "label": [[0], [1, 0]]}, features=features)
    task = Task(problem_type=MULTI, labels=("y", "x"))
    assert encode_labels(load_examples(given), task)["label"][:] == [[0, 1], [1, 1]]


def test_scores_are_floats() -> None:
    assert encoded([1, 2], Task(problem_type=SCORE)) == [1.0, 2.0]
    assert encoded(["1.5", "2"], Task(problem_type=SCORE)) == [1.5, 2.0]


PAIR = Task(problem_type=SINGLE, labels=("negative", "positive"))
SET = Task(problem_type=MULTI, labels=("a", "b", "c"))
NUMBER = Task(problem_type=SCORE)


@pytest.mark.parametrize(
    ("labels", "task", "message"),
    [
        (["positive", "negativ"], PAIR, r"Row 1 .*'negativ'.*negative, positive.*Did you mean"),
        ([0, 1, 2], PAIR, r"Row 2 .*label 2.*allowed are negative, positive"),
        ([0, -1], PAIR, r"Row 1 .*label -1"),
        (["positive", None], PAIR, r"Row 1 .*no label"),
        ([0.0, float("nan")], PAIR, r"Row 1 .*nan"),
        ([0.0, 0.5], PAIR, r"Row 1 .*0\.5"),
        ([[0], [1]], PAIR, r"Row 0 .*list.*multi_label_classification"),
        ([1.0, float("nan")], NUMBER, r"Row 1 .*nan.*finite"),
        ([1.0, float("inf")], NUMBER, r"Row 1 .*inf.*finite"),
        (["1.5", "n/a"], NUMBER, r"Row 1 .*'n/a'.*finite"),
        ([[1.0], [2.0]], NUMBER, r"Row 0 .*finite"),
        (["a", "b"], SET, r"Row 0 .*'a'.*list per row"),
        ([["a"], ["d"]], SET, r"Row 1 .*'d'.*allowed are a, b, c"),
        ([["a"], ["b", "b"]], SET, r"Row 1 .*'b' twice"),
        ([[0, 1, 0], [1, 0, 1, 1]], SET, r"Row 0 .*twice"),
    ],
)
def test_a_label_that_does_not_fit_is_named_with_its_row(
    labels: list[Any], task: Task, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        encoded(labels, task)


def test_the_row_in_an_error_is_that_of_the_source(tmp_path: Path) -> None:
    lines = [f"text {row}\t{int(row == 17)}\n" for row in range(20)]
    (tmp_path / "a.tsv").write_text("text\tlabel\n" + "".join(lines))
    dataset = load_examples(tmp_path / "a.tsv").select(range(10, 20))
    with pytest.raises(DataError, match=r"Row 17 \(from 0\)"):
        encode_labels(dataset, Task(problem_type=SINGLE, labels=("0",)))


def test_classes_of_one_name_are_refused() -> None:
    with pytest.raises(ConfigError, match="'a' twice"):
        encoded(["a"], Task(problem_type=SINGLE, labels=("a", "a")))


def test_without_labels_there_is_nothing_to_encode() -> None:
    dataset = load_examples(Dataset.from_dict({"text": ["a"]}))
    assert encode_labels(dataset, PAIR) is dataset


def test_the_majority_share_is_the_best_constant_answer() -> None:
    assert majority_share([0, 1, 1, 1], PAIR) == 0.75
    assert majority_share([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]], SET) == pytest.approx(2 / 3)
    assert majority_share([1.0, 1.0], NUMBER) is None
    assert majority_share([], PAIR) is None
