"""Some rows also run to full depth, to see whether an operating point still holds."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from offramp.calibration import RISKS, Monitor, OperatingPoint
from offramp.calibration.risks import Answered
from offramp.errors import ConfigError, OfframpError, OutputError
from offramp.policies import Policy
from offramp.prediction.items import Row
from offramp.prediction.ready import ReadyPoint

logger = logging.getLogger("offramp")


def begin(
    point: OperatingPoint, path: Path | None, level: float
) -> tuple[Monitor, FileLock | None]:
    """A new monitor of a point or the one of a file, and the lock of that file.

    One process at a time may keep a file: the last to write would undo what others saw. The lock is
    a hidden file beside it, which stays.

    Raises ConfigError where somebody has it, or it has another level.
    """
    if path is None:
        return Monitor.of(point, level), None
    lock = _lock_of(path.resolve())
    try:
        monitor = Monitor.load(path, point) if path.exists() else Monitor.of(point, level)
        if monitor.level != level:
            raise ConfigError(f"{path} was begun with level={monitor.level:g}, not {level:g}.")
    except OfframpError:
        if lock is not None:
            lock.release()
        raise
    return monitor, lock


def _lock_of(path: Path) -> FileLock | None:
    # whoever closes need not be the thread that began, nor the next watcher the same user
    lock = FileLock(path.with_name(f".{path.name}.lock"), mode=0o666, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"Somebody else watches with {path}. Give each process a file of its own."
        ) from None
    except OSError as problem:
        logger.warning("Others are not kept from watching with %s: %s", path, problem)
        return None
    return lock


class Watch:
    """Audits the rows of a predictor and keeps a monitor of them; see `Predictor.watch`.

    Args:
        monitor: what was seen so far.
        share: of rows to audit, at random.
        policy: whose rows are watched, and nobody else's.
        instead: the point after an alarm; None keeps the first.
        path: where the monitor is saved after what it notes of audits; None keeps it in memory.
        problem_type: of the model.
        file_lock: of the path, see `begin`; released with `close`.
    """

    def __init__(
        self,
        monitor: Monitor,
        share: float,
        policy: Policy,
        instead: ReadyPoint | None,
        path: Path | None,
        problem_type: str,
        file_lock: FileLock | None = None,
    ) -> None:
        self.monitor, self.share, self.policy = monitor, share, policy
        self._instead, self._path, self._problem_type = instead, path, problem_type
        self._file_lock = file_lock
        self._drawn = np.random.default_rng()  # nobody shall know which row is audited
        self._lock = threading.Lock()
        self._of_thread = threading.local()
        self._drift_said = False
        if monitor.alarmed:
            logger.warning("%s", monitor.words())

    @property
    def changes_policy(self) -> bool:
        """Whether rows run under another policy after an alarm."""
        return self._instead is not None

    @property
    def instead(self) -> ReadyPoint | None:
        """The point that rows run under since the alarm; None where nothing has changed."""
        return self._instead if self.monitor.alarmed else None

    def saw(
        self,
        rows: Sequence[Row],
        scores: np.ndarray,
        exit_layers: Sequence[int],
        full_depth: Callable[[Sequence[Row]], np.ndarray],
        unforced: Callable[[Sequence[Row]], tuple[np.ndarray, list[int]]] | None = None,
    ) -> None:
        """Take note of a batch that was answered, and audit some of it.

        Args:
            scores: of the exits that answered, (rows, classes).
            full_depth: gives the scores of some rows at full depth.
            unforced: where rows have a budget, gives scores and exit layers of some without. The
                point is judged by these, and by audited rows alone, since a forced answer is
                nothing that it promised.
        """
        audited = np.flatnonzero(self._drawn.random(len(rows)) < self.share).tolist()
        some = [rows[place] for place in audited]
        early, losses = scores[audited], list[float]()
        if unforced is not None:
            early, exit_layers = unforced(some) if some else (early, [])
        if some:
            losses = self._losses(early, full_depth(some))
        unkept = getattr(self._of_thread, "unkept", None)
        if unkept is None:
            self._note([(losses, exit_layers)])
        else:
            unkept.append((losses, exit_layers))

    @contextmanager
    def when_kept(self) -> Iterator[Callable[[], None]]:
        """Take note of this thread's rows when their answers are kept: call what this gives then.

        Answers that are lost are given again, and rows audited again, which may not count twice.
        """
        unkept: list[tuple[list[float], Sequence[int]]] = []
        self._of_thread.unkept = unkept

        def keep() -> None:
            self._note(unkept)
            unkept.clear()

        try:
            yield keep
        finally:
            del self._of_thread.unkept

    def _note(self, seen: Sequence[tuple[list[float], Sequence[int]]]) -> None:
        """Batches: what their audited rows lost, and where rows left."""
        with self._lock:
            for losses, exit_layers in seen:
                before = self.monitor
                after = self.monitor = before.after(losses, exit_layers)
                self._say(before, after)
            if any(losses for losses, _ in seen):
                self._save()

    def close(self) -> None:
        """Save what was seen and leave the file to others; what is seen later is not kept."""
        with self._lock:
            try:
                self._save()
            finally:
                self._path = None
                if self._file_lock is not None:
                    self._file_lock.release()

    def _save(self) -> None:
        """Rows get their answers even where what was seen cannot be kept."""
        if self._path is None:
            return
        try:
            self.monitor.save(self._path)
        except OutputError as problem:
            logger.warning(
                "What was seen of point '%s' is not kept: %s", self.monitor.point, problem
            )
            self._path = None

    def _losses(self, early: np.ndarray, full: np.ndarray) -> list[float]:
        """Of rows that full depth can answer; an answer that is broken there loses all."""
        early, full = (scores[np.isfinite(full).all(axis=1)] for scores in (early, full))
        fine = np.isfinite(early).all(axis=1)
        losses = np.ones(len(early))
        asked = Answered(early[fine], full[fine], None, self._problem_type)
        losses[fine] = RISKS[self.monitor.risk].of(asked)
        return losses.tolist()

    def _say(self, before: Monitor, after: Monitor) -> None:
        if after.alarmed and not before.alarmed:
            logger.warning("%s", after.words())
        if after.drifted and not self._drift_said:
            self._drift_said = True
            logger.warning(
                "Point '%s': rows leave at other layers than those it was chosen on (stability "
                "index %.2f). Its promise is for rows like those.",
                after.point,
                after.drift,
            )
