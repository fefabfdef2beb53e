"""Tiny random models and a tokenizer, made here and now: no download, no training.

Weights are drawn wide, so that exits disagree and every layer is worth leaving at; a model
initialised the usual way gives every input the same answer and tests nothing.
"""

from __future__ import annotations

import random
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from offramp.backbones import Batch
from offramp.exits import ExitKind, ExitSpec
from offramp.model import MultiExitModel
from offramp.model.stock import auto_class
from offramp.testing.pictures import (
    IMAGE_ARCHITECTURES,
    tiny_image_config,
    tiny_image_processor,
    tiny_pixels,
)

ARCHITECTURES = ("bert", "roberta", "albert", "distilbert")
"""One of each kind: plain, positions from padding, shared weights, names of its own."""
RELATIVES = (
    "camembert", "deberta-v2", "electra", "ernie", "jina_embeddings_v3", "modernbert", "mpnet",
    "nomic_bert", "xlm-roberta",
)  # fmt: skip
"""The other text encoders that are supported."""
PROBLEM_TYPES = ("single_label_classification", "multi_label_classification", "regression")
MAX_TOKENS = 64
_ROWS = 128

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_WORDS = (
    "the", "a", "film", "was", "not", "good", "bad", "very", "dull", "bright", "story", "and",
    "but", "with", "no", "plot", "actors", "play", "slow", "fast", "end", "we", "you", "it",
    "is", "are", "of", "in", "on", "to", "for", "this", "that", "never", "always", "great",
)  # fmt: skip
_SIGNS = tuple(string.ascii_lowercase + string.digits + string.punctuation)
_VOCABULARY = _SPECIAL + tuple(
    dict.fromkeys(_WORDS + _SIGNS + tuple(f"##{sign}" for sign in _SIGNS))
)


def tiny_tokenizer(arch: str = "bert") -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of about 180 pieces that knows any English text."""
    pieces = {piece: number for number, piece in enumerate(_VOCABULARY)}
    inner = Tokenizer(models.WordPiece(pieces, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    typed = ["token_type_ids"] if arch in ("bert", "albert") else []
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=MAX_TOKENS,
        model_input_names=["input_ids", *typed, "attention_mask"],
    )


def tiny_texts(count: int, seed: int = 0, longest: int = 40) -> list[str]:
    """Random sentences of 1 to `longest` known words; the same seed gives the same ones."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=draw.randint(1, longest))) for _ in range(count)]


def tiny_batch(rows: int, tokens: int = 16, seed: int = 0, padded: bool = True) -> Batch:
    """Random token ids of random lengths, padded on the right to the longest, (rows, tokens).

    With `padded` False all rows have `tokens` tokens and there is no attention mask.
    """
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(_SPECIAL), len(_VOCABULARY), (rows, tokens), generator=draw)
    ids[:, 0] = _SPECIAL.index("[CLS]")
    if not padded:
        return {"input_ids": ids}
    lengths = torch.randint(2, tokens + 1, (rows,), generator=draw)
    lengths[0] = tokens
    mask = (torch.arange(tokens) < lengths.unsqueeze(1)).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def _config(arch: str, problem_type: str, num_labels: int, layers: int) -> PreTrainedConfig:
    labels = [f"label-{number}" for number in range(num_labels)]
    common: dict[str, Any] = {
        "problem_type": problem_type,
        "id2label": dict(enumerate(labels)),
        "label2id": {name: number for number, name in enumerate(labels)},
    }
    if arch in IMAGE_ARCHITECTURES:
        return tiny_image_config(arch, layers, common)
    common |= {"vocab_size": len(_VOCABULARY), "pad_token_id": 0}
    if arch == "distilbert":
        sizes = {"dim": 32, "n_heads": 4, "hidden_dim": 64, "n_layers": layers}
        return AutoConfig.for_model(arch, max_position_embeddings=MAX_TOKENS, **sizes, **common)
    sizes = {
        "hidden_size": 32,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        # RoBERTa and its like count positions from the padding index on
        "max_position_embeddings": MAX_TOKENS + (arch in _COUNT_FROM_PADDING),
    }
    return AutoConfig.for_model(arch, **sizes, **_OWN.get(arch, {}), **common)


_COUNT_FROM_PADDING = ("roberta", "camembert", "xlm-roberta", "mpnet")
_OWN: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16, "num_hidden_groups": 2, "inner_group_num": 2},
    "electra": {"embedding_size": 16},
    "modernbert": {
        "local_attention": 8,
        "classifier_pooling": "mean",
        **{f"{name}_token_id": None for name in ("bos", "eos", "cls", "sep")},
    },
    "deberta-v2": {
        "relative_attention": True,
        "position_buckets": 8,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "conv_kernel_size": 3,
        "pooler_hidden_size": 32,
    },
}
"""What makes an architecture itself."""


