"""Exits that also say how much of what they read has nothing to do with the classes.

Source: CAP (null space projection), IJCAI 2025, arXiv 2506.17249.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import EXITS, ExitOutput, Exits, Host
from offramp.exits.pooled import PooledExit, PooledKind, check_pooling


@EXITS.register("nsp")
class NspSpec(PooledKind):
    """Pooled exits with a signal `nsp`, (units,), in 0..1; 0 at full depth; not in training.

    The share of the exit's feature that lies outside the space its weights span: for scores
    z W + b and z' = z + b W^+ it is |z' - z' P| / |z'|, where P projects onto the columns of W.
    """

    kind = "nsp"

    def build(self, host: Host, num_scores: int) -> Exits:
        check_pooling(self.pooling, host)
        if num_scores < 2:
            raise ConfigError(
                "Exits of kind 'nsp' need two scores or more: one column of weights spans a line, "
                "and the distance from it tells nothing about classes. Use kind 'pooled'."
            )
        made = {n: NspExit(self, host.width(n), num_scores, host) for n in range(1, host.depth)}
        return NspExits({str(layer): exit for layer, exit in made.items()})


class NspExit(PooledExit):
    """A pooled exit that knows the space of its classes; arguments as `PooledExit`."""

    _known: tuple[Any, Tensor, Tensor] | None = None

    def read(self, pooled: Tensor, carry: Any = None) -> tuple[ExitOutput, Any]:
        feature = self.feature(pooled)
        signals = {} if self.training else {"nsp": self.outside(feature)}
        return ExitOutput(self.score(feature), signals), carry

    def outside(self, feature: Tensor) -> Tensor:
        """The share of (rows, width) outside the classes' space, (rows,) fp32 in 0..1."""
        basis, shift = self._space()
        shifted = feature.detach().float() + shift
        # the remainder itself: 1 minus the share inside would lose its digits where it is small
        rest = shifted - (shifted @ basis) @ basis.T
        length = shifted.norm(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
        return (rest.norm(dim=-1) / length).clamp(0, 1)

    def _space(self) -> tuple[Tensor, Tensor]:
        """Basis (width, classes) and shift b W^+ (width,), once for every state of the weights."""
        if torch.compiler.is_exporting() and self._known is not None:
            return self._known[1:]  # weights are stand-ins, and a graph has no decomposition
        leaves = (self.classifier.weight, self.classifier.bias)
        state = tuple((id(x), x.device, 0 if x.is_inference() else x._version) for x in leaves)
        known = self._known
        if known is None or known[0] != state:
            known = self._known = (state, *class_space(*leaves))
        return known[1:]


class NspExits(Exits):
    """Exits with `nsp`; at full depth, where nobody goes on, it is 0."""

    def full_signals(self, scores: Tensor) -> Mapping[str, Tensor]:
        return {} if self.training else {"nsp": scores.new_zeros(scores.shape[0]).float()}


@torch.no_grad()
def class_space(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """An orthonormal basis of what (classes, width) weights span, and b W^+, both fp32.

    Columns of the basis that the weights do not reach are 0, so any rank will do.
    """
    left, sizes, right = torch.linalg.svd(weight.float().T, full_matrices=False)
    floor = torch.finfo(torch.float32).eps * max(weight.shape) * sizes.amax()
    reached = sizes > floor
    basis = left * reached
    along = (right * bias.float()).sum(dim=-1) / torch.where(reached, sizes, torch.inf)
    return basis, (basis * along).sum(dim=-1)
