"""Harm to a model folder is refused by name; nothing in a folder is run or believed."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
)

from offramp.errors import ConfigError, ModelError, OfframpError
from offramp.exits import ExitSpec
from offramp.methods import METHODS
from offramp.model import Head, MultiExitConfig, MultiExitModel
from offramp.model.folder import manifest_of
from offramp.storage import write_document, write_json
from offramp.testing import (
    ARCHITECTURES,
    save_tiny_stock,
    tiny_batch,
    tiny_model,
    tiny_stock,
    tiny_tokenizer,
)

Tensors = dict[str, Tensor]


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
def copied(ours: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(ours, tmp_path / "model"))


@pytest.fixture
def copied_stock(stock: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stock, tmp_path / "stock"))


def scores(model: MultiExitModel) -> list[Tensor]:
    with torch.inference_mode():
        return [output.scores for output in model.all_exits(tiny_batch(5, seed=9))]


# --- harm to our weights (R6) -------------------------------------------------------------


def _swap(tensors: Tensors, key: str, value: Tensor | None, name: str | None = None) -> Tensors:
    others = {other: leaf for other, leaf in tensors.items() if other != key}
    return others if value is None else {**others, name or key: value.contiguous()}


def _nudge(leaf: Tensor) -> Tensor:
    nudged = leaf.clone()
    nudged.view(-1)[-1] += 1e-4
    return nudged


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


HARMS: dict[str, Callable[[Tensors, str], Tensors]] = {
    "removed": lambda all_, key: _swap(all_, key, None),
    "added": lambda all_, key: {**all_, f"{key}.copy": all_[key].clone()},
    "renamed": lambda all_, key: _swap(all_, key, all_[key], key.replace("weight", "wait") + "_"),
    "transposed": lambda all_, key: _swap(all_, key, all_[key].t()),
    "reshaped": lambda all_, key: _swap(all_, key, all_[key].unsqueeze(0)),
    "perturbed": lambda all_, key: _swap(all_, key, _nudge(all_[key])),
    "zeroed": lambda all_, key: _swap(all_, key, torch.zeros_like(all_[key]) - 7),
    "broken": lambda all_, key: _swap(all_, key, torch.full_like(all_[key], torch.nan)),
    "cast": lambda all_, key: _swap(all_, key, all_[key].half()),
}
KEYS = sorted(tiny_model(layers=2, spec=ExitSpec(pooling="attention", hidden=True)).state_dict())


@pytest.fixture(scope="module")
def richest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("richest") / "model"
    spec = ExitSpec(pooling="attention", hidden=True)
    tiny_model(layers=2, spec=spec).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_any_harm_to_any_tensor_of_ours_is_refused_by_name(richest: Path, key: str) -> None:
    weights = richest / "model.safetensors"
    whole = weights.read_bytes()
    tensors = load_file(weights)
    try:
        for harm, change in HARMS.items():
            if harm == "transposed" and tensors[key].dim() != 2:
                continue
            harmed = change(tensors, key)
            assert harmed.keys() != tensors.keys() or not _equal(harmed[key], tensors[key])
            save_file(harmed, weights, metadata={"format": "pt"})
            with pytest.raises(ModelError) as caught:
                MultiExitModel.from_pretrained(richest)
            assert key in str(caught.value), harm
    finally:
        weights.write_bytes(whole)
    MultiExitModel.from_pretrained(richest)


def test_two_tensors_that_change_places_are_both_wrong(copied: Path) -> None:
    weights = copied / "model.safetensors"
    tensors = load_file(weights)
    one, other = (f"stock.bert.encoder.layer.{n}.attention.self.query.weight" for n in (0, 1))
    tensors[one], tensors[other] = tensors[other], tensors[one]
    save_file(tensors, weights)
    with pytest.raises(ModelError, match=r"attention\.self\.query\.weight"):
        MultiExitModel.from_pretrained(copied)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.999])
def test_truncated_weights_are_refused(copied: Path, share: float) -> None:
    weights = copied / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        MultiExitModel.from_pretrained(copied)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=st.floats(0, 1, exclude_max=True), byte=st.integers(1, 255))
def test_weights_with_any_one_byte_changed_are_refused(
    copied: Path, place: float, byte: int
) -> None:
    weights = copied / "model.safetensors"
    data = bytearray(weights.read_bytes())
    where = int(place * len(data))
    data[where] ^= byte
    (copied / "model.safetensors").write_bytes(data)
    try:
        with pytest.raises(ModelError):
            MultiExitModel.from_pretrained(copied)
    finally:
        data[where] ^= byte
        weights.write_bytes(data)


# --- harm to a stock checkpoint -----------------------------------------------------------


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_tensor_missing_added_or_misshapen_in_a_stock_checkpoint_is_named(
    tmp_path: Path, arch: str
) -> None:
    folder = save_tiny_stock(tmp_path / "stock", arch)
    weights = folder / "model.safetensors"
    tensors = load_file(weights)
    for key, leaf in list(tensors.items())[::7]:
        changes = [HARMS["removed"], HARMS["added"], HARMS["renamed"]]
        changes += [HARMS["transposed"]] if leaf.dim() == 2 and len(set(leaf.shape)) == 2 else []
        for change in changes:
            save_file(change(tensors, key), weights, metadata={"format": "pt"})
            with pytest.raises(ModelError) as caught:
                MultiExitModel.from_pretrained(folder)
            assert key in str(caught.value)


def test_a_missing_head_is_an_error_unless_a_new_one_is_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = BertConfig(**tiny_stock(layers=2).config.to_dict())
    BertForMaskedLM(config).save_pretrained(tmp_path / "pretrained")
    with pytest.raises(ModelError, match=r"classifier\.weight.*offramp train"):
        MultiExitModel.from_pretrained(tmp_path / "pretrained")
    head = Head(problem_type="multi_label_classification", labels=("a", "b"))
    model = MultiExitModel.from_pretrained(tmp_path / "pretrained", head=head)
    assert "classifier.weight" in caplog.text
    assert model.problem_type == "multi_label_classification"
    assert model.config.id2label == {0: "a", 1: "b"}
    weights = tmp_path / "pretrained" / "model.safetensors"
    key = "bert.encoder.layer.1.output.dense.weight"
    save_file(HARMS["removed"](load_file(weights), key), weights, metadata={"format": "pt"})
    with pytest.raises(ModelError, match=key):
        MultiExitModel.from_pretrained(tmp_path / "pretrained", head=head)


def test_another_number_of_labels_makes_a_new_head_and_says_so(
    stock: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = Head(problem_type="single_label_classification", labels=("a", "b", "c", "d", "e"))
    model = MultiExitModel.from_pretrained(stock, head=head)
    assert "classifier.weight" in caplog.text
    assert all(len(row) == 5 for row in scores(model)[0])


# --- folders that are no model ------------------------------------------------------------


def test_what_is_no_model_folder_is_refused_with_a_reason(
    tmp_path: Path, ours: Path, stock: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    for folder in (ours, stock):
        shutil.copytree(folder, tmp_path / f"bare-{folder.parent.name}")
        (tmp_path / f"bare-{folder.parent.name}" / "model.safetensors").unlink()
    said = {
        "empty": "holds no model: there is no config.json",
        "file": "is a file",
        "nowhere/at/all": "neither a folder here nor",
        **{path.name: "model.safetensors" for path in tmp_path.glob("bare-*")},
    }
    assert len(said) == 5
    for name, reason in said.items():
        with pytest.raises(ModelError) as caught:
            MultiExitModel.from_pretrained(tmp_path / name)
        assert reason in str(caught.value)
        assert name.split("/")[0] in str(caught.value)


def test_an_architecture_that_is_not_known_is_refused_with_the_nearest_name() -> None:
    config = MultiExitConfig(stock={"model_type": "xlm-roberta-xl", "num_hidden_layers": 1})
    said = r"'xlm-roberta-xl' is not supported.*Did you mean 'xlm-roberta'.*Supported: albert, bert"
    with pytest.raises(ModelError, match=said):
        MultiExitModel(config)


def test_options_are_checked(ours: Path, stock: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'metod'.*Did you mean 'method'"):
        MultiExitModel.from_pretrained(stock, metod="deebert")
    with pytest.raises(ConfigError, match="Did you mean 'deebert'"):
        MultiExitModel.from_pretrained(stock, method="deeberta")
    for option in ({"method": "pabee"}, {"exits": ExitSpec()}):
        with pytest.raises(ConfigError, match="has its exits already"):
            MultiExitModel.from_pretrained(ours, **option)  # type: ignore[arg-type]
    assert MultiExitModel.from_pretrained(stock, method="deebert").config.method == "deebert"
    chosen = MultiExitModel.from_pretrained(stock, exits=ExitSpec(pooling="attention"))
    assert chosen.config.exit_kind().pooling == "attention"
    default = MultiExitModel.from_pretrained(stock).config.exit_kind()
    assert default == METHODS["auto"].exits


# --- no code from files (R4) --------------------------------------------------------------

_TRAPS = (
    "pytorch_model.bin",
    "model.bin",
    "model.pt",
    "model.pth",
    "model.pkl",
    "model.ckpt",
    "weights.pickle",
    "training_args.bin",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "adapter_model.bin",
    "tokenizer.pkl",
    "vocab.pkl",
    "points/point.pkl",
    "points/point.bin",
    "flax_model.msgpack",
    "tf_model.h5",
    "pytorch_model.bin.index.json",
    "model.joblib",
)


class _Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["ours", "stock"])
def test_booby_traps_beside_the_weights_never_go_off(
    tmp_path: Path, copied: Path, copied_stock: Path, kind: str
) -> None:
    marker = tmp_path / "gone-off"
    bomb = pickle.dumps(_Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the trap itself must work"
    marker.unlink()
    folder = copied if kind == "ours" else copied_stock
    for name in _TRAPS:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(bomb)
    for name in ("modeling_evil.py", "conftest.py", "__init__.py", "tokenization_evil.py"):
        (folder / name).write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\n")
    model = MultiExitModel.from_pretrained(folder)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    assert not marker.exists()
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError):
        MultiExitModel.from_pretrained(folder)
    assert not marker.exists()


@pytest.mark.parametrize("model_type", ["bert", "evil"])
def test_code_that_a_stock_config_points_at_is_never_run(
    tmp_path: Path, copied_stock: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    marker = tmp_path / "gone-off"
    code = f"from pathlib import Path\nPath({str(marker)!r}).touch()\n"
    (copied_stock / "modeling_evil.py").write_text(code)
    config = json.loads((copied_stock / "config.json").read_text())
    config["model_type"] = model_type
    config["auto_map"] = {
        "AutoConfig": "modeling_evil.Config",
        "AutoModelForSequenceClassification": "modeling_evil.Model",
    }
    (copied_stock / "config.json").write_text(json.dumps(config))
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "n")
    try:
        MultiExitModel.from_pretrained(copied_stock)
    except ModelError as problem:
        assert model_type == "evil", problem  # noqa: PT017
    assert not marker.exists()
    assert not asked, "nobody is asked whether the code may run"


# --- configs (R5) -------------------------------------------------------------------------


def _forge(folder: Path, config: Any) -> None:
    """Write a config and a manifest that vouches for it, as an attacker would."""
    write_json(folder / "config.json", config)
    manifest = manifest_of(config, load_file(folder / "model.safetensors"))
    write_document(folder / "offramp.json", manifest)


def test_a_config_changed_by_hand_is_refused(copied: Path) -> None:
    path = copied / "config.json"
    config = json.loads(path.read_text())
    for change, said in (
        ({"exits": {**config["exits"], "pooling": "cls"}}, "was changed after"),
        ({"stock": {**config["stock"], "layer_norm_eps": 0.1}}, "was changed after"),
        ({"metod": "pabee"}, "unknown key 'metod'. Did you mean 'method'"),
    ):
        path.write_text(json.dumps(config | change))
        with pytest.raises(OfframpError) as caught:
            MultiExitModel.from_pretrained(copied)
        assert said in str(caught.value)
    for key in config:
        path.write_text(json.dumps({k: v for k, v in config.items() if k != key}))
        with pytest.raises(OfframpError, match=key):
            MultiExitModel.from_pretrained(copied)


@pytest.mark.parametrize("file", ["config.json", "offramp.json"])
@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"a": NaN}', '{"a": 1, "a": 2}', "\x00"])
def test_json_that_is_no_document_of_ours_is_refused(copied: Path, file: str, text: str) -> None:
    (copied / file).write_text(text)
    with pytest.raises(OfframpError, match=file):
        MultiExitModel.from_pretrained(copied)


def test_a_manifest_of_another_schema_is_refused(copied: Path) -> None:
    path = copied / "offramp.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"schema_version": 2}))
    with pytest.raises(ModelError, match="schema_version"):
        MultiExitModel.from_pretrained(copied)


_HUGE = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "vocab_size",
    "max_position_embeddings",
    "type_vocab_size",
    "num_labels",
)


@pytest.mark.parametrize("kind", ["ours", "stock"])
@pytest.mark.parametrize("size", [900_000, 2**30, 10**30])
@pytest.mark.parametrize("key", _HUGE)
def test_a_huge_claim_in_a_config_is_refused_before_anything_is_allocated(
    copied: Path, copied_stock: Path, key: str, size: int, kind: str
) -> None:
    if kind == "ours":
        folder = copied
        config = json.loads((folder / "config.json").read_text())
        _forge(folder, config | {"stock": {**config["stock"], key: size}})
    else:
        folder = copied_stock
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: size}))
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            MultiExitModel.from_pretrained(folder)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 100e6


_leaf = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=6)
    | st.lists(st.integers(0, 3), max_size=3)
    | st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=2)
)
_STOCK_KEYS = sorted(tiny_stock(layers=2).config.to_dict())


@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@example(place="stock", key="pad_token_id", value=580)
@given(
    place=st.sampled_from(["top", "exits", "stock", "stock", "stock"]),
    key=st.sampled_from(_STOCK_KEYS) | st.text(max_size=8),
    value=_leaf,
)
def test_whatever_a_forged_config_says_it_loads_or_is_an_error_of_ours(
    ours: Path, copied: Path, place: str, key: str, value: Any
) -> None:
    config = json.loads((ours / "config.json").read_text())
    if place == "top":
        config[st_key(config, key)] = value
    else:
        config[place][st_key(config[place], key)] = value
    try:
        _forge(copied, config)
    except KeyError:
        return
    try:
        MultiExitModel.from_pretrained(copied)
    except OfframpError as problem:
        assert str(copied) in str(problem) or "config.json" in str(problem)  # noqa: PT017


def st_key(known: dict[str, Any], key: str) -> str:
    """The key itself, or one of the known ones, so that half of all cases hit."""
    names = sorted(known)
    return names[len(key) % len(names)] if len(key) % 2 else key
