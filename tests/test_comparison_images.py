"""Methods side by side on networks that read images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from offramp.comparison import compare, statistics
from offramp.comparison.eligible import eligible
from offramp.comparison.plan import Cell
from offramp.errors import ConfigError, ModelError
from offramp.methods import METHODS
from offramp.model import load_stock
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


def test_all_on_a_residual_network_are_those_that_it_can_have(
    tmp_path: Path, inline: list[Cell], caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number, picture in enumerate(tiny_pictures(40, seed=ord(name[0]))):
            picture.save(tmp_path / "pictures" / name / f"{name}-{number}.png")
    source = save_tiny_stock(tmp_path / "resnet", "cifar_resnet")
    given = {"fresh_head": True, **QUICK}
    with pytest.raises(ModelError, match="cannot be cut off"):
        compare(source, tmp_path / "pictures", tmp_path / "no", methods=["truncated"], **given)
    assert not (tmp_path / "no").exists()
    stock = load_stock(source)
    with caplog.at_level("INFO", "offramp"):
        names = eligible(["all"], "single_label_classification", stock)
    assert set(names) == {"plain", "attach", *METHODS}
    assert "Left out of `all`: truncated: Layers of a 'cifar_resnet'" in caplog.text
    done = compare(
        source, tmp_path / "pictures", tmp_path / "which", methods=["palbert", "elbert"], **given
    )
    assert done.complete, done.missing


@pytest.mark.parametrize("pooling", ["attention", "cls"])
def test_a_pooling_that_exits_cannot_have_is_refused_before_anything_runs(
    pooling: str, tmp_path: Path
) -> None:
    text, pictures = (
        load_stock(save_tiny_stock(tmp_path / n, n)) for n in ("bert", "cifar_resnet")
    )
    kind = "single_label_classification"
    assert ("gpfee" in eligible(["all"], kind, text, pooling)) == (pooling == "cls")
    with pytest.raises(ConfigError, match=r"gpfee|makes no sense"):
        eligible(["gpfee"], kind, pictures, pooling)
