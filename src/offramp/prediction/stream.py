"""Answers one after the other, from anything that holds texts or images."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict

from offramp.data import load_examples
from offramp.data.images import lazy_images
from offramp.engines import UNLIMITED, Budget, windows
from offramp.errors import ConfigError
from offramp.prediction.formats import columns as output_columns
from offramp.prediction.items import Item, options_of
from offramp.prediction.kept import Kept
from offramp.prediction.labels import Labels
from offramp.prediction.predictor import DEFAULT, Answer, Point, Predictor
from offramp.prediction.ready import ReadyPoint

logger = logging.getLogger("offramp")

Data: TypeAlias = str | Path | Dataset | DatasetDict | Iterable[Item]
Numbered = tuple[int, Item]


def predict(
    model: Predictor | str | os.PathLike[str],
    data: Data,
    *,
    point: Point | None = None,
    scores: bool = False,
    sets: bool = False,
    device: Any = None,
    dtype: Any = None,
    backend: str = "torch",
    budget: Budget = UNLIMITED,
    **columns: Any,
) -> Iterator[dict[str, Any]]:
    """Answers in the order of the rows, as they come: {row, label, score, exit_layer}.

    Rows are read a few thousand at a time, so `data` may be endless. A row whose scores are
    not finite gives {row, error}; its neighbours get their answers.

    Args:
        model: a folder, a hub id, or a `Predictor` (which has its own device, dtype and backend).
        data: a file, hub id or dataset as `load_examples` takes them, or an iterable of texts
            or images.
        point: an operating point, a policy or `full`; None is the model's own.
        scores: also give the scores of all classes.
        sets: also give `set`, the classes that may be right, see `calibrate`.
        budget: of each row; entries then say which were `forced` to leave by it.
        columns: `text`, `text_pair`, `image`, `split`, `points`, `keep` ... as of
            `load_examples`; what is kept stands in the entries.
    """
    predictor, ready = opened(model, point, device=device, dtype=dtype, backend=backend)
    labels = labels_of(predictor, ready, scores, sets, budget)

    def answered(rows: Iterable[Numbered]) -> Iterator[dict[str, Any]]:
        found = blocks(predictor, ahead(predictor, rows), ready, labels, budget)
        return chain.from_iterable(found)

    if not isinstance(data, str | Path | Dataset | DatasetDict):
        return answered(enumerate(data))
    examples = load_examples(data, **columns)
    kept = Kept(examples, output_columns(labels))
    return kept.beside(answered(rows_of_examples(examples)))


def labels_of(
    predictor: Predictor, point: ReadyPoint, scores: bool, sets: bool, budget: Budget
) -> Labels:
    """What names the answers of a call."""
    of_sets = predictor.sets_of(point) if sets else None
    if sets and predictor.watched is not None and predictor.watched.changes_policy:
        raise ConfigError(
            "Sets belong to one point, and an alarm takes another. Watch with on_alarm='warn', or "
            "leave the sets out."
        )
    return Labels(predictor.model, scores, of_sets, forced=budget != UNLIMITED)


def opened(
    model: Predictor | str | os.PathLike[str], point: Point | None, **how: Any
) -> tuple[Predictor, ReadyPoint]:
    """A predictor, loaded if need be, and the point of this call."""
    if isinstance(model, Predictor):
        return model, model.ready(point)
    loaded = Predictor.load(model, DEFAULT if point is None else point, **how)
    return loaded, loaded.point


def rows_of_examples(examples: Dataset, first: int = 0) -> Iterator[Numbered]:
    """Row numbers and items of loaded examples, from the given one on."""
    if first >= len(examples):
        return
    if "image" in examples.column_names:
        rows = examples.select(range(first, len(examples)))
        points = rows["point"][:] if "point" in rows.column_names else [None] * len(rows)
        for row, image, point in zip(rows["row"][:], lazy_images(rows), points, strict=True):
            yield row, {"image": image, "point": point}
        return
    names = [name for name in ("text", "text_pair", "point") if name in examples.column_names]
    for start in range(first, len(examples), 1000):
        batch = examples[start : start + 1000]
        texts = zip(*(batch[name] for name in names), strict=True)
        for row, parts in zip(batch["row"], texts, strict=True):
            yield row, dict(zip(names, parts, strict=True))


def ahead(predictor: Predictor, rows: Iterable[Numbered]) -> Iterator[list[Numbered]]:
    """As many rows at a time as are worth sorting by length."""
    return windows(rows, predictor.items.ahead * predictor.max_rows)


def blocks(
    predictor: Predictor,
    arriving: Iterable[Sequence[Numbered]],
    point: ReadyPoint,
    labels: Labels,
    budget: Budget = UNLIMITED,
    seen: Callable[[Sequence[Answer]], object] | None = None,
) -> Iterator[list[dict[str, Any]]]:
    """Entries of the rows that arrive together; says at the end how many texts were cut.

    Raises ConfigError where sets are asked for, and a row names a point of its own.
    """
    cut, total = 0, 0
    for window in arriving:
        items = [item for _, item in window]
        if labels.sets is not None and any("point" in options_of(item) for item in items):
            raise ConfigError("Sets belong to one point, but rows name points of their own.")
        answers, long = predictor.answer(items, point, seen, budget)
        cut, total = cut + long, total + len(window)
        pairs = zip(window, answers, strict=True)
        yield [labels.entry(row, answer) for (row, _), answer in pairs]
    if cut:
        limit = predictor.max_length
        logger.warning("%d of %d texts are longer than %s tokens and were cut.", cut, total, limit)
