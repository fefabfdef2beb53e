"""What a user asks about, one item at a time: texts, pairs of texts, images."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

from offramp.backbones import Batch
from offramp.data import input_id
from offramp.data.hashing import image_id
from offramp.data.images import LazyImage, file_bytes
from offramp.data.tokens import encode_texts, token_limit
from offramp.engines import Inputs, TextInputs, bucket, collate
from offramp.engines.batching import WINDOW
from offramp.errors import ConfigError, DataError
from offramp.model import MultiExitModel

Item: TypeAlias = Any
"""A text: str, (text, text_pair) or {"text": ..., "text_pair": ...}; an image: the path of a file,
a PIL image or {"image": either}. A dict may also hold `OPTIONS`."""

OPTIONS = ("point", "max_depth", "max_seconds")
"""What a row may ask for itself: an operating point, and a budget of layers and of time."""


_TEXTS = ("text", "text_pair")


class Row(NamedTuple):
    """One item, ready for a batch.

    Attributes:
        id: names the input, see `input_id`.
        length: in tokens; 1 for an image.
        columns: what `Inputs.collate` takes of it.
    """

    id: int
    length: int
    columns: Mapping[str, Any]


class Items(Protocol):
    """Reads what users ask about.

    Attributes:
        longest: row in tokens, or None.
        ahead: how many batches' worth of rows a stream reads ahead.
        usual_top_k: answers per item that transformers' pipeline gives; None is the best alone.
    """

    longest: int | None
    ahead: int
    usual_top_k: int | None

    def is_one(self, given: Any) -> bool:
        """Whether this is one item rather than a list of them; pairs and dicts always are."""
        ...

    def read(self, items: Sequence[Item]) -> tuple[list[Row], int]:
        """The items and how many of them were cut. Raises DataError for what is none."""
        ...

    def batch(self, rows: Sequence[Row], device: Any, few_lengths: bool = False) -> Batch:
        """One batch, perhaps padded to one of a few lengths, so that shapes come again."""
        ...


def items_of(model: MultiExitModel, inputs: Inputs, max_length: int | None) -> Items:
    """What a model with such inputs can be asked about."""
    if isinstance(inputs, TextInputs):
        lengths = [length for length in (max_length, model.max_length) if length is not None]
        return TextItems(inputs, min(lengths, default=None))
    return ImageItems(inputs)


class TextItems:
    """Texts and pairs of texts."""

    ahead = WINDOW
    usual_top_k: int | None = None

    def __init__(self, inputs: TextInputs, longest: int | None) -> None:
        self._inputs = inputs
        self._lock = threading.Lock()
        self.longest = token_limit(inputs.tokenizer, longest, pairs=True)

    def is_one(self, given: Any) -> bool:
        return isinstance(given, str)

    def read(self, items: Sequence[Item]) -> tuple[list[Row], int]:
        texts = [_parts(item) for item in items]
        rows: dict[int, Row] = {}
        cut = 0
        for parts in {len(text) for text in texts}:
            places = [place for place, text in enumerate(texts) if len(text) == parts]
            chosen = [texts[place] for place in places]
            # fast tokenizers keep their truncation setting on themselves
            with self._lock:
                columns, long = encode_texts(self._inputs.tokenizer, chosen, self.longest)
            cut += long
            for place, values in zip(places, zip(*columns.values(), strict=True), strict=True):
                tokens = dict(zip(columns, values, strict=True))
                rows[place] = Row(input_id(*texts[place]), _length(tokens), tokens)
        return [rows[place] for place in range(len(texts))], cut

    def batch(self, rows: Sequence[Row], device: Any, few_lengths: bool = False) -> Batch:
        longest = max(row.length for row in rows)
        tokens = bucket(longest, self.longest) if few_lengths else longest
        return collate(_columns(rows), self._inputs.tokenizer.pad_token_id, device, tokens)


class ImageItems:
    """Images, each opened when its batch is made."""

    longest: int | None = None
    ahead = 1  # images are large, and there is nothing to sort them by
    usual_top_k: int | None = 5

    def __init__(self, inputs: Inputs) -> None:
        self._inputs = inputs

    def is_one(self, given: Any) -> bool:
        return isinstance(given, str | os.PathLike) or hasattr(given, "convert")

    def read(self, items: Sequence[Item]) -> tuple[list[Row], int]:
        return [_image_row(item) for item in items], 0

    def batch(self, rows: Sequence[Row], device: Any, few_lengths: bool = False) -> Batch:
        return self._inputs.collate(_columns(rows), device)


def options_of(item: Item) -> dict[str, Any]:
    """What an item asks for itself, by the names of `OPTIONS`."""
    if not isinstance(item, Mapping):
        return {}
    return {name: item[name] for name in OPTIONS if item.get(name) is not None}


def check_items(items: Iterable[Item]) -> None:
    """Refuse one text where there should be several. Raises ConfigError."""
    if isinstance(items, str):
        raise ConfigError("Give a list of texts; one text alone would be read letter by letter.")


def alike(items: Iterable[Item]) -> Iterator[Item]:
    """Items of a stream. Raises ConfigError for one that asks for a way of its own."""
    for item in items:
        own = options_of(item)
        if own:
            raise ConfigError(
                f"Rows of a stream run alike, but one asks for {', '.join(own)}. Use `answer` or "
                "`predict`, or give `stream` a point and a budget."
            )
        yield item


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {name: [row.columns[name] for row in rows] for name in rows[0].columns}


def _parts(text: Item) -> tuple[str, ...]:
    """(text,) or (text, text_pair). Raises DataError for anything else."""
    if isinstance(text, str):
        return (text,)
    if isinstance(text, Mapping) and "text" in text and set(text) <= {*_TEXTS, *OPTIONS}:
        parts = tuple(text[name] for name in _TEXTS if text.get(name) is not None)
    else:
        parts = tuple(text) if isinstance(text, tuple) else ()
    if len(parts) not in (1, 2) or not all(isinstance(part, str) for part in parts):
        raise DataError(
            f"Not a text: {str(text)[:80]!r}, a {type(text).__name__}. Give a str, a tuple "
            '(text, text_pair), or a dict {"text": ..., "text_pair": ...}.'
        )
    return parts


def _length(tokens: Mapping[str, list[int]]) -> int:
    if not tokens["input_ids"]:
        raise DataError("A text is empty and gives no token at all. Leave it out.")
    return len(tokens["input_ids"])


def _image_row(item: Item) -> Row:
    named = isinstance(item, Mapping) and "image" in item and set(item) <= {"image", *OPTIONS}
    image = item["image"] if named else item
    if isinstance(image, str | os.PathLike):
        path = str(Path(image).expanduser())
        image = LazyImage({"bytes": None, "path": path}, path)
    if isinstance(image, LazyImage):
        return Row(image_id(file_bytes(image.stored)), 1, {"image": image})
    if hasattr(image, "convert") and hasattr(image, "tobytes"):
        return Row(image_id(_pixels(image)), 1, {"image": image})
    raise DataError(
        f"Not an image: {str(item)[:80]!r}, a {type(item).__name__}. Give the path of an image "
        'file, a PIL image, or a dict {"image": either}.'
    )


def _pixels(image: Any) -> bytes:
    try:
        return bytes(image.tobytes())
    except (OSError, ValueError) as problem:
        raise DataError(f"An image cannot be read: {problem}.") from problem
