"""From examples to what a model reads: tokens, or pixels."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from datasets import Dataset, Image, Value
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from offramp.backbones import Batch
from offramp.data.images import LazyImage, check_images, needs_pillow, upright_rgb
from offramp.data.memory import with_columns
from offramp.data.tokens import encode, load_tokenizer
from offramp.engines.batching import collate
from offramp.errors import ConfigError, DataError, ModelError
from offramp.model.bounds import UNUSABLE
from offramp.storage import fingerprint, read_json

Columns = Mapping[str, Sequence[Any]]


class Inputs(Protocol):
    """What turns examples into batches, by a model's processor.

    Attributes:
        columns: of an encoded dataset that make a batch, where it has them.
    """

    columns: tuple[str, ...]

    def encode(self, dataset: Dataset, longest: int | None = None) -> Dataset:
        """Check every example and add `length` and whatever is worth computing only once."""
        ...

    def collate(self, columns: Columns, device: torch.device | str = "cpu") -> Batch:
        """One batch."""
        ...

    def fingerprint(self) -> str:
        """A name for how examples become numbers."""
        ...


class TextInputs:
    """Texts, by a tokenizer."""

    columns: tuple[str, ...] = ("input_ids", "token_type_ids")

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer

    def encode(self, dataset: Dataset, longest: int | None = None) -> Dataset:
        if "input_ids" in dataset.column_names:
            return dataset
        if "text" not in dataset.column_names:
            raise DataError("The model reads texts and the rows hold images. Name the --text.")
        return encode(dataset, self.tokenizer, longest)[0]

    def collate(self, columns: Columns, device: torch.device | str = "cpu") -> Batch:
        return collate(columns, self.tokenizer.pad_token_id, device)

    def fingerprint(self) -> str:
        """Padding and truncation are the caller's affair."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return fingerprint(json.dumps(self.tokenizer.get_vocab(), sort_keys=True))
        rules = json.loads(backend.to_str())
        for setting in ("padding", "truncation"):
            rules.pop(setting, None)
        return fingerprint(json.dumps(rules, sort_keys=True))


class ImageInputs:
    """Images, by an image processor; they become pixels when a batch is made."""

    columns: tuple[str, ...] = ("image",)

    def __init__(self, processor: BaseImageProcessor) -> None:
        self.processor = processor

    def encode(self, dataset: Dataset, longest: int | None = None) -> Dataset:
        if "image" not in dataset.column_names:
            raise DataError("The model reads images and the rows hold texts. Name the --image.")
        if "length" in dataset.column_names:
            return dataset
        check_images(dataset)
        # all images cost the same, so one is the length of each
        counted = with_columns(dataset, {"length": ([1] * len(dataset), Value("int32"))})
        return counted.cast_column("image", Image(decode=False))

    def collate(self, columns: Columns, device: torch.device | str = "cpu") -> Batch:
        images = [_opened(image) for image in columns["image"]]
        try:
            pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        except (ValueError, TypeError) as problem:
            raise DataError(
                f"The image processor makes no batch of these images: {problem} Does it bring all "
                "to one size (do_resize, size)?"
            ) from problem
        return {"pixel_values": pixels.to(device)}

    def fingerprint(self) -> str:
        settings = json.loads(self.processor.to_json_string())
        return fingerprint(json.dumps(settings, sort_keys=True))


def _opened(image: Any) -> Any:
    """A PIL image from one, from a lazy one, or from what `datasets` stores."""
    if isinstance(image, Mapping):
        image = LazyImage(image, str(image["path"] or "An image"))
    return image.open() if isinstance(image, LazyImage) else upright_rgb(image)


def inputs_of(processor: Any) -> Inputs:
    """How a tokenizer or an image processor makes batches. Raises ConfigError for others."""
    if isinstance(processor, PreTrainedTokenizerBase):
        return TextInputs(processor)
    if isinstance(processor, BaseImageProcessor):
        return ImageInputs(processor)
    raise ConfigError(
        f"A {type(processor).__name__} is no processor. Give the model's tokenizer or its image "
        "processor: AutoTokenizer.from_pretrained(...), AutoImageProcessor.from_pretrained(...)."
    )


def load_processor(folder: Path, reads: str) -> Any:
    """The tokenizer (reads `text`) or image processor (`image`) saved in a folder.

    Raises:
        ModelError: there is none.
    """
    return load_tokenizer(folder) if reads == "text" else _image_processor(folder)


def _image_processor(folder: Path) -> BaseImageProcessor:
    needs_pillow()
    try:
        return _in_pillow(folder).from_pretrained(folder)
    except (*UNUSABLE, ModelError) as problem:
        reason = str(problem).strip().split("\n")[0].strip(" :.")
        raise ModelError(
            f"{folder}: no usable image processor ({reason}). Save the model's own beside it: "
            f"AutoImageProcessor.from_pretrained(...).save_pretrained('{folder}')."
        ) from problem


def _in_pillow(folder: Path) -> Any:
    """The class named in the folder, in Pillow's arithmetic: the same pixels on every machine."""
    settings = read_json(folder / "preprocessor_config.json", ModelError)
    kind = settings.get("image_processor_type") if isinstance(settings, dict) else None
    name = str(kind).removesuffix("Fast").removesuffix("Pil") + "Pil"
    if not hasattr(transformers, name):
        raise ModelError(f"no image processor '{kind}' that works with Pillow is known")
    return getattr(transformers, name)
