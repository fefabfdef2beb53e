"""Claims about every architecture: the whole road, from a stock folder to answers."""

from __future__ import annotations

from pathlib import Path

import pytest

from offramp.backbones import BACKBONES
from offramp.testing import (
    ARCHITECTURES,
    IMAGE_ARCHITECTURES,
    RELATIVES,
    check_road,
    tiny_processor,
    tiny_stock,
)


def stock(folder: Path, arch: str, problem_type: str = "single_label_classification") -> Path:
    """Of few layers: there are many architectures."""
    tiny_stock(arch, problem_type, layers=3).save_pretrained(folder)
    tiny_processor(arch).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("arch", ARCHITECTURES + RELATIVES + IMAGE_ARCHITECTURES)
def test_the_whole_road_is_open(arch: str, tmp_path: Path) -> None:
    check_road(stock(tmp_path / "stock", arch))


@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_the_whole_road_is_open_for_every_task(problem_type: str, tmp_path: Path) -> None:
    check_road(stock(tmp_path / "stock", "modernbert", problem_type))


def test_every_architecture_that_is_registered_is_tried_here() -> None:
    assert set(BACKBONES.names()) == set(ARCHITECTURES + RELATIVES + IMAGE_ARCHITECTURES)
