"""Pooled vectors of all layers of a frozen model, computed once and kept on disk."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState
from numpy.lib.format import open_memmap
from torch import Tensor, nn
from torch.utils.data import Dataset as TorchDataset
from tqdm.auto import tqdm

from offramp.engines.batching import plan_batches
from offramp.exits import ExitKind, ExitOutput
from offramp.model import MultiExitModel, MultiExitOutput
from offramp.objectives import Objective
from offramp.training.batches import Rows

logger = logging.getLogger("offramp")


def vectors_type(
    exits: ExitKind, objective: Objective, model: MultiExitModel, rows: Rows, limit: int
) -> np.dtype[Any] | None:
    """In what vectors are cached for the stages of the exits alone; None where nothing is.

    That is without such a stage, with exits that do not answer from one fixed vector, with an
    objective that runs the model in its own way, and where all vectors take more than `limit`
    bytes.
    """
    frozen = any(stage.trainable == "exits" for stage in objective.ahead())
    own_way = type(objective).training_step is not Objective.training_step or objective.apart
    if not frozen or own_way or not exits.cacheable:
        return None
    return cache_type(len(rows.lengths), model, limit)


def cache_type(rows: int, model: MultiExitModel, limit: int) -> np.dtype[Any] | None:
    """float32 if the vectors fit under `limit` bytes, else float16, else None."""
    for kind in (np.dtype(np.float32), np.dtype(np.float16)):
        if cache_bytes(rows, model, kind) <= limit:
            return kind
    return None


def cache_bytes(rows: int, model: MultiExitModel, kind: np.dtype[Any]) -> int:
    """Disk that the vectors of `rows` rows take."""
    return rows * (sum(widths(model)) * kind.itemsize + _classes(model) * 4)


def widths(model: MultiExitModel) -> list[int]:
    """Of what exits 1..L-1 pool."""
    return [model.backbone.width(layer) for layer in range(1, model.depth)]


class VectorCache(TorchDataset[dict[str, Tensor]]):
    """Pooled vectors of all exits, one after the other, and full-depth scores, memory-mapped.

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
        folder.mkdir(parents=True, exist_ok=True)
        self.pooled = _array(folder / "pooled.npy", kind, (count, sum(widths(model))))
        self.teacher = _array(
            folder / "teacher.npy", np.dtype(np.float32), (count, _classes(model))
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
            self.pooled[places] = torch.cat(vectors, dim=1).cpu().numpy()
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

    def parts(self) -> Iterator[tuple[Tensor, ...]]:
        """The pooled vectors of some rows after the other, (rows, width) per exit."""
        for start in range(0, len(self), 4096):
            part = torch.from_numpy(self.pooled[start : start + 4096].astype(np.float32))
            yield part.split(widths(self._model), dim=1)

    def rows(self, lengths: Tensor | None = None) -> Rows:
        """As the rows of a stage; lengths (rows,) order them as a stage that reads tokens does."""
        alike = torch.ones(len(self), dtype=torch.long)
        return Rows(self, alike if lengths is None else lengths, _as_it_is)


def filled_cache(
    folder: Path, model: MultiExitModel, rows: Rows, kind: np.dtype[Any], quiet: bool
) -> VectorCache:
    """The vectors of a model as it is now; all processes compute what is missing in `folder`."""
    state = PartialState()
    nn.Module.to(model, state.device)
    model.eval()
    with state.main_process_first():
        cache = VectorCache(folder, model, rows, kind)
    cache.fill(quiet, state.process_index, state.num_processes)
    state.wait_for_everyone()
    return cache


class CachedExits(nn.Module):
    """The exits of a model, fed with cached vectors instead of tokens."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.exits = model.exits
        self._widths = widths(model)

    def forward(self, pooled: Tensor, teacher: Tensor) -> MultiExitOutput:
        outputs, carry = [], None
        for layer, vectors in enumerate(pooled.split(self._widths, dim=1), start=1):
            output, carry = self.exits.at(layer).read(vectors, carry)  # type: ignore[attr-defined]
            outputs.append(output)
        full = ExitOutput(teacher, self.exits.full_signals(teacher))
        return MultiExitOutput(exits=(*outputs, full))


@torch.inference_mode()
def pooled_vectors(
    views: Sequence[MultiExitModel], batch: Mapping[str, Tensor]
) -> tuple[list[list[Tensor]], Tensor]:
    """Per view what exits 1..L-1 pool, (rows, width) each, and full-depth scores, (rows, classes).

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
                pooled = view.exits.at(layer).pool(flow.hidden, flow.mask)  # type: ignore[attr-defined]
                found.append(pooled.float())
    return vectors, first.backbone.head(flow.hidden, flow.mask).float()


def sampled_vectors(model: MultiExitModel, rows: Rows, seed: int) -> Iterator[list[Tensor]]:
    """What exits 1..L-1 pool of a sample of the rows, (rows, width) each, part after part.

    The model is put in evaluation mode: dropout has no part in it, and BatchNorm learns nothing.
    """
    model.eval()
    sample = rows.sample(seed)
    for block in plan_batches(sample.lengths.numpy()):
        yield pooled_vectors([model], sample.batch(block))[0][0]


def _classes(model: MultiExitModel) -> int:
    return cast(int, model.config.num_labels)


def _array(path: Path, kind: np.dtype[Any], shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """A memory-mapped array, kept if one of that kind and shape is there."""
    try:
        found = open_memmap(path, mode="r+")
        if found.dtype == kind and found.shape == shape:
            return found
    except (OSError, ValueError):
        pass
    return open_memmap(path, mode="w+", dtype=kind, shape=shape)


def _as_it_is(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return batch
