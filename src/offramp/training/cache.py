"""Pooled vectors of all layers of a frozen model, computed once and kept on disk."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from offramp.engines.batching import plan_batches
from offramp.errors import OutputError
from offramp.exits import ExitOutput, PooledExit
from offramp.model import MultiExitModel, MultiExitOutput
from offramp.training.running import Rows

logger = logging.getLogger("offramp")


def cache_type(rows: int, model: MultiExitModel, limit: int) -> np.dtype[Any] | None:
    """float32 if the vectors fit under `limit` bytes, else float16, else None."""
    for kind in (np.dtype(np.float32), np.dtype(np.float16)):
        if cache_bytes(rows, model, kind) <= limit:
            return kind
    return None


def cache_bytes(rows: int, model: MultiExitModel, kind: np.dtype[Any]) -> int:
    """Disk that the vectors of `rows` rows take."""
    vectors = (model.depth - 1) * model.backbone.width(1)
    return rows * (vectors * kind.itemsize + model.stock.num_labels * 4)


class VectorCache(TorchDataset[dict[str, Tensor]]):
    """Pooled vectors (rows, L-1, width) and full-depth scores (rows, classes), memory-mapped.

    Filled in blocks; a finished block is never computed again, so a killed run goes on.

    Args:
        folder: where the arrays lie.
        model: on its device, its exits say how to pool.
        rows: an encoded dataset's rows.
        kind: float32 or float16.
    """

    def __init__(
        self, folder: Path, model: MultiExitModel, rows: Rows, kind: np.dtype[Any]
    ) -> None:
        self._rows = rows
        self._model = model
        self._labels = rows.dataset["label"][:] if "label" in rows.dataset.column_names else None
        self._blocks = plan_batches(rows.lengths.numpy())
        count = len(rows.lengths)
        _check_space(folder, cache_bytes(count, model, kind))
        folder.mkdir(parents=True, exist_ok=True)
        shape = (count, model.depth - 1, model.backbone.width(1))
        self.pooled = _array(folder / "pooled.npy", kind, shape)
        self.teacher = _array(
            folder / "teacher.npy", np.dtype(np.float32), (count, model.stock.num_labels)
        )
        self.done = _array(folder / "done.npy", np.dtype(np.uint8), (len(self._blocks),))

    def fill(self, quiet: bool, rank: int = 0, world: int = 1) -> None:
        """Compute what is missing; each of `world` processes takes its share of the blocks."""
        todo = [n for n in range(rank, len(self._blocks), world) if not self.done[n]]
        if self.done.any():
            logger.info("Vectors: %d of %d blocks were there.", self.done.sum(), len(self.done))
        for number in tqdm(todo, desc="vectors", unit="block", disable=quiet or None):
            places = np.sort(self._blocks[number])
            (vectors,), scores = pooled_vectors([self._model], self._rows.batch(places))
            self.pooled[places] = vectors.cpu().numpy()
            self.teacher[places] = scores.cpu().numpy()
            # the vectors reach the disk before the mark that they are there
            self.pooled.flush()
            self.teacher.flush()
            self.done[number] = 1
            self.done.flush()

    def __len__(self) -> int:
        return len(self.teacher)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        return self.__getitems__([place])

    def __getitems__(self, places: Sequence[int]) -> dict[str, Tensor]:
        """A whole batch at once."""
        batch = {
            "pooled": torch.from_numpy(self.pooled[places].astype(np.float32)),
            "teacher": torch.from_numpy(self.teacher[places]),
        }
        if self._labels is not None:
            batch["labels"] = torch.tensor([self._labels[place] for place in places])
        return batch

    def moments(self) -> tuple[Tensor, Tensor]:
        """Mean and spread over the rows, (L-1, width)."""
        shape = self.pooled.shape[1:]
        total, squares = np.zeros(shape), np.zeros(shape)
        for start in range(0, len(self), 4096):
            part = self.pooled[start : start + 4096].astype(np.float64)
            total += part.sum(axis=0)
            squares += (part**2).sum(axis=0)
        mean = total / len(self)
        spread = np.sqrt(np.maximum(squares / len(self) - mean**2, 0))
        # what hardly varies at all must not be blown up
        spread = np.maximum(spread, 1e-3 * spread.mean(axis=1, keepdims=True) + 1e-6)
        return torch.from_numpy(mean).float(), torch.from_numpy(spread).float()

    def rows(self) -> Rows:
        """As the rows of a stage."""
        return Rows(self, torch.ones(len(self), dtype=torch.long), _as_it_is)


class CachedExits(nn.Module):
    """The exits of a model, fed with cached vectors instead of tokens.

    They are trained on standardised vectors, because the [CLS] vectors of early layers differ
    so little from row to row that a gradient method would hardly see it; `fold` then moves
    mean and spread into the weights.

    Args:
        model: its exits are trained in place.
        mean, spread: of the vectors, (L-1, width).
    """

    mean: Tensor
    spread: Tensor

    def __init__(self, model: MultiExitModel, mean: Tensor, spread: Tensor) -> None:
        super().__init__()
        self.exits = model.exits
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("spread", spread, persistent=False)
        for place, made in enumerate(self._made()):
            if made.dense is not None:  # it starts as the model's pooler and shall stay that
                made.dense.bias.data += made.dense.weight.data @ mean[place]
                made.dense.weight.data *= spread[place]

    def _made(self) -> list[PooledExit]:
        return list(self.exits.values())  # type: ignore[arg-type]

    def forward(self, pooled: Tensor, teacher: Tensor) -> MultiExitOutput:
        vectors = (pooled - self.mean) / self.spread
        early = [
            ExitOutput(made.answer(vectors[:, place])) for place, made in enumerate(self._made())
        ]
        return MultiExitOutput(exits=(*early, ExitOutput(teacher)))

    @torch.no_grad()
    def fold(self) -> None:
        """Make the exits read vectors as they are."""
        for place, made in enumerate(self._made()):
            first = made.classifier if made.dense is None else made.dense
            first.weight /= self.spread[place]
            first.bias -= first.weight @ self.mean[place]


@torch.inference_mode()
def pooled_vectors(
    views: Sequence[MultiExitModel], batch: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What each exit pools, (rows, L-1, width) per view, and full-depth scores, (rows, classes).

    Args:
        views: models that share one backbone and differ in pooling.
        batch: may hold labels, which are not read.
    """
    first = views[0]
    device = first.stock.device
    inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
    flow = first.backbone.embed(inputs)
    vectors: list[list[Tensor]] = [[] for _ in views]
    for layer in range(1, first.depth + 1):
        flow = first.backbone.layer(layer, flow)
        if layer < first.depth:
            for view, found in zip(views, vectors, strict=True):
                found.append(view.exits[str(layer)].pool(flow.hidden, flow.mask))  # type: ignore[operator]
    pooled = [torch.stack(found, dim=1).float() for found in vectors]
    return pooled, first.backbone.head(flow.hidden).float()


def _array(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A memory-mapped array, kept if one of that kind and shape is there."""
    try:
        found = open_memmap(path, mode="r+")
        if found.dtype == kind and found.shape == shape:
            return found
    except (OSError, ValueError):
        pass
    return open_memmap(path, mode="w+", dtype=kind, shape=shape)


def _check_space(folder: Path, wanted: int) -> None:
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    there = sum(file.stat().st_size for file in folder.glob("*.npy"))
    free = shutil.disk_usage(place).free + there
    if wanted > free:
        raise OutputError(
            f"{folder}: pooled vectors need {wanted / 1e9:.1f} GB, free are {free / 1e9:.1f} GB. "
            "Give fewer rows (--max-rows), a lower cache limit, or another place."
        )


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
