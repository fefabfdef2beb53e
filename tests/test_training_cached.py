"""Claims about training on a model that stays as it is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitKind, ExitSpec
from offramp.exits.gated import GatedSpec
from offramp.exits.learned import LearnedSpec
from offramp.exits.student import StudentSpec
from offramp.exits.subspace import NspSpec
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.objectives import (
    DepthWeighted,
    Imitating,
    Objective,
    RobustExits,
    SelfDistillation,
    Stage,
    TwoStage,
)
from offramp.objectives.gated import Gated
from offramp.testing import (
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)
from offramp.training import TRAIN, TrainOptions, attach, cache, train
from offramp.training.cache import CachedExits, pooled_vectors, vectors_type
from offramp.training.estimate import estimate
from offramp.training.preparing import encoded_rows
from offramp.training.standard import moments, standardised

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
    given: dict[str, Any] = {"method": "pabee", "pooling": "cls", "options": SHORT}
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


# Vectors that are computed once

KINDS: list[ExitKind] = [
    ExitSpec(pooling="mean"),
    GatedSpec(pooling="cls"),
    GatedSpec(pooling="mean", hidden=True),
    LearnedSpec(pooling="mean"),
    LearnedSpec(pooling="cls", hidden=True, correctness="own"),
    NspSpec(pooling="pooler"),
]
SAVING = TrainOptions(
    epochs=3, batch_size=4, gradient_accumulation=2, learning_rate=1e-3, save_steps=3, quiet=True
)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let gates and heads both have their turns in a short run."""
    short = replace(METHODS["jei_dnn"], objective=partial(Gated, every=2))
    monkeypatch.setitem(METHODS._items, "jei_dnn", short)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows whose vectors were computed for the cache, by block."""
    rows: list[int] = []
    compute = cache.pooled_vectors

    def counted(views: Sequence[MultiExitModel], batch: dict[str, Tensor]) -> Any:
        rows.append(len(batch["input_ids"]))
        return compute(views, batch)

    monkeypatch.setattr(cache, "pooled_vectors", counted)
    return rows


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows that went through all layers and exits, by batch."""
    rows: list[int] = []
    run = MultiExitModel.all_exits

    def counted(self: MultiExitModel, batch: Any) -> Any:
        rows.append(len(batch["input_ids"]))
        return run(self, batch)

    monkeypatch.setattr(MultiExitModel, "all_exits", counted)
    return rows


def trained(
    method: str, source: Path, output: Path, options: TrainOptions = SAVING, **given: Any
) -> dict[str, Tensor]:
    train(source, examples(), output, method=method, pooling="mean", options=options, **given)
    return load_file(output / "model.safetensors")


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_exits_say_of_cached_vectors_what_they_say_of_tokens(spec: ExitKind) -> None:
    model, batch = tiny_model("bert", spec=spec), tiny_batch(16)
    with torch.inference_mode():
        wanted = model.all_exits(batch)
        (vectors,), scores = pooled_vectors([model], batch)
        found = CachedExits(model).eval()(torch.cat(vectors, dim=1), scores).exits
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.scores, other.scores)
        torch.testing.assert_close(dict(one.signals), dict(other.signals))


