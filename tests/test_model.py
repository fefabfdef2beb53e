"""The multi-exit model: what it answers, and exact round trips through its folder."""

from __future__ import annotations

import copy
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from offramp.errors import ConfigError, ModelError, OutputError
from offramp.exits import POOLINGS, ExitSpec
from offramp.model import MultiExitConfig, MultiExitModel, load_stock
from offramp.testing import (
    ARCHITECTURES,
    PROBLEM_TYPES,
    save_tiny,
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_texts,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small folder of ours; tests copy it before they harm it."""
    folder = tmp_path_factory.mktemp("ours") / "model"
    tiny_model(layers=2).save_pretrained(folder, processor=tiny_tokenizer())
    return folder


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_stock(tmp_path_factory.mktemp("stock") / "model")


@pytest.fixture
def copied_stock(stock: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "stock"))


def scores(model: MultiExitModel) -> list[Tensor]:
    with torch.inference_mode():
        return [output.scores for output in model.all_exits(tiny_batch(5, seed=9))]


def same_answers(one: MultiExitModel, other: MultiExitModel) -> bool:
    return all(torch.equal(a, b) for a, b in zip(scores(one), scores(other), strict=True))


# --- what it answers ----------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_full_depth_is_the_stock_model_bit_for_bit_and_the_loss_is_its_loss(
    arch: str, problem_type: str
) -> None:
    stock = tiny_stock(arch, problem_type)
    model = MultiExitModel.from_stock(stock).eval()
    batch = dict(tiny_batch(4))
    labels = torch.tensor([0, 1, 2, 0]).float()
    if problem_type == "multi_label_classification":
        labels = torch.eye(3)[[0, 1, 2, 0]]
    elif problem_type == "single_label_classification":
        labels = labels.long()
    with torch.inference_mode():
        wanted, given = stock(**batch, labels=labels), model(**batch, labels=labels)
    assert torch.equal(given.logits, wanted.logits)
    assert torch.equal(given.logits, given.exits[-1].scores)
    assert given.loss.item() == pytest.approx(wanted.loss.item(), rel=1e-6)
    assert len(given.exits) == model.depth == 6
    assert model.problem_type == problem_type


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_exits_of_a_tiny_model_disagree_so_that_tests_mean_something(
    arch: str, pooling: Any
) -> None:
    model = tiny_model(arch, spec=ExitSpec(pooling=pooling))
    with torch.inference_mode():
        outputs = model.all_exits(tiny_batch(200, tokens=24, seed=3))
    labels = torch.stack([output.scores.argmax(dim=-1) for output in outputs], dim=1)
    changes = (labels[:, 1:] != labels[:, :-1]).float().mean(dim=0)
    assert changes.min() >= 0.05
    assert all(len(labels[:, layer].unique()) == 3 for layer in range(model.depth))


def test_the_problem_type_is_inferred_where_the_config_is_silent() -> None:
    one = MultiExitConfig(stock={"model_type": "bert", "id2label": {"0": "score"}})
    assert one.problem_type is None
    for labels, wanted in ((1, "regression"), (4, "single_label_classification")):
        stock = tiny_stock("bert", "regression", labels)
        stock.config.problem_type = None
        assert MultiExitModel.from_stock(stock).problem_type == wanted


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_longest_input_fits_and_one_token_more_does_not(arch: str) -> None:
    model = tiny_model(arch)
    assert model.max_length == 64
    with torch.inference_mode():
        model.all_exits(tiny_batch(2, tokens=64))
        with pytest.raises((IndexError, RuntimeError)):
            model.all_exits(tiny_batch(2, tokens=65))


def test_mpnet_counts_positions_from_two_whatever_its_config_says() -> None:
    model = tiny_model("mpnet")
    assert (model.stock.config.pad_token_id, model.max_length) == (0, 63)
    model.all_exits(tiny_batch(2, tokens=63))


# --- save and load ------------------------------------------------------------------------


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_saved_model_comes_back_exactly(
    tmp_path: Path, arch: str, pooling: Any, hidden: bool, problem_type: str
) -> None:
    spec = ExitSpec(pooling=pooling, hidden=hidden, dropout=0.3)
    model = tiny_model(arch, problem_type, spec=spec, layers=3)
    model.save_pretrained(tmp_path / "model")
    again = MultiExitModel.from_pretrained(tmp_path / "model")
    assert same_answers(model, again)
    assert again.fingerprint() == model.fingerprint()
    assert again.config.to_dict() == model.config.to_dict()
    assert again.config.exit_kind() == spec
    assert again.problem_type == problem_type
    assert again.config.id2label == model.stock.config.id2label
    assert not again.training
    assert all(leaf.requires_grad for leaf in again.parameters())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_stock_model_comes_back_out(tmp_path: Path, arch: str) -> None:
    before = tiny_stock(arch)
    MultiExitModel.from_stock(before).save_pretrained(tmp_path / "ours")
    MultiExitModel.from_pretrained(tmp_path / "ours").stock.save_pretrained(tmp_path / "stock")
    after = AutoModelForSequenceClassification.from_pretrained(tmp_path / "stock").eval()
    assert type(after) is type(before)
    with torch.inference_mode():
        batch = tiny_batch(4)
        assert torch.equal(after(**batch).logits, before(**batch).logits)


def test_transformers_auto_class_loads_ours(ours: Path) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(ours)
    assert isinstance(model, MultiExitModel)
    assert same_answers(model, MultiExitModel.from_pretrained(ours))
    half = AutoModelForSequenceClassification.from_pretrained(ours, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16


def test_a_released_folder_holds_safetensors_and_json_and_a_card(ours: Path) -> None:
    files = {path.name for path in ours.iterdir()}
    assert {Path(name).suffix for name in files - {"README.md"}} == {".json", ".safetensors"}
    tokenizer = AutoTokenizer.from_pretrained(ours)
    text = tiny_texts(1)[0]
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids


def test_twelve_labels_keep_their_order(tmp_path: Path) -> None:
    model = tiny_model(num_labels=12, layers=2)
    model.save_pretrained(tmp_path / "model")
    again = MultiExitModel.from_pretrained(tmp_path / "model")
    assert list(again.config.id2label.values()) == [f"label-{n}" for n in range(12)]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_model_runs_its_own_layers(
    make: Callable[[MultiExitModel], MultiExitModel],
) -> None:
    model = tiny_model(layers=2, spec=ExitSpec(pooling="pooler"))
    before = scores(model)
    twin = make(model)
    assert same_answers(model, twin)
    with torch.no_grad():
        for leaf in twin.parameters():
            leaf.add_(0.1)
    assert all(torch.equal(a, b) for a, b in zip(scores(model), before, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(scores(twin), before, strict=True))


# --- fingerprints -------------------------------------------------------------------------


def test_the_fingerprint_changes_with_any_weight_and_with_the_exits() -> None:
    model = tiny_model(layers=2)
    seen = {model.fingerprint()}
    for leaf in model.parameters():
        with torch.no_grad():
            leaf.view(-1)[0] += 1e-3
        seen.add(model.fingerprint())
    assert len(seen) == 1 + len(list(model.parameters()))
    model.exits["1"] = copy.deepcopy(model.exits["1"])
    with torch.no_grad():
        model.exits["1"].classifier.weight.mul_(2)
    assert model.fingerprint() not in seen
    other = tiny_model(layers=2, spec=ExitSpec(pooling="mean", dropout=0.2))
    assert other.fingerprint() != tiny_model(layers=2).fingerprint()


def test_the_fingerprint_survives_saving_loading_casting_and_inference_mode(ours: Path) -> None:
    model = MultiExitModel.from_pretrained(ours)
    name = model.fingerprint()
    assert model.to(torch.bfloat16).fingerprint() == name
    assert MultiExitModel.from_pretrained(ours, dtype=torch.float16).fingerprint() == name
    with torch.inference_mode():
        assert MultiExitModel.from_pretrained(ours).fingerprint() == name
    assert tiny_model(layers=2).fingerprint() == name


# --- saving -------------------------------------------------------------------------------


def test_saving_keeps_the_owners_files_and_only_the_points_of_these_weights(
    tmp_path: Path,
) -> None:
    folder = save_tiny(tmp_path / "model")
    (folder / "README.md").write_text("mine")
    (folder / "points").mkdir()
    (folder / "points" / "default.json").write_text("{}")
    MultiExitModel.from_pretrained(folder).save_pretrained(folder)
    assert (folder / "points" / "default.json").exists(), "same weights, same points"
    tiny_model(seed=1).save_pretrained(folder)
    assert not (folder / "points").exists()
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "tokenizer.json").exists()


def test_saving_over_a_stock_checkpoint_makes_it_ours(copied_stock: Path) -> None:
    model = MultiExitModel.from_pretrained(copied_stock)
    model.save_pretrained(copied_stock)
    assert same_answers(MultiExitModel.from_pretrained(copied_stock), model)


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    model = tiny_model(layers=2)
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/model")):
        with pytest.raises(OutputError, match=place.name):
            model.save_pretrained(place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_given_state_dict_is_what_is_saved(tmp_path: Path) -> None:
    model, other = tiny_model(layers=2), tiny_model(layers=2, seed=1)
    model.save_pretrained(tmp_path / "model", state_dict=other.state_dict())
    assert MultiExitModel.from_pretrained(tmp_path / "model").fingerprint() == other.fingerprint()
    model.save_pretrained(tmp_path / "not", is_main_process=False)
    assert not (tmp_path / "not").exists()


def test_a_stock_checkpoint_loads_alone(stock: Path) -> None:
    loaded = load_stock(stock)
    with torch.inference_mode():
        batch = tiny_batch(4)
        assert torch.equal(loaded.eval()(**batch).logits, tiny_stock()(**batch).logits)


@pytest.mark.parametrize("dtype", ["bf16", "bfloat16", "auto", torch.bfloat16, "int8", "float64"])
def test_a_dtype_may_be_given_by_its_name(tmp_path: Path, dtype: Any) -> None:
    save_tiny(tmp_path)
    if dtype in ("int8", "float64"):
        with pytest.raises(ConfigError, match="Give float32, bfloat16"):
            MultiExitModel.from_pretrained(tmp_path, dtype=dtype)
        return
    found = MultiExitModel.from_pretrained(tmp_path, dtype=dtype).dtype
    assert found == (torch.float32 if dtype == "auto" else torch.bfloat16)


def test_what_would_not_come_back_is_not_saved(tmp_path: Path) -> None:
    resized = tiny_model()
    resized.resize_token_embeddings(400)
    renamed = tiny_model()
    renamed.stock.config.id2label = {0: "x", 1: "y", 2: "z"}
    both = tiny_model()
    both.config.id2label = both.stock.config.id2label = {0: "x", 1: "y", 2: "z"}
    said_of = ((resized, "has shape"), (renamed, "'id2label' of"), (both, "'id2label' of"))
    for model, said in said_of:
        with pytest.raises(ModelError, match=said):
            model.save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()


def test_a_layer_that_is_broken_is_refused_by_name(tmp_path: Path) -> None:
    model = tiny_model()
    with torch.no_grad():
        next(model.backbone.layers.parameters())[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="of a layer holds NaN"):
        MultiExitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "labels",
    [
        {"id2label": {0: "neg", 1: "mid", 2: "pos"}},
        {"id2label": {"0": "neg", "1": "mid", "2": "pos"}},
        {"label2id": {"neg": 0, "mid": 1, "pos": 2}},
        {"label2id": {0: 0, 1: 1, 2: 2}},
    ],
)
def test_labels_of_the_stock_model_are_saved_whatever_they_are(
    tmp_path: Path, labels: dict[str, Any]
) -> None:
    stock = tiny_stock()
    for name, value in labels.items():
        setattr(stock.config, name, value)
    MultiExitModel.from_stock(stock).save_pretrained(tmp_path)
    again = MultiExitModel.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path / "again")
    assert MultiExitModel.from_pretrained(tmp_path / "again").fingerprint() == again.fingerprint()


def test_a_model_is_saved_after_its_stock_model_was_asked_for_a_loss(tmp_path: Path) -> None:
    stock = tiny_stock()
    stock.config.problem_type = None
    model = MultiExitModel.from_stock(stock)
    stock(**tiny_batch(3), labels=torch.tensor([0, 1, 2]))
    model.save_pretrained(tmp_path)
