"""What every policy must keep, ours or a third party's."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence

import torch
from pydantic import ValidationError
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.policies import (
    EvidencePolicy,
    Policy,
    Rows,
    State,
    bars_of,
    decide,
    has_one_bar,
    make_policy,
    reads_all,
)
from offramp.testing.reference import (
    Outputs,
    Walked,
    ensure,
    random_outputs,
    rows_like,
    select,
    select_rows,
    spread_bars,
    walk,
)


def check_policy(policy: Policy, problem_type: str, outputs: Outputs | None = None) -> None:
    """Check that a policy is a pure rule about single rows.

    Args:
        policy: the one to check.
        problem_type: a task it is for.
        outputs: what it decides on, one per layer. Random scores, and signals between 0 and 1,
            of 96 rows and 12 layers unless given.

    Raises:
        AssertionError: saying what the policy does that it must not.
    """
    outputs = outputs or random_outputs(problem_type, signals=policy.needs)
    rows = rows_like(outputs)
    try:
        policy.check(problem_type, len(outputs))
    except ConfigError as problem:
        raise AssertionError(f"{_who(policy)} refuses {problem_type}: {problem}") from problem
    _check_frozen(policy)
    _check_purity(policy, outputs, rows)
    _check_row_independence(policy, outputs, rows)
    _check_compaction(policy, outputs, rows)
    _check_broken_rows(policy, outputs, rows)
    if isinstance(policy, EvidencePolicy):
        _check_bars(policy, outputs, rows)
        _check_memory(policy, outputs, rows)
    _check_round_trip(policy)


def _who(policy: Policy) -> str:
    return f"Policy '{policy.name}'"


def _check_frozen(policy: Policy) -> None:
    for name in type(policy).model_fields:
        with contextlib.suppress(ValidationError):
            setattr(policy, name, getattr(policy, name))
            raise AssertionError(f"{_who(policy)} lets its option '{name}' be changed.")


def _check_purity(policy: Policy, outputs: Outputs, rows: Rows) -> None:
    """Same input, same output; nothing written to self or to what it was given."""
    before = _memory(policy)
    state = policy.start(rows)
    for layer, output in enumerate(outputs, start=1):
        given = _copy({"scores": output.scores, **output.signals, **state})
        first, second = policy.step(state, layer, output), policy.step(state, layer, output)
        now = {"scores": output.scores, **output.signals, **state}
        ensure(_same(given, now), f"{_who(policy)} writes to the tensors it is given.")
        alike = _same(
            {"leave": first.leave, "answer": first.answer, **first.state},
            {"leave": second.leave, "answer": second.answer, **second.state},
        )
        ensure(alike, f"{_who(policy)} answers the same question differently the second time.")
        _check_shapes(policy, first.leave, first.answer, first.state, output)
        state = first.state
    ensure(_memory(policy) == before, f"{_who(policy)} keeps state on itself.")


def _check_shapes(
    policy: Policy, leave: Tensor, answer: Tensor, state: State, output: ExitOutput
) -> None:
    rows = output.scores.shape[0]
    ensure(
        leave.dtype == torch.bool and leave.shape == (rows,),
        f"{_who(policy)} must say for each row whether it leaves: bool, shape ({rows},).",
    )
    ensure(
        answer.shape == output.scores.shape,
        f"{_who(policy)} answers with shape {tuple(answer.shape)}, not "
        f"{tuple(output.scores.shape)}.",
    )
    for name, leaf in state.items():
        ensure(
            leaf.dim() > 0 and leaf.shape[0] == rows,
            f"{_who(policy)}: state '{name}' does not have the row as its first axis.",
        )


def _check_row_independence(policy: Policy, outputs: Outputs, rows: Rows) -> None:
    """Alone, in any company and in any order a row gets the same answer at the same layer."""
    whole = walk(policy, outputs, rows)
    count = rows.ids.shape[0]
    draw = torch.Generator().manual_seed(1)
    companies = [torch.tensor([row]) for row in range(0, count, 5)]
    companies += [torch.randperm(count, generator=draw)[:size] for size in (2, 3, 8, 31, count)]
    for company in companies:
        part = walk(policy, select(outputs, company), select_rows(rows, company))
        ensure(
            _same_walk(part, whole, company),
            f"{_who(policy)} lets a row's neighbours or its place decide: rows "
            f"{company.tolist()[:8]} leave elsewhere among all rows than by themselves.",
        )


def _check_compaction(policy: Policy, outputs: Outputs, rows: Rows) -> None:
    """Taking out the rows that left, skipping exits it does not read, and its bar as a tensor, as
    engines have it, change nothing."""
    whole = walk(policy, outputs, rows)
    where, state, bars = rows.ids, policy.start(rows), bars_of(policy, len(outputs))
    for layer, output in enumerate(outputs, start=1):
        last = layer == len(outputs)
        here = select([output], where)[0]
        leave, _, answer, state = decide(policy, state, layer, here, last, bars[layer - 1])
        gone = where[leave]
        agree = (whole.exit_layers[gone] == layer).all() and torch.allclose(
            whole.scores[gone], answer[leave].float(), atol=1e-5, equal_nan=True
        )
        ensure(
            agree,
            f"{_who(policy)} decides otherwise at layer {layer} once other rows have left.",
        )
        where, state = where[~leave], {name: leaf[~leave] for name, leaf in state.items()}


def _check_broken_rows(policy: Policy, outputs: Outputs, rows: Rows) -> None:
    """A row with a score that is no number is flagged; its neighbours notice nothing."""
    clean = walk(policy, outputs, rows)
    count = rows.ids.shape[0]
    read = [n for n in range(1, len(outputs) + 1) if n == len(outputs) or policy.reads(n)]
    values = (math.nan, math.inf, -math.inf)
    for number, layer in enumerate((read[0], read[len(read) // 2], read[-1])):
        row = (7 * layer + number) % count
        broken = walk(policy, _break(outputs, layer, row, values[number]), rows)
        if int(clean.exit_layers[row]) < layer:
            ensure(_same_walk(broken, clean), f"{_who(policy)} looks ahead of its layer.")
            continue
        said = bool(broken.bad[row]) and int(broken.exit_layers[row]) == layer
        ensure(said, f"{_who(policy)} does not let go of a row whose scores are broken.")
        others = rows.ids[rows.ids != row]
        part = Walked(broken.scores[others], broken.exit_layers[others], broken.bad[others])
        ensure(_same_walk(part, clean, others), f"{_who(policy)}: a broken row harms another.")


def _break(outputs: Outputs, layer: int, row: int, value: float) -> list[ExitOutput]:
    harmed = list(outputs)
    scores = outputs[layer - 1].scores.clone()
    scores[row, 0] = value
    harmed[layer - 1] = ExitOutput(scores, outputs[layer - 1].signals)
    return harmed


def _check_bars(policy: EvidencePolicy, outputs: Outputs, rows: Rows) -> None:
    """A stricter bar never leaves earlier, and `with_bar` is the inverse of `bar`."""
    if math.isfinite(policy.bar):
        ensure(policy.with_bar(policy.bar) == policy, f"{_who(policy)}: with_bar(bar) differs.")
    bars = sorted(spread_bars(policy, outputs, count=15))
    previous: Walked | None = None
    for bar in bars:
        now = walk(policy.with_bar(bar), outputs, rows)
        if previous is not None:
            later = bool((now.exit_layers >= previous.exit_layers).all())
            ensure(later, f"{_who(policy)}: at the stricter bar {bar} a row leaves earlier.")
        previous = now
    if has_one_bar(policy) and reads_all(policy, len(outputs)):
        _check_one_bar(policy, outputs, rows, bars)


def _check_one_bar(
    policy: EvidencePolicy, outputs: Outputs, rows: Rows, bars: Sequence[float]
) -> None:
    """Evidence says for every bar at once who leaves, as a sweep over a table has it."""
    state, seen = policy.start(rows), []
    for layer, output in enumerate(outputs[:-1], start=1):
        evidence, state = policy.evidence(state, layer, output)
        seen.append(evidence.float())
    for bar in bars:
        stay = torch.stack([~(evidence > policy.with_bar(bar).bar) for evidence in seen])
        now = walk(policy.with_bar(bar), outputs, rows)
        ensure(
            torch.equal(1 + stay.cumprod(dim=0).sum(dim=0), now.exit_layers),
            f"{_who(policy)}: at the bar {bar} rows leave elsewhere than its evidence says. It may "
            "not depend on the bar; a rule of another kind has a step of its own.",
        )


def _check_memory(policy: EvidencePolicy, outputs: Outputs, rows: Rows) -> None:
    """What is said to remember nothing sees the same in an exit whatever came before."""
    state = policy.start(rows)
    for layer, output in enumerate(outputs if not policy.remembers else (), start=1):
        alone, fresh = policy.evidence(policy.start(rows), layer, output)
        after, state = policy.evidence(state, layer, output)
        answers = policy.answer(fresh, output), policy.answer(state, output)
        ensure(
            torch.equal(alone, after) and torch.equal(*answers),
            f"{_who(policy)} says that it remembers nothing, but earlier exits count at layer "
            f"{layer}. Set remembers = True.",
        )


def _check_round_trip(policy: Policy) -> None:
    text = json.dumps(policy.to_dict(), allow_nan=False)
    try:
        again = make_policy(json.loads(text))
    except ConfigError as problem:
        raise AssertionError(f"{_who(policy)} does not come back from JSON: {problem}") from problem
    ensure(again == policy, f"{_who(policy)} comes back from JSON as {again}.")


def _memory(policy: Policy) -> str:
    """Everything a policy could remember by: its fields, private attributes, class attributes."""
    own = (vars(policy), policy.__pydantic_private__)
    shared = {name: value for name, value in vars(type(policy)).items() if name[:2] != "__"}
    return repr((own, shared))


def _copy(tensors: State) -> State:
    return {name: leaf.clone() for name, leaf in tensors.items()}


def _same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(one[name].nan_to_num(), other[name].nan_to_num()) for name in one
    )


def _same_walk(part: Walked, whole: Walked, chosen: Tensor | None = None) -> bool:
    """Equal exits and flags, and answers up to the last bits."""
    rows = torch.arange(whole.bad.shape[0]) if chosen is None else chosen
    return (
        torch.equal(part.exit_layers, whole.exit_layers[rows])
        and torch.equal(part.bad, whole.bad[rows])
        and torch.allclose(part.scores, whole.scores[rows], atol=1e-5, equal_nan=True)
    )