@pytest.mark.parametrize("spec", [kind for kind in KINDS if kind.rescalable], ids=str)
def test_signals_survive_the_move_of_mean_and_spread(spec: ExitKind) -> None:
    model, batch = tiny_model("bert", spec=spec), tiny_batch(32)
    with torch.no_grad():
        (vectors,), _ = pooled_vectors([model], batch)
        with standardised(model, moments([vectors])):
            inside = model.all_exits(batch)
        after = model.all_exits(batch)
    for one, other in zip(inside, after, strict=True):
        torch.testing.assert_close(one.scores, other.scores, rtol=1e-4, atol=1e-4)
        for name in one.signals.keys() - {"nsp"}:  # that one is of the weights as they are
            torch.testing.assert_close(one.signals[name], other.signals[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("fine_tuned", [True, False])
@pytest.mark.parametrize("method", ["deebert", "jei_dnn"])
def test_a_frozen_model_runs_once_for_each_row(
    method: str,
    fine_tuned: bool,
    source: Path,
    tmp_path: Path,
    computed: list[int],
    forwards: list[int],
) -> None:
    trained(method, source, tmp_path / "out", fine_tuned=fine_tuned)
    assert sum(computed) == len(examples())
    assert not forwards


def test_without_room_for_vectors_the_model_runs_for_every_batch(
    source: Path, tmp_path: Path, computed: list[int], forwards: list[int]
) -> None:
    none = SAVING.model_copy(update={"cache_limit": 0})
    trained("deebert", source, tmp_path / "out", none, fine_tuned=True)
    assert not computed
    assert sum(forwards) >= 3 * len(examples())


@pytest.mark.parametrize("method", ["deebert", "jei_dnn"])
def test_weights_are_those_of_a_run_without_the_cache(
    method: str, source: Path, tmp_path: Path
) -> None:
    none = SAVING.model_copy(update={"cache_limit": 0})
    wanted = trained(method, source, tmp_path / "tokens", none)
    found = trained(method, source, tmp_path / "vectors")
    assert found.keys() == wanted.keys()
    for name, leaf in found.items():
        torch.testing.assert_close(leaf, wanted[name], rtol=1e-4, atol=1e-5, msg=name)
    gates = [leaf for name, leaf in found.items() if name.endswith("gate.bias")]
    assert all(leaf.any() for leaf in gates)  # they start at 0
    assert bool(gates) == (method == "jei_dnn")


@pytest.mark.parametrize("method", ["deebert", "jei_dnn"])
def test_a_cached_stage_that_is_stopped_again_and_again_ends_in_the_same_weights(
    method: str,
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    computed: list[int],
) -> None:
    wanted = trained(method, source, tmp_path / "whole", fine_tuned=True)
    computed.clear()
    stop_every(8, monkeypatch)
    stops = 0
    while not (tmp_path / "cut").exists():
        try:
            trained(method, source, tmp_path / "cut", fine_tuned=True)
        except Stopped:
            stops += 1
    found = load_file(tmp_path / "cut" / "model.safetensors")
    assert stops >= 2
    assert all(torch.equal(leaf, wanted[name]) for name, leaf in found.items())
    assert sum(computed) == len(examples())


class Stopped(BaseException):
    """A kill that a test can survive."""


def stop_every(updates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every n-th update of the weights end the run."""
    count, update = 0, torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count % updates == 0:
            raise Stopped
        return update(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)


def test_vectors_are_computed_anew_after_the_model_was_trained_once_more(
    source: Path, tmp_path: Path, computed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = (Stage("one", "exits"), Stage("stock", "stock"), Stage("exits", "exits"))
    monkeypatch.setattr(TwoStage, "stages", lambda self: stages)
    monkeypatch.setattr(TwoStage, "losses", losses_of_all)
    trained("deebert", source, tmp_path / "out")
    assert sum(computed) == 2 * len(examples())


def losses_of_all(self: Objective, outputs: Any, batch: Any, stage: Stage) -> dict[str, Tensor]:
    return DepthWeighted().losses(outputs, batch, stage)


@pytest.mark.parametrize("spec", [GatedSpec(pooling="mean"), LearnedSpec(pooling="cls")], ids=str)
def test_exits_with_signals_are_attached_from_vectors(
    spec: ExitKind, source: Path, tmp_path: Path, computed: list[int], forwards: list[int]
) -> None:
    made = attach(source, examples(), tmp_path / "out", exits=spec, options=SHORT)
    assert sum(computed) == len(examples())
    assert not forwards
    again = MultiExitModel.from_pretrained(tmp_path / "out")
    assert not any(part.training for part in made.modules())
    with torch.inference_mode():
        for one, other in zip(
            made.all_exits(tiny_batch(8)), again.all_exits(tiny_batch(8)), strict=True
        ):
            assert torch.equal(one.scores, other.scores)


def frozen(objective: Objective) -> Objective:
    objective.stages = lambda: (Stage("exits", "exits"),)  # type: ignore[method-assign]
    return objective


CACHED: dict[str, tuple[ExitKind, Callable[[], Objective], bool]] = {
    "fixed vectors": (ExitSpec(pooling="cls"), SelfDistillation, True),
    "learned pooling": (ExitSpec(pooling="attention"), SelfDistillation, False),
    "students": (StudentSpec(), SelfDistillation, False),
    "no stage of exits alone": (ExitSpec(pooling="cls"), DepthWeighted, False),
    "several forwards": (ExitSpec(pooling="cls"), lambda: frozen(Imitating()), False),
    "gradients apart": (ExitSpec(pooling="cls"), lambda: frozen(RobustExits()), False),
}


@pytest.mark.parametrize("case", CACHED)
def test_vectors_are_cached_only_where_exits_alone_learn_from_fixed_ones(case: str) -> None:
    exits, make, wanted = CACHED[case]
    model = tiny_model("bert")
    rows = encoded_rows(examples(), model, tiny_tokenizer(), None)
    assert (vectors_type(exits, make(), model, rows, 2**30) is not None) == wanted


def test_an_estimate_counts_one_pass_for_all_cached_stages() -> None:
    model = tiny_model("bert", spec=GatedSpec(pooling="mean"))
    rows = encoded_rows(examples(), model, tiny_tokenizer(), None)
    objective, options = Gated(), TrainOptions(epochs=2, batch_size=8).filled(TRAIN)
    kind = vectors_type(GatedSpec(pooling="mean"), objective, model, rows, 2**30)
    tokens = int(rows.lengths.sum())
    before = {name: leaf.clone() for name, leaf in model.state_dict().items()}
    assert estimate(model, objective, rows, options).units == (2 + 1 + 2) * tokens
    made = estimate(model, objective, rows, options, kind)
    assert made.steps == (2 + 1 + 2) * 6
    assert made.units == (2 + 1) * tokens
    assert all(torch.equal(leaf, before[name]) for name, leaf in model.state_dict().items())
