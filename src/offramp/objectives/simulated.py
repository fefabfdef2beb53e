"""Each row weighs most where it would leave (COSEE, AAAI 2025, arXiv 2412.13236)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.objectives.base import Clock, Objective, Stage
from offramp.objectives.task import row_losses

Doubt = Literal["energy", "entropy", "max_probability"]


class SimulatedExits(Objective):
    """Losses weighted by the distance from where rows would leave, and a calibrated signal.

    At every step `thresholds` thresholds are drawn. For each, m* is the first layer whose doubt
    is below it, or L, and exit m weighs softmax over m of -beta |m - m*|; beta grows from 0 to
    `sharpness` in the course of training. The mean over thresholds and rows is the loss. To
    it comes `calibration` times, per exit, max(0, doubt of the rows it answers rightly - doubt of
    the others + `margin`), averaged over the exits that have both kinds in the batch.

    For one class of many: an energy over classes says nothing of sets of labels or of one score.

    Args:
        doubt: 0..1, smaller where an exit is surer: `energy` 1 / (1 + sum exp(score)), `entropy`
            over its maximum, `max_probability` 1 - the largest probability.
        thresholds: drawn at every step.
        sharpness: beta at the end; 10 is nearly one exit alone.
        calibration: weight of the calibration.
        margin: between right and wrong rows.
        draw: `quantiles` of the batch's doubts over all exits; `last_epoch` uniform between
            the smallest and the largest doubt of the epoch before, 0..1 in the first, as
            released.
    """

    span: Tensor
    seen: Tensor
    epoch: Tensor

    def __init__(
        self,
        doubt: Doubt = "energy",
        thresholds: int = 5,
        sharpness: float = 1.0,
        calibration: float = 0.1,
        margin: float = 0.3,
        draw: Literal["quantiles", "last_epoch"] = "quantiles",
    ) -> None:
        super().__init__()
        if thresholds < 1 or not (sharpness >= 0 and calibration >= 0):
            raise ConfigError(
                f"thresholds is {thresholds}, sharpness {sharpness} and calibration {calibration}. "
                "Give at least one threshold, and the others from 0."
            )
        self.doubt: Doubt = doubt
        self.thresholds, self.sharpness = thresholds, sharpness
        self.calibration, self.margin = calibration, margin
        self.draw = draw
        if draw == "last_epoch":
            self.register_buffer("span", torch.tensor([0.0, 1.0]))
            self.register_buffer("seen", torch.tensor([math.inf, -math.inf]))
            self.register_buffer("epoch", torch.tensor(0))

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        labels, kind = batch["labels"], batch["problem_type"]
        if kind != "single_label_classification":
            raise ConfigError(f"Simulated exits are for one class of many, not for {kind}.")
        clock = batch.get("clock", Clock())
        losses = torch.stack([row_losses(o.scores, labels, kind) for o in outputs], dim=1)
        doubts = torch.stack([doubt(o.scores, self.doubt) for o in outputs[:-1]], dim=1)
        weights = self.weights(doubts.detach(), clock)
        right = torch.stack([o.scores.argmax(dim=-1) == labels for o in outputs[:-1]], dim=1)
        return {
            "exits": (weights * losses).sum(dim=-1).mean(),
            "calibration": self.calibration * separation(doubts, right, self.margin),
        }

    def weights(self, doubts: Tensor, clock: Clock) -> Tensor:
        """Of each row's exits by their doubts (rows, L-1), full depth included; (rows, L)."""
        layers = exit_layers(doubts, self._thresholds(doubts, clock))
        near = nearness(doubts.shape[1] + 1, self.sharpness * clock.progress, doubts.device)
        return near[layers - 1].mean(dim=0)

    def _thresholds(self, doubts: Tensor, clock: Clock) -> Tensor:
        """Drawn, (thresholds,)."""
        drawn = torch.rand(self.thresholds, device=doubts.device)
        if self.draw == "quantiles":
            return torch.quantile(doubts.flatten(), drawn)
        self._turn(clock.epoch)
        smallest, largest = doubts.aminmax()
        self.seen = torch.stack((self.seen[0].min(smallest), self.seen[1].max(largest)))
        return self.span[0] + (self.span[1] - self.span[0]) * drawn

    def _turn(self, epoch: int) -> None:
        """In a new epoch what was seen in the last one becomes the span."""
        later = (epoch > self.epoch) & self.seen.isfinite().all()
        fresh = torch.tensor([math.inf, -math.inf], device=self.seen.device)
        self.span = torch.where(later, self.seen, self.span)
        self.seen = torch.where(later, fresh, self.seen)
        self.epoch = torch.full_like(self.epoch, epoch)


def doubt(scores: Tensor, kind: Doubt) -> Tensor:
    """Scores (rows, classes) as 0..1, smaller where they are surer, (rows,) fp32."""
    scores = scores.float()
    if kind == "energy":
        return torch.sigmoid(-scores.logsumexp(dim=-1))
    log = scores.log_softmax(dim=-1)
    if kind == "entropy":
        # not special.entr, whose gradient is NaN where a probability vanishes
        return -(log.exp() * log).sum(dim=-1) / math.log(scores.shape[-1])
    return 1 - log.exp().amax(dim=-1)


def exit_layers(doubts: Tensor, thresholds: Tensor) -> Tensor:
    """Where rows leave: doubts (rows, L-1), thresholds (k,) -> 1-based layers, (k, rows)."""
    below = doubts < thresholds[:, None, None]
    always = torch.ones_like(below[..., :1])
    return 1 + torch.cat((below, always), dim=-1).int().argmax(dim=-1)


def nearness(depth: int, sharpness: float, device: torch.device) -> Tensor:
    """Row m* of (depth, depth): softmax over m of -sharpness |m - m*|."""
    layers = torch.arange(depth, device=device)
    distance = (layers[:, None] - layers).abs()
    return torch.softmax(-sharpness * distance.float(), dim=-1)


def separation(doubts: Tensor, right: Tensor, margin: float) -> Tensor:
    """How far doubts (rows, exits) are from being `margin` lower where exits are `right`."""
    easy, hard = right.float(), (~right).float()
    mean_easy = (doubts * easy).sum(dim=0) / easy.sum(dim=0).clamp_min(1)
    mean_hard = (doubts * hard).sum(dim=0) / hard.sum(dim=0).clamp_min(1)
    both = right.any(dim=0) & ~right.all(dim=0)
    lacking = torch.relu(mean_easy - mean_hard + margin) * both
    return lacking.sum() / both.sum().clamp_min(1)
