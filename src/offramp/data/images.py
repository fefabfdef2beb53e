"""Columns of images: which they are, how they are kept, and what each one's bytes are.

An image is kept as `datasets` keeps it, as the bytes of its file or as the path to it, and
becomes pixels when it is asked for: a folder of photographs does not fit into memory.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Image
from tqdm.auto import tqdm

from offramp.data.sources import Source, as_arrow
from offramp.errors import DataError, MissingExtraError

NAMES = ("image", "img", "picture", "photo", "image_path", "file_name")
"""Column names known to hold images or the paths of image files."""

MOST_BYTES = 2**31 - 1
"""What Arrow can hold in one piece."""

STORED = pa.struct({"bytes": pa.binary(), "path": pa.string()})


def image_feature() -> Image:
    """Raises MissingExtraError where images cannot be read."""
    needs_pillow()
    return Image()


def needs_pillow() -> None:
    """Raise MissingExtraError where images cannot be read."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise MissingExtraError("pillow", "images") from None


def read_images(source: Source, column: str) -> pa.ChunkedArray:
    """A column of images or of paths as `datasets` stores images, (rows,).

    Paths are relative to the file they stand in. A missing or other value is an error that
    names the row.
    """
    values = as_arrow(source, column)
    if values.null_count:
        row = pc.index(values.is_null(), True).as_py()
        raise DataError(f"{source.name}: {source.place(row)}: '{column}' is missing.")
    if values.nbytes > MOST_BYTES:
        raise DataError(
            f"{source.name}: column '{column}' holds {values.nbytes / 1e9:.0f} GB of images, more "
            "than are kept in memory. Save them as files and give their folder, or their paths."
        )
    if column in source.images or _is_stored(values.type):
        return _with_content(source, column, values.cast(STORED))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        paths = [_found(source, column, row, path) for row, path in enumerate(values.to_pylist())]
        return pa.chunked_array([_stored(pa.nulls(len(paths), pa.binary()), pa.array(paths))])
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        raw = values.cast(pa.binary()).combine_chunks()
        return pa.chunked_array([_stored(raw, pa.nulls(len(raw), pa.string()))])
    raise DataError(
        f"{source.name}: column '{column}' holds {values.type}, not images. An image column "
        "holds images, their bytes, or paths of image files. Name it with --image."
    )


def _is_stored(kind: pa.DataType) -> bool:
    """As `datasets` writes images, perhaps by another tool that does not say so."""
    return pa.types.is_struct(kind) and {field.name for field in kind} == {"bytes", "path"}


def _with_content(source: Source, column: str, values: pa.ChunkedArray) -> pa.ChunkedArray:
    """The stored images; DataError where one has neither bytes nor a path."""
    for row, (raw, path) in enumerate(_halves(values)):
        if not raw and path is None:
            raise DataError(f"{source.name}: {source.place(row)}: '{column}' is an empty image.")
    return values


def _halves(values: pa.ChunkedArray) -> Iterator[tuple[bool, str | None]]:
    """Whether an image has bytes, and its path."""
    for chunk in values.chunks:
        has_bytes = chunk.field("bytes").is_valid().to_pylist()
        yield from zip(has_bytes, chunk.field("path").to_pylist(), strict=True)


def _stored(raw: pa.Array, paths: pa.Array) -> pa.StructArray:
    return pa.StructArray.from_arrays([raw, paths], fields=list(STORED))


def _found(source: Source, column: str, row: int, path: str) -> str:
    whole = Path(source.folder, os.path.expanduser(path))
    if not os.path.isfile(whole):  # unlike Path.is_file it bears any name
        raise DataError(
            f"{source.name}: {source.place(row)}: '{column}' names {whole}, which is no file. "
            "Paths count from the folder of the file they stand in."
        )
    return str(whole)


@dataclass(frozen=True, slots=True)
class LazyImage:
    """An image that is opened when it is needed.

    Attributes:
        stored: as `datasets` stores it.
        name: what errors call it.
    """

    stored: Mapping[str, Any]
    name: str

    def open(self) -> Any:
        """A PIL image, RGB and upright. Raises DataError."""
        return open_image(file_bytes(self.stored), self.name)


def lazy_images(dataset: Dataset) -> Iterator[LazyImage]:
    """The images of all rows, named by their rows."""
    view = dataset.select_columns(["image"]).with_format("arrow")
    rows = iter(dataset["row"][:] if "row" in dataset.column_names else range(len(dataset)))
    for table in view.iter(batch_size=100):
        for stored in table.column("image").to_pylist():
            file = f", {stored['path']}," if stored["path"] and stored["bytes"] is None else ""
            yield LazyImage(stored, f"Row {next(rows)} (from 0){file}")


def image_files(dataset: Dataset) -> Iterator[bytes]:
    """The bytes of every row's image file, one after the other."""
    return (file_bytes(image.stored) for image in lazy_images(dataset))


def file_bytes(stored: Mapping[str, Any]) -> bytes:
    """The bytes of one image file. Raises DataError where it is gone."""
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    try:
        return Path(stored["path"]).read_bytes()
    except (OSError, ValueError) as problem:
        raise DataError(f"{stored['path']}: cannot be read: {problem}.") from problem


def check_images(dataset: Dataset) -> None:
    """Open every image once, so that a broken one is named before the work starts.

    Raises:
        DataError: with the row of the first image that cannot be opened.
    """
    images = lazy_images(dataset)
    for image in tqdm(
        images, total=len(dataset), desc="images", unit="row", disable=None, leave=False
    ):
        image.open()


def open_image(data: bytes, what: str) -> Any:
    """A PIL image, RGB and upright. Raises DataError where the bytes are none."""
    needs_pillow()
    import PIL.Image

    with _refusing(what), PIL.Image.open(io.BytesIO(data)) as opened:
        return upright_rgb(opened, what)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever Pillow says of a broken image as a DataError."""
    import PIL.Image

    try:
        yield
    # a broken PNG is a SyntaxError to Pillow, a huge one a DecompressionBombError
    except (OSError, SyntaxError, ValueError, PIL.Image.DecompressionBombError) as problem:
        said = str(problem).replace("<_io.BytesIO object at ", "<").rstrip(".")
        raise DataError(f"{what} is no image that can be opened: {said}.") from problem


def upright_rgb(image: Any, what: str = "An image") -> Any:
    """A PIL image as RGB, turned as the camera's own note says. Raises DataError."""
    import PIL.ImageOps

    with _refusing(what):
        upright = PIL.ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):  # whole numbers, which RGB would cut off at 255
            upright = upright.convert("I")
            if np.asarray(upright).max() > 255:
                upright = upright.point(lambda value: value * (1 / 257))
            upright = upright.convert("L")
        return upright.convert("RGB")
