"""Methods side by side on networks that read images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.comparison import compare, statistics
from offramp.comparison.plan import Cell
from offramp.testing import save_tiny_stock, tiny_pictures

pytest_plugins = ("comparison_fixtures",)

pytest.importorskip("PIL")
QUICK = {"seeds": 1, "rates": [1e-3], "epochs": 1, "batch_size": 16, "quiet": True}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(statistics, "RESAMPLES", 20)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_methods_are_ranked_on_digits_with_a_vision_transformer(
    tmp_path: Path, inline: list[Cell]
) -> None:
    source = save_tiny_stock(tmp_path / "vit", "vit")
    done = compare(
        source, "digits", tmp_path / "which", split="train", eval_split="validation",
        test_split="test", fresh_head=True, max_rows=48,
        methods=["pabee", "palbert", "fastbert"], **QUICK,
    )  # fmt: skip
    assert done.complete, done.missing
    assert done.board is not None
    assert {row.name for row in done.board.methods} == {"pabee", "palbert", "fastbert"}
    assert "digits" in (done.folder / "leaderboard.html").read_text(encoding="utf-8")


def test_a_method_that_a_residual_network_cannot_have_is_named_with_its_reason(
    tmp_path: Path, inline: list[Cell]
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number, picture in enumerate(tiny_pictures(40, seed=ord(name[0]))):
            picture.save(tmp_path / "pictures" / name / f"{name}-{number}.png")
    source = save_tiny_stock(tmp_path / "resnet", "cifar_resnet")
    done = compare(
        source, tmp_path / "pictures", tmp_path / "which", fresh_head=True,
        methods=["pabee", "elbert"], **QUICK,
    )  # fmt: skip
    assert done.board is not None
    assert [row.name for row in done.board.methods] == ["pabee"]
    (missing,) = done.missing
    assert missing.method == "elbert"
    assert "need layers of one width; this model's have 8, 16, 32" in missing.why
