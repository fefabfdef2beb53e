"""Stock classifiers as they are found in the wild, and what becomes of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp.engines import TorchEngine, label_names, record
from offramp.errors import ConfigError, ModelError
from offramp.model import Head, MultiExitModel
from offramp.policies import Full
from offramp.testing import (
    ARCHITECTURES,
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)


def _add_tensor(folder: Path, key: str) -> None:
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {key: torch.ones(4, 4)}, weights, metadata={"format": "pt"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_config_that_asks_for_tuples_changes_nothing(arch: str) -> None:
    stock = tiny_stock(arch)
    wanted = stock(**tiny_batch(4)).logits
    stock.config.return_dict = False
    with torch.inference_mode():
        model = MultiExitModel.from_stock(stock)
        assert torch.equal(model(**tiny_batch(4)).logits, wanted)


def test_no_input_is_left_out_in_silence() -> None:
    model, batch = tiny_model(), tiny_batch(4, padded=False)
    with torch.inference_mode():
        embedded = model.stock.get_input_embeddings()(batch["input_ids"]).flip(1)
        given, stock = (m(inputs_embeds=embedded) for m in (model, model.stock))
        assert torch.equal(given.logits, stock.logits)
        with pytest.raises(ModelError, match="position_ids"):
            model(**batch, position_ids=torch.arange(16).flip(0).expand(4, -1))


def test_regression_with_several_numbers_is_refused_not_answered_with_the_first() -> None:
    with pytest.raises(ModelError, match=r"one number; this one has 3 labels"):
        MultiExitModel.from_stock(tiny_stock(problem_type="regression", num_labels=3))


def test_label_numbers_that_start_at_one_are_counted_in_their_order() -> None:
    stock = tiny_stock()
    stock.config.id2label = {1: "one", 2: "two", 3: "three"}
    assert label_names(MultiExitModel.from_stock(stock)) == ("one", "two", "three")


def test_new_exits_are_in_the_mode_of_their_classifier() -> None:
    stock = tiny_stock()
    assert not any(part.training for part in MultiExitModel.from_stock(stock).modules())
    assert MultiExitModel.from_stock(stock.train()).training


def test_a_model_in_training_mode_is_neither_run_nor_recorded(tmp_path: Path) -> None:
    from datasets import Dataset

    model = tiny_model().train()
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        TorchEngine(model).run(tiny_batch(2), Full())
    data = Dataset.from_dict({"text": tiny_texts(2)})
    with pytest.raises(ConfigError, match=r"model\.eval\(\)"):
        record(model, data, tmp_path / "table", "tune", processor=tiny_tokenizer())


@pytest.mark.parametrize("arch", ["roberta", "distilbert"])
def test_a_pooler_that_no_classifier_reads_may_lie_in_a_checkpoint(
    tmp_path: Path, arch: str
) -> None:
    folder = save_tiny_stock(tmp_path / "stock", arch)
    _add_tensor(folder, f"{arch}.pooler.dense.weight")
    MultiExitModel.from_pretrained(folder)
    _add_tensor(folder, f"{arch}.more.dense.weight")
    with pytest.raises(ModelError, match=rf"{arch}\.more"):
        MultiExitModel.from_pretrained(folder)


def test_a_new_head_is_no_excuse_for_spare_tensors_in_the_backbone(tmp_path: Path) -> None:
    folder = save_tiny_stock(tmp_path / "stock")
    head = Head(problem_type="single_label_classification", labels=("a", "b"))
    _add_tensor(folder, "another_head.weight")
    MultiExitModel.from_pretrained(folder, head=head)
    _add_tensor(folder, "bert.encoder.layer.6.output.dense.weight")
    with pytest.raises(ModelError, match=r"bert\.encoder\.layer\.6"):
        MultiExitModel.from_pretrained(folder, head=head)


def test_a_note_in_a_config_may_hold_any_number(tmp_path: Path) -> None:
    save_tiny_stock(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "my_seed": 4_294_967_295}))
    assert MultiExitModel.from_pretrained(tmp_path).depth > 1
