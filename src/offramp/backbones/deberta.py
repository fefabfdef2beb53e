"""DeBERTa-v2 and v3: a convolution over the embedding joins in after layer 1."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from offramp.backbones.base import Flow
from offramp.backbones.encoders import EncoderBackbone, Layout, linear_head, register_layout


class DebertaBackbone(EncoderBackbone):
    """The convolution, where a checkpoint has one, is a part of layer 1."""

    def _make_skeleton(self) -> nn.Module:
        root = super()._make_skeleton()
        encoder = root.get_submodule("encoder")
        if "conv" in encoder._modules:
            encoder._modules["conv"] = None
        return root

    def layer(self, number: int, flow: Flow) -> Flow:
        after = super().layer(number, flow)
        conv = self._stock.base_model.get_submodule("encoder")._modules.get("conv")
        if number > 1 or conv is None:
            return after
        mask = flow.mask
        if mask is None:
            mask = torch.ones(flow.hidden.shape[:2], device=flow.hidden.device)
        return after._replace(hidden=conv(flow.hidden, after.hidden, mask))


def _pool(model: Any, hidden: Tensor, mask: Tensor | None) -> Tensor:
    return model.pooler(hidden)


LAYOUT = Layout(
    "deberta.encoder.layer",
    _pool,
    linear_head,
    "pooler.dense",
    shared_inputs=("relative_pos", "rel_embeddings"),
    returns_tuple=True,
)
register_layout("deberta-v2", LAYOUT, DebertaBackbone)
