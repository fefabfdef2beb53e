"""Runs the cells of a grid, each in a process of its own, as many at once as there is room for."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)

from offramp.comparison.plan import STOPPED, Cell, Grid, Result, results

logger = logging.getLogger("offramp")

LOG = "log.txt"
POLL_SECONDS = 0.5
STOP_SECONDS = 120.0
"""For a checkpoint, after which a run is killed."""


@dataclass(frozen=True)
class Try:
    """A process at work on a run.

    Attributes:
        log: what it says goes after what was said by those before it.
        before: how many bytes that is.
    """

    process: subprocess.Popen[bytes]
    log: Path
    before: int

    def why(self) -> str:
        """The reason that it gave for its end, or the last that it said."""
        code = self.process.returncode
        if code == STOPPED:
            return "stopped"
        if code < 0:
            name = signal.Signals(-code).name
            hint = " Memory may have run out: try fewer --workers." if name == "SIGKILL" else ""
            return f"ended by {name}.{hint}"
        said = self.said() or "it said nothing."
        if said.startswith("Error: "):
            return said.removeprefix("Error: ")
        return f"{said} See {self.log}."

    def said(self) -> str:
        """Its last line."""
        with open(self.log, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.before, end - 4096))
            lines = file.read().decode("utf-8", "replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")


@dataclass
class Workers:
    """The processes of a comparison.

    Args:
        folder: of the comparison.
        most: processes at once; None for one per core, or one on a GPU, and as memory allows.
        deadline: on the monotonic clock; runs are stopped there with a checkpoint.
        plugins: modules that the processes import first.
        quiet: no progress.
        failed: runs that are not to be begun, and do not count, with the reason.
    """

    folder: Path
    most: int | None = None
    deadline: float | None = None
    plugins: Sequence[str] = ()
    quiet: bool = False
    failed: dict[Cell, str] = field(default_factory=dict)
    _running: dict[Cell, Try] = field(default_factory=dict)

    def run(self, grid: Grid) -> None:
        """Do what is not done yet, until it is done or the deadline has come."""
        with _Bars(grid.count(), self.quiet) as bars:
            try:
                while not self._late():
                    done = self._collect(grid)
                    wanted = [c for c in grid.next(done, self.failed) if c not in self._running]
                    if not wanted and not self._running:
                        return
                    for cell in wanted[: self._room(done)]:
                        self._begin(cell)
                    bars.show(self._over(grid, done), self._running)
                    time.sleep(POLL_SECONDS)
                logger.warning("The time is up; the same command goes on from here.")
            finally:
                self._stop()

    def done(self) -> dict[Cell, Result]:
        """All runs that have a result and count."""
        found = results(self.folder)
        return {cell: result for cell, result in found.items() if cell not in self.failed}

    def _over(self, grid: Grid, done: Mapping[Cell, Result]) -> int:
        """How many of its runs are done."""
        return sum(cell in done for cell in grid.wanted(done, self.failed))

    def _late(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _room(self, done: dict[Cell, Result]) -> int:
        """How many more processes there may be."""
        most = self.most
        if most is None:
            most = 1 if torch.cuda.is_available() else _cores()
            largest = max((result.memory for result in done.values()), default=0)
            if largest:
                # what has begun may not have taken yet what it will
                free = _free() + _held(self._running.values())
                most = min(most, int(free // (1.2 * largest)))
            elif not torch.cuda.is_available():
                # what a run takes is not known before one has been done
                most = min(most, max(1, int(_free() // (4 << 30))))
        return max(most, 1) - len(self._running)

    def _begin(self, cell: Cell) -> None:
        place = self.folder / "cells" / cell.name
        place.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "offramp.comparison.cell", str(self.folder)]
        command += [json.dumps(cell._asdict()), *self.plugins]
        with open(place / LOG, "ab") as log:
            before = log.tell()
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.PIPE,
                env=self._environment(),
                # Ctrl-C in a terminal is for this process alone: runs that are told twice
                # stop without a checkpoint
                start_new_session=True,
            )
        self._running[cell] = Try(process, place / LOG, before)

    def _environment(self) -> dict[str, str]:
        # one run at a time may have all cores, unless the user has said how many
        alone = os.environ.get("OMP_NUM_THREADS", str(_cores()))
        threads = alone if self.most == 1 else "1"
        known = {"OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        known |= {"TRANSFORMERS_VERBOSITY": "error", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
        return {**os.environ, **known, "PYTHONUNBUFFERED": "1"}

    def _collect(self, grid: Grid) -> dict[Cell, Result]:
        """Take note of processes that have ended; everything that is done."""
        ended = {cell: one for cell, one in self._running.items() if one.process.poll() is not None}
        done = self.done()
        for cell, one in ended.items():
            del self._running[cell]
            if cell in done:
                minutes = done[cell].seconds / 60
                of = f"{self._over(grid, done)} of {grid.count()}"
                logger.info("%s: done in %.1f minutes of training, %s.", cell.name, minutes, of)
            else:
                self.failed[cell] = one.why()
                logger.warning("%s: %s", cell.name, self.failed[cell])
        return done

    def _stop(self) -> None:
        """Let every process make a checkpoint."""
        processes = [one.process for one in self._running.values()]
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
        until = time.monotonic() + STOP_SECONDS
        for process in processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        self._running.clear()


def _free(container: Path = Path("/sys/fs/cgroup")) -> float:
    """Bytes that may still be taken, of the machine and of the container that this runs in."""
    free: float = psutil.virtual_memory().available
    try:
        limit = (container / "memory.max").read_text().strip()
        used = int((container / "memory.current").read_text())
        lines = (container / "memory.stat").read_text().splitlines()
        cached = int(dict(line.split() for line in lines)["inactive_file"])  # given up when needed
        return free if limit == "max" else min(free, max(0, int(limit) - used + cached))
    except (OSError, ValueError, KeyError):
        return free  # in no container, or in one of another kind


def _held(tries: Iterable[Try]) -> int:
    """Bytes of memory that their processes have."""
    held = 0
    for one in tries:
        with contextlib.suppress(psutil.NoSuchProcess):
            held += psutil.Process(one.process.pid).memory_info().rss
    return held


def _cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Bars:
    """A bar for the grid and a line per running process, on stderr."""

    def __init__(self, total: int, quiet: bool) -> None:
        self._total = total
        shown = not quiet and sys.stderr.isatty()
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=Console(stderr=True),
            disable=not shown,
        )
        self._lines: dict[Cell, TaskID] = {}

    def __enter__(self) -> _Bars:
        self._progress.start()
        self._all = self._progress.add_task("runs", total=self._total)
        return self

    def __exit__(self, *problem: object) -> None:
        self._progress.stop()

    def show(self, done: int, running: dict[Cell, Try]) -> None:
        self._progress.update(self._all, completed=done)
        for cell in [cell for cell in self._lines if cell not in running]:
            self._progress.remove_task(self._lines.pop(cell))
        for cell, one in running.items():
            if cell not in self._lines:
                self._lines[cell] = self._progress.add_task(cell.name, total=None)
            said = f"  {cell.name}: {one.said()[:60]}"
            self._progress.update(self._lines[cell], description=said)
