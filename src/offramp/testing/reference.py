"""The slow twin of every engine: all layers for all rows, nobody taken out, then one look back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp.exits import ExitOutput
from offramp.policies import POLICIES, EvidencePolicy, Policy, Rows, decide

Outputs = Sequence[ExitOutput]
"""What every exit says about the same rows, layer 1 first."""


def ensure(condition: object, claim: str) -> None:
    """Raise AssertionError with the claim unless the condition holds, also under `python -O`."""
    if not condition:
        raise AssertionError(claim)


@dataclass(frozen=True, slots=True)
class Walked:
    """What became of each row: as `engines.Answers`."""

    scores: Tensor
    exit_layers: Tensor
    bad: Tensor


def walk(policy: Policy, outputs: Outputs, rows: Rows) -> Walked:
    """Ask the policy about all rows at every layer and keep each row's first exit."""
    scores = torch.zeros_like(outputs[0].scores, dtype=torch.float32)
    exit_layers = torch.zeros(scores.shape[0], dtype=torch.long)
    bad = torch.zeros(scores.shape[0], dtype=torch.bool)
    state = policy.start(rows)
    for layer, output in enumerate(outputs, start=1):
        last = layer == len(outputs)
        if not (last or policy.reads(layer)):
            continue
        leave, broken, answer, state = decide(policy, state, layer, output, last)
        first = leave & (exit_layers == 0)
        exit_layers[first] = layer
        scores[first] = answer[first].float()
        if broken is not None:
            bad |= broken & first
    return Walked(scores, exit_layers, bad)


def walk_alone(policy: Policy, outputs: Outputs, rows: Rows) -> Walked:
    """`walk` for each row by itself, so that a policy cannot see any neighbour."""
    parts = []
    for row in range(rows.ids.shape[0]):
        only = torch.tensor([row])
        parts.append(walk(policy, select(outputs, only), select_rows(rows, only)))
    return Walked(
        torch.cat([part.scores for part in parts]),
        torch.cat([part.exit_layers for part in parts]),
        torch.cat([part.bad for part in parts]),
    )


def rows_like(outputs: Outputs) -> Rows:
    """Ids 0, 1, 2, ... and varied lengths for the rows of some outputs."""
    ids = torch.arange(outputs[0].scores.shape[0])
    return Rows(ids, 4 + ids % 29)


def select(outputs: Outputs, chosen: Tensor) -> list[ExitOutput]:
    """The outputs of some rows only."""
    return [
        ExitOutput(
            output.scores[chosen], {name: leaf[chosen] for name, leaf in output.signals.items()}
        )
        for output in outputs
    ]


def select_rows(rows: Rows, chosen: Tensor) -> Rows:
    return Rows(rows.ids[chosen], rows.lengths[chosen])


def stack_rows(per_row: Iterable[Outputs]) -> list[ExitOutput]:
    """One set of outputs from those of many rows or batches."""
    return [
        ExitOutput(
            torch.cat([output.scores for output in layer]),
            {name: torch.cat([one.signals[name] for one in layer]) for name in layer[0].signals},
        )
        for layer in zip(*per_row, strict=True)
    ]


def random_outputs(
    problem_type: str,
    rows: int = 96,
    depth: int = 12,
    num_scores: int = 4,
    seed: int = 0,
    signals: Iterable[str] = (),
) -> list[ExitOutput]:
    """Scores that drift from layer to layer: some rows settle early, some change their mind.

    Signals are numbers between 0 and 1.
    """
    draw = torch.Generator().manual_seed(seed)
    shape = (rows, 1 if problem_type == "regression" else num_scores)
    sharpness = torch.randn(rows, 1, generator=draw).exp()
    scores, outputs = torch.randn(shape, generator=draw), []
    for _ in range(depth):
        scores = 0.8 * scores + 0.6 * torch.randn(shape, generator=draw)
        extras = {name: torch.rand(rows, generator=draw) for name in signals}
        outputs.append(ExitOutput(scores * sharpness, extras))
    return outputs


def all_signals() -> list[str]:
    """The signals that registered policies read."""
    return sorted({signal for name in POLICIES for signal in POLICIES[name].signals})


def spread_policies(problem_type: str, outputs: Outputs) -> list[Policy]:
    """Every registered policy for the task, with bars at which these rows leave here and there.

    Those that read a signal which the outputs lack are left out.
    """
    chosen: list[Policy] = []
    for name in POLICIES:
        for policy in POLICIES[name].variants(problem_type, len(outputs)):
            if not set(policy.needs) <= set(outputs[0].signals):
                continue
            candidates = [policy]
            if isinstance(policy, EvidencePolicy):
                candidates += [policy.with_bar(bar) for bar in spread_bars(policy, outputs)]
            chosen += candidates
    return list(dict.fromkeys(chosen))


def spread_bars(policy: EvidencePolicy, outputs: Outputs, count: int = 3) -> list[float]:
    """Finite bars spread over the evidence that a policy sees in these outputs."""
    state, seen = policy.start(rows_like(outputs)), []
    for layer, output in enumerate(outputs, start=1):
        evidence, state = policy.evidence(state, layer, output)
        seen.append(evidence.float())
    values = torch.cat(seen)
    values = values[torch.isfinite(values)]
    shares = torch.linspace(0, 1, count + 2)[1:-1]
    return torch.quantile(values, shares).tolist() if values.numel() else []
