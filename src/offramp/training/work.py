"""The work folder beside an output: what a killed run needs to go on.

It holds `run.json` (what the run was asked to do), the Trainer's checkpoints of the running
stage, and the weights after each finished stage. It is removed once the output is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import offramp
from offramp.calibration import list_points
from offramp.data.hashing import dataset_ids
from offramp.errors import ConfigError, OutputError
from offramp.model.folder import CONFIG, is_ours
from offramp.storage import (
    LOCK,
    Strict,
    alone_in,
    fingerprint,
    read_document,
    read_json,
    whole_file,
    write_document,
    write_json,
)

logger = logging.getLogger("offramp")

T = TypeVar("T")

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class Run(Strict):
    """What a run was asked to do, by topic, so that a change can be named."""

    schema_version: int = 1
    asked: dict[str, str]


class WorkFolder:
    """Everything of a run that is not its result."""

    def __init__(self, output: Path) -> None:
        self.path = output.absolute().with_name(f"{output.absolute().name}.work")

    def open(self, asked: Mapping[str, Any]) -> None:
        """Go on with the run that lies here, or start anew if it was asked something else."""
        texts = {name: json.dumps(value, sort_keys=True) for name, value in asked.items()}
        texts["versions"] = f"offramp {offramp.__version__}, torch {torch.__version__}"
        run = Run(asked=texts)
        with PartialState().main_process_first():
            self._open(run)

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Nobody else trains into the same output meanwhile. Raises ConfigError where one does."""
        if not PartialState().is_main_process:
            return contextlib.nullcontext()
        return alone_in(self.path, "Another run")

    def _open(self, run: Run) -> None:
        before = self._before()
        if before == run:
            logger.info("Continuing the run in %s.", self.path)
            return
        if before is not None:
            names = {*run.asked, *before.asked}
            changed = sorted(n for n in names if before.asked.get(n) != run.asked.get(n))
            logger.warning(
                "%s holds a run of another kind (different: %s): starting anew.",
                self.path,
                ", ".join(changed),
            )
        self._clear()
        write_document(self.path / "run.json", run)

    def _clear(self) -> None:
        for found in self.path.glob("*"):
            if found.is_dir():
                shutil.rmtree(found, ignore_errors=True)
            elif found.name != LOCK:
                found.unlink(missing_ok=True)

    def _before(self) -> Run | None:
        try:
            return read_document(Run, self.path / "run.json")
        except ConfigError:
            return None

    def once(self, name: str, decide: Callable[[], T]) -> T:
        """A decision of this run: made the first time, read back when the run continues.

        With several processes all decide, and the main process's decision holds.
        """
        path, state = self.path / f"{name}.json", PartialState()
        state.wait_for_everyone()
        decided = path.is_file()
        state.wait_for_everyone()
        if not decided:
            decision = decide()
            if state.is_main_process:
                write_json(path, decision)
            state.wait_for_everyone()
        return cast(T, read_json(path))

    def stage(self, name: str) -> Path:
        """Folder of the checkpoints of a stage."""
        return self.path / name

    def _finished(self, name: str) -> Path:
        return self.path / f"{name}.safetensors"

    def finish(self, name: str, module: nn.Module) -> None:
        """Keep the weights after a stage and drop its checkpoints."""
        with whole_file(self._finished(name)) as staged:
            save_file({n: t.contiguous() for n, t in module.state_dict().items()}, staged)
        shutil.rmtree(self.stage(name), ignore_errors=True)

    def finished(self, name: str) -> dict[str, Tensor] | None:
        """The weights after a stage, or None if it is not finished."""
        path = self._finished(name)
        return load_file(path) if path.is_file() else None

    def last_checkpoint(self, name: str, processes: int = 1) -> Path | None:
        """The newest whole checkpoint of a stage; half-written ones are removed."""
        found = self.stage(name).glob("checkpoint-*")
        for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
            if _is_whole(path, processes):
                return path
            logger.warning("%s was not written to its end: skipped.", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _is_whole(checkpoint: Path, processes: int) -> bool:
    """Of the files of the main process trainer_state.json is written last."""
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    if len(list(checkpoint.glob("rng_state*.pth"))) != processes:
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def check_output(output: Path, source: Path, plain: bool = False) -> None:
    """Raise now if a folder cannot be written there, not after hours of training.

    Only a `plain` result, which is a stock model, may take the place of a stock model.
    """
    output = output.absolute()
    if output.resolve() == source.resolve():
        raise ConfigError(f"{output} is the model that is to be read. Give another folder.")
    if Path.cwd().is_relative_to(output.resolve()):
        raise ConfigError(f"{output} is the folder you are in, or holds it. Name one of its own.")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder for the model.")
    if not plain and (output / CONFIG).is_file() and not is_ours(output):
        raise ConfigError(f"{output} holds another model. Give another folder, or remove it first.")
    points = list_points(output)
    if points:
        logger.warning(
            "%s holds a model with operating points (%s). It will be replaced, and they will go "
            "unless the weights come out the same.",
            output,
            ", ".join(points),
        )
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}."):
            pass
        if output.is_dir() and not os.access(output, os.W_OK):
            raise PermissionError("write-protected")
    except OSError as problem:
        raise OutputError(f"{output}: cannot be written: {problem}.") from problem


def check_space(folder: Path, wanted: int, mend: str) -> None:
    """Raise if the disk has less than `wanted` bytes free, what lies in `folder` aside."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = shutil.disk_usage(place).free + there
    if wanted > free:
        raise OutputError(
            f"{folder}: this needs {math.ceil(wanted / 1e6):,} MB of disk, free are "
            f"{free // 1_000_000:,} MB. "
            f"{mend}"
        )


def dataset_fingerprint(dataset: Dataset) -> str:
    """A name for the rows and their order, whatever file or cache they came from."""
    names = sorted(set(dataset.column_names) & {"input_ids", "token_type_ids", "label"})
    parts: list[bytes | str] = []
    if "image" in dataset.column_names:
        parts.append(dataset_ids(dataset).tobytes())
    view = dataset.select_columns(names).with_format("arrow")
    for table in view.iter(batch_size=5_000):
        sink = pa.BufferOutputStream()
        whole = table.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
        parts.append(fingerprint(sink.getvalue().to_pybytes()))
    return fingerprint(*names, *parts)


_FULL = ("No space left", "Disk quota", "StorageFull", "code: 28", "inline_container")
"""What the writers of checkpoints say of a disk that takes no more."""


@contextlib.contextmanager
def says_disk_is_full(folder: Path) -> Iterator[None]:
    """Raise OutputError where a checkpoint could not be written."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as problem:
        if not any(word in str(problem) for word in _FULL):
            raise
        raise OutputError(
            f"The disk seems to be full: {problem}. Make room, and the same command goes on with "
            f"what lies in {folder}."
        ) from problem


@contextlib.contextmanager
def says_how_to_continue(work: WorkFolder) -> Iterator[None]:
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(
            "Stopped. The same command continues from where it was, with what lies in %s.",
            work.path,
        )
        raise
