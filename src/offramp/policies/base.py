"""What a policy is, and the one place where an exit is decided.

A policy is a frozen set of numbers with two pure functions, `start` and `step`. It holds no
model, no counters and no device: state goes in and comes out. Replay on a recorded table,
calibration and every engine call the same `decide`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeGuard

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from offramp.errors import ConfigError
from offramp.exits.base import ExitOutput
from offramp.registry import Registry

State = dict[str, Tensor]
NEVER = math.inf
"""The bar that no evidence passes."""
_FEW = 128
"""Scores that are sooner added one by one than by a kernel."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The units a policy is started on.

    Attributes:
        ids: a stable number per row, (rows,) int64, the same alone or in any batch.
        lengths: tokens per row, (rows,) int64.
    """

    ids: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on a device."""
        return Rows(self.ids.to(device), self.lengths.to(device))


class Step(NamedTuple):
    """What a policy says after one layer, for each row still running."""

    leave: Tensor  # (rows,) bool
    answer: Tensor  # (rows, classes), what a leaving row is answered with
    state: State


class Decision(NamedTuple):
    """A step with broken rows flagged: a `bad` row leaves at once, with an error."""

    leave: Tensor  # (rows,) bool, includes bad
    bad: Tensor | None  # (rows,) bool, or None where every row is finite
    answer: Tensor
    state: State


class Policy(BaseModel):
    """An exit criterion. Subclasses are frozen and refuse unknown or non-finite options.

    Attributes:
        problem_types: the tasks it is for; `why_not` says why not for the others.
        signals: what it reads beside scores, by their names in `ExitOutput.signals`.
        searched: whether a search that names no policy tries it, where its signals are there.
        hashes_ids: whether all 64 bits of a row's id decide.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    name: ClassVar[str]
    problem_types: ClassVar[tuple[str, ...]] = (
        "single_label_classification",
        "multi_label_classification",
        "regression",
    )
    why_not: ClassVar[str] = ""
    signals: ClassVar[tuple[str, ...]] = ()
    searched: ClassVar[bool] = True
    hashes_ids: ClassVar[bool] = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The signals it reads with the options that it has."""
        return self.signals

    def start(self, rows: Rows) -> State:
        """State before layer 1: tensors whose first axis is the row."""
        return {}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        """Look at the exit after `layer` (1-based) and say which rows leave."""
        raise NotImplementedError

    def step_at(self, bar: float | Tensor, state: State, layer: int, output: ExitOutput) -> Step:
        """A step with another bar; for those that `bars_of` knows some of."""
        raise NotImplementedError

    def reads(self, layer: int) -> bool:
        """Whether the exit after `layer` is looked at; others are not evaluated."""
        return True

    @classmethod
    def variants(cls, problem_type: str, depth: int) -> list[Policy]:
        """Where a search over this kind starts; it sweeps the bar of those that have one."""
        return [cls()] if problem_type in cls.problem_types else []

    def check(self, problem_type: str, depth: int) -> None:
        """Refuse a task this policy cannot answer. Raises ConfigError."""
        if problem_type not in self.problem_types:
            raise ConfigError(
                f"Policy '{self.name}' is not for {problem_type}; "
                f"it is for: {', '.join(self.problem_types)}. {self.why_not}".rstrip()
            )
        multi_label = problem_type == "multi_label_classification"
        if getattr(self, "multi_label", multi_label) != multi_label:
            raise ConfigError(
                f"Policy '{self.name}' has multi_label={not multi_label}, but the model is for "
                f"{problem_type}. Set multi_label={multi_label}."
            )

    def check_signals(self, given: Iterable[str]) -> None:
        """Refuse exits that do not give the signals it reads. Raises ConfigError."""
        given = sorted(given)
        missing = [name for name in self.needs if name not in given]
        if missing:
            raise ConfigError(
                f"Policy '{self.name}' reads the signal '{missing[0]}', which these exits do not "
                f"give; they give: {', '.join(given) or 'none'}. Choose another policy, or train "
                "with a method whose exits give it."
            )

    def _check_per_exit(self, option: str, values: Sequence[Any], depth: int) -> None:
        """Refuse a list that is neither for all exits nor for each. Raises ConfigError."""
        if len(values) not in (1, depth - 1):
            raise ConfigError(
                f"Policy '{self.name}': {option} has {len(values)} entries. Give one for all "
                f"exits, or {depth - 1}: one for each exit before the last of {depth} layers."
            )

    def signal(self, output: ExitOutput, name: str) -> Tensor:
        """A signal of an exit, (rows,). Raises ConfigError where there is none."""
        if name not in output.signals:
            self.check_signals(output.signals)
        return output.signals[name]

    def to_dict(self) -> dict[str, Any]:
        return {"name": self.name, **self.model_dump(mode="json")}


