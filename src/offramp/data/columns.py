"""Which column is the input and which the label; their values as typed Arrow arrays."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from offramp.data.images import NAMES as IMAGES
from offramp.data.sources import Source, as_arrow
from offramp.errors import ConfigError, DataError
from offramp.registry import nearest

logger = logging.getLogger("offramp")

PAIRS = (
    ("text", "text_pair"),
    ("text1", "text2"),
    ("sentence1", "sentence2"),
    ("sentence_a", "sentence_b"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "context"),
    ("question", "passage"),
    ("query", "passage"),
    ("query", "document"),
)
# fmt: off
TEXTS = (
    "text", "sentence", "content", "review", "reaction", "document", "question", "tweet",
    "comment", "message", "body", "headline", "description", "utterance", "smiles", "sequence",
)
LABELS = (
    "label", "labels", "score", "class", "target", "category", "sentiment", "rating", "stars",
    "gold_label", "intent", "emotion",
)
# fmt: on
_PLAIN = {"text", "text_pair", "image", "label", "labels"}
"""Names that say what they are for."""


class Chosen(NamedTuple):
    """Names of the columns to use; the input is a text, two texts or an image.

    `point` is that of the operating point that each row asks for.
    """

    text: str | None
    text_pair: str | None
    image: str | None
    label: str | None
    point: str | None = None


def choose_columns(
    source: Source,
    text: str | None,
    text_pair: str | None,
    label: str | None,
    image: str | None = None,
    point: str | None = None,
) -> Chosen:
    """The columns named by the options, the others by convention (PAIRS, TEXTS, IMAGES, LABELS).

    Convention goes by the lower-case name. `text` wins over all, then a known pair, then a
    single known column; `label` wins over `labels`, then a single known column. Two that fit
    equally well are an error, not a guess. No label column is fine.
    """
    given = {"text": text, "text-pair": text_pair, "image": image, "label": label}
    for option, column in (given | {"point-column": point}).items():
        if column is not None:
            check_there(source, column, option)
    if text is None and text_pair is not None:
        raise ConfigError("--text-pair names the second text, so --text must name the first.")
    if text is not None and image is not None:
        raise ConfigError("The input is a text (--text) or an image (--image); name one of them.")
    if text is None and image is None:
        text, text_pair, image = _conventional_input(source)
    if label is None:
        label = _conventional_label(source, {text, text_pair, image, point})
    used = [column for column in (text, text_pair, image, label, point) if column is not None]
    if len(set(used)) < len(used):
        raise DataError(f"{source.name}: one column is named twice: {', '.join(used)}.")
    guessed = [column for column in used if column not in given.values() and column != point]
    if {column.lower() for column in guessed} - _PLAIN:
        logger.info("%s: reads %s.", source.name, ", ".join(f"'{column}'" for column in guessed))
    return Chosen(text, text_pair, image, label, point)


def check_there(source: Source, column: str, option: str) -> None:
    """Refuse the name of no column. Raises DataError."""
    if column not in source.columns:
        raise DataError(
            f"{source.name}: no column '{column}' (--{option}).{nearest(column, _all(source))} "
            f"{_listing(source)}"
        )


def _conventional_input(source: Source) -> tuple[str | None, str | None, str | None]:
    """The text, its pair and the image, at least two of them None."""
    texts = _known_texts(source)
    images = source.images if texts else _known_images(source)
    found = [(*names, None) for names in texts] + [(None, None, image) for image in images]
    if len(found) == 1:
        return found[0]
    if found:
        options = ", ".join(" + ".join(filter(None, columns)) for columns in found)
        raise DataError(
            f"{source.name}: more than one column could be the input: {options}. Say which with "
            "--text COLUMN (and --text-pair COLUMN for a second one) or --image COLUMN."
        )
    hints = [hint for name in TEXTS if (hint := nearest(name, _all(source)))]
    raise DataError(
        f"{source.name}: no column is known as text ({', '.join(TEXTS)}, or a pair such as "
        f"sentence1 + sentence2) or as image ({', '.join(IMAGES)}).{hints[0] if hints else ''} "
        f"{_listing(source)} Say which with --text COLUMN or --image COLUMN."
    )


def _known_texts(source: Source) -> list[tuple[str, str | None]]:
    """Texts and their pairs by convention."""
    columns = [column for column in source.columns if column not in source.images]
    known = {column.lower(): column for column in reversed(columns)}
    if "text" in known:
        return [(known["text"], known.get("text_pair"))]
    pairs: list[tuple[str, str | None]] = [
        (known[first], known[second]) for first, second in PAIRS if {first, second} <= set(known)
    ]
    return pairs or [(known[name], None) for name in TEXTS if name in known]


def _known_images(source: Source) -> list[str]:
    """Columns that hold images, or where there is none, that are called so."""
    if source.images:
        return list(source.images)
    known = {column.lower(): column for column in reversed(source.columns)}
    return [known[name] for name in IMAGES if name in known]


def _conventional_label(source: Source, taken: set[str | None]) -> str | None:
    known = {column.lower(): column for column in source.columns if column not in taken}
    found = [known[name] for name in LABELS if name in known]
    if len(found) > 1 and found[0].lower() not in ("label", "labels"):
        raise DataError(
            f"{source.name}: more than one column could be the label: {', '.join(found)}. "
            "Say which with --label COLUMN."
        )
    return found[0] if found else None


def _all(source: Source) -> list[str]:
    return list(source.columns)


def _listing(source: Source) -> str:
    shown = [column[:40] for column in source.columns[:20]]
    more = f" and {len(source.columns) - 20} more" if len(source.columns) > 20 else ""
    return f"Columns there: {', '.join(shown)}{more}."


# --- values ---------------------------------------------------------------------------


def read_text(source: Source, column: str) -> pa.ChunkedArray:
    """A column of text, (rows,); a missing or other value is an error that names the row."""
    values = as_arrow(source, column)
    if values.type == pa.null():
        raise DataError(f"{source.name}: column '{column}' is missing in every row.")
    if not _is_text(values.type):
        raise DataError(
            f"{source.name}: column '{column}' holds {values.type}, not text. Name the text "
            "column with --text."
        )
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise DataError(
            f"{source.name}: {source.place(row)}: '{column}' is missing "
            f"({values.null_count} such rows)."
        )
    return values.cast(pa.string())


def read_names(source: Source, column: str) -> pa.ChunkedArray:
    """A column of names, (rows,); an empty or missing one is null."""
    values = as_arrow(source, column)
    if pa.types.is_nested(values.type) or pa.types.is_floating(values.type):
        raise DataError(f"{source.name}: column '{column}' holds no names, but {values.type}.")
    names = values.cast(pa.string())
    return pc.if_else(pc.equal(names, ""), None, names)


def read_kept(source: Source, column: str) -> pa.ChunkedArray:
    """A column that goes into the answers as it is, (rows,): text, numbers or truth values.

    Dates become text; NaN and infinite numbers, which JSON does not know, become null.
    """
    check_there(source, column, "keep")
    values = as_arrow(source, column)
    kind, types = values.type, pa.types
    if types.is_nested(kind) or types.is_binary(kind) or types.is_large_binary(kind):
        raise DataError(
            f"{source.name}: column '{column}' (--keep) holds {kind}; what is kept is text, "
            "numbers or truth values."
        )
    if types.is_floating(kind):
        numbers = values.cast(pa.float64())
        return pc.if_else(pc.is_finite(numbers), numbers, None)
    plain = types.is_integer(kind) or types.is_boolean(kind)
    return values if plain else values.cast(pa.string())


def read_label(source: Source, column: str) -> pa.ChunkedArray | None:
    """A column of labels: text, int64, float64 or lists of these; None if all are missing."""
    values = as_arrow(source, column)
    if source.untyped:
        values = _numbers(values)
    kind = _label_type(values.type)
    if kind is None:
        raise DataError(
            f"{source.name}: column '{column}' holds {values.type}; a label is text, a number "
            "or a list of these. Name the label column with --label."
        )
    try:
        values = values.cast(kind)
    except pa.ArrowInvalid as problem:
        raise DataError(f"{source.name}: column '{column}': {problem}.") from None
    # In hub sets whose classes have names, -1 stands for 'not given' (GLUE's test splits).
    hidden = column in source.class_names and kind == pa.int64() and pc.max(values).as_py() == -1
    return None if hidden or values.null_count == len(values) else values


def _label_type(kind: pa.DataType) -> pa.DataType | None:
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = _label_type(kind.value_type)
        return pa.list_(inner) if inner is not None and not types.is_list(inner) else None
    if types.is_boolean(kind) or types.is_integer(kind):
        return pa.int64()
    if types.is_floating(kind) or types.is_decimal(kind):
        return pa.float64()
    if _is_text(kind) or types.is_null(kind):
        return pa.string()
    return None


def _is_text(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


_INT = re.compile(r"[+-]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(
    r"[+-]?(((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)(e[+-]?[0-9]+)?|nan|inf(inity)?)", re.IGNORECASE
)


def _numbers(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Cells of a CSV or TSV as int64 or float64 where all are; an empty cell is missing."""
    cells = [cell or None for cell in column.to_pylist()]
    filled = [cell for cell in cells if cell is not None]
    parse: Callable[[str], Any] = str
    if all(_INT.fullmatch(cell) and len(cell) < 19 for cell in filled):
        parse = int
    elif all(_FLOAT.fullmatch(cell) for cell in filled):
        parse = float
    return pa.chunked_array([pa.array([None if cell is None else parse(cell) for cell in cells])])
