"""Claims about training on a model that stays as it is."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from offramp.errors import ConfigError
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.testing import save_tiny_stock, tiny_stock, tiny_texts, tiny_tokenizer
from offramp.training import TrainOptions, train

SHORT = TrainOptions(max_steps=4, batch_size=8, quiet=True)


def examples(count: int = 48) -> Dataset:
    texts = tiny_texts(count, longest=12)
    return Dataset.from_dict({"text": texts, "label": [len(text) % 3 for text in texts]})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock(tmp_path_factory.mktemp("stock"))


# A start that is fine-tuned already


@pytest.mark.parametrize("pooling", ["cls", None])
@pytest.mark.parametrize("method", ["deebert", "jei_dnn"])
def test_on_a_fine_tuned_model_only_the_exits_are_trained(
    method: str, pooling: Any, source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "offramp")
    given: dict[str, Any] = {"method": method, "pooling": pooling, "options": SHORT}
    made = train(source, examples(), tmp_path / "out", fine_tuned=True, **given)
    before = MultiExitModel.from_pretrained(source).stock.state_dict()
    assert all(torch.equal(leaf, before[name]) for name, leaf in made.stock.state_dict().items())  # type: ignore[union-attr, operator]
    assert all(leaf.any() for leaf in made.exits.parameters())  # type: ignore[union-attr]
    assert "Rehearsing" not in caplog.text
    assert "Stage 'stock'" not in caplog.text


def test_what_plain_leaves_is_the_model_of_both_stages_in_one_run(
    source: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"method": "deebert", "pooling": "cls", "options": SHORT}
    train(source, examples(), tmp_path / "plain", method="plain", options=SHORT)
    whole = train(source, examples(), tmp_path / "whole", **given)
    apart = train(tmp_path / "plain", examples(), tmp_path / "apart", fine_tuned=True, **given)
    wanted = whole.stock.state_dict()  # type: ignore[union-attr, operator]
    for name, leaf in apart.stock.state_dict().items():  # type: ignore[union-attr, operator]
        torch.testing.assert_close(leaf, wanted[name], msg=name)


def test_a_method_that_trains_the_model_along_still_does(source: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"pooling": "cls", "options": SHORT}
    one = train(source, examples(), tmp_path / "one", fine_tuned=True, **given)
    other = train(source, examples(), tmp_path / "other", **given)
    wanted = other.state_dict()
    assert all(torch.equal(leaf, wanted[name]) for name, leaf in one.state_dict().items())


def test_plain_has_nothing_left_to_train(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'plain' trains the model alone.*name a method"):
        train(source, examples(), tmp_path / "out", method="plain", fine_tuned=True)


@pytest.mark.parametrize(("how", "why"), [({"layers": 3}, "cut to 3"), ({}, "new head")])
def test_a_model_without_answers_of_its_own_is_not_fine_tuned(
    how: dict[str, Any], why: str, source: Path, tmp_path: Path
) -> None:
    if not how:
        source = tmp_path / "encoder"
        tiny_stock().base_model.save_pretrained(source)
        tiny_tokenizer().save_pretrained(source)
    with pytest.raises(ConfigError, match=why):
        train(source, examples(), tmp_path / "out", method="deebert", fine_tuned=True, **how)


@pytest.mark.parametrize("method", ["deebert", "fastbert", "jei_dnn"])
def test_what_is_left_of_a_method_are_its_stages_with_exits(method: str) -> None:
    objective = METHODS[method].objective()
    all_stages = objective.ahead()
    objective.fine_tuned = True
    assert objective.ahead() == all_stages[1:]
    assert all_stages[0].trainable == "stock"