class EvidencePolicy(Policy):
    """A policy that leaves as soon as its evidence is strictly above a bar.

    One number per row and layer decides, so a whole sweep of bars is one pass over a table.
    Evidence does not depend on the bar; ties go on. `bar` is what a sweep varies; `with_bar`
    is its inverse for the finite bars that the options allow, and takes the nearest of these
    for others; the bar that is never passed, NEVER, is the policy `full`.

    Attributes:
        remembers: what an exit says counts at later ones. Without, an exit at which nobody may
            leave need not be looked at, see `PerExit`. Who writes `evidence` or `answer` says so
            anew, whatever the parent says.
    """

    remembers: ClassVar[bool] = True

    @classmethod
    def __pydantic_init_subclass__(cls, **options: Any) -> None:
        super().__pydantic_init_subclass__(**options)
        own = vars(cls)
        if "remembers" not in own and ("evidence" in own or "answer" in own):
            cls.remembers = True

    @property
    def bar(self) -> float:
        raise NotImplementedError

    @property
    def takes_bars(self) -> bool:
        """Whether `step_at` may be given bars from outside, an input of a graph, for its own."""
        return not has_own_step(self)

    def bar_at(self, layer: int) -> float:
        """What `step_at` is given after `layer`: the bar, unless exits have bars of their own.

        A policy that has is not swept, since one number does not say where it leaves.
        """
        return self.bar

    def without_bars(self) -> EvidencePolicy:
        """The same for all policies that differ in their bars alone."""
        return self.with_bar(0.0)

    def with_bar(self, bar: float) -> EvidencePolicy:
        """The same policy with another, finite bar."""
        raise NotImplementedError

    def _with(self, **options: Any) -> Self:
        """A validated copy; `model_copy` would let a negative or NaN threshold pass."""
        return type(self)(**{**dict(self), **options})

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        """Evidence for leaving after `layer`, (rows,) float, and the next state."""
        raise NotImplementedError

    def answer(self, state: State, output: ExitOutput) -> Tensor:
        """What rows that leave now are answered with; `state` is the one after this layer.

        Like evidence, it does not depend on the bar.
        """
        return output.scores

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return self.step_at(self.bar_at(layer), state, layer, output)

    def step_at(self, bar: float | Tensor, state: State, layer: int, output: ExitOutput) -> Step:
        """A step with another bar than its own: in a graph it is an input."""
        evidence, state = self.evidence(state, layer, output)
        return Step(evidence.float() > bar, self.answer(state, output), state)


def of_exit(values: Sequence[Any], layer: int) -> Any:
    """The entry of a list with one for all exits, or one for each; the last serves full depth."""
    return values[min(layer, len(values)) - 1]


def has_own_step(policy: EvidencePolicy) -> bool:
    """Whether evidence and bars alone do not say who leaves."""
    return type(policy).step is not EvidencePolicy.step


def has_own_bars(policy: Policy) -> bool:
    """Whether each exit has a bar of its own."""
    return isinstance(policy, EvidencePolicy) and type(policy).bar_at is not EvidencePolicy.bar_at


