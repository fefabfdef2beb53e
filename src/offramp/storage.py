"""Files that are whole or not there, JSON that is strict, and fingerprints.

Writing a folder goes: a sibling staging folder, the old one renamed aside, the new one
renamed into place, the old one deleted. `recover` puts the old one back if a crash fell
between the two renames, so a reader sees the old artefact or the new one, never a mixture.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from offramp.errors import ConfigError, OfframpError, OutputError
from offramp.registry import nearest


class Strict(BaseModel):
    """Base of every document of ours: frozen, no unknown keys, no NaN or infinity."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=()
    )


D = TypeVar("D", bound=Strict)
LOCK = ".lock"


def parse_document(
    kind: type[D], data: Any, source: str, error: type[OfframpError] = ConfigError
) -> D:
    """Validate `data` as a `kind`; a problem names the source and the key."""
    try:
        return kind.model_validate(data)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "(document)"
        hint = ""
        if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
            hint = nearest(key, list(kind.model_fields))
        raise error(f"{source}: key '{key}': {first['msg']}.{hint}") from None


def read_json(path: Path, error: type[OfframpError] = ConfigError) -> Any:
    """Read strict JSON: no NaN, no Infinity, no duplicate keys; errors name the file."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is not a number that may stand here")

    def finite(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if len(set(keys)) != len(keys):
            raise ValueError("a key stands twice")
        return dict(pairs)

    try:
        text = path.read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=unique)
    except FileNotFoundError:
        raise error(f"{path}: no such file.") from None
    except (OSError, ValueError, RecursionError) as problem:
        raise error(f"{path}: not readable as JSON: {problem}.") from None


def read_document(kind: type[D], path: Path, error: type[OfframpError] = ConfigError) -> D:
    """Read a JSON file of ours and validate it as `kind`."""
    return parse_document(kind, read_json(path, error), str(path), error)


def write_json(path: Path, data: Any) -> None:
    """Write JSON whole or not at all."""
    with whole_file(path) as staged:
        text = json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False)
        staged.write_text(text + "\n", encoding="utf-8")


def write_document(path: Path, document: Strict) -> None:
    """Write a document as JSON, whole or not at all; `read_document` reads it."""
    write_json(path, document.model_dump(mode="json"))


def cache_folder() -> Path | None:
    """Where things that can be made again are kept, or None where no home is known."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    known = os.path.isabs(base)  # '~' stays where no home is known
    return Path(base, "offramp") if known else None


def drop_oldest(folder: Path, most: int) -> None:
    """Delete the files of a folder that were used longest ago, until `most` bytes are left.

    Others may be at work there: what is gone already, or not ours to delete, is passed over.
    """
    known: dict[Path, os.stat_result] = {}
    with contextlib.suppress(OSError):
        for file in folder.iterdir():
            with contextlib.suppress(OSError):
                known[file] = file.stat()
    for file in sorted(known, key=lambda one: known[one].st_mtime, reverse=True):
        most -= known[file].st_size
        if most < 0:
            with contextlib.suppress(OSError):
                file.unlink()


def check_place(path: Path) -> None:
    """Raise OutputError now if a file cannot be written there, not when it has been made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = _staged(path)
        staged.touch()
        staged.unlink()
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written: {problem}.") from problem


def _staged(path: Path) -> Path:
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a staging path that becomes `path` only if the block succeeds."""
    staged = _staged(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield staged
        _sync(staged)
        os.replace(staged, path)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written: {problem}.") from problem
    finally:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(
    path: Path, keep_others: bool = False, leave_behind: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Yield a staging folder that replaces `path` only if the block succeeds.

    With `keep_others`, files of the old folder that the block did not write are carried
    over, all but `leave_behind`, so saving never deletes what the folder's owner keeps there.
    """
    path = path.resolve()
    staged = _staged(path)
    try:
        recover(path)
        if path.exists() and not path.is_dir():
            raise OutputError(f"{path} is a file; give the name of a folder.")
        path.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        if keep_others and path.is_dir():
            _carry_over(path, staged, leave_behind)
        for file in staged.rglob("*"):
            if file.is_file():
                _sync(file)
        _swap(staged, path)
    except OSError as problem:
        raise OutputError(f"{path}: cannot be written: {problem}.") from problem
    finally:
        shutil.rmtree(staged, ignore_errors=True)


@contextlib.contextmanager
def alone_in(folder: Path, who: str) -> Iterator[None]:
    """Nobody else is in here for the same folder meanwhile; makes the folder.

    Args:
        who: would be at work there, as in 'Another comparison'.

    Raises ConfigError where another one is, OutputError where a folder cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{who} is at work in {folder}. Wait for it, or give another folder."
        ) from None
    except OSError as problem:
        raise OutputError(f"{folder}: cannot be written: {problem}.") from problem
    try:
        yield
    finally:
        lock.release()


def recover(path: Path) -> None:
    """Put back the old folder if a crash fell between the two renames of a save."""
    path = path.resolve()
    aside = _aside(path)
    if aside.is_dir() and not path.exists():
        with contextlib.suppress(OSError):
            os.rename(aside, path)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _swap(staged: Path, path: Path, tries: int = 3) -> None:
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        os.rename(path, aside)
    try:
        os.rename(staged, path)
    except OSError:
        if aside.exists():
            os.rename(aside, path)
        elif path.exists() and tries > 1:
            # somebody who looked between the two renames has put the old one back
            return _swap(staged, path, tries - 1)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _carry_over(old: Path, staged: Path, leave_behind: tuple[str, ...]) -> None:
    for source in old.iterdir():
        target = staged / source.name
        if target.exists() or source.name in leave_behind:
            continue
        if source.is_dir() and not source.is_symlink():
            shutil.copytree(source, target, symlinks=True)
        else:
            shutil.copy2(source, target, follow_symlinks=False)


def _sync(path: Path) -> None:
    with open(path, "rb") as handle:
        os.fsync(handle.fileno())


def fingerprint(*parts: bytes | memoryview | str) -> str:
    """A short stable name for content: 32 hex digits of SHA-256 over the parts."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little"))
        digest.update(data)
    return digest.hexdigest()[:32]


def fingerprint_of_files(*files: Path) -> str:
    """`fingerprint` of what files hold, which need not fit into memory."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.stat().st_size.to_bytes(8, "little"))
        with open(file, "rb") as handle:
            while part := handle.read(1 << 20):
                digest.update(part)
    return digest.hexdigest()[:32]
