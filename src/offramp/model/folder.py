"""The released folder: config.json, model.safetensors, a manifest that vouches for both, a card.

`offramp.json` holds a digest of every tensor, so a removed, added, renamed, transposed or
changed tensor is found on loading and named.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedConfig

from offramp.calibration.listing import PICTURE, drawn, picture_fits
from offramp.calibration.point import usable_points
from offramp.card import README, write_card
from offramp.errors import ModelError
from offramp.model.bounds import UNUSABLE, Building, Extent
from offramp.model.card import card_for, stock_card
from offramp.model.configuration import KEYS, MIRRORED, MultiExitConfig, check_config_keys
from offramp.storage import (
    Strict,
    fingerprint,
    read_document,
    read_json,
    recover,
    whole_folder,
    write_document,
    write_json,
)

if TYPE_CHECKING:
    from offramp.model.modeling import MultiExitModel

CONFIG, WEIGHTS, MANIFEST, POINTS = "config.json", "model.safetensors", "offramp.json", "points"


class TensorEntry(Strict):
    """Name of a dtype, shape, and digest of the bytes of one tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str


class Manifest(Strict):
    """What `offramp.json` says about the weights beside it."""

    schema_version: Literal[1] = 1
    fingerprint: str
    tensors: dict[str, TensorEntry]


def plain_config(config: PreTrainedConfig) -> dict[str, Any]:
    """A stock config as JSON data, without what changes from load to load."""
    data = json.loads(config.to_json_string(use_diff=True))
    for key in ("transformers_version", "_name_or_path", "dtype", "torch_dtype"):
        data.pop(key, None)
    return data


def manifest_of(config: Mapping[str, Any], state: Mapping[str, Tensor]) -> Manifest:
    """Digest every tensor and the config of a model."""
    entries = {name: _entry(state[name]) for name in sorted(state)}
    return Manifest(fingerprint=_fingerprint(config, entries), tensors=entries)


