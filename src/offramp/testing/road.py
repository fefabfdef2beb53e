"""What every supported classifier must do: the whole road, on a handful of inputs."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset

from offramp.calibration import calibrate
from offramp.data import load_examples
from offramp.engines import load_processor, record
from offramp.model import MultiExitModel
from offramp.prediction import predict
from offramp.table import ExitTable, replay
from offramp.testing.pictures import tiny_pictures
from offramp.testing.reference import ensure
from offramp.testing.tiny import tiny_texts
from offramp.training import TrainOptions, attach, train

_ROWS = 40
_OPTIONS = TrainOptions(max_steps=2, batch_size=8, quiet=True)


def check_road(source: str | Path) -> None:
    """Take a stock classifier through train, attach, record, calibrate, predict, save, reload.

    Args:
        source: a folder with a processor; it is not changed.

    Raises:
        AssertionError: saying where the road breaks.
        OfframpError: a part of it refuses the model.
    """
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        _check_train(Path(source), folder / "train")
        _check_attach(Path(source), folder / "attach")
        table = _check_record(folder / "attach", folder / "table")
        _check_predict(folder / "attach", table)
        _check_save(folder / "attach", folder / "again")


def _inputs(model: MultiExitModel, seed: int = 0) -> dict[str, list[Any]]:
    if model.backbone.reads == "image":
        return {"image": tiny_pictures(_ROWS, seed)}
    return {"text": tiny_texts(_ROWS, seed)}


def _labels(model: MultiExitModel) -> list[Any]:
    count = int(cast(Any, model.stock.num_labels))
    if model.problem_type == "regression":
        return [0.1 * row for row in range(_ROWS)]
    if model.problem_type == "multi_label_classification":
        return [[(row + label) % 2 for label in range(count)] for row in range(_ROWS)]
    return [row % count for row in range(_ROWS)]


def _check_train(source: Path, output: Path) -> None:
    before = MultiExitModel.from_pretrained(source)
    rows = Dataset.from_dict({**_inputs(before), "label": _labels(before)})
    train(source, rows, output, pooling="mean", options=_OPTIONS)
    ensure(not _same_stock(before, output), "train changes no weight of the backbone.")


def _check_attach(source: Path, output: Path) -> None:
    before = MultiExitModel.from_pretrained(source)
    rows = Dataset.from_dict(_inputs(before))
    attach(source, rows, output, pooling="mean", options=_OPTIONS)
    ensure(_same_stock(before, output), "attach changes a weight of the frozen classifier.")


def _same_stock(before: MultiExitModel, folder: Path) -> bool:
    new = MultiExitModel.from_pretrained(folder).stock.state_dict()
    return all(torch.equal(new[name], old) for name, old in before.stock.state_dict().items())


def _check_record(folder: Path, path: Path) -> ExitTable:
    model = MultiExitModel.from_pretrained(folder).eval()
    rows = load_examples(Dataset.from_dict(_inputs(model, seed=1)))
    processor = load_processor(folder, model.backbone.reads)
    table = record(model, rows, path, "tune", processor=processor, progress=False)
    ensure(table.rows == _ROWS, f"The table has {table.rows} of {_ROWS} rows.")
    return table


def _check_predict(folder: Path, table: ExitTable) -> None:
    point = calibrate(table, target_speedup=1.5).point
    point.save(folder)
    (items,) = _inputs(MultiExitModel.from_pretrained(folder), seed=1).values()
    answers = list(predict(folder, items))
    wanted = replay(table, point.build_policy()).exit_layers.tolist()
    layers = [answer["exit_layer"] for answer in answers]
    ensure(layers == wanted, f"Live exit layers {layers} are not those of the replay, {wanted}.")


def _check_save(folder: Path, again: Path) -> None:
    model = MultiExitModel.from_pretrained(folder)
    model.save_pretrained(again, processor=load_processor(folder, model.backbone.reads))
    (items,) = _inputs(model, seed=1).values()
    same = list(predict(folder, items, point="full")) == list(predict(again, items, point="full"))
    ensure(same, "A model that is saved again answers otherwise.")
