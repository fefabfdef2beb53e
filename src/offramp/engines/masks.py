"""Attention masks that say which tokens are padding, and say it once for each row.

Models write such a mask as a table of tokens by tokens, all rows of it alike, and take dozens of
steps to make it. Layers do the same with one row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from offramp.backbones import Backbone, Flow
from offramp.engines.alike import Values

Embed = Callable[[Values], Flow]


def with_thin_masks(backbone: Backbone, batches: Sequence[Values], longest: Values | None) -> Embed:
    """What comes before the first layer, with thin masks where that changes no state.

    Args:
        batches: to see it on; rows of different lengths, as `Backbone.embed` takes them.
        longest: one as long as texts may be, where a window would be seen whatever its width;
            without it masks stay as they are.
    """
    if longest is None:
        return backbone.embed
    flows = [backbone.embed(batch) for batch in batches]
    pairs = list(zip(flows, batches, strict=True))
    names = _only_padding(backbone.embed(longest), longest)
    names = names.intersection(*(_only_padding(*pair) for pair in pairs))
    if not names or not all(_same_states(backbone, *pair, names) for pair in pairs):
        return backbone.embed
    return lambda batch: _thin(backbone.embed(batch), batch, names)


def _only_padding(flow: Flow, batch: Values) -> set[str]:
    """Names of masks that say of each token what the row's mask says."""
    if "attention_mask" not in batch:
        return set()
    real = _real(batch)

    def is_table(leaf: Tensor) -> bool:
        rows, _, _, tokens = real.shape
        fits = leaf.dim() == 4 and (leaf.shape[0], leaf.shape[-1]) == (rows, tokens)
        return fits and leaf.dtype == torch.bool and torch.equal(leaf, real.expand_as(leaf))

    return {name for name, leaf in flow.inputs.items() if is_table(leaf)}


def _real(batch: Values) -> Tensor:
    """(rows, 1, 1, tokens): the tokens that may be looked at, by whichever token."""
    return batch["attention_mask"].bool()[:, None, None]


def _thin(flow: Flow, batch: Values, names: Collection[str]) -> Flow:
    return flow._replace(inputs={**flow.inputs, **dict.fromkeys(names, _real(batch))})


def _same_states(backbone: Backbone, flow: Flow, batch: Values, names: Collection[str]) -> bool:
    """Whether all layers do the same with thin masks, at tokens that are none of padding."""
    thin, mask = _thin(flow, batch, names), batch["attention_mask"].bool()
    for number in range(1, backbone.depth + 1):
        flow = backbone.layer(number, flow)
        try:
            thin = backbone.layer(number, thin)
        except Exception:  # whatever it is that a layer does with a table
            return False
        size = flow.hidden.abs().max().item()
        if not math.isfinite(size):
            return False
        if not torch.allclose(thin.hidden[mask], flow.hidden[mask], rtol=0, atol=1e-5 * size):
            return False
    return True
