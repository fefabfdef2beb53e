"""Rows and batches for training, in an order that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler, Subset

from offramp.backbones import Batch
from offramp.training.work import dataset_fingerprint

Collate = Callable[[Mapping[str, Sequence[Any]]], Batch]
"""From columns of an encoded dataset to a batch."""

SAMPLE = 2000
"""Rows that tell enough of how vectors are spread, or of which pooling suits a model."""


class Batches:
    """Rows of an encoded dataset as one batch, with `labels` where rows have them."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        names = [name for name in rows[0] if name != "label"]
        batch = dict(self.collate({name: [row[name] for row in rows] for name in names}))
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch


class Rows:
    """What a stage is trained on.

    Attributes:
        dataset: rows by number, for a DataLoader.
        lengths: (rows,), to group them by.
        collate: makes a batch of rows.
        made_by: names what makes numbers of them, where that is not done yet.
    """

    def __init__(
        self, dataset: Any, lengths: Tensor, collate: Callable[..., Any], made_by: str = ""
    ) -> None:
        self.dataset = dataset
        self.lengths = lengths
        self.collate = collate
        self.made_by = made_by

    def fingerprint(self) -> str:
        """A name for the rows and their order, whatever file or cache they came from."""
        return dataset_fingerprint(self.dataset) + self.made_by

    def batch(self, places: Iterable[int]) -> dict[str, Tensor]:
        """The rows at `places`, padded."""
        return self.collate([self.dataset[int(place)] for place in places])

    def part(self, places: np.ndarray) -> Rows:
        """Only the rows at `places`."""
        chosen = Subset(self.dataset, places.tolist())
        return Rows(chosen, self.lengths[torch.from_numpy(places)], self.collate)

    def shuffled(self, seed: int) -> np.ndarray:
        """The places of all rows in a random order."""
        return np.random.default_rng(seed).permutation(len(self.lengths))

    def sample(self, seed: int) -> Rows:
        """At most 2,000 of the rows."""
        return self.part(self.shuffled(seed)[:SAMPLE])

    @classmethod
    def of(cls, dataset: Dataset, collate: Collate, made_by: str = "") -> Rows:
        """Rows of an encoded dataset: `input_ids` or `image`, `length`, perhaps `label`."""
        wanted = ("input_ids", "token_type_ids", "image", "label")
        used = [name for name in wanted if name in dataset.column_names]
        lengths = torch.tensor(dataset["length"][:])
        return cls(dataset.select_columns(used), lengths, Batches(collate), made_by)


class LengthGrouped(Sampler[int]):
    """A new random order every epoch in which neighbours have similar lengths.

    The order depends on seed and epoch alone, so a resumed run meets the rows of the killed
    one; transformers' own sampler draws from the global generator and does not.

    Args:
        lengths: of all rows, (rows,).
        batch_size: rows per update.
        seed: of the run.
    """

    def __init__(self, lengths: Tensor, batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = torch.Generator().manual_seed(self.seed * 100_003 + self.epoch)
        order = torch.randperm(len(self), generator=draw)
        batches: list[Tensor] = []
        # 50 batches are sorted together, then all batches are shuffled: lengths do not rise
        # and fall with the steps; the one batch that may be short stays last
        for chunk in order.split(50 * self.batch_size):
            by_length = chunk[self.lengths[chunk].argsort(stable=True)]
            batches += by_length.split(self.batch_size)
        *whole, last = batches
        for place in torch.randperm(len(whole), generator=draw).tolist():
            yield from whole[place].tolist()
        yield from last.tolist()
