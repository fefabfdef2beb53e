"""Answers of FastBERT, ELBERT and RomeBERT as released, reproduced through the public model,
policy and engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from conftest import shared_path
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AlbertConfig,
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
)

from offramp.backbones import BACKBONES, Layout, register_layout
from offramp.engines import TorchEngine
from offramp.exits import ExitSpec
from offramp.exits.own_head import OwnHeadSpec
from offramp.exits.student import StudentSpec
from offramp.model import MultiExitModel
from offramp.objectives import LearnedWeights, RobustExits, TeachStudents
from offramp.objectives.robust import LAST, inner
from offramp.policies import make_policy
from offramp.training.gradients import gradients_apart
from offramp.training.trainer import Trainee

SIZES: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 12,
    "num_attention_heads": 4,
    "num_labels": 2,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def answers(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(shared_path("golden", f"{name}.json").read_text())
    return found


def weights(name: str) -> dict[str, Tensor]:
    return load_file(shared_path("golden", f"{name}.safetensors"))


def inputs() -> tuple[dict[str, Tensor], Tensor]:
    batch = load_file(shared_path("golden", "inputs.safetensors"))
    return batch, batch.pop("labels")


def run(
    model: MultiExitModel, batch: Mapping[str, Tensor], policy: Any, size: int
) -> tuple[list[int], Tensor]:
    """Exit layers and scores of all rows, in batches of `size`."""
    engine = TorchEngine(model)
    parts = [
        engine.run(
            {name: leaf[start : start + size] for name, leaf in batch.items()}, make_policy(policy)
        )
        for start in range(0, 64, size)
    ]
    layers = torch.cat([part.exit_layers for part in parts])
    return layers.tolist(), torch.cat([part.scores for part in parts])


def check_run(
    model: MultiExitModel,
    batch: Mapping[str, Tensor],
    policy: Any,
    wanted: Mapping[str, Any],
    size: int,
) -> None:
    """Exit layers are equal, scores within 1e-4."""
    layers, scores = run(model, batch, policy, size)
    assert layers == wanted["layers"], policy
    assert (gap(scores, torch.tensor(wanted["logits"])) <= 1e-4).all(), policy


def gap(scores: Tensor, others: Tensor) -> Tensor:
    """The largest difference of each answer."""
    return (scores - others).abs().amax(dim=-1)


# --- FastBERT -----------------------------------------------------------------------------


class TeacherConfig(BertConfig):
    model_type = "fastbert_as_released"


class Teacher(nn.Module):
    """FastBERT's head of full depth, which has the architecture of its students."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze, self.key, self.value, self.query, self.out, self.dense = (
            nn.Linear(width, width) for _ in range(6)
        )
        self.classifier = nn.Linear(width, 2)

    def pool(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        tokens = self.squeeze(hidden).tanh()
        query, key, value = (
            part(tokens).unflatten(-1, (2, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        hide = None if mask is None else (mask == 1)[:, None, None]
        found = nn.functional.scaled_dot_product_attention(query, key, value, hide)
        return self.out(found.transpose(1, 2).flatten(2))[:, 0]

    def forward(self, pooled: Tensor) -> Tensor:
        scores: Tensor = self.classifier(self.dense(pooled).tanh())
        return scores


class TheirLayerNorm(nn.LayerNorm):
    """Divides by an unbiased deviation plus eps; some deviations are so small that it matters."""

    def forward(self, hidden: Tensor) -> Tensor:
        spread = hidden.std(dim=-1, keepdim=True) + 1e-6
        return self.weight * (hidden - hidden.mean(dim=-1, keepdim=True)) / spread + self.bias


class TaughtBert(BertForSequenceClassification):
    """BERT with FastBERT's own norms and head."""

    config_class = TeacherConfig

    def __init__(self, config: BertConfig) -> None:
        super().__init__(config)
        self.classifier = Teacher(config.hidden_size)
        for part in [part for part in self.modules() if isinstance(part, nn.LayerNorm)]:
            part.__class__ = TheirLayerNorm


LAYOUT = Layout(
    "bert.encoder.layer",
    pool=lambda model, hidden, mask: model.classifier.pool(hidden, mask),
    head=lambda model, pooled: model.classifier(pooled),
)


@pytest.fixture(scope="module")
def fastbert() -> Any:
    known = weights("fastbert")
    AutoConfig.register(TeacherConfig.model_type, TeacherConfig, exist_ok=True)
    register_layout(TeacherConfig.model_type, LAYOUT)
    positions = len(known["embedding.position_embedding.weight"])
    config = TeacherConfig(max_position_embeddings=positions, type_vocab_size=3, **SIZES)
    model = MultiExitModel.from_stock(TaughtBert(config), StudentSpec(dropout=0.0), "fastbert")
    state = {**model.state_dict(), **_ours(known)}
    model.load_state_dict(state)
    yield model.eval()
    BACKBONES._items.pop(TeacherConfig.model_type)


_EMBEDDINGS = {"embedding.layer_norm": "LayerNorm"} | {
    f"embedding.{kind}_embedding": f"{name}_embeddings"
    for kind, name in (("word", "word"), ("position", "position"), ("segment", "token_type"))
}
_LAYER = {
    "self_attn.linear_layers.0": "attention.self.query",
    "self_attn.linear_layers.1": "attention.self.key",
    "self_attn.linear_layers.2": "attention.self.value",
    "self_attn.final_linear": "attention.output.dense",
    "layer_norm_1": "attention.output.LayerNorm",
    "feed_forward.linear_1": "intermediate.dense",
    "feed_forward.linear_2": "output.dense",
    "layer_norm_2": "output.LayerNorm",
}
_HEAD = {
    "output_layer_0": "squeeze",
    "self_atten.linear_layers.0": "query",
    "self_atten.linear_layers.1": "key",
    "self_atten.linear_layers.2": "value",
    "self_atten.final_linear": "out",
    "output_layer_1": "dense",
    "output_layer_2": "classifier",
}


def _ours(known: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """FastBERT's weights under our names.

    The bias of the students' keys cancels in the softmax; ours have none.
    """
    found = {}
    for name, leaf in known.items():
        path, _, kind = name.rpartition(".")
        kind = {"gamma": "weight", "beta": "bias"}.get(kind, kind)
        room, number, rest = [*path.split(".", 2), ""][:3]
        if room == "embedding":
            place = f"stock.bert.embeddings.{_EMBEDDINGS[path]}"
        elif room == "encoder":
            number, rest = rest.split(".", 1)
            place = f"stock.bert.encoder.layer.{number}.{_LAYER[rest]}"
        elif number == "11":
            place = f"stock.classifier.{_HEAD[rest]}"
        elif (_HEAD[rest], kind) == ("key", "bias"):
            continue
        else:
            place = f"exits.{int(number) + 1}.{_HEAD[rest]}"
        found[f"{place}.{kind}"] = leaf
    return found


def _numbered_from_one(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Segments as FastBERT counts them: 0 is padding."""
    return {**batch, "token_type_ids": batch["attention_mask"] + batch["token_type_ids"]}


@pytest.fixture(scope="module")
def exact(fastbert: MultiExitModel) -> tuple[Tensor, Tensor]:
    """Each exit's scores in fp64, (layers, rows, classes), and how far they move when the weights
    do in their last bit of fp32, (layers, rows).

    The golden model is drawn so wide that the latter is more than 1e-4 in a third of its answers.
    """
    batch = _numbered_from_one(inputs()[0])
    double = copy.deepcopy(fastbert).double()
    with torch.no_grad():
        still = torch.stack([output.scores for output in double.all_exits(batch)])
        moved = torch.zeros(still.shape[:2], dtype=torch.double)
        for seed in range(8):
            draw = torch.Generator().manual_seed(seed)
            other = copy.deepcopy(double)
            for leaf in other.parameters():
                bit = torch.finfo(torch.float32).eps * torch.rand(leaf.shape, generator=draw)
                leaf.mul_(1 + 2 * bit - torch.finfo(torch.float32).eps)
            scores = torch.stack([output.scores for output in other.all_exits(batch)])
            moved = torch.maximum(moved, gap(scores, still))
    return still, moved


@pytest.mark.parametrize("size", [1, 64])
def test_fastbert_leaves_as_the_original_and_answers_as_near_to_fp64(
    fastbert: MultiExitModel, exact: tuple[Tensor, Tensor], size: int
) -> None:
    """The golden answers are fp32, and where the last bit matters no fp32 is near another. So each
    is held to the model in fp64, in units of what the last bit of the weights moves there."""
    batch = _numbered_from_one(inputs()[0])
    found = []
    for speed, wanted in answers("fastbert")["runs"].items():
        policy = {"name": "entropy", "threshold": float(speed), "normalised": True}
        layers, scores = run(fastbert, batch, policy, size)
        assert layers == wanted["layers"], policy
        golden = torch.tensor(wanted["logits"], dtype=torch.double)
        still, moved = (leaf[torch.tensor(layers) - 1, range(64)] for leaf in exact)
        found.append((gap(scores, still), gap(golden, still), gap(scores, golden), moved))
    ours, theirs, between, bit = (torch.cat(gaps) for gaps in zip(*found, strict=True))
    # what the golden file itself is from fp64
    assert (theirs > 1e-4).sum() == 85
    assert 2.5e-3 < theirs.max() < 2.6e-3
    assert (theirs / bit).max() < 4
    # ours are nearer on average, and none is farther than the farthest of theirs, but for a
    # factor that batches of 1 and 64 and other kernels differ by among themselves
    assert (ours / bit).mean() <= (theirs / bit).mean()
    assert (ours / bit).max() <= 1.5 * (theirs / bit).max()
    # where four bits on either side are within 1e-4 all answers are, and most of the others
    steady = bit <= 1e-4 / 8
    assert steady.float().mean() > 0.4
    assert (between[steady] <= 1e-4).all()
    assert (between <= 1e-4).float().mean() > 2 / 3


def test_fastbert_has_the_losses_of_the_original(fastbert: MultiExitModel) -> None:
    batch, labels = inputs()
    with torch.no_grad():
        outputs = fastbert(**_numbered_from_one(batch)).exits
    objective = TeachStudents()
    for stage, name in zip(objective.stages(), ("stage1_ce", "stage2_kl"), strict=True):
        given = {"labels": labels, "problem_type": fastbert.problem_type}
        loss = sum(objective.losses(outputs, given, stage).values())
        assert float(loss) == pytest.approx(answers("fastbert")[name], rel=1e-4)


# --- ELBERT -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def elbert() -> MultiExitModel:
    config = AlbertConfig(
        embedding_size=64,
        max_position_embeddings=64,
        classifier_dropout_prob=0.0,
        hidden_act="gelu",  # ALBERT's own is an approximation of it
        **SIZES,
    )
    stock = AutoModelForSequenceClassification.from_config(config)
    model = MultiExitModel.from_stock(stock, OwnHeadSpec(), "elbert")
    shared = "albert.encoder.exit_out_layer.classifier"
    known = {name.replace(shared, "classifier"): leaf for name, leaf in weights("elbert").items()}
    model.load_state_dict({f"stock.{name}": leaf for name, leaf in known.items()})
    return model.eval()


def test_elbert_has_the_loss_of_the_original(elbert: MultiExitModel) -> None:
    batch, labels = inputs()
    objective = LearnedWeights()
    objective.prepare(12)
    (stage,) = objective.stages()
    with torch.no_grad():
        outputs = elbert(**batch).exits
        given = {"labels": labels, "problem_type": elbert.problem_type}
        loss = sum(objective.losses(outputs, given, stage).values())
    assert float(loss) == pytest.approx(answers("elbert")["train_loss"], rel=1e-4)


@pytest.mark.parametrize("size", [1, 64])
def test_elbert_leaves_and_answers_as_the_original(elbert: MultiExitModel, size: int) -> None:
    batch, _ = inputs()
    for setting, wanted in answers("elbert")["runs"].items():
        rule, window, threshold = setting.replace("N=", "").replace("thr=", "").split()
        options = {"rule": rule, "window": int(window), "threshold": float(threshold)}
        check_run(elbert, batch, {"name": "window", **options}, wanted, size)


# --- RomeBERT -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def romebert() -> MultiExitModel:
    config = BertConfig(max_position_embeddings=64, **SIZES)
    stock = AutoModelForSequenceClassification.from_config(config)
    model = MultiExitModel.from_stock(
        stock, ExitSpec(pooling="cls", hidden=True, dropout=0.0), "romebert"
    )
    found = {}
    for name, leaf in weights("romebert").items():
        _, highway, rest = name.partition("bert.encoder.highway.")
        if not highway:
            found[f"stock.{name}"] = leaf
            continue
        number, _, part = rest.partition(".")
        if number != "11":  # the original never trains its last off-ramp
            found[f"exits.{int(number) + 1}.{part.removeprefix('pooler.')}"] = leaf
    model.load_state_dict(found)
    return model


def _losses(model: MultiExitModel, objective: RobustExits) -> tuple[Trainee, dict[str, Tensor]]:
    batch, labels = inputs()
    (stage,) = objective.stages()
    trainee = Trainee(model.train(), objective, stage, model.problem_type)
    return trainee, trainee(**batch, labels=labels)


def test_romebert_has_the_losses_of_the_original(romebert: MultiExitModel) -> None:
    wanted = answers("romebert")
    with torch.no_grad():
        _, found = _losses(romebert, RobustExits(reduction="mean"))
    assert float(found[LAST]) == pytest.approx(wanted["last_loss"], rel=1e-4)
    assert float(found["labels"]) == pytest.approx(wanted["multi_loss"], rel=1e-4)
    assert float(found["distillation"]) == pytest.approx(wanted["distill_loss"], rel=1e-4)
    assert float(sum(found.values())) == pytest.approx(wanted["full_loss"], rel=1e-4)


@pytest.mark.parametrize(("reference", "norm"), [("exits", "norm_small"), ("last", "norm_large")])
def test_romebert_projects_gradients_as_the_original(
    romebert: MultiExitModel, reference: Any, norm: str
) -> None:
    wanted = answers("romebert")
    objective = RobustExits(reduction="mean", reference=reference)
    trainee, parts = _losses(romebert, objective)
    found = gradients_apart(trainee, parts)
    last, exits = found[LAST], found[""]
    layers = romebert.backbone.layers[:11]
    there = [leaf for leaf in layers.parameters() if leaf.ndim > 1]
    assert sum(leaf.numel() for leaf in there) == wanted["n_params"]

    def length(gradient: Any) -> float:
        return float(inner(gradient, gradient, there)) ** 0.5

    # the dot product and the cosine show that the gradients are the same; the original's norms
    # were summed in fp32, which loses about a thousandth over 1.4 million numbers
    product, scale = float(inner(last, exits, there)), length(last) * length(exits)
    assert product / scale == pytest.approx(wanted["dot"] / scale, abs=1e-6)
    assert product / scale == pytest.approx(wanted["cos"], abs=1e-5)
    combined = objective.combine({LAST: last}, exits, trainee.model)
    plain = {leaf: last[leaf] + exits[leaf] for leaf in there}
    lengths = {"norm_last": last, "norm_exit": exits, "norm_sum": plain, norm: combined}
    for name, gradient in lengths.items():
        assert length(gradient) == pytest.approx(wanted[name], rel=1.5e-3), name
    # between the two directions the original finds this little
    kept = length(last if reference == "last" else exits)
    found = length(combined) ** 2 - length(last) ** 2 - length(exits) ** 2
    assert found == pytest.approx(-((product / kept) ** 2), rel=1e-3)
