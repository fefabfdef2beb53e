"""The work folder beside an output: what a killed run needs to go on.

It holds `run.json` (what the run was asked to do), the Trainer's checkpoints of the running
stage, and the weights after each finished stage. It is removed once the output is written.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import offramp
from offramp.errors import ConfigError, OutputError
from offramp.storage import (
    Strict,
    fingerprint,
    read_document,
    read_json,
    whole_file,
    write_document,
    write_json,
)

logger = logging.getLogger("offramp")

CHECKPOINT_FILES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json")


class Run(Strict):
    """What a run was asked to do, by topic, so that a change can be named."""

    schema_version: int = 1
    asked: dict[str, str]


class WorkFolder:
    """Everything of a run that is not its result."""

    def __init__(self, output: Path) -> None:
        self.path = output.absolute().with_name(f"{output.absolute().name}.work")

    def open(self, asked: dict[str, Any]) -> None:
        """Go on with the run that lies here, or start anew if it was asked something else."""
        texts = {name: json.dumps(value, sort_keys=True) for name, value in asked.items()}
        texts["versions"] = f"offramp {offramp.__version__}, torch {torch.__version__}"
        run = Run(asked=texts)
        before = self._before()
        if before is not None and before != run:
            changed = sorted(k for k, v in texts.items() if before.asked.get(k) != v)
            logger.warning(
                "%s belongs to another run (%s changed): starting anew.",
                self.path, ", ".join(changed) or "version",
            )  # fmt: skip
        if before == run:
            logger.info("Continuing the run in %s.", self.path)
            return
        self.remove()
        write_document(self.path / "run.json", run)

    def _before(self) -> Run | None:
        try:
            return read_document(Run, self.path / "run.json")
        except ConfigError:
            return None

    def once(self, name: str, decide: Callable[[], str]) -> str:
        """A decision of this run: made the first time, read back when the run continues."""
        path = self.path / f"{name}.json"
        if not path.is_file():
            write_json(path, decide())
        return str(read_json(path))

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

    def last_checkpoint(self, name: str) -> Path | None:
        """The newest whole checkpoint of a stage; half-written ones are removed."""
        found = self.stage(name).glob("checkpoint-*")
        for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
            if _is_whole(path):
                return path
            logger.warning("%s was not written to its end: skipped.", path)
            shutil.rmtree(path, ignore_errors=True)
        return None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def _is_whole(checkpoint: Path) -> bool:
    """trainer_state.json is written last, so its parsing vouches for the rest."""
    if not all((checkpoint / name).is_file() for name in CHECKPOINT_FILES):
        return False
    if not list(checkpoint.glob("rng_state*.pth")):
        return False
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except ValueError:
        return False
    return True


def check_output(output: Path) -> None:
    """Raise now if a folder cannot be written there, not after hours of training."""
    output = output.absolute()
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; give a folder for the model.")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}."):
            pass
        if output.is_dir() and not os.access(output, os.W_OK):
            raise PermissionError("write-protected")
    except OSError as problem:
        raise OutputError(f"{output}: cannot be written: {problem}.") from problem


def dataset_fingerprint(dataset: Dataset) -> str:
    """A name for the rows and their order, whatever file or cache they came from."""
    names = sorted(set(dataset.column_names) & {"input_ids", "token_type_ids", "label"})
    parts: list[bytes | str] = []
    view = dataset.select_columns(names).with_format("arrow")
    for table in view.iter(batch_size=5_000):
        sink = pa.BufferOutputStream()
        whole = table.combine_chunks().replace_schema_metadata(None)
        with pa.ipc.new_stream(sink, whole.schema) as writer:
            writer.write_table(whole)
        parts.append(fingerprint(sink.getvalue().to_pybytes()))
    return fingerprint(*names, *parts)


@contextlib.contextmanager
def says_how_to_continue(work: WorkFolder):  # type: ignore[no-untyped-def]
    """Say on Ctrl-C that nothing is lost."""
    try:
        yield
    except KeyboardInterrupt:
        logger.warning(
            "Stopped. The same command continues from the last checkpoint in %s.", work.path
        )
        raise