def has_one_bar(policy: Policy) -> TypeGuard[EvidencePolicy]:
    """Whether evidence above one bar says who leaves, so that the bar can be swept."""
    return (
        isinstance(policy, EvidencePolicy) and not has_own_step(policy) and not has_own_bars(policy)
    )


def with_inner(policy: Policy) -> Iterator[Policy]:
    """A policy and those among its options."""
    yield policy
    for _, option in policy:
        if isinstance(option, Policy):
            yield from with_inner(option)


def reads_all(policy: Policy, depth: int) -> bool:
    """Whether it looks at every exit before the last, and so do those inside."""
    return all(one.reads(layer) for one in with_inner(policy) for layer in range(1, depth))


def bars_of(policy: Policy, depth: int) -> Sequence[Tensor | None]:
    """The bar after each layer, for `decide`; None where the policy takes none from outside.

    A comparison with a number makes a tensor of it each time, which costs more than to compare. On
    the CPU it meets evidence on any device.
    """
    if not isinstance(policy, EvidencePolicy) or not policy.takes_bars:
        return [None] * depth
    if has_own_bars(policy):
        bars = [policy.bar_at(layer) for layer in range(1, depth + 1)]
        return torch.tensor(bars, dtype=torch.float32, device="cpu").unbind()
    return [torch.tensor(policy.bar, dtype=torch.float32, device="cpu")] * depth


POLICIES: Registry[type[Policy]] = Registry("policy")


def make_policy(spec: Mapping[str, Any] | str | Policy) -> Policy:
    """Build a policy from its name, or from {"name": ..., its options}."""
    if isinstance(spec, Policy):
        return spec
    options = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"A policy needs a 'name', one of: {', '.join(POLICIES)}.")
    kind = POLICIES[name]
    try:
        return kind(**options)
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        allowed = ", ".join(kind.model_fields) or "none"
        raise ConfigError(
            f"Policy '{name}': option '{key}': {first['msg']}. Its options: {allowed}."
        ) from None


def decide(
    policy: Policy,
    state: State,
    layer: int,
    output: ExitOutput,
    last: bool = False,
    bar: Tensor | None = None,
    look: bool = True,
) -> Decision:
    """Apply a policy after one layer: the only place where an exit is decided.

    Decisions are made in fp32 whatever the compute dtype. At the last layer every row
    leaves. A row with a non-finite score leaves as bad. After a layer that the policy does not
    read nobody leaves, and the answer is what the exit says, for whoever has no time to go on.

    Args:
        bar: after this layer, instead of the policy's own, where a graph is traced that serves
            them all; or its own from `bars_of`.
        look: values may be looked at to save work; on a GPU whoever looks has to wait.
    """
    if output.signals or output.scores.dtype != torch.float32:
        # signals as well: an exit table holds them in fp32, and a replay must decide alike
        signals = {name: signal.float() for name, signal in output.signals.items()}
        output = ExitOutput(output.scores.float(), signals)
    if not (last or policy.reads(layer)):
        step = Step(torch.zeros_like(output.scores[:, 0], dtype=torch.bool), output.scores, state)
    elif bar is None:
        step = policy.step(state, layer, output)
    else:
        step = policy.step_at(bar, state, layer, output)
    leave, bad = step.leave, _bad_rows(output.scores, look)
    if last:
        leave = torch.ones_like(leave)
    elif bad is not None:
        leave = leave | bad
    return Decision(leave, bad, step.answer, step.state)


def _bad_rows(scores: Tensor, look: bool) -> Tensor | None:
    """Rows with a non-finite score, or None where every row is known to be finite."""
    if not look:
        return (scores * 0).sum(dim=-1).isnan()  # fewer steps than asking each score
    # one sum says that all is finite in nearly every case
    few = scores.numel() <= _FEW
    if math.isfinite(sum(map(sum, scores.tolist())) if few else scores.sum().item()):
        return None
    finite = torch.isfinite(scores).all(dim=-1)  # the sum of finite scores may overflow
    return None if finite.all() else ~finite
