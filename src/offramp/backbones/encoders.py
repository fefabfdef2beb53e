"""Hugging Face text encoders, cut into embedding, layers and rest without a fork.

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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from offramp.backbones.base import Backbone, Batch, Flow, take_rows
from offramp.errors import ModelError
from offramp.registry import Registry, nearest

BACKBONES: Registry[Callable[[PreTrainedModel], Backbone]] = Registry("backbone")
"""Maps a config's `model_type` to what cuts its sequence classifier into layers."""


def make_backbone(stock: PreTrainedModel) -> Backbone:
    """Cut a stock `...ForSequenceClassification` model into layers; weights are shared."""
    model_type = stock.config.model_type
    if model_type not in BACKBONES:
        known = BACKBONES.names()
        raise ModelError(
            f"Architecture '{model_type}' is not supported.{nearest(model_type, known)} "
            f"Supported: {', '.join(known)}. One file adds another: see docs/architecture.md."
        )
    return BACKBONES[model_type](stock)


@dataclass(frozen=True, slots=True)
class Layout:
    """Where an architecture keeps its parts, as attribute paths from the classifier.

    Attributes:
        layers: path to the `nn.ModuleList` of layers.
        pool: from the last hidden state to the vector the head's last linear layer reads.
        head: from that vector to the scores.
        pooler: path to the dense layer of the model's pooler.
        row_inputs: names of layer arguments whose first axis is the row.
    """

    layers: str
    pool: Callable[[Any, Tensor], Tensor]
    head: Callable[[Any, Tensor], Tensor]
    pooler: str
    row_inputs: tuple[str, ...] = ("attention_mask",)


class _Call(NamedTuple):
    """One recorded layer call: the module, its fixed arguments, and keys into Flow.inputs."""

    module: nn.Module
    fixed: Mapping[str, Any]
    rows: Mapping[str, str]


class _Recorders(nn.Module):
    """Stands where the list of layers stood; each item notes its call and returns its input.

    The items are plain functions, which cost less to call than modules.
    """

    def __init__(self, layers: nn.ModuleList, log: threading.local) -> None:
        super().__init__()
        self._items = [self._recorder(layer, log) for layer in layers]

    @staticmethod
    def _recorder(layer: nn.Module, log: threading.local) -> Callable[..., Tensor]:
        def note(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            log.calls.append((layer, args, kwargs))
            return hidden

        return note

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Callable[..., Tensor]]:
        return iter(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]


