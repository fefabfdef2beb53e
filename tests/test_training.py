"""Claims about train and attach."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
    pipeline,
)

from offramp.model import MultiExitModel
from offramp.testing import save_tiny_stock, tiny_batch, tiny_texts
from offramp.training import TrainOptions, attach, train
from offramp.training.options import warn_of_slow_bf16

SHORT = TrainOptions(max_steps=4, batch_size=8, quiet=True)
KINDS = {
    "single_label_classification": lambda text: len(text) % 3,
    "multi_label_classification": lambda text: ["label-0"] * ("good" in text) + ["label-1"],
    "regression": lambda text: len(text) / 50,
}


def examples(kind: str = "single_label_classification", count: int = 64) -> Dataset:
    texts = tiny_texts(count, longest=12)
    return Dataset.from_dict({"text": texts, "label": [KINDS[kind](text) for text in texts]})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("arch", ["bert", "albert"])
def test_train_and_attach_work_for_every_task_and_for_layers_that_share_weights(
    arch: str, kind: str, tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock", arch, kind)
    train(source, examples(kind), tmp_path / "trained", options=SHORT)
    attach(source, examples(kind), tmp_path / "attached", options=SHORT)
    for name in ("trained", "attached"):
        model = MultiExitModel.from_pretrained(tmp_path / name)
        assert model.problem_type == kind


@pytest.mark.parametrize("pooling", ["cls", "pooler", "mean", "attention"])
@pytest.mark.parametrize("limit", [2**30, 0])
def test_an_attached_model_answers_at_full_depth_bit_for_bit_like_its_source(
    pooling: str, limit: int, tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    data = examples().remove_columns("label")
    options = SHORT.model_copy(update={"cache_limit": limit})
    model = attach(source, data, tmp_path / "out", pooling=pooling, options=options)  # type: ignore[arg-type]
    stock = AutoModelForSequenceClassification.from_pretrained(source).eval()
    batch = tiny_batch(16)
    with torch.inference_mode():
        wanted = stock(**batch).logits
        assert torch.equal(model(**batch).logits, wanted)
        again = MultiExitModel.from_pretrained(tmp_path / "out")
        assert torch.equal(again(**batch).logits, wanted)


def test_a_plain_trainer_evaluates_the_model(tmp_path: Path) -> None:
    batch = tiny_batch(12, 8, padded=False)
    columns = {name: leaf.tolist() for name, leaf in batch.items()}
    rows = Dataset.from_dict({**columns, "labels": [0, 1, 2] * 4})
    model = MultiExitModel.from_pretrained(save_tiny_stock(tmp_path / "stock"))
    how = TrainingArguments(
        str(tmp_path), per_device_eval_batch_size=4, use_cpu=True, report_to="none"
    )
    trainer = Trainer(model, how)
    assert trainer.evaluate(rows)["eval_loss"] > 0
    with torch.inference_mode():
        wanted = model(**batch).logits
    found = trainer.predict(rows).predictions
    torch.testing.assert_close(torch.from_numpy(found), wanted)


@pytest.mark.parametrize("shift", [0, 1])
def test_attach_says_before_the_work_that_labels_seem_to_be_those_of_other_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, shift: int
) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    texts = tiny_texts(60)
    answers = [said["label"] for said in pipeline("text-classification", str(source))(texts)]
    labels = [f"label-{(int(name[-1]) + shift) % 3}" for name in answers]
    data = Dataset.from_dict({"text": texts, "label": labels})
    attach(source, data, tmp_path / "out", options=TrainOptions(quiet=True, max_steps=1))
    assert ("mapped to the wrong classes" in caplog.text) == bool(shift)


@pytest.mark.parametrize(
    ("has", "choice", "warned"),
    [
        ({"architecture": "x86_64"}, True, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, True, False),
        ({"architecture": "x86_64"}, "auto", False),
        ({"architecture": "aarch64"}, True, False),
        ({}, True, False),
    ],
)
def test_bf16_on_a_processor_without_it_is_said_to_be_slow(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    has: dict[str, Any],
    choice: bool | str,
    warned: bool,
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    warn_of_slow_bf16(choice)
    assert ("slower than in fp32" in caplog.text) == warned