def _fingerprint(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> str:
    parts = [json.dumps({key: config[key] for key in KEYS}, sort_keys=True)]
    return fingerprint(*parts, *(f"{name}:{e.model_dump_json()}" for name, e in entries.items()))


def _entry(tensor: Tensor) -> TensorEntry:
    data = tensor.detach().cpu().contiguous()
    raw = data.reshape(-1).view(torch.uint8).numpy().data if data.numel() else b""
    return TensorEntry(
        dtype=str(tensor.dtype).removeprefix("torch."),
        shape=tuple(tensor.shape),
        sha256=hashlib.sha256(raw).hexdigest(),
    )


def resolve(source: str | os.PathLike[str], **hub: Any) -> Path:
    """A local folder for a folder name or hub id; downloads only safetensors and text."""
    if not isinstance(source, str | os.PathLike):
        raise ModelError(
            f"A model is named by a folder or a hub id, not by a {type(source).__name__}. One that "
            "is loaded answers through offramp.prediction.Predictor(model, processor)."
        )
    if not os.fspath(source):
        raise ModelError("The name of the model is empty. Give a folder or a hub id.")
    path = Path(source)
    recover(path)
    if path.is_dir():
        return path
    if path.exists():
        raise ModelError(f"{path} is a file; a model is a folder with {CONFIG} and {WEIGHTS}.")
    try:
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model"]
        return Path(snapshot_download(str(source), allow_patterns=patterns, **hub))
    except Exception as problem:
        raise ModelError(
            f"'{source}' is neither a folder here nor a model that the hub gives: "
            f"{str(problem).strip().splitlines()[0]}"
        ) from problem


def is_ours(path: Path) -> bool:
    """Whether a folder holds a multi-exit model; a folder without a config is an error."""
    if not (path / CONFIG).is_file():
        raise ModelError(f"{path} holds no model: there is no {CONFIG} in it. Give a model folder.")
    data = read_json(path / CONFIG, ModelError)
    if not isinstance(data, dict):
        raise ModelError(f"{path / CONFIG}: not a JSON object.")
    return data.get("model_type") == "offramp"


def load(kind: type[MultiExitModel], path: Path) -> MultiExitModel:
    """Load a folder of ours; every tensor must be there, of the right shape and unchanged."""
    data = read_json(path / CONFIG, ModelError)
    check_config_keys(data, str(path / CONFIG))
    promised = read_document(Manifest, path / MANIFEST, ModelError)
    tensors = _read_weights(path / WEIGHTS)
    found = manifest_of(data, tensors)
    _check_unchanged(path, found, promised)
    model = _build(kind, path, data)
    _check_fit(path, model.state_dict(), tensors)
    # kernels' last bits depend on alignment, which a mapped file does not keep and a copy does
    model.load_state_dict({name: leaf.clone() for name, leaf in tensors.items()}, assign=True)
    model.remember(found.fingerprint)
    return model


def _read_weights(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; the folder holds no weights.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as problem:
        raise ModelError(f"{path}: broken weights file: {problem}") from problem


def _check_unchanged(path: Path, found: Manifest, promised: Manifest) -> None:
    _check_names(path / WEIGHTS, set(promised.tensors), set(found.tensors))
    for name, entry in found.tensors.items():
        if promised.tensors[name] != entry:
            raise ModelError(f"{path / WEIGHTS}: '{name}' is not the tensor that was saved.")
    if promised.fingerprint != found.fingerprint:
        raise ModelError(f"{path / CONFIG}: was changed after the model was saved.")


def _check_names(path: Path, wanted: set[str], given: set[str]) -> None:
    missing, unexpected = sorted(wanted - given), sorted(given - wanted)
    if missing or unexpected:
        said = [f"missing {', '.join(missing[:8])}"] if missing else []
        said += [f"unexpected {', '.join(unexpected[:8])}"] if unexpected else []
        raise ModelError(f"{path}: {'; '.join(said)}. Save or download the model again.")


def _build(kind: type[MultiExitModel], path: Path, data: Mapping[str, Any]) -> MultiExitModel:
    """A model whose parameters have shapes but no memory yet."""
    extent = Extent.of(path)
    extent.check(data, path / CONFIG)
    try:
        with Building(extent, path / CONFIG, virtual=True):
            return kind(MultiExitConfig.from_dict(dict(data)))
    except UNUSABLE as problem:
        raise ModelError(f"{path / CONFIG}: not a usable config: {problem}") from problem


def _check_fit(path: Path, model: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    _check_names(path / WEIGHTS, set(model), set(tensors))
    for name, tensor in tensors.items():
        if model[name].shape != tensor.shape:
            raise ModelError(
                f"{path / WEIGHTS}: '{name}' has shape {tuple(tensor.shape)}, the config wants "
                f"{tuple(model[name].shape)}."
            )


def save(
    model: MultiExitModel, path: Path, tensors: dict[str, Tensor] | None, processor: Any
) -> None:
    """Write a folder of ours; see `MultiExitModel.save_pretrained`."""
    state = tensors if tensors is not None else model.state_dict()
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    _check_kept(model, state)
    manifest = manifest_of(model.config.to_dict(), state)
    recover(path)
    unchanged = _fingerprint_on_disk(path) == manifest.fingerprint
    points = usable_points(path) if unchanged else []
    picture = picture_fits(path, points)
    stale = [] if unchanged else [POINTS]
    stale += [PICTURE] if drawn(path) is not None and not picture else []
    card = card_for(model, path, points, picture)
    with whole_folder(path, keep_others=True, leave_behind=tuple(stale)) as staged:
        save_file(state, staged / WEIGHTS, metadata={"format": "pt"})
        write_json(staged / CONFIG, model.config.to_dict())
        write_document(staged / MANIFEST, manifest)
        if processor is not None:
            processor.save_pretrained(staged)
        if card is not None:
            write_card(staged / README, card)


def _check_kept(model: MultiExitModel, state: Mapping[str, Tensor]) -> None:
    """Refuse what would come back as another model, or not at all. Raises ModelError."""
    config = MultiExitConfig.from_dict(model.config.to_dict())
    with torch.device("meta"):
        again = type(model)(config)
    for name, leaf in again.state_dict().items():
        if name in state and state[name].shape != leaf.shape:
            raise ModelError(
                f"'{name}' has shape {tuple(state[name].shape)} and its config says "
                f"{tuple(leaf.shape)}: it was changed after exits were hung on. Change the stock "
                "model, and then make one with exits of it."
            )
    now = plain_config(model.stock.config)
    for name in MIRRORED:
        changed = now.get(name) != config.stock.get(name)
        changed |= getattr(model.config, name) != getattr(config, name)
        # transformers itself fills in the task at the first loss
        if changed and not (name == "problem_type" and now.get(name) == model.problem_type):
            raise ModelError(
                f"'{name}' of the config was changed after exits were hung on, and would be lost. "
                "Change the stock model's, and then make one with exits of it."
            )


def save_stock(model: MultiExitModel, path: Path, processor: Any) -> None:
    """Write the stock model alone, as transformers would; what made the folder ours goes."""
    recover(path)
    card = stock_card(path)
    stale = [MANIFEST, POINTS, *([] if drawn(path) is None else [PICTURE])]
    with whole_folder(path, keep_others=True, leave_behind=tuple(stale)) as staged:
        model.stock.save_pretrained(staged)
        if processor is not None:
            processor.save_pretrained(staged)
        if card is not None:
            write_card(staged / README, card)


def _fingerprint_on_disk(path: Path) -> str | None:
    try:
        return read_document(Manifest, path / MANIFEST, ModelError).fingerprint
    except ModelError:
        return None
