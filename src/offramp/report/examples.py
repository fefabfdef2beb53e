"""Inputs with their answer layer by layer."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from datasets import Dataset

from offramp.data.hashing import dataset_ids
from offramp.data.images import LazyImage, lazy_images
from offramp.errors import DataError
from offramp.metrics import MULTI, SINGLE
from offramp.report.figures import Figures

EACH = 4
LONGEST = 400
THUMBNAIL = 96
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Cell:
    """An exit's answer; `sure` is its probability, `right` None without labels."""

    answer: str
    sure: float | None
    right: bool | None
    layer: int


@dataclass(frozen=True, slots=True)
class Example:
    """One row; without texts and picture (a data URI) where the table's inputs are not at hand."""

    number: int
    tokens: int
    texts: tuple[str, ...]
    picture: str | None
    truth: str | None
    exit_layer: int
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that tell the same thing."""

    title: str
    why: str
    examples: tuple[Example, ...]


Shown = tuple[str, ...] | LazyImage
Inputs = Mapping[int, Shown]
"""Texts or image of a table's rows, by their id."""


def inputs_by_id(rows: Dataset | None, figures: Figures) -> Inputs:
    """The inputs of a table's rows by their id, the hash of the input. Raises DataError."""
    if rows is None:
        return {}
    ids, wanted = dataset_ids(rows).tolist(), set(figures.table.ids.tolist())
    inputs: Iterable[Shown] = _texts(rows)
    if "image" in rows.column_names:
        inputs = lazy_images(rows)
    found = {key: parts for key, parts in zip(ids, inputs, strict=True) if key in wanted}
    if not found:
        raise DataError("None of these rows is in the table; give the rows it was recorded on.")
    return found


def _texts(rows: Dataset) -> Iterable[tuple[str, ...]]:
    names = [name for name in ("text", "text_pair") if name in rows.column_names]
    return zip(*(rows[name][:] for name in names), strict=True)


def choose(figures: Figures, inputs: Inputs) -> list[Group]:
    """A few rows of each kind that tells something; no row stands in two groups."""
    taken: set[int] = set()
    groups = []
    for title, why, mask in _kinds(figures):
        places = [n for n in np.flatnonzero(mask).tolist() if n not in taken][:EACH]
        taken.update(places)
        if places:
            found = tuple(_example(figures, place, inputs) for place in places)
            groups.append(Group(title, why, found))
    return groups


def _kinds(figures: Figures) -> Iterator[tuple[str, str, Mask]]:
    layers, rows = figures.done.exit_layers, np.arange(figures.table.rows)
    if figures.regression:
        strayed = np.abs(figures.predicted[rows, layers - 1] - figures.predicted[:, -1])
        far = np.sort(strayed)[-EACH:].min()
        yield "Farthest from full depth", "", (strayed >= far) & (strayed > 0)
    elif figures.labelled:
        better, worse = figures.better_worse
        yield (
            "Lost by leaving early",
            "wrong at its exit, right at full depth",
            (worse[rows, layers - 1]),
        )
        yield (
            "Gained by leaving early",
            "right at its exit, wrong at full depth",
            (better[rows, layers - 1]),
        )
        yield (
            "Overthought",
            "right at an earlier layer, wrong where it left",
            (better[:, :-1].any(axis=1) & ~figures.right[rows, layers - 1]),
        )
    else:
        yield "Another answer than full depth", "", ~figures.right[rows, layers - 1]
    yield "Left first", "", layers == layers.min()
    yield "Left last", "", (layers == layers.max()) & (layers > layers.min())


def _example(figures: Figures, place: int, inputs: Inputs) -> Example:
    table = figures.table
    shown = inputs.get(int(table.ids[place]), ())
    return Example(
        number=place,
        tokens=int(table.columns["lengths"][place]),
        texts=() if isinstance(shown, LazyImage) else tuple(map(_cut, shown)),
        picture=_thumbnail(shown) if isinstance(shown, LazyImage) else None,
        truth=None if table.labels is None else _answer(figures, table.labels[place]),
        exit_layer=int(figures.done.exit_layers[place]),
        cells=tuple(_cell(figures, place, layer) for layer in range(1, table.depth + 1)),
    )


def _cell(figures: Figures, place: int, layer: int) -> Cell:
    answer = _answer(figures, figures.predicted[place, layer - 1])
    if figures.regression:
        return Cell(answer, None, None, layer)
    sure = float(figures.sureness(np.array([place]), layer)[0])
    right = bool(figures.right[place, layer - 1]) if figures.labelled else None
    return Cell(answer, sure, right, layer)


def _answer(figures: Figures, value: npt.ArrayLike) -> str:
    """A class, label set or number, as it is called."""
    kind, names = figures.table.problem_type, figures.label_names
    if kind == SINGLE:
        return names[int(value)]  # type: ignore[arg-type]
    if kind == MULTI:
        return ", ".join(names[n] for n in np.flatnonzero(np.asarray(value) > 0)) or "none"
    return f"{float(value):.3g}"  # type: ignore[arg-type]


def _thumbnail(image: LazyImage) -> str:
    """A small PNG as a data URI."""
    small, file = image.open(), io.BytesIO()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
