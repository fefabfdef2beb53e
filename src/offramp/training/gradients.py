"""Gradients of parts of a loss, kept apart until an objective combines them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from offramp.objectives import Gradients, added

if TYPE_CHECKING:
    from offramp.training.trainer import Trainee

_REST = ""


class KeptApart:
    """Sums of gradients over the batches of one step: one per part that the objective names,
    one for the rest.

    Each takes the memory of a set of gradients. Between steps nothing is kept, so a checkpoint
    needs none of it.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Gradients] = {}

    def add(self, trainee: Trainee, parts: Mapping[str, Tensor]) -> None:
        """Add the gradients of the parts of one batch's loss."""
        for name, found in gradients_apart(trainee, parts).items():
            self._sums[name] = added(self._sums.get(name, {}), found)

    def meet(self, trainee: Trainee, accelerator: Accelerator) -> None:
        """Leave the objective's combination in the parameters' `grad`, and forget the sums.

        With several processes each sum is first averaged over them, so they all combine the
        gradients of the whole batch; a part has to reach the same parameters in each.
        """
        sums, self._sums = self._sums, {}
        if accelerator.num_processes > 1:
            sums = {name: _averaged(found, accelerator) for name, found in sums.items()}
        rest = sums.pop(_REST, {})
        with torch.no_grad():
            combined = trainee.objective.combine(sums, rest, trainee.model)
        for parameter, gradient in combined.items():
            parameter.grad = gradient


def gradients_apart(trainee: Trainee, parts: Mapping[str, Tensor]) -> dict[str, Gradients]:
    """The gradient of each part that the objective wants apart, and of the sum of the others."""
    losses = {name: parts[name] for name in trainee.objective.apart if name in parts}
    others = [part.float() for name, part in parts.items() if name not in losses]
    if others:
        losses[_REST] = torch.stack(others).sum()
    parameters = [leaf for leaf in trainee.parameters() if leaf.requires_grad]
    last = list(losses)[-1]
    return {
        name: _gradient(loss, parameters, keep_graph=name != last) for name, loss in losses.items()
    }


def _gradient(loss: Tensor, parameters: Iterable[nn.Parameter], keep_graph: bool) -> Gradients:
    leaves = list(parameters)
    found = torch.autograd.grad(loss, leaves, retain_graph=keep_graph, allow_unused=True)
    pairs = zip(leaves, found, strict=True)
    return {leaf: gradient for leaf, gradient in pairs if gradient is not None}


def _averaged(gradients: Gradients, accelerator: Accelerator) -> Gradients:
    return {leaf: accelerator.reduce(found, "mean") for leaf, found in gradients.items()}
