"""What all tests share: a quiet, offline environment and the shared folder."""

from __future__ import annotations

import copy
import functools
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Read when torch, transformers and datasets are first imported, hence set before any test is.
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

# CI tries the same examples in every run; other runs look for new ones
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("search", deadline=None, max_examples=50)
settings.load_profile("ci" if os.environ.get("CI") else "search")

ROOT = Path(__file__).resolve().parents[1]
_cache = pytest.StashKey[str]()


def shared_folder() -> Path:
    """Where golden answers, data and weights lie; it need not exist."""
    return (ROOT / os.environ.get("OFFRAMP_SHARED", "../shared")).resolve()


def shared_path(*parts: str) -> Path:
    """A file or folder of the shared folder; the test is skipped where it is missing."""
    path = shared_folder().joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is missing; OFFRAMP_SHARED names the folder that holds it")
    return path


@pytest.fixture(name="shared_path", scope="session")
def shared_path_fixture() -> Callable[..., Path]:
    return shared_path


@pytest.fixture(autouse=True, scope="session")
def few_updates() -> Iterator[None]:
    """Exits of few rows need not be good ones here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("offramp.training.attachment.FEWEST_UPDATES", 20)
        yield


@pytest.fixture(autouse=True, scope="session")
def one_table_of_operators() -> Iterator[None]:
    """The exporter reads its table anew for each graph: a second and a half, and the same table."""
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry as Registry

        read = functools.cache(Registry.from_torchlib)
    except (ImportError, AttributeError):  # without the extra, or in another version of torch
        yield
        return

    def table(*given: Any, **named: Any) -> Any:
        own = copy.copy(read(*given, **named))
        own.functions = {name: list(known) for name, known in own.functions.items()}
        return own

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Registry, "from_torchlib", staticmethod(table))
        yield


def pytest_configure(config: pytest.Config) -> None:
    """What is cached is cached in a folder of this run; xdist's workers inherit it."""
    # what a shell runs in its background is deaf to Ctrl-C, and so is what that starts
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="offramp-datasets-")
        config.stash[_cache] = folder
        os.environ["HF_DATASETS_CACHE"] = folder
        os.environ["XDG_CACHE_HOME"] = folder


def pytest_collection_finish() -> None:
    """What imports made stays; no later collection of garbage has to look through it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    if folder := config.stash.get(_cache, None):
        shutil.rmtree(folder, ignore_errors=True)