class EncoderBackbone:
    """A Hugging Face encoder with a classification head, run one layer at a time."""

    def __init__(self, stock: PreTrainedModel, layout: Layout) -> None:
        self._stock = stock
        self._layout = layout
        self._log = threading.local()
        self.layers: nn.ModuleList = stock.get_submodule(layout.layers)  # type: ignore[assignment]
        self.depth = int(stock.config.num_hidden_layers)
        self.shared_weights = len(self.layers) < self.depth
        self.pooler: nn.Linear | None = stock.get_submodule(layout.pooler)  # type: ignore[assignment]
        # names of what a layer takes after the hidden state; all layers of a stack agree
        self._names = tuple(inspect.signature(self.layers[0].forward).parameters)[1:]
        self._skeleton = self._make_skeleton()
        self._accepts = set(inspect.signature(stock.base_model.forward).parameters)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a model cuts its own layers; recorders would still point at the old ones."""
        return EncoderBackbone, (self._stock, self._layout)

    def _make_skeleton(self) -> nn.Module:
        """A shallow copy of the encoder with recorders for layers and no pooler."""
        prefix, *path = self._layout.layers.split(".")
        if prefix != self._stock.base_model_prefix:
            raise ModelError(f"Layout of '{self._stock.config.model_type}' starts at '{prefix}'.")
        root = _shallow(self._stock.base_model)
        node = root
        for name in path[:-1]:
            child = _shallow(node.get_submodule(name))
            node._modules[name] = child
            node = child
        node._modules[path[-1]] = _Recorders(self.layers, self._log)
        for name in ("pooler", "pooler_activation"):
            if name in root._modules:
                root._modules[name] = None
        return root

    def embed(self, batch: Batch) -> Flow:
        """Run everything before layer 1 and note what each layer will need."""
        self._log.calls = []
        named = {name: value for name, value in batch.items() if name in self._accepts}
        hidden = self._skeleton(**named, return_dict=True).last_hidden_state
        calls, self._log.calls = self._log.calls, []
        if len(calls) != self.depth:
            raise ModelError(
                f"Expected {self.depth} layer calls, the stock model made {len(calls)}."
            )
        inputs: dict[str, Tensor] = {}
        constants: list[_Call] = []
        for number, (module, args, kwargs) in enumerate(calls, start=1):
            if constants and _same(args, kwargs, *calls[number - 2][1:]):
                before = constants[-1]
                constants.append(_Call(module, before.fixed, before.rows))
            else:
                arguments = dict(zip(self._names, args, strict=False)) | kwargs
                constants.append(self._describe(number, module, arguments, inputs))
        return Flow(hidden, batch.get("attention_mask"), inputs, constants)

    def _describe(
        self,
        number: int,
        module: nn.Module,
        arguments: Mapping[str, Any],
        inputs: dict[str, Tensor],
    ) -> _Call:
        """Sort one call's arguments into row inputs and the rest."""
        fixed: dict[str, Any] = {}
        rows: dict[str, str] = {}
        for name, value in arguments.items():
            if isinstance(value, Tensor) and name in self._layout.row_inputs:
                rows[name] = f"{name}.{number}"
                inputs[rows[name]] = value
            elif value is None or isinstance(value, bool | int | float | str):
                fixed[name] = value
            else:
                raise ModelError(
                    f"Layer {number} of '{self._stock.config.model_type}' takes a "
                    f"{type(value).__name__.lower()} '{name}' that its layout does not describe. "
                    "If it is a tensor with a row axis, add it to the layout's row_inputs."
                )
        return _Call(module, fixed, rows)

    def layer(self, number: int, flow: Flow) -> Flow:
        """Run layer `number` (1-based) with the arguments the stock model gives it."""
        call: _Call = flow.constants[number - 1]
        given = call.fixed
        if call.rows:
            given = {**given, **{name: flow.inputs[key] for name, key in call.rows.items()}}
        hidden = call.module(flow.hidden, **given)
        return Flow(hidden, flow.mask, flow.inputs, flow.constants)

    def take(self, flow: Flow, rows: Tensor) -> Flow:
        return take_rows(flow, rows)

    def width(self, number: int) -> int:
        return int(self._stock.config.hidden_size)

    def pool(self, hidden: Tensor) -> Tensor:
        return self._layout.pool(self._stock, hidden)

    def head(self, hidden: Tensor) -> Tensor:
        return self._layout.head(self._stock, self.pool(hidden))


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


def _linear_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier(model.dropout(pooled))


def _bert_pool(model: Any, hidden: Tensor) -> Tensor:
    return model.bert.pooler(hidden)


def _albert_pool(model: Any, hidden: Tensor) -> Tensor:
    return model.albert.pooler_activation(model.albert.pooler(hidden[:, 0]))


def _roberta_pool(model: Any, hidden: Tensor) -> Tensor:
    head = model.classifier
    return torch.tanh(head.dense(head.dropout(hidden[:, 0])))


def _roberta_head(model: Any, pooled: Tensor) -> Tensor:
    return model.classifier.out_proj(model.classifier.dropout(pooled))


def _distilbert_pool(model: Any, hidden: Tensor) -> Tensor:
    return torch.relu(model.pre_classifier(hidden[:, 0]))


LAYOUTS: dict[str, Layout] = {
    "bert": Layout("bert.encoder.layer", _bert_pool, _linear_head, "bert.pooler.dense"),
    "albert": Layout(
        "albert.encoder.albert_layer_groups", _albert_pool, _linear_head, "albert.pooler"
    ),
    "roberta": Layout("roberta.encoder.layer", _roberta_pool, _roberta_head, "classifier.dense"),
    "distilbert": Layout(
        "distilbert.transformer.layer", _distilbert_pool, _linear_head, "pre_classifier"
    ),
}


def register_layout(model_type: str, layout: Layout) -> None:
    """Support an encoder architecture by saying where it keeps its parts."""
    BACKBONES.register(model_type, lambda stock: EncoderBackbone(stock, layout))


for _model_type, _layout in LAYOUTS.items():
    register_layout(_model_type, _layout)
