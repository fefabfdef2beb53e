"""Hugging Face encoders, cut into embedding, layers and rest without a fork.

The stock forward is run once on a skeleton: a shallow copy of the encoder whose layers are
recorders that return their input. That costs only the embedding and yields, in order, every
layer call with its arguments, so shared layers (ALBERT) need no special case and a layout is
one row of data. The shared model is never touched, so many threads may embed at once.
"""

from __future__ import annotations

import copy
import inspect
import operator
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.backbones.base import Backbone, Batch, Flow, join_rows, take_rows
from offramp.errors import DataError, ModelError
from offramp.exits import POOLINGS
from offramp.registry import Registry, nearest

BACKBONES: Registry[Callable[[PreTrainedModel], Backbone]] = Registry("backbone")
"""Maps a config's `model_type` to what cuts its sequence classifier into layers."""

HOW_TO_ADD = "docs/howto/backbone.md"


def make_backbone(stock: PreTrainedModel) -> Backbone:
    """Cut a stock `...ForSequenceClassification` model into layers; weights are shared."""
    check_architecture(stock.config.model_type)
    return BACKBONES[stock.config.model_type](stock)


def check_architecture(model_type: str) -> None:
    """Raise ModelError for what nobody has registered; large models need not be made for that."""
    if model_type not in BACKBONES:
        known = BACKBONES.names()
        raise ModelError(
            f"Architecture '{model_type}' is not supported.{nearest(model_type, known)} "
            f"Supported: {', '.join(known)}. One file adds another: see {HOW_TO_ADD}."
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an architecture keeps its parts, as attribute paths from the classifier.

    Attributes:
        layers: path to the `nn.ModuleList` of layers.
        pool: (model, normed hidden state, mask) to the vector the head's last linear layer reads.
        head: (model, that vector) to the scores.
        pooler: path to the dense layer of the model's pooler, if it has one.
        norm: path to what normalises the sum that pre-norm layers leave; None where each layer
            ends with a norm of its own.
        row_inputs: names of layer arguments whose first axis is the row: tensors, or tuples.
        shared_inputs: names of tensor arguments that are the same for all rows.
        returns_tuple: a layer returns a tuple whose first item is the hidden state.
        positions_from_padding: positions count from `pad_token_id` + 1, as in RoBERTa.
        reads: `text` or `image`.
    """

    layers: str
    pool: Callable[[Any, Tensor, Tensor | None], Tensor]
    head: Callable[[Any, Tensor], Tensor]
    pooler: str | None = None
    norm: str | None = None
    row_inputs: tuple[str, ...] = ("attention_mask",)
    shared_inputs: tuple[str, ...] = ()
    returns_tuple: bool = False
    positions_from_padding: bool = False
    reads: Literal["text", "image"] = "text"


_Keys = str | tuple[str, ...]


class _Call(NamedTuple):
    """One recorded layer call: what runs it, its plain arguments, and where its tensors are."""

    run: Callable[..., Any]
    fixed: Mapping[str, Any]
    rows: Mapping[str, _Keys]  # into Flow.inputs
    shared: Mapping[str, _Keys]  # into Flow.shared


class _Recorder:
    """Stands where a layer stood: notes its call and returns its input.

    No module, because a module's call costs more.
    """

    def __init__(
        self, layer: nn.Module, run: Callable[..., Any], log: threading.local, layout: Layout
    ) -> None:
        self.layer, self.run = layer, run
        self._log = log
        self._returns_tuple = layout.returns_tuple

    def __call__(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls = self._log.calls
        if not calls:
            self._log.hidden = hidden
        calls.append((self.run, args, kwargs))
        return (hidden, None) if self._returns_tuple else hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)  # ModernBERT asks a layer what attention it has


class _Recorders(nn.Module):
    """Stands where the list of layers stood."""

    def __init__(self, items: Sequence[_Recorder]) -> None:
        super().__init__()
        self._items = items

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[_Recorder]:
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


class EncoderBackbone:
    """A Hugging Face encoder with a classification head, run one layer at a time."""

    def __init__(self, stock: PreTrainedModel, layout: Layout) -> None:
        if not hasattr(stock, "classifier"):  # DeiT with a teacher has two
            raise ModelError(
                f"{type(stock).__name__} is not supported: exits need a model with one classifier. "
                f"See {HOW_TO_ADD}."
            )
        self._stock = stock
        self._layout = layout
        self._log = threading.local()
        self.layers: nn.ModuleList = stock.get_submodule(layout.layers)  # type: ignore[assignment]
        self._cut = tuple(self.layers)  # whatever the list holds later
        self.depth = int(stock.config.num_hidden_layers)
        self.shared_weights = len(self.layers) < self.depth
        self.reads: str = layout.reads
        self.poolings = POOLINGS
        self.pooler: nn.Linear | None = _part(stock, layout.pooler)  # type: ignore[assignment]
        self.view = _part(stock, layout.norm)
        # names of what a layer takes after the hidden state; all layers of a stack agree
        self._names = tuple(inspect.signature(self.layers[0].forward).parameters)[1:]
        self._skeleton = self._make_skeleton()
        self._accepts = set(inspect.signature(stock.base_model.forward).parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model cuts its own layers; recorders would still point at the old ones."""
        return type(self), (self._stock, self._layout)

    def through(self, run: Callable[[nn.Module], Callable[..., Any]]) -> EncoderBackbone:
        """The same, on the same weights, whose layers are called as `run` says of each module."""
        twin = object.__new__(type(self))  # a copy would be cut anew, see __reduce__
        vars(twin).update(vars(self))
        twin._log = threading.local()
        twin._skeleton = twin._recording(self._skeleton, run)
        return twin

    def _make_skeleton(self) -> nn.Module:
        """A shallow copy of the encoder with recorders for layers and no pooler."""
        prefix = self._layout.layers.partition(".")[0]
        if prefix != self._stock.base_model_prefix:
            raise ModelError(f"Layout of '{self._stock.config.model_type}' starts at '{prefix}'.")
        root = self._recording(self._stock.base_model, lambda layer: layer)
        for name in ("pooler", "pooler_activation"):
            if name in root._modules:
                root._modules[name] = None
        return root

    def _recording(self, encoder: nn.Module, run: Callable[[nn.Module], Any]) -> nn.Module:
        """A shallow copy with recorders for layers."""
        root = node = _shallow(encoder)
        *path, last = self._layout.layers.split(".")[1:]
        for name in path:
            node._modules[name] = node = _shallow(node.get_submodule(name))
        recorders = [_Recorder(layer, run(layer), self._log, self._layout) for layer in self._cut]
        node._modules[last] = _Recorders(recorders)
        return root

    def example(self, tokens: int, device: torch.device | str) -> Batch:
        if self.reads == "text":
            ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
            kinds = getattr(self._stock.config, "type_vocab_size", 0) or 0
            typed = kinds > 1 and "token_type_ids" in self._accepts
            return {"input_ids": ids} | ({"token_type_ids": ids} if typed else {})
        size: Any = self._stock.config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        channels: Any = self._stock.config.num_channels
        return {"pixel_values": torch.zeros((1, channels, height, width), device=device)}

    def embed(self, batch: Batch) -> Flow:
        """Run everything before layer 1 and note what each layer will need."""
        if self.reads == "image":
            self._check_pixels(batch["pixel_values"])
        self._log.calls = []
        named = {name: value for name, value in batch.items() if name in self._accepts}
        self._skeleton(**named, return_dict=True)
        hidden, self._log.hidden = self._log.hidden, None
        calls, self._log.calls = self._log.calls, []
        if len(calls) != self.depth:
            raise ModelError(
                f"Expected {self.depth} layer calls, the stock model made {len(calls)}."
            )
        inputs: dict[str, Tensor] = {}
        shared: dict[str, Tensor] = {}
        constants: list[_Call] = []
        for number, (run, args, kwargs) in enumerate(calls, start=1):
            if number > 1 and _same(args, kwargs, *calls[number - 2][1:]):
                constants.append(constants[-1]._replace(run=run))
            else:
                arguments = dict(zip(self._names, args, strict=False)) | kwargs
                rows = hidden.shape[0]
                constants.append(self._describe(number, run, arguments, inputs, shared, rows))
        return Flow(hidden, batch.get("attention_mask"), inputs, shared, constants)

    def _check_pixels(self, pixels: Tensor) -> None:
        wanted, given = self.example(0, "meta")["pixel_values"].shape[1:], pixels.shape[1:]
        if given != wanted:
            raise DataError(
                "The model reads images of (channels, height, width) "
                f"{tuple(wanted)}, its image processor gives {tuple(given)}. Save the processor "
                "that belongs to the model beside it."
            )

    def _describe(
        self,
        number: int,
        run: Callable[..., Any],
        arguments: Mapping[str, Any],
        inputs: dict[str, Tensor],
        shared: dict[str, Tensor],
        count: int,
    ) -> _Call:
        """Sort one call's arguments into plain values, tensors of rows and tensors for all."""
        fixed: dict[str, Any] = {}
        of_rows: dict[str, _Keys] = {}
        of_all: dict[str, _Keys] = {}
        for name, value in arguments.items():
            if value is None or isinstance(value, bool | int | float | str):
                fixed[name] = value
            elif self._is_shared(name, value, count):
                of_all[name] = _keep(shared, f"{name}.{number}", value)
            elif name in self._layout.row_inputs and isinstance(value, Tensor | tuple):
                of_rows[name] = _keep(inputs, f"{name}.{number}", value)
            else:
                raise ModelError(
                    f"Layer {number} of '{self._stock.config.model_type}' takes a "
                    f"{type(value).__name__.lower()} '{name}' that its layout does not describe. "
                    "If it is a tensor with a row axis, add it to the layout's row_inputs."
                )
        return _Call(run, fixed, of_rows, of_all)

    def _is_shared(self, name: str, value: Any, count: int) -> bool:
        """Whether an argument is the same for all rows; a mask of one row is that row's own."""
        if name in self._layout.shared_inputs:
            return True
        if name not in self._layout.row_inputs or (count == 1 and name == "attention_mask"):
            return False
        return all(isinstance(leaf, Tensor) and leaf.shape[0] == 1 for leaf in _leaves(value))

    def layer(self, number: int, flow: Flow) -> Flow:
        """Run layer `number` (1-based) with the arguments the stock model gives it."""
        call: _Call = flow.constants[number - 1]
        given = call.fixed
        if call.rows:
            given = {**given, **{name: _fetch(flow.inputs, key) for name, key in call.rows.items()}}
        if call.shared:
            given = {
                **given,
                **{name: _fetch(flow.shared, key) for name, key in call.shared.items()},
            }
        hidden = call.run(flow.hidden, **given)
        if self._layout.returns_tuple:
            hidden = hidden[0]
        return Flow(hidden, flow.mask, flow.inputs, flow.shared, flow.constants)

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        return take_rows(flow, rows)

    def join(self, flows: Sequence[Flow]) -> Flow:
        return join_rows(flows)

    def width(self, number: int) -> int:
        return int(self._stock.config.hidden_size)

    @property
    def max_length(self) -> int | None:
        limit = getattr(self._stock.config, "max_position_embeddings", None)
        if limit is None or not self._layout.positions_from_padding:
            return limit
        # the embeddings', since MPNet counts from 2 whatever its config says
        embeddings: Any = self._stock.base_model.embeddings
        return int(limit) - int(embeddings.padding_idx) - 1

    def pool(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        return self._layout.pool(self._stock, hidden, mask)

    def answer(self, pooled: Tensor) -> Tensor:
        return self._layout.head(self._stock, pooled)

    def head(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        viewed = hidden if self.view is None else self.view(hidden)
        return self.answer(self.pool(viewed, mask))


def _same(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    other_args: tuple[Any, ...],
    other_kwargs: Mapping[str, Any],
) -> bool:
    """Whether two layers get the very same arguments, as most encoders' layers do."""
    return (
        len(args) == len(other_args)
        and all(map(operator.is_, args, other_args))
        and list(kwargs) == list(other_kwargs)
        and all(map(operator.is_, kwargs.values(), other_kwargs.values()))
    )


def _shallow(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and children but may swap its own children."""
    clone = copy.copy(module)
    clone._modules = dict(module._modules)
    return clone


def _part(model: nn.Module, path: str | None) -> nn.Module | None:
    return None if path is None else model.get_submodule(path)


def _leaves(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _keep(kept: dict[str, Tensor], key: str, value: Any) -> _Keys:
    """Keep one or several tensors for later layers, each once; the keys they are found under."""
    if isinstance(value, tuple):
        return tuple(_keep_leaf(kept, f"{key}.{i}", leaf) for i, leaf in enumerate(value))
    return _keep_leaf(kept, key, value)


def _keep_leaf(kept: dict[str, Tensor], key: str, leaf: Tensor) -> str:
    for known, other in kept.items():
        if other is leaf:
            return known
    kept[key] = leaf
    return key


def _fetch(inputs: Mapping[str, Tensor], key: _Keys) -> Any:
    return inputs[key] if isinstance(key, str) else tuple(inputs[part] for part in key)


def linear_head(model: Any, pooled: Tensor) -> Tensor:
    """Scores of a head that ends with `dropout` and `classifier`."""
    return model.classifier(model.dropout(pooled))


def _out_proj_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier.out_proj(model.classifier.dropout(pooled))


def _base_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return model.base_model.pooler(hidden)


def _albert_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return model.albert.pooler_activation(model.albert.pooler(hidden[:, 0]))


def _roberta_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    head = model.classifier
    return torch.tanh(head.dense(head.dropout(hidden[:, 0])))


def _electra_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    head = model.classifier
    return head.activation(head.dense(head.dropout(hidden[:, 0])))


def _distilbert_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return torch.relu(model.pre_classifier(hidden[:, 0]))


def _modernbert_pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    if model.config.classifier_pooling == "cls":
        return model.head(hidden[:, 0])
    if mask is None:
        mask = torch.ones(hidden.shape[:2], device=hidden.device, dtype=torch.bool)
    return model.head((hidden * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True))


def _first_token(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return hidden[:, 0]


def _bare_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(pooled)


def _modernbert_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(model.drop(pooled))


ROTARY = ("attention_mask", "position_embeddings")

LAYOUTS: dict[str, Layout] = {
    "bert": Layout("bert.encoder.layer", _base_pool, linear_head, "bert.pooler.dense"),
    "albert": Layout(
        "albert.encoder.albert_layer_groups", _albert_pool, linear_head, "albert.pooler"
    ),
    "distilbert": Layout(
        "distilbert.transformer.layer", _distilbert_pool, linear_head, "pre_classifier"
    ),
    "electra": Layout("electra.encoder.layer", _electra_pool, _out_proj_head, "classifier.dense"),
    "ernie": Layout("ernie.encoder.layer", _base_pool, linear_head, "ernie.pooler.dense"),
    "modernbert": Layout(
        "model.layers",
        _modernbert_pool,
        _modernbert_head,
        "head.dense",
        norm="model.final_norm",
        row_inputs=ROTARY,
    ),
    "mpnet": Layout(
        "mpnet.encoder.layer",
        _roberta_pool,
        _out_proj_head,
        "classifier.dense",
        row_inputs=("attention_mask", "position_bias"),
        returns_tuple=True,
        positions_from_padding=True,
    ),
    "nomic_bert": Layout(
        "nomic_bert.layers",
        _base_pool,
        linear_head,
        "nomic_bert.pooler.dense",
        row_inputs=(*ROTARY, "position_ids"),
    ),
    "jina_embeddings_v3": Layout(
        "roberta.layers", _roberta_pool, _out_proj_head, "classifier.dense", row_inputs=ROTARY
    ),
    "vit": Layout("vit.layers", _first_token, _bare_head, norm="vit.layernorm", reads="image"),
    "deit": Layout("deit.layers", _first_token, _bare_head, norm="deit.layernorm", reads="image"),
}
LAYOUTS |= {
    like_roberta: Layout(
        "roberta.encoder.layer",
        _roberta_pool,
        _out_proj_head,
        "classifier.dense",
        positions_from_padding=True,
    )
    for like_roberta in ("roberta", "camembert", "xlm-roberta")
}


def register_layout(
    model_type: str, layout: Layout, kind: type[EncoderBackbone] = EncoderBackbone
) -> None:
    """Support an encoder architecture by saying where it keeps its parts."""
    BACKBONES.register(model_type, lambda stock: kind(stock, layout))


for _model_type, _layout in LAYOUTS.items():
    register_layout(_model_type, _layout)
