"""Fixtures of the command line tests: a way to run it, and models and rows to run it on."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cli_support import ROWS, Said, write_csv

from offramp.cli.main import main
from offramp.testing import save_tiny, save_tiny_stock, tiny_texts


@pytest.fixture(autouse=True)
def _logger_as_it_was() -> Iterator[None]:
    logger = logging.getLogger("offramp")
    before = logger.handlers, logger.level, logger.propagate
    yield
    logger.handlers, logger.level, logger.propagate = before


@pytest.fixture
def offramp(capsys: pytest.CaptureFixture[str]) -> Callable[..., Said]:
    def run(*arguments: object) -> Said:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, rows and a table that tests read and never change."""
    folder = tmp_path_factory.mktemp("cli")
    save_tiny_stock(folder / "stock")
    save_tiny(folder / "exits")
    save_tiny(folder / "other", seed=5)
    texts = tiny_texts(ROWS)
    write_csv(folder / "rows.csv", [(t, f"label-{n % 3}") for n, t in enumerate(texts)])
    write_csv(folder / "odd.csv", [(text, "odd") for text in texts[:2]])
    write_csv(folder / "texts.csv", [(text,) for text in texts], ("text",))
    quiet = ["--quiet", "--output"]
    assert main(["record", str(folder / "exits"), "-d", str(folder / "rows.csv"), *quiet,
                 str(folder / "tune.table")]) == 0  # fmt: skip
    return folder


@pytest.fixture
def exits(place: Path, tmp_path: Path) -> Path:
    """A multi-exit model that a test may change."""
    return Path(shutil.copytree(place / "exits", tmp_path / "exits"))
