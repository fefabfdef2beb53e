"""What an attack tries to raise: how little reason a row gives any exit to let it go.

Each is a function of the outputs of all exits but the last, which lets everyone go, and of the
problem type; it gives one number a row, (rows,), through which gradients flow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.metrics import MULTI, REGRESSION
from offramp.registry import Registry

Objective = Callable[[Sequence[ExitOutput], str], Tensor]
OBJECTIVES: Registry[Objective] = Registry("objective of an attack")


def log_probabilities(outputs: Sequence[ExitOutput], problem_type: str) -> Tensor:
    """Logarithms of (rows, exits, questions, answers): one question, or a yes or no a label.

    Raises ConfigError for regression, whose one number has no answer that is as good as all others.
    """
    if problem_type == REGRESSION:
        raise ConfigError(
            "A regression model answers with one number, for which there is no 'all answers are "
            "alike' to drive exits to, so it cannot be attacked. Give a model with classes."
        )
    scores = torch.stack([output.scores for output in outputs], dim=1).float()
    if problem_type == MULTI:
        scores = torch.stack((scores, torch.zeros_like(scores)), dim=-1)
    else:
        scores = scores.unsqueeze(2)
    return scores.log_softmax(dim=-1)


@OBJECTIVES.register("uniform")
def uniform(outputs: Sequence[ExitOutput], problem_type: str) -> Tensor:
    """Minus the cross-entropy of each exit to the uniform answer (DeepSloth, arXiv 2010.02432)."""
    return log_probabilities(outputs, problem_type).mean(dim=(1, 2, 3))


@OBJECTIVES.register("even")
def even(outputs: Sequence[ExitOutput], problem_type: str) -> Tensor:
    """1 - sum over C classes of |p - 1/C| / (C - 1), the mean of exits (WAFFLE, 2310.19152)."""
    probabilities = log_probabilities(outputs, problem_type).exp()
    classes = probabilities.shape[-1]
    uneven = (probabilities - 1 / classes).abs().sum(dim=-1) / (classes - 1)
    return 1 - uneven.mean(dim=(1, 2))


@OBJECTIVES.register("disagree")
def disagree(outputs: Sequence[ExitOutput], problem_type: str) -> Tensor:
    """The chance that answers drawn from an exit and from the one before differ; against patience,
    which a row need not be uncertain for."""
    probabilities = log_probabilities(outputs, problem_type).exp()
    if len(outputs) < 2:
        raise ConfigError("Objective 'disagree' needs two exits before the last. Take 'uniform'.")
    alike = (probabilities[:, 1:] * probabilities[:, :-1]).sum(dim=-1)
    return 1 - alike.mean(dim=(1, 2))


@OBJECTIVES.register("stay")
def stay(outputs: Sequence[ExitOutput], problem_type: str) -> Tensor:
    """The mean logarithm of the chance to go on past an exit that says when to halt (PonderNet,
    PALBERT), whatever its answer."""
    if any("halt" not in output.signals for output in outputs):
        raise ConfigError(
            "Objective 'stay' needs exits that say when to halt, as of 'pondernet' and 'palbert'. "
            "Take 'uniform' or 'disagree'."
        )
    halt = torch.stack([output.signals["halt"] for output in outputs], dim=1)
    return torch.log1p(-halt.clamp(max=1 - 1e-6)).mean(dim=1)
