"""Variants of `auto`, one change at a time, as methods for `compare --plugin auto_variants`, with
this folder on PYTHONPATH.

`v-fast-simple` is `auto` itself, for images `v-first-last`, for numbers `v-fast-soft0` but for the
unit of its errors, which here is that of the labels; the objective of all of them has what `auto`
was tried with and without.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from offramp.exits import ExitKind, ExitOutput, ExitSpec
from offramp.exits.learned import LearnedSpec
from offramp.methods import METHODS
from offramp.methods.base import Method
from offramp.objectives.alternating import correctness_loss
from offramp.objectives.base import Clock, Objective, Stage
from offramp.objectives.distillation import SelfDistillation
from offramp.objectives.simulated import exit_layers, nearness
from offramp.objectives.task import row_losses

Weighting = Literal["simulated", "depth", "equal"]


class Blended(Objective):
    """sum over exits of w * (task loss + `distillation` * divergence from full depth).

    Args:
        weighting: w of a row and exit: `simulated` by how near the exit is to where the row would
            leave, which is where it is sure enough (the exits' signal `correct` or, without one,
            entropy; regression without one has no such place and takes `depth`); `depth` as in
            PABEE; `equal`.
        sharpness: of `simulated`, at the end of training.
        thresholds: of `simulated`, drawn at every step.
        distillation: weight of the divergence, 0 for none.
        temperature: of both sides of the divergence.
        correctness: weight of the error of the signal `correct`, where exits give it.
        full: extra weight of full depth.
        warm_up: share of the epochs that fine-tune the stock model first, unless it is
            fine-tuned already.
        exits_first: share of the epochs after that in which exits alone learn, ten times as
            fast, from the labels and from full depth.
        exits_last: the same at the end.
        rate: of exits while all learns, see `Stage`.
        rate_alone: of exits while they learn alone.
    """

    def __init__(
        self,
        weighting: Weighting = "simulated",
        sharpness: float = 1.0,
        thresholds: int = 5,
        distillation: float = 0.5,
        temperature: float = 2.0,
        correctness: float = 1.0,
        full: float = 0.0,
        warm_up: float = 0.5,
        exits_first: float = 0.0,
        exits_last: float = 0.0,
        rate: float = 1.0,
        rate_alone: float = 10.0,
    ) -> None:
        super().__init__()
        self.weighting: Weighting = weighting
        self.sharpness, self.thresholds = sharpness, thresholds
        self.distillation, self.temperature = distillation, temperature
        self.correctness, self.full = correctness, full
        self.warm_up, self.rate, self.rate_alone = warm_up, rate, rate_alone
        self.exits_first, self.exits_last = exits_first, exits_last
        self._first = SelfDistillation()

    def stages(self) -> Sequence[Stage]:
        warm_up = 0.0 if self.fine_tuned else self.warm_up
        first, last = (share * (1 - warm_up) for share in (self.exits_first, self.exits_last))
        found = (
            Stage("stock", "stock", warm_up),
            Stage("exits", "exits", first, rate=self.rate_alone, standardised=True),
            Stage("joint", "all", 1 - warm_up - first - last, rate=self.rate),
            Stage("last", "exits", last, rate=self.rate_alone, standardised=True),
        )
        return tuple(stage for stage in found if stage.share)

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        if stage.trainable == "exits":
            return self._first.losses(outputs, batch, stage)
        labels, kind = batch["labels"], batch["problem_type"]
        losses = torch.stack([row_losses(o.scores, labels, kind) for o in outputs], dim=1)
        *early, last = outputs
        if not early or stage.trainable == "stock":
            return {"exits": losses[:, -1].mean()}
        weights = self._weights(early, kind, batch.get("clock", Clock()))
        parts = {"exits": (weights * losses).sum(dim=1).mean() + self.full * losses[:, -1].mean()}
        if self.distillation:
            apart = [divergence(o.scores, last.scores, kind, self.temperature) for o in early]
            soft = (weights[:, :-1] * torch.stack(apart, dim=1)).sum(dim=1).mean()
            parts["distillation"] = self.distillation * soft
        judged = [output for output in early if "correct" in output.signals]
        if judged and self.correctness:
            parts["correctness"] = self.correctness * correctness_loss(judged, labels, kind)
        return parts

    @torch.no_grad()
    def _weights(self, early: Sequence[ExitOutput], kind: str, clock: Clock) -> Tensor:
        """(rows, L), each row adds up to 1."""
        depth, rows = len(early) + 1, len(early[0].scores)
        device = early[0].scores.device
        known = kind != "regression" or "correct" in early[0].signals
        if self.weighting == "simulated" and known:
            doubts = torch.stack([_doubt(output, kind) for output in early], dim=1)
            drawn = torch.rand(self.thresholds, device=device)
            layers = exit_layers(doubts, torch.quantile(doubts.flatten(), drawn))
            near = nearness(depth, self.sharpness * clock.progress, device)
            return near[layers - 1].mean(dim=0)
        layer = torch.arange(1, depth + 1, device=device).float()
        weights = torch.ones_like(layer) if self.weighting == "equal" else layer
        return (weights / weights.sum()).expand(rows, depth)


def _doubt(output: ExitOutput, kind: str) -> Tensor:
    """(rows,), smaller where an exit is surer."""
    if "correct" in output.signals:
        return 1 - output.signals["correct"].float()
    scores = output.scores.float()
    if kind == "single_label_classification":
        log = scores.log_softmax(dim=-1)
        return -(log.exp() * log).sum(dim=-1)
    return -scores.abs().amin(dim=-1)  # of the least sure label


def divergence(scores: Tensor, teacher: Tensor, kind: str, temperature: float) -> Tensor:
    """How far scores (rows, classes) are from a teacher's, (rows,); no gradient to the teacher.

    T^2 KL(teacher || scores) of probabilities at temperature T (Hinton et al., 2015), per label
    and then the mean for label sets; the squared difference for regression.
    """
    scores, teacher = scores.float(), teacher.detach().float()
    if kind == "regression":
        return (scores - teacher).square().mean(dim=-1)
    scores, teacher = scores / temperature, teacher / temperature
    if kind == "multi_label_classification":
        truth = teacher.sigmoid()
        loss = functional.binary_cross_entropy_with_logits
        apart = loss(scores, truth, reduction="none") - loss(teacher, truth, reduction="none")
        return temperature**2 * apart.mean(dim=-1)
    log, guess = teacher.log_softmax(dim=-1), scores.log_softmax(dim=-1)
    return temperature**2 * (log.exp() * (log - guess)).sum(dim=-1)


ATTENTIVE = LearnedSpec(pooling="attention", correctness="own")
PLAIN = ExitSpec(pooling="attention")
SHARED = LearnedSpec(pooling="attention")
SIMPLE: dict[str, Any] = {"exits": PLAIN, "distillation": 0.0, "rate": 3.0}
NAMES: dict[str, str] = {}
"""What is other than in `v-base`, by name."""


def variant(
    name: str, told: str, exits: ExitKind = ATTENTIVE, measures: bool = False, **options: Any
) -> None:
    made = Method(
        name=f"v-{name}",
        paper=f"a variant of auto: {told}",
        exits=exits,
        objective=partial(Blended, **{"exits_first": 0.0, **options}),
        policy="max_probability",
        measures_pooling=measures,
    )
    METHODS.register(made.name, made)
    NAMES[made.name] = told


variant("base", "")
variant("depth", "weights by depth, as PABEE's", weighting="depth")
variant("equal", "equal weights", weighting="equal")
variant("sharp3", "beta 3 instead of 1", sharpness=3.0)
variant("soft0", "no distillation", distillation=0.0)
variant("soft2", "four times the distillation", distillation=2.0)
variant("plain-exits", "no correctness output", exits=PLAIN)
variant("probed", "pooling as the probe says, not learned", measures=True)
variant("shared", "one correctness output for all exits", exits=SHARED)
variant(
    "hidden",
    "a hidden layer in every exit",
    exits=LearnedSpec(pooling="attention", correctness="own", hidden=True),
)
variant("full1", "full depth weighs more", full=1.0)
variant("warm", "no correctness output; exits learn alone first", exits=PLAIN, exits_first=0.25)
variant("warm-half", "v-warm, half of the time alone", exits=PLAIN, exits_first=0.5)
variant(
    "warm-soft0",
    "v-warm without distillation",
    exits=PLAIN,
    exits_first=0.25,
    distillation=0.0,
)
variant("fast", "exits at three times the rate", rate=3.0)
variant("fast-plain", "v-fast, no correctness output", exits=PLAIN, rate=3.0)
variant(
    "fast-warm",
    "v-warm with exits at three times the rate",
    exits=PLAIN,
    exits_first=0.25,
    rate=3.0,
)
variant("simple", "no correctness output, no distillation", exits=PLAIN, distillation=0.0)
variant("fast-soft0", "v-fast without distillation", distillation=0.0, rate=3.0)
variant(
    "fast-simple",
    "v-fast, no correctness output, no distillation",
    **SIMPLE,
)
variant(
    "fast-simple-full",
    "v-fast-simple, full depth weighs more",
    **SIMPLE,
    full=1.0,
)
variant("fast-shared", "v-fast with one correctness output", exits=SHARED, rate=3.0)
variant(
    "faster-simple",
    "v-fast-simple with exits at ten times the rate",
    exits=PLAIN,
    distillation=0.0,
    rate=10.0,
)
variant(
    "first-simple",
    "v-fast-simple, exits learn alone first",
    **SIMPLE,
    exits_first=0.25,
)
variant(
    "half-first",
    "v-first-simple, half of the time alone",
    **SIMPLE,
    exits_first=0.5,
)
variant(
    "last",
    "v-fast-simple, exits learn alone last",
    **SIMPLE,
    exits_last=0.25,
)
variant(
    "first-last",
    "v-fast-simple, exits learn alone first and last",
    **SIMPLE,
    exits_first=0.25,
    exits_last=0.25,
)
variant(
    "full-third",
    "v-fast-simple, full depth weighs a third more",
    **SIMPLE,
    full=0.3,
)
variant(
    "first-full",
    "v-first-simple, full depth weighs a third more",
    **SIMPLE,
    exits_first=0.25,
    full=0.3,
)
variant(
    "first-half-last",
    "v-first-last, half of the time alone at the end",
    **SIMPLE,
    exits_first=0.25,
    exits_last=0.5,
)
variant(
    "half-first-last",
    "v-first-last, half of the time alone at the start",
    **SIMPLE,
    exits_first=0.5,
    exits_last=0.25,
)
variant(
    "eighth-first-last",
    "v-first-last, an eighth alone at the start, three at the end",
    **SIMPLE,
    exits_first=0.125,
    exits_last=0.375,
)
for name, told, options in (
    ("equal", "equal weights", {"weighting": "equal"}),
    ("depth", "weights by depth, as PABEE's", {"weighting": "depth"}),
    ("slow", "exits at the rate of the model", {"rate": 1.0}),
    ("thirty", "exits alone at 30 times the rate instead of 10", {"rate_alone": 30.0}),
    ("five", "exits alone at 5 times the rate instead of 10", {"rate_alone": 5.0}),
    (
        "equal-ten",
        "equal weights, exits at ten times the rate throughout",
        {"weighting": "equal", "rate": 10.0},
    ),
    (
        "equal-soft",
        "equal weights, with distillation",
        {"weighting": "equal", "distillation": 0.5},
    ),
):
    variant(
        f"first-last-{name}",
        f"v-first-last, {told}",
        **{**SIMPLE, "exits_first": 0.25, "exits_last": 0.25, **options},
    )
variant("simple-equal", "v-fast-simple, equal weights", weighting="equal", **SIMPLE)
variant("simple-depth", "v-fast-simple, weights by depth, as PABEE's", weighting="depth", **SIMPLE)
variant("simple-probed", "v-fast-simple, pooling as the probe says", measures=True, **SIMPLE)
