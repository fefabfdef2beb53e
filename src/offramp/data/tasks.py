"""What is to be predicted, and labels as the numbers a loss reads."""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any, Literal, NoReturn, get_args

from datasets import ClassLabel, Dataset, List, Value

from offramp.data.memory import with_columns
from offramp.errors import ConfigError, DataError
from offramp.registry import nearest
from offramp.storage import Strict

log = logging.getLogger("offramp")

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
SINGLE, MULTI, REGRESSION = get_args(ProblemType)


class Task(Strict):
    """A problem type as in transformers, and the class names in their order.

    Attributes:
        labels: one name per class; empty for regression, whose answer is one number.
    """

    problem_type: ProblemType
    labels: tuple[str, ...] = ()

    @property
    def num_labels(self) -> int:
        return len(self.labels) or 1

    @property
    def id2label(self) -> dict[int, str]:
        """The names as a transformers config keeps them."""
        return dict(enumerate(self.labels or ("LABEL_0",)))


def check_problem_type(problem_type: str | None) -> None:
    """Refuse what is none; None is left to be inferred. Raises ConfigError."""
    known = list(get_args(ProblemType))
    if problem_type is not None and problem_type not in known:
        raise ConfigError(
            f"Unknown problem type '{problem_type}'.{nearest(problem_type, known)} "
            f"Known: {', '.join(known)}."
        )


def infer_task(
    dataset: Dataset,
    problem_type: str | None = None,
    id2label: Mapping[int, str] | None = None,
) -> Task:
    """The task a dataset's labels pose, or that of a model (`id2label`) they are to fit.

    Floats are scores (regression), lists are label sets (multi-label), anything else names
    or numbers one class (single-label). With `id2label` the classes are the model's, and one
    entry means regression. `problem_type` overrules.

    Raises:
        DataError: no labels, or one class only, where the classes must come from the data.
    """
    check_problem_type(problem_type)
    kind = problem_type or _problem_type(dataset, id2label)
    if kind == REGRESSION:
        return Task(problem_type=REGRESSION)
    if id2label is None:
        names = _names_in(dataset, kind)
    else:
        names = tuple(str(id2label[key]) for key in sorted(id2label, key=int))
    return Task(problem_type=kind, labels=names)  # type: ignore[arg-type]


def encode_labels(dataset: Dataset, task: Task) -> Dataset:
    """The dataset with `label` as the task's loss reads it; without labels, as it is.

    Single-label: int, found by the class name (case counts only if it must), else by the
    number, plain or as in LABEL_2; one reading holds for the whole column. Multi-label: a
    list of 0.0/1.0 per class, from lists of names or class numbers, or from lists of 0/1 of
    that length. Regression: float.

    Raises:
        DataError: a label that is missing, not finite or outside the set, with its row.
    """
    if "label" not in dataset.column_names:
        return dataset
    labels = dataset["label"][:]
    for index, label in enumerate(labels):
        if label is None:
            _refuse(dataset, index, "has no label", "every row or none needs one")
    if task.problem_type == REGRESSION:
        return with_columns(dataset, {"label": (_scores(dataset, labels), Value("float64"))})
    if task.problem_type == MULTI:
        return with_columns(dataset, {"label": (_sets(dataset, labels, task), _SET)})
    twice = [name for name in task.labels if task.labels.count(name) > 1]
    if twice:
        raise ConfigError(f"The task names the class '{twice[0]}' twice; class names must differ.")
    feature = ClassLabel(names=list(task.labels))
    return with_columns(dataset, {"label": (_classes(dataset, labels, task), feature)})


_SET = List(Value("float32"))


def majority_share(labels: Sequence[Any], task: Task) -> float | None:
    """The accuracy of always giving the commonest answer; None for regression.

    `labels` as `encode_labels` gives them; in multi-label tasks an answer is a whole set.
    """
    if task.problem_type == REGRESSION or not len(labels):
        return None
    answers = (tuple(label) if isinstance(label, list) else label for label in labels)
    return Counter(answers).most_common(1)[0][1] / len(labels)


@contextmanager
def names_source(data: object) -> Iterator[None]:
    """Say of which file or hub id a row is that is refused within."""
    try:
        yield
    except DataError as problem:
        if not (isinstance(data, str | PathLike) and str(problem).startswith("Row ")):
            raise
        raise DataError(f"{data}: {problem}") from None


# --- which task -----------------------------------------------------------------------


def _problem_type(dataset: Dataset, id2label: Mapping[int, str] | None) -> str:
    if id2label is not None and len(id2label) == 1:
        return REGRESSION
    feature = dataset.features.get("label")
    if isinstance(feature, List):
        return MULTI
    is_score = isinstance(feature, Value) and feature.dtype.startswith("float")
    return REGRESSION if is_score and id2label is None else SINGLE


def _names_in(dataset: Dataset, kind: str) -> tuple[str, ...]:
    feature = dataset.features.get("label")
    if feature is None:
        raise DataError(
            "The data has no labels, so its classes are not known. Name the label column with "
            "--label."
        )
    inner = getattr(feature, "feature", feature)
    if isinstance(inner, ClassLabel):
        return tuple(inner.names)
    labels = [label for label in dataset["label"][:] if label is not None]
    if kind == MULTI:
        _refuse_scalars(dataset, labels)
        size = len(labels[0])
        if _are_flags(labels, size):
            return tuple(str(number) for number in range(size))
        labels = [item for items in labels for item in items]
    return _distinct(labels)


