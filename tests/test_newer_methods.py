"""BERxiT, COSEE, CAP and GPFEE from training over the recorded table to the engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from offramp import train
from offramp.data import encode
from offramp.engines import TorchEngine, collate, record
from offramp.errors import ConfigError
from offramp.methods import METHODS
from offramp.policies import POLICIES, EvidencePolicy, Fixed, Rows
from offramp.table import evidence_matrix, replay
from offramp.testing import (
    check_engine,
    save_tiny_stock,
    spread_policies,
    tiny_batch,
    tiny_model,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import TrainOptions

SINGLE = "single_label_classification"
BAND = 5e-5
TASKS = [
    (name, task)
    for name in ("berxit", "cosee", "cap", "gpfee", "beem", "pcee_bert", "f_pabee")
    for task in METHODS[name].problem_types
    if task in (SINGLE, "regression")
]


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_replay_is_live_by_the_methods_own_policy(name: str, task: str, tmp_path: Path) -> None:
    method = METHODS[name]
    model = tiny_model("bert", task, spec=method.exits)
    rows = encode(Dataset.from_dict({"text": tiny_texts(80)}), tiny_tokenizer())[0]
    table = record(model, rows, tmp_path / "t", "tune", processor=tiny_tokenizer(), progress=False)
    tokens = collate({"input_ids": rows["input_ids"]}, 0)
    given = Rows(torch.from_numpy(table.ids.copy()), torch.tensor(rows["length"][:]))
    (first, *_) = POLICIES[method.policy].variants(task, model.depth)
    assert isinstance(first, EvidencePolicy)
    evidence = evidence_matrix(table, first)
    finite = evidence[:, :-1][np.isfinite(evidence[:, :-1])]
    for bar in np.quantile(finite, [0.3, 0.7]):
        policy = first.with_bar(float(bar))
        live, replayed = TorchEngine(model).run(tokens, policy, given), replay(table, policy)
        near = (np.abs(evidence - policy.bar) < BAND).any(axis=1)
        same = live.exit_layers.numpy() == replayed.exit_layers
        assert (same | near).all()
        answers = torch.from_numpy(replayed.answers)[same]
        torch.testing.assert_close(live.scores[same], answers, atol=BAND, rtol=0)
        assert len(set(replayed.exit_layers.tolist())) > 1


@pytest.mark.parametrize("name", ["berxit", "cap"])
def test_the_engine_passes_with_policies_that_read_the_signal(name: str) -> None:
    model = tiny_model(spec=METHODS[name].exits)
    with torch.no_grad():
        outputs = model.all_exits(tiny_batch(48, tokens=24, seed=5))
    signal = set(outputs[0].signals)
    chosen = [p for p in spread_policies(SINGLE, outputs) if signal & set(p.needs)]
    assert chosen
    check_engine(TorchEngine, model, policies=chosen[:3], rows=24)


@pytest.mark.parametrize("layer", [1, 3, 5])
def test_an_exit_that_remembers_answers_as_in_the_table_though_no_other_is_read(
    layer: int,
) -> None:
    model = tiny_model(spec=METHODS["gpfee"].exits)
    batch = tiny_batch(9)
    with torch.no_grad():
        wanted = model.all_exits(batch)[layer - 1].scores
    live = TorchEngine(model).run(batch, Fixed(layer=layer))
    torch.testing.assert_close(live.scores, wanted, atol=BAND, rtol=0)


def examples(task: str) -> Dataset:
    texts = tiny_texts(48)
    labels = [
        len(text) / 50 if task == "regression" else f"label-{len(text) % 3}" for text in texts
    ]
    return Dataset.from_dict({"text": texts, "label": labels})


@pytest.mark.parametrize(
    ("name", "task"),
    [("berxit", "regression"), ("cosee", SINGLE), ("cap", SINGLE), ("gpfee", SINGLE)],
)
def test_a_run_keeps_the_kind_of_exits_and_measures_their_pooling(
    name: str, task: str, tmp_path: Path
) -> None:
    source = save_tiny_stock(tmp_path / "stock", problem_type=task)
    options = TrainOptions(max_steps=4, batch_size=8, quiet=True)
    model = train(source, examples(task), tmp_path / "out", method=name, options=options)
    kind = model.config.exit_kind()
    assert type(kind) is type(METHODS[name].exits)
    assert kind.pooling in ("cls", "mean")
    before = METHODS[name].exits.model_dump()
    assert kind.model_dump() == {**before, "pooling": kind.pooling}


def test_a_pooling_that_exits_do_not_have_is_refused_in_words(tmp_path: Path) -> None:
    source = save_tiny_stock(tmp_path / "stock")
    options = TrainOptions(max_steps=1, quiet=True)
    with pytest.raises(ConfigError, match="Exits of method 'gpfee': key 'pooling'"):
        train(
            source, examples(SINGLE), tmp_path / "out", method="gpfee", pooling="attention",
            options=options,
        )  # fmt: skip
