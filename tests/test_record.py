"""Claims about recording: the table holds what the model says, and replay is the live engine."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from offramp.data import encode, encode_labels, infer_task, input_id
from offramp.engines import (
    TorchEngine,
    collate,
    cost_model,
    processor_fingerprint,
    record,
    warn_below_majority,
)
from offramp.errors import DataError, OfframpError
from offramp.model import MultiExitModel
from offramp.policies import (
    Entropy,
    EvidencePolicy,
    Fixed,
    Full,
    Margin,
    MaxProbability,
    Patience,
    Policy,
    Rows,
)
from offramp.table import ExitTable, evidence_matrix, replay
from offramp.testing import ARCHITECTURES, PROBLEM_TYPES, tiny_model, tiny_texts, tiny_tokenizer

# 1e-5 for scores of a trained model; tiny models are drawn wide and amplify the last bits more
BAND = 5e-5
COUNT = 300


def examples(arch: str = "bert", count: int = COUNT, labelled: bool = False) -> Dataset:
    columns: dict[str, list] = {"text": tiny_texts(count)}
    if labelled:
        columns["label"] = [f"label-{row % 3}" for row in range(count)]
    return encode(Dataset.from_dict(columns), tiny_tokenizer(arch))[0]


def record_tiny(folder: Path, model: MultiExitModel, dataset: Dataset, **options) -> ExitTable:
    options = {"role": "tune", "processor": tiny_tokenizer(), "progress": False, **options}
    return record(model, dataset, folder / "table", **options)


def run_live(model: MultiExitModel, dataset: Dataset, rows: list[int], policy: Policy):
    tokens = collate({"input_ids": dataset[rows]["input_ids"]}, 0)
    ids = torch.tensor([input_id(text) for text in dataset[rows]["text"]])
    return TorchEngine(model).run(tokens, policy, Rows(ids, torch.tensor(dataset[rows]["length"])))


def policies(problem_type: str) -> list[Policy]:
    multi = problem_type == "multi_label_classification"
    if problem_type == "regression":
        return [Patience(patience=p, tolerance=t) for p in (1, 3) for t in (0.1, 0.5)]
    confident = [MaxProbability(threshold=t, multi_label=multi) for t in (0.6, 0.9)]
    return [
        *confident,
        Margin(threshold=0.4, multi_label=multi),
        Entropy(threshold=0.4, multi_label=multi),
        Patience(patience=1, multi_label=multi),
        Patience(patience=2, multi_label=multi),
    ]


@pytest.mark.parametrize(
    ("arch", "problem_type"),
    [
        *(("bert", task) for task in PROBLEM_TYPES),
        *((arch, "single_label_classification") for arch in ARCHITECTURES if arch != "bert"),
    ],
)
def test_replay_equals_the_live_engine_for_every_policy(
    arch: str, problem_type: str, tmp_path: Path
) -> None:
    model = tiny_model(arch, problem_type)
    dataset = examples(arch)
    table = record_tiny(tmp_path, model, dataset, max_tokens=500)
    used: set[int] = set()
    for policy in [*policies(problem_type), Full(), Fixed(layer=1)]:
        replayed = replay(table, policy)
        # alone, in the order of the data, in other batches than those recorded
        for rows in ([5], list(range(40)), list(range(40, COUNT, 3))):
            live = run_live(model, dataset, rows, policy)
            same = live.exit_layers.numpy() == replayed.exit_layers[rows]
            assert (same | near_the_bar(table, policy)[rows]).all()
            torch.testing.assert_close(
                live.scores[same], torch.from_numpy(replayed.answers[rows][same]), atol=BAND, rtol=0
            )
        used |= set(replayed.exit_layers.tolist())
    assert used == set(range(1, model.depth + 1)), "a layer that is not used proves nothing"


def near_the_bar(table: ExitTable, policy: Policy) -> np.ndarray:
    """Rows whose evidence comes so close to the bar at some layer that the last bits decide."""
    assert isinstance(policy, EvidencePolicy)
    return (np.abs(evidence_matrix(table, policy) - policy.bar) < BAND).any(axis=1)


def test_labels_change_between_exits_so_that_the_claims_above_are_not_empty(
    tmp_path: Path,
) -> None:
    table = record_tiny(tmp_path, tiny_model(), examples())
    labels = table.scores.argmax(axis=-1)
    assert ((labels[:, 1:] != labels[:, :-1]).mean(axis=0) > 0.05).all()


def test_the_last_exit_of_the_table_is_the_stock_model(tmp_path: Path) -> None:
    model, dataset = tiny_model(), examples()
    table = record_tiny(tmp_path, model, dataset)
    for row in (0, 7, 31):
        with torch.inference_mode():
            stock = model.stock(torch.tensor([dataset[row]["input_ids"]])).logits[0]
        np.testing.assert_allclose(table.scores[row, -1], stock, atol=BAND)


def test_the_table_knows_its_rows_costs_model_and_labels(tmp_path: Path) -> None:
    model = tiny_model()
    raw = examples(labelled=True)
    dataset = encode_labels(raw, infer_task(raw, id2label=model.config.id2label))
    table = record_tiny(tmp_path, model, dataset, role="calibrate")
    assert table.ids.tolist() == [input_id(text) for text in dataset["text"]]
    lengths = table.columns["lengths"]
    assert lengths.tolist() == [len(row) for row in dataset["input_ids"]]
    costs = cost_model(model)
    np.testing.assert_array_equal(table.columns["layer_cost"], costs.layers(lengths))
    np.testing.assert_array_equal(table.columns["exit_cost"], costs.exits(lengths))
    assert table.labels is not None
    assert table.labels.tolist() == [row % 3 for row in range(COUNT)]
    header = table.header
    assert (header.role, header.dtype, header.problem_type) == (
        "calibrate",
        "float32",
        model.problem_type,
    )
    assert header.model_fingerprint == model.fingerprint()
    assert header.label_names == ("label-0", "label-1", "label-2")


def test_examples_that_are_not_encoded_yet_are_encoded_for_the_model(tmp_path: Path) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    raw = Dataset.from_dict({"text": ["film " * 500, "a plot"], "label": ["label-2", "label-0"]})
    table = record_tiny(tmp_path / "raw", model, raw)
    labelled = encode_labels(raw, infer_task(raw, id2label=model.config.id2label))
    ready, _ = encode(labelled, tokenizer, model.max_length)
    same = record_tiny(tmp_path / "ready", model, ready)
    assert table.columns["lengths"].tolist() == [64, 4]
    assert table.header == same.header
    assert all(np.array_equal(table.columns[name], same.columns[name]) for name in table.columns)


def test_the_tokenizer_has_one_name_however_it_was_used() -> None:
    tokenizer = tiny_tokenizer()
    before = processor_fingerprint(tokenizer)
    tokenizer(["a film", "a"], padding=True, truncation=True, max_length=8)
    assert processor_fingerprint(tokenizer) == before
    tokenizer.add_tokens(["offramp"])
    assert processor_fingerprint(tokenizer) != before


def test_rows_that_recur_in_another_role_are_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, dataset = tiny_model(), examples()
    tune = record_tiny(tmp_path / "tune", model, dataset.select(range(100)))
    with caplog.at_level(logging.WARNING, "offramp"):
        test = record_tiny(
            tmp_path / "test", model, dataset.select(range(90, 200)), role="test", others=[tune]
        )
    known = set(dataset["text"][:100])
    kept = [text for text in dataset["text"][90:200] if text not in known]
    assert test.rows == len(kept) <= 100
    assert not set(test.ids.tolist()) & set(tune.ids.tolist())
    assert f"{110 - test.rows} of 110 rows were dropped from 'test'" in caplog.text
    with pytest.raises(DataError, match="Give other rows"):
        record_tiny(tmp_path, model, dataset.select(range(50)), role="test", others=[tune])
    assert not (tmp_path / "table").exists()


def test_full_depth_below_the_majority_class_is_said_aloud(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, dataset = tiny_model(), examples()
    right = record_tiny(tmp_path, model, dataset).scores[:, -1].argmax(axis=-1)
    with caplog.at_level(logging.WARNING, "offramp"):
        record_tiny(tmp_path, model, dataset.add_column("label", right))
        assert "most frequent answer" not in caplog.text
        record_tiny(tmp_path, model, dataset.add_column("label", (right + 1) % 3))
    assert "mapped to the wrong classes" in caplog.text
    assert "0=label-0" in caplog.text


def test_full_depth_that_gives_everyone_the_majority_class_is_said_aloud(
    caplog: pytest.LogCaptureFixture,
) -> None:
    always, kind = np.tile([0.0, 1.0], (10, 1)), "single_label_classification"
    warn_below_majority(always, np.ones(10, dtype=int), kind, ["no", "yes"])
    assert not caplog.text  # rows of one class cannot tell
    warn_below_majority(always, np.array([1] * 7 + [0] * 3), kind, ["no", "yes"])
    assert "right on 70.0% of 10 rows, no more than" in caplog.text


def test_scores_that_are_not_finite_are_recorded_and_flagged_on_replay(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.exits["2"].classifier.bias[0] = torch.nan
    table = record_tiny(tmp_path, model, examples())
    assert np.isnan(table.scores[:, 1]).any(axis=-1).all()
    replayed = replay(table, Full())
    assert not replayed.bad.any(), "full depth does not look at exit 2"
    assert replay(table, Fixed(layer=2)).bad.all()


def test_an_interrupted_recording_leaves_no_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calls = tiny_model(), []
    usual = model.all_exits

    def break_later(batch):
        calls.append(batch)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return usual(batch)

    monkeypatch.setattr(model, "all_exits", break_later)
    with pytest.raises(KeyboardInterrupt):
        record_tiny(tmp_path, model, examples())
    assert list(tmp_path.iterdir()) == []
    assert not issubclass(KeyboardInterrupt, OfframpError)


def test_no_rows_are_an_error_not_a_table(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows to record"):
        record_tiny(tmp_path, tiny_model(), Dataset.from_dict({"text": []}))