def _distinct(labels: list[Any]) -> tuple[str, ...]:
    names = {_key(label) for label in labels}
    numbers = {name for name in names if re.fullmatch(r"-?[0-9]+", name)}
    if numbers and names - numbers:
        raise DataError(
            f"Labels mix numbers ('{min(numbers)}') and names ('{min(names - numbers)}'). Give "
            "all classes names or all numbers."
        )
    if len(names) < 2:
        raise DataError(f"All labels are '{''.join(names)}': there is nothing to tell apart.")
    return tuple(sorted(names, key=int if numbers else None))


# --- labels as numbers ----------------------------------------------------------------


def _scores(dataset: Dataset, labels: list[Any]) -> list[float]:
    scores = []
    for index, label in enumerate(labels):
        try:
            score = float(label)
        except (TypeError, ValueError):
            score = math.nan
        if not math.isfinite(score):
            _refuse(dataset, index, f"has the score {label!r}", "a score is a finite number")
        scores.append(score)
    return scores


def _classes(dataset: Dataset, labels: list[Any], task: Task) -> list[int]:
    for index, label in enumerate(labels):
        if isinstance(label, list):
            _refuse(
                dataset,
                index,
                f"has the list {label!r} as label",
                "one class per row, or problem type multi_label_classification",
            )
    known = _reading(dataset, labels, task)
    for index, label in enumerate(labels):
        if label not in known:
            _refuse_class(dataset, index, label, task)
    return [known[label] for label in labels]


def _sets(dataset: Dataset, labels: list[Any], task: Task) -> list[list[float]]:
    _refuse_scalars(dataset, labels)
    if _are_flags(labels, task.num_labels):
        return [[float(flag) for flag in flags] for flags in labels]
    known = _reading(dataset, [item for items in labels for item in items], task)
    sets = []
    for index, items in enumerate(labels):
        flags = [0.0] * task.num_labels
        for item in items:
            if item not in known:
                _refuse_class(dataset, index, item, task)
            if flags[known[item]]:
                _refuse(dataset, index, f"names the class {item!r} twice", "each class once")
            flags[known[item]] = 1.0
        sets.append(flags)
    return sets


def _are_flags(labels: list[list[Any]], size: int) -> bool:
    """Lists of 0/1, one per class, rather than lists of classes."""
    return size > 1 and all(
        len(items) == size and all(item in (0, 1) for item in items) for items in labels
    )


def _reading(dataset: Dataset, labels: Iterable[Any], task: Task) -> dict[Any, int]:
    """Label -> class, by that one of the readings (name, number) which knows most labels."""
    distinct = set(labels)
    feature = dataset.features["label"]
    inner = getattr(feature, "feature", feature)
    plain = _best({label: _key(label) for label in distinct}, task.labels)
    if not isinstance(inner, ClassLabel):
        return plain
    names = {label: inner.names[label] for label in distinct if 0 <= label < len(inner.names)}
    named = _best(names, task.labels)
    if len(named) == len(distinct) or len(plain) < len(distinct):
        return named
    log.warning(
        "The data calls its classes %s, the model %s: classes are matched by number.",
        ", ".join(inner.names),
        ", ".join(task.labels),
    )
    return plain


def _best(keys: Mapping[Any, str], labels: tuple[str, ...]) -> dict[Any, int]:
    exact = {name: number for number, name in enumerate(labels)}
    folded = {name.casefold(): number for name, number in exact.items()}
    plain = {str(number): number for number in exact.values()}
    generic = {f"label_{number}": number for number in exact.values()}
    tried = [
        {label: exact[key] for label, key in keys.items() if key in exact},
        {label: folded[key.casefold()] for label, key in keys.items() if key.casefold() in folded},
        {label: plain[key] for label, key in keys.items() if key in plain},
        {label: generic[key.lower()] for label, key in keys.items() if key.lower() in generic},
    ]
    if len(folded) < len(labels):
        del tried[1]
    return max(tried, key=len)


def _key(label: Any) -> str:
    """A label as a class name: 2, 2.0 and '2' are the same."""
    if isinstance(label, float) and label.is_integer():
        return str(int(label))
    return str(label)


def _refuse_scalars(dataset: Dataset, labels: list[Any]) -> None:
    for index, label in enumerate(labels):
        if not isinstance(label, list):
            _refuse(
                dataset,
                index,
                f"has the label {label!r}",
                "multi-label data needs a list per row, in JSONL or Parquet",
            )


def _refuse_class(dataset: Dataset, index: int, label: Any, task: Task) -> NoReturn:
    shown = ", ".join(task.labels[:20]) + (", ..." if len(task.labels) > 20 else "")
    hint = nearest(str(label), list(task.labels))
    _refuse(dataset, index, f"has the label {label!r}", f"allowed are {shown}.{hint}".rstrip("."))


def _refuse(dataset: Dataset, index: int, problem: str, allowed: str) -> NoReturn:
    row = dataset["row"][index] if "row" in dataset.column_names else index
    raise DataError(f"Row {row} (from 0) {problem}: {allowed}.")
