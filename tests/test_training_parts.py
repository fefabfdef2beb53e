"""Claims about the parts of training: order, freezing, pooling, vectors, estimate, heads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModel, AutoModelForSequenceClassification

from offramp.backbones import Batch
from offramp.errors import ConfigError
from offramp.exits import ExitKind, ExitSpec, Pooling
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import DepthWeighted, Objective, Part, SelfDistillation, Stage
from offramp.objectives.auto import Auto
from offramp.testing import (
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import ATTACH, TRAIN, TrainOptions, attach, finetune, probe, train
from offramp.training.batches import LengthGrouped, Rows
from offramp.training.cache import VectorCache, cache_bytes, cache_type, pooled_vectors
from offramp.training.estimate import estimate
from offramp.training.preparing import encoded_rows, weights_fingerprint
from offramp.training.probe import choose_pooling, rehearse
from offramp.training.running import run_stages
from offramp.training.standard import moments, standardised
from offramp.training.trainer import Trainee
from offramp.training.work import WorkFolder

RELEASED = [name for name in METHODS if METHODS[name].released]
QUIET = TrainOptions(max_steps=4, batch_size=8, quiet=True)


def examples(count: int = 64, classes: int = 3) -> Dataset:
    texts = tiny_texts(count, longest=12)
    return Dataset.from_dict({"text": texts, "label": [len(text) % classes for text in texts]})


def rows_for(model: MultiExitModel, count: int = 64) -> Rows:
    return encoded_rows(examples(count), model, tiny_tokenizer(), None)


# Order


@given(
    lengths=st.lists(st.integers(1, 99), min_size=1, max_size=200),
    size=st.integers(1, 9),
    seed=st.integers(0, 2**32 - 1),
    epoch=st.integers(0, 5),
)
def test_every_epoch_has_every_row_once_in_an_order_of_seed_and_epoch_alone(
    lengths: list[int], size: int, seed: int, epoch: int
) -> None:
    order = LengthGrouped(torch.tensor(lengths), size, seed)
    order.set_epoch(epoch)
    first = list(order)
    assert sorted(first) == list(range(len(lengths)))
    torch.rand(7)
    assert list(order) == first


def test_epochs_differ_and_batches_hold_rows_of_similar_length() -> None:
    lengths = torch.randint(1, 100, (3200,), generator=torch.Generator().manual_seed(0))
    order = LengthGrouped(lengths, 32, seed=1)
    first = torch.tensor(list(order))
    order.set_epoch(1)
    assert first.tolist() != list(order)
    grouped = lengths[first].view(-1, 32)
    assert (grouped.max(dim=1).values - grouped.min(dim=1).values).float().mean() < 5
    # long batches do not all come first or last
    assert grouped.float().mean(dim=1)[:50].std() > 15


# Freezing


@pytest.mark.parametrize("stage", ["stock", "exits"])
def test_a_stage_leaves_the_part_it_does_not_train_as_it_is(stage: str, tmp_path: Path) -> None:
    model = tiny_model("bert", spec=ExitSpec(pooling="pooler"))
    stock, exits = weights_fingerprint(model.stock), weights_fingerprint(model.exits)

    class One(type(METHODS["deebert"].objective())):  # type: ignore[misc]
        def stages(self) -> list[Stage]:
            return [Stage(stage, stage)]  # type: ignore[arg-type]

    run_stages(model, One(), rows_for(model), QUIET.filled(TRAIN), WorkFolder(tmp_path / "out"))
    assert (weights_fingerprint(model.stock) == stock) == (stage == "exits")
    assert (weights_fingerprint(model.exits) == exits) == (stage == "stock")
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_dropout_is_off_in_a_frozen_model_and_on_in_its_exits() -> None:
    model = tiny_model("bert")
    trainee = Trainee(model, SelfDistillation(), Stage("exits", "exits"), model.problem_type)
    trainee.train()
    assert not any(part.training for part in model.stock.modules())
    assert all(part.training for part in model.exits.modules())


# Pooling


@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_the_probe_finds_the_pooling_that_the_answer_hangs_on(
    pooling: Pooling, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("bert", "regression")
    texts = examples(300).remove_columns("label")
    rows = encoded_rows(texts, model, tiny_tokenizer(), None)
    pool_all = probe.pooled_vectors

    def answer_by_pooling(views: list[MultiExitModel], batch: Batch) -> tuple[Any, torch.Tensor]:
        vectors, _ = pool_all(views, batch)
        pooled = torch.stack(vectors[probe.PROBED.index(pooling)]).mean(dim=0)
        return vectors, pooled[:, :1]

    monkeypatch.setattr(probe, "pooled_vectors", answer_by_pooling)
    assert choose_pooling(model, rows, seed=0) == pooling


def test_a_rehearsal_is_repeatable_and_leaves_the_model_alone() -> None:
    model = MultiExitModel.from_stock(tiny_stock("bert"), METHODS["pabee"].exits)
    before = weights_fingerprint(model)
    options = QUIET.model_copy(update={"max_steps": 40}).filled(TRAIN)
    rows = rows_for(model)
    first = rehearse(model, DepthWeighted(), rows, options, new_head=False)
    assert rehearse(model, DepthWeighted(), rows, options, new_head=False) == first
    assert weights_fingerprint(model) == before


@pytest.mark.parametrize("method", ["pabee", "deebert"])
def test_the_paper_decides_the_pooling_only_where_asked(method: str, tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    found = {}
    for name, given_options in {
        "paper": {"as_released": True},
        "user": {"pooling": "attention"},
        "measured": {},
    }.items():
        train(source, examples(), tmp_path / name, method=method, options=QUIET, **given_options)  # type: ignore[arg-type]
        found[name] = json.loads((tmp_path / name / "config.json").read_text())["exits"]
    paper = METHODS[method].exits
    assert found["paper"] == paper.to_dict()
    assert found["user"] == {**paper.to_dict(), "pooling": "attention"}
    assert found["measured"]["pooling"] in probe.REHEARSED
    assert found["measured"]["hidden"] == paper.to_dict()["hidden"]


# Vectors


@pytest.mark.parametrize("learnt", [False, True])
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("pooling", ["cls", "mean", "pooler", "attention"])
def test_exits_fitted_on_standardised_vectors_give_the_same_from_plain_ones(
    pooling: str, hidden: bool, learnt: bool
) -> None:
    model = tiny_model("bert", spec=ExitSpec(pooling=pooling, hidden=hidden))  # type: ignore[arg-type]
    batch = tiny_batch(32)
    with torch.no_grad():
        (vectors,), _ = pooled_vectors([model], batch)
        before = [output.scores for output in model.all_exits(batch)]
        found = moments(zip(*(v.split(16) for v in vectors), strict=True))
        with standardised(model, found, learnt):
            inside = [output.scores for output in model.all_exits(batch)]
        after = [output.scores for output in model.all_exits(batch)]
    for one, two, three in zip(before[:-1], inside, after, strict=False):
        torch.testing.assert_close(two, three, rtol=1e-4, atol=1e-4)
        if learnt or hidden:  # a copy of the pooler stays one
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
        else:
            assert not torch.allclose(one, two, atol=1e-2)


@pytest.mark.parametrize(("before", "learnt"), [("exits", True), ("all", True), ("stock", False)])
def test_a_stage_on_standardised_vectors_goes_on_from_what_exits_have_learnt(
    before: Part, learnt: bool, tmp_path: Path
) -> None:
    first = Stage("first", before, rate=10.0)
    still = Stage("still", "exits", rate=1e-9, standardised=True)

    def scores(*stages: Stage) -> list[torch.Tensor]:
        class Staged(Auto):
            def stages(self) -> list[Stage]:
                return list(stages)

        model = tiny_model("bert")
        folder = WorkFolder(tmp_path / f"{len(stages)}")
        run_stages(model, Staged(), rows_for(model), QUIET.filled(TRAIN), folder)
        with torch.no_grad():
            return [output.scores for output in model.all_exits(tiny_batch(8))]

    exits = zip(scores(first)[:-1], scores(first, still)[:-1], strict=True)
    gone_on = [torch.allclose(one, other, rtol=1e-3, atol=1e-3) for one, other in exits]
    assert gone_on == [learnt] * len(gone_on)


def test_moments_are_those_of_all_rows() -> None:
    draw = torch.Generator().manual_seed(0)
    exits = [torch.randn(90, width, generator=draw) * 7 + width for width in (3, 5)]
    found = moments(zip(*(vectors.split(40) for vectors in exits), strict=True))
    for vectors, (mean, spread) in zip(exits, found, strict=True):
        torch.testing.assert_close(mean, vectors.mean(dim=0))
        torch.testing.assert_close(spread, vectors.std(dim=0, correction=0))


def test_cached_vectors_are_those_the_exits_pool(tmp_path: Path) -> None:
    model = tiny_model("albert", spec=ExitSpec(pooling="mean"))
    rows = rows_for(model)
    for kind, tolerance in (("float32", 1e-5), ("float16", 1e-2)):
        cache = VectorCache(tmp_path / kind, model, rows, np.dtype(kind))
        cache.fill(quiet=True)
        batch = cache.__getitems__([5, 3])
        one, scores = pooled_vectors([model], rows.batch([5]))
        whole = torch.cat(one[0], dim=1)
        torch.testing.assert_close(batch["pooled"][:1], whole, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(batch["teacher"][:1], scores, rtol=1e-5, atol=1e-5)
        assert batch["labels"].tolist() == [rows.dataset[5]["label"], rows.dataset[3]["label"]]


def test_the_cache_stays_under_its_limit() -> None:
    model = tiny_model("bert")
    full = cache_bytes(100, model, np.dtype(np.float32))
    assert cache_type(100, model, full) == np.float32
    assert cache_type(100, model, full - 1) == np.float16
    assert cache_type(100, model, full // 3) is None


def test_attached_exits_agree_with_full_depth_more_than_untrained_ones(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    data = examples(400).remove_columns("label")
    model = attach(source, data, tmp_path / "out", options=TrainOptions(quiet=True))
    fresh = MultiExitModel.from_pretrained(source)
    batch = rows_for(model, 400).batch(range(400))
    batch.pop("labels")

    def agreement(which: MultiExitModel) -> float:
        with torch.inference_mode():
            early = which.all_exits(batch)[-2].scores.argmax(dim=-1)
            return float((early == model.stock(**batch).logits.argmax(dim=-1)).float().mean())

    assert agreement(model) > agreement(fresh) + 0.2


# Estimate


def test_an_estimate_counts_steps_and_tokens_and_changes_no_weights() -> None:
    model = tiny_model("bert")
    rows = rows_for(model, 50)
    before = weights_fingerprint(model)
    options = TrainOptions(epochs=2, batch_size=8, gradient_accumulation=2).filled(TRAIN)
    made = estimate(model, METHODS["deebert"].objective(), rows, options)
    assert made.steps == 2 * 2 * 4  # stages, epochs, updates of 16 of 50 rows
    assert made.units == 2 * 2 * int(rows.lengths.sum())
    assert made.rows == 50
    assert made.minutes > 0
    assert weights_fingerprint(model) == before
    assert not model.training


# Options


def test_defaults_fill_only_what_was_not_given() -> None:
    filled = TrainOptions(epochs=7, weight_decay=0.5).filled(ATTACH)
    assert (filled.epochs, filled.weight_decay) == (7, 0.5)
    assert filled.learning_rate == ATTACH.learning_rate
    assert TrainOptions().filled(ATTACH) == ATTACH


@settings(max_examples=20)
@given(given=st.sampled_from([{"epochs": 0}, {"warmup": 1.0}, {"epoch": 3}, {"learning_rate": 0}]))
def test_options_out_of_range_or_misspelt_are_refused(given: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        TrainOptions(**given)  # type: ignore[arg-type]


# Heads


def test_a_pretrained_encoder_gets_a_new_head_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_stock("bert").base_model.save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    model = train(tmp_path / "encoder", examples(classes=5), tmp_path / "out", options=QUIET)
    assert model.config.num_labels == 5
    assert "classifier.weight" in caplog.text


def test_a_classifier_keeps_its_head_unless_a_fresh_one_is_asked_for(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    old = AutoModelForSequenceClassification.from_pretrained(source).classifier.weight
    slow = QUIET.model_copy(update={"learning_rate": 1e-9, "head_learning_rate": 1e-9})
    kept = train(source, examples(), tmp_path / "kept", method="plain", options=slow)
    torch.testing.assert_close(kept.classifier.weight, old)
    fresh = train(
        source, examples(), tmp_path / "new", method="plain", fresh_head=True, options=slow
    )
    assert not torch.allclose(fresh.classifier.weight, old, atol=1e-3)


def test_plain_writes_an_ordinary_checkpoint_over_one_of_ours(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    train(source, examples(), tmp_path / "out", pooling="cls", options=QUIET)
    assert (tmp_path / "out" / "offramp.json").exists()
    train(source, examples(), tmp_path / "out", method="plain", options=QUIET)
    assert not (tmp_path / "out" / "offramp.json").exists()
    assert type(AutoModel.from_pretrained(tmp_path / "out")).__name__ == "BertModel"


def test_a_model_with_exits_gets_no_fresh_head(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "ours", processor=tiny_tokenizer())
    with pytest.raises(ConfigError, match="exits for its own task"):
        train(tmp_path / "ours", examples(), tmp_path / "out", fresh_head=True)


def test_half_precision_comes_back_bit_for_bit(tmp_path: Path) -> None:
    stock = tiny_stock("bert").half()
    stock.save_pretrained(tmp_path / "stock")
    tiny_tokenizer().save_pretrained(tmp_path / "stock")
    model = attach(tmp_path / "stock", examples(), tmp_path / "out", options=QUIET)
    assert model.dtype == torch.float16
    assert weights_fingerprint(model.stock) == weights_fingerprint(stock)


@pytest.mark.parametrize("name", RELEASED)
def test_as_released_trains_as_the_code_of_its_authors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[tuple[Objective, ExitKind]] = []
    monkeypatch.setattr(
        finetune,
        "run_stages",
        lambda model, objective, *_: trained.append((objective, model.config.exit_kind())),
    )
    source = save_tiny_stock(tmp_path / "source")
    for as_released in (False, True):
        place = tmp_path / f"released-{as_released}"
        train(source, examples(), place, method=name, as_released=as_released, options=QUIET)
    paper, code = trained
    assert [type(part) for part in code] == [type(part) for part in paper]
    for setting, value in METHODS[name].released.items():
        place = 0 if hasattr(paper[0], setting) else 1
        assert getattr(paper[place], setting) != value == getattr(code[place], setting)


def test_settings_reach_the_exits_and_the_loss(tmp_path: Path) -> None:
    palbert = METHODS["palbert"].with_settings({"input": "current", "layers": "1", "beta": 0.25})
    assert (palbert.exits.input, palbert.exits.layers, palbert.objective().beta) == (
        "current",
        1,
        0.25,
    )
    assert palbert.objective().prior == METHODS["palbert"].objective().prior
    settings = {"input": "current", "layers": 1}
    source, options = save_tiny_stock(tmp_path / "source"), QUIET
    made = train(
        source, examples(), tmp_path / "out", method="palbert", settings=settings, options=options
    )
    assert made.config.exit_kind().layers == 1


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"betta": 1}, "no setting 'betta'. Did you mean 'beta'"),
        ({"pooling": "cls"}, "no setting 'pooling'"),
        ({"layers": 0}, "'layers': Input should be greater"),
        ({"beta": "much"}, "'beta': Input should be a valid number"),
        ({"beta": "NaN"}, "'beta': Input should be a finite number"),
        ({"tail": "short"}, "'tail': Input should be 'spread' or 'last'"),
        ({"prior": 2}, "between 0 and 1"),
        ({"prior": True}, "setting 'prior' is a number"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        METHODS["palbert"].with_settings(settings).objective()