@torch.no_grad()
def _widen(module: nn.Module, seed: int) -> None:
    """Redraw all weights so that rows, tokens and layers differ visibly."""
    draw = torch.Generator().manual_seed(seed)
    for part in module.modules():
        if isinstance(part, nn.Linear | nn.Conv2d):
            part.weight.normal_(std=1.2 / part.weight[0].numel() ** 0.5, generator=draw)
            if part.bias is not None:
                part.bias.normal_(std=0.2, generator=draw)
        elif isinstance(part, nn.Embedding):
            part.weight.normal_(generator=draw)
        elif isinstance(part, nn.LayerNorm | nn.BatchNorm2d):
            part.weight.normal_(mean=1.0, std=0.2, generator=draw)
            if part.bias is not None:
                part.bias.normal_(std=0.2, generator=draw)


@torch.no_grad()
def _balance(linear: Any, scores: Tensor) -> None:
    """Rescale what gave `scores` (rows, classes) to mean 0 and deviation 2 per class."""
    scale = 2.0 / scores.std(dim=0).clamp_min(1e-6)
    linear.bias.copy_((linear.bias - scores.mean(dim=0)) * scale)
    linear.weight.mul_(scale.unsqueeze(1))


def tiny_batch_for(model: PreTrainedModel, rows: int, tokens: int = 16, seed: int = 0) -> Batch:
    """`tiny_batch` or `tiny_pixels`, whichever the model reads."""
    if model.main_input_name == "pixel_values":
        return tiny_pixels(rows, seed)
    return tiny_batch(rows, tokens, seed)


def tiny_processor(arch: str) -> Any:
    """The tokenizer or image processor of an architecture."""
    return tiny_image_processor() if arch in IMAGE_ARCHITECTURES else tiny_tokenizer(arch)


def tiny_stock(
    arch: str = "bert",
    problem_type: str = "single_label_classification",
    num_labels: int | None = None,
    layers: int = 6,
    seed: int = 0,
) -> PreTrainedModel:
    """A stock classifier of width 32 in evaluation mode; ALBERT has 2 groups of 2 layers.

    Args:
        arch: one of `ARCHITECTURES`, `RELATIVES` or `IMAGE_ARCHITECTURES`.
        problem_type: as in transformers.
        num_labels: 3, or 1 for regression, unless given.
        layers: depth; for ALBERT the number of group passes.
        seed: of the weights.
    """
    count = num_labels or (1 if problem_type == "regression" else 3)
    config = _config(arch, problem_type, count, layers)
    stock: Any = auto_class(config).from_config(config)
    _widen(stock, seed)
    stock.eval()
    last_linear = [part for part in stock.classifier.modules() if isinstance(part, nn.Linear)][-1]
    _balance(last_linear, stock(**tiny_batch_for(stock, _ROWS, seed=seed)).logits)
    return stock


def tiny_model(
    arch: str = "bert",
    problem_type: str = "single_label_classification",
    num_labels: int | None = None,
    spec: ExitKind | None = None,
    layers: int = 6,
    seed: int = 0,
) -> MultiExitModel:
    """A multi-exit model on `tiny_stock` whose exits are drawn wide as well."""
    stock = tiny_stock(arch, problem_type, num_labels, layers, seed)
    model = MultiExitModel.from_stock(stock, spec or ExitSpec(pooling="mean"))
    model.eval()
    for made in model.exits.values():
        _widen(made, seed + 1)
    outputs = model.all_exits(tiny_batch_for(stock, _ROWS, seed=seed))
    for layer, output in enumerate(outputs[:-1], start=1):
        classifier = getattr(model.exits.at(layer), "classifier", None)
        if classifier is not None:
            _balance(classifier, output.scores)
    return model


def save_tiny(
    folder: str | Path,
    arch: str = "bert",
    problem_type: str = "single_label_classification",
    num_labels: int | None = None,
    spec: ExitKind | None = None,
    seed: int = 0,
) -> Path:
    """Write a `tiny_model` with its tokenizer; returns the folder."""
    model = tiny_model(arch, problem_type, num_labels, spec, seed=seed)
    model.save_pretrained(folder, processor=tiny_processor(arch))
    return Path(folder)


def save_tiny_stock(
    folder: str | Path,
    arch: str = "bert",
    problem_type: str = "single_label_classification",
    num_labels: int | None = None,
    seed: int = 0,
) -> Path:
    """Write a `tiny_stock` with its tokenizer, as transformers would; returns the folder."""
    tiny_stock(arch, problem_type, num_labels, seed=seed).save_pretrained(folder)
    tiny_processor(arch).save_pretrained(folder)
    return Path(folder)
