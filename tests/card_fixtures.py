"""Fixtures of the tests of the model card: a model of each kind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from offramp.testing import PROBLEM_TYPES, save_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each kind, to be copied."""
    place = tmp_path_factory.mktemp("models")
    return {kind: save_tiny(place / kind, problem_type=kind) for kind in PROBLEM_TYPES}


@pytest.fixture
def kind() -> str:
    return PROBLEM_TYPES[0]


@pytest.fixture
def folder(models: dict[str, Path], kind: str, tmp_path: Path) -> Path:
    """A model that a test may change."""
    return Path(shutil.copytree(models[kind], tmp_path / "model"))
