"""Answers of the original implementations, reproduced through the public model, policy and engine.

Every case found in the shared golden folder runs, whatever its seed: a case is a pair
`<family>...json` and `.safetensors`, with its own `inputs<suffix>.safetensors` if there is one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from conftest import shared_folder
from safetensors.torch import load_file
from torch import Tensor
from transformers import AlbertConfig, AutoModelForSequenceClassification, BertConfig

from offramp.engines import TorchEngine
from offramp.exits import ExitSpec
from offramp.methods import METHODS
from offramp.model import MultiExitModel
from offramp.policies import Policy, make_policy

GOLDEN = shared_folder() / "golden"
FAMILIES = ("pabee_albert_cls", "pabee_albert_reg", "pabee_bert_cls", "deebert")
FOUND = sorted(path.stem for path in GOLDEN.glob("*.json") if path.stem.startswith(FAMILIES))
CASES = FOUND or [
    pytest.param("none", marks=pytest.mark.skip(reason=f"no golden answers in {GOLDEN}"))
]


@dataclass(frozen=True)
class Case:
    model: MultiExitModel
    batch: dict[str, Tensor]
    labels: Tensor
    answers: Mapping[str, Any]
    regression: bool


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Case:
    name: str = request.param
    family = next(prefix for prefix in FAMILIES if name.startswith(prefix))
    own = GOLDEN / f"inputs{name.removeprefix(family)}.safetensors"
    inputs = load_file(own if own.is_file() else GOLDEN / "inputs.safetensors")
    labels = inputs.pop("labels")
    answers = json.loads((GOLDEN / f"{name}.json").read_text())
    model = _deebert(name) if family == "deebert" else _pabee(name)
    return Case(model.eval(), inputs, labels, answers, family.endswith("reg"))


def _pabee(name: str) -> MultiExitModel:
    weights = load_file(GOLDEN / f"{name}.safetensors")
    last = max(int(key.split(".")[1]) for key in weights if key.startswith("classifiers."))
    renamed = {}
    for key, tensor in weights.items():
        room, _, rest = key.partition(".")
        if room != "classifiers":
            renamed[f"stock.{key}"] = tensor
        else:
            number, _, part = rest.partition(".")
            place = "stock" if int(number) == last else f"exits.{int(number) + 1}"
            renamed[f"{place}.classifier.{part}"] = tensor
    return _model(renamed, "pabee", METHODS["pabee"].exits)


def _deebert(name: str) -> MultiExitModel:
    weights = load_file(GOLDEN / f"{name}.safetensors")
    renamed = {}
    for key, tensor in weights.items():
        _, highway, rest = key.partition("bert.encoder.highway.")
        if not highway:
            renamed[f"stock.{key}"] = tensor
            continue
        number, _, part = rest.partition(".")
        # the original never trains its last off-ramp; here the stock head answers there
        if f"bert.encoder.highway.{int(number) + 1}.classifier.weight" in weights:
            part = part.removeprefix("pooler.")
            renamed[f"exits.{int(number) + 1}.{part}"] = tensor
    return _model(renamed, "deebert", METHODS["deebert"].exits)


def _model(weights: Mapping[str, Tensor], method: str, exits: ExitSpec) -> MultiExitModel:
    """Sizes are read off the weights; 12 layers and 4 heads are the golden folder's own."""
    albert = any(".albert." in key for key in weights)
    prefix = "stock.albert" if albert else "stock.bert"
    words = weights[f"{prefix}.embeddings.word_embeddings.weight"]
    positions = weights[f"{prefix}.embeddings.position_embeddings.weight"]
    common = {
        "vocab_size": words.shape[0],
        "max_position_embeddings": positions.shape[0],
        "num_hidden_layers": 12,
        "num_attention_heads": 4,
        "num_labels": weights["stock.classifier.weight"].shape[0],
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config: AlbertConfig | BertConfig
    if albert:
        inner = f"{prefix}.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight"
        config = AlbertConfig(
            embedding_size=words.shape[1],
            hidden_size=weights[inner].shape[1],
            intermediate_size=weights[inner].shape[0],
            classifier_dropout_prob=0.0,
            **common,
        )
    else:
        inner = f"{prefix}.encoder.layer.0.intermediate.dense.weight"
        config = BertConfig(
            hidden_size=words.shape[1], intermediate_size=weights[inner].shape[0], **common
        )
    stock = AutoModelForSequenceClassification.from_config(config)
    spec = exits.model_copy(update={"dropout": 0.0})
    model = MultiExitModel.from_stock(stock, spec, method)
    model.load_state_dict(weights)
    return model


def _policy(case: Case, setting: str) -> Policy:
    if case.model.config.method == "deebert":
        threshold = float(setting)
        return make_policy({"name": "entropy", "threshold": threshold} if threshold > 0 else "full")
    if setting == "0":  # the original's way to say full depth
        return make_policy("full")
    tolerance = {"tolerance": 0.5} if case.regression else {}
    return make_policy({"name": "patience", "patience": int(setting), **tolerance})


def _comparable(case: Case, setting: str, layers: Tensor) -> Tensor:
    """Rows whose logits must agree: all, but for one known defect of DeeBERT's release.

    Its last off-ramp is never trained and yet answers in place of the final classifier when
    its entropy happens to be low; here the final classifier answers at the last layer.
    """
    if case.model.config.method == "deebert" and float(setting) > 0:
        return layers < case.model.depth
    return torch.ones_like(layers, dtype=torch.bool)


@pytest.mark.parametrize("batch_size", [1, 64])
def test_golden_exit_layers_and_logits_are_those_of_the_original(
    golden: Case, batch_size: int
) -> None:
    engine = TorchEngine(golden.model)
    for setting, wanted in golden.answers["runs"].items():
        parts = [
            engine.run(
                {name: leaf[start : start + batch_size] for name, leaf in golden.batch.items()},
                _policy(golden, setting),
            )
            for start in range(0, len(golden.labels), batch_size)
        ]
        layers = torch.cat([part.exit_layers for part in parts])
        scores = torch.cat([part.scores for part in parts])
        assert layers.tolist() == wanted["layers"], f"setting {setting}"
        rows = _comparable(golden, setting, layers)
        torch.testing.assert_close(
            scores[rows], torch.tensor(wanted["logits"])[rows], atol=1e-4, rtol=0
        )


def test_golden_training_losses_are_those_of_the_original(golden: Case) -> None:
    objective = METHODS[golden.model.config.method].objective()
    golden.model.train()
    with torch.no_grad():
        outputs = golden.model(**golden.batch).exits
    batch = {"labels": golden.labels, "problem_type": golden.model.problem_type}
    names = ["train_loss"] if len(objective.stages()) == 1 else ["stage1_loss", "stage2_loss"]
    for name, stage in zip(names, objective.stages(), strict=True):
        loss = sum(objective.losses(outputs, batch, stage).values())
        assert float(loss) == pytest.approx(golden.answers[name], rel=1e-4), name
