"""Everything of ours through the public checks, as a matrix; and proof that the checks bite."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from torch import Tensor

from offramp import testing
from offramp.engines import Answers, Engine, Exitable, TorchEngine
from offramp.exits import ExitOutput, ExitSpec
from offramp.methods import METHODS, Method
from offramp.model import MultiExitModel
from offramp.objectives import DepthWeighted, Objective
from offramp.policies import (
    POLICIES,
    Entropy,
    EvidencePolicy,
    Full,
    MaxProbability,
    Patience,
    Policy,
    Rows,
    State,
    Step,
)
from offramp.testing import (
    ARCHITECTURES,
    IMAGE_ARCHITECTURES,
    PROBLEM_TYPES,
    check_bookkeeping,
    check_engine,
    check_method,
    check_policy,
    random_outputs,
    spread_policies,
    tiny_batch,
    tiny_batch_for,
    tiny_model,
)
from offramp.testing.reference import all_signals

SINGLE = "single_label_classification"
MATRIX = [
    pytest.param(policy, problem_type, id=f"{problem_type}-{policy!r}")
    for problem_type in PROBLEM_TYPES
    for policy in spread_policies(problem_type, random_outputs(problem_type, signals=all_signals()))
]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def registered_for_this_test_only() -> Iterator[None]:
    before = dict(POLICIES._items), dict(METHODS._items)
    yield
    for registry, items in zip((POLICIES, METHODS), before, strict=True):
        registry._items.clear()
        registry._items.update(items)  # type: ignore[arg-type]


# --- ours ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("policy", "problem_type"), MATRIX)
def test_every_policy_passes(policy: Policy, problem_type: str) -> None:
    check_policy(policy, problem_type)


def test_the_matrix_holds_every_registered_policy_for_every_task_it_declares() -> None:
    there = {(case.values[0].name, case.values[1]) for case in MATRIX}  # type: ignore[union-attr]
    wanted = {(name, task) for name in POLICIES for task in POLICIES[name].problem_types}
    assert there == wanted


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_passes(name: str) -> None:
    check_method(METHODS[name])


@pytest.mark.parametrize("problem_type", PROBLEM_TYPES)
def test_the_torch_engine_passes_with_every_policy(problem_type: str) -> None:
    check_engine(TorchEngine, tiny_model("bert", problem_type, layers=6), rows=24)


@pytest.mark.parametrize(
    ("arch", "problem_type"),
    [(arch, PROBLEM_TYPES[0]) for arch in ARCHITECTURES[1:] + IMAGE_ARCHITECTURES]
    + [("albert", problem_type) for problem_type in PROBLEM_TYPES[1:]],
)
def test_the_torch_engine_passes_on_every_architecture(arch: str, problem_type: str) -> None:
    model = tiny_model(arch, problem_type, layers=3)
    check_engine(TorchEngine, model, _a_few(model), rows=24)


def _a_few(model: MultiExitModel) -> list[Policy]:
    seen = model.all_exits(tiny_batch_for(model.stock, 24))
    return [
        policy
        for policy in spread_policies(model.problem_type, seen)
        if policy in (Patience(patience=1), Full()) or isinstance(policy, Entropy)
    ]


@pytest.mark.parametrize("pooling", ["cls", "pooler", "attention"])
def test_the_torch_engine_passes_with_every_pooling(pooling: Any) -> None:
    model = tiny_model(spec=ExitSpec(pooling=pooling, hidden=True))
    check_engine(TorchEngine, model, _a_few(model), rows=24)


def test_the_public_names_are_there() -> None:
    assert all(hasattr(testing, name) for name in testing.__all__)
    assert len(set(testing.__all__)) == len(testing.__all__)


def test_tiny_folders_are_what_they_are_called(tmp_path: Path) -> None:
    ours = testing.save_tiny(tmp_path / "ours", "roberta", "regression")
    stock = testing.save_tiny_stock(tmp_path / "stock", "albert", num_labels=5)
    assert MultiExitModel.from_pretrained(ours).problem_type == "regression"
    assert len(MultiExitModel.from_pretrained(stock).config.id2label) == 5


# --- policies that must fail --------------------------------------------------------------


class Bad(Policy):
    """Leaves on maximum probability; its children each break one rule."""

    name: ClassVar[str] = "bad"
    threshold: float = Field(default=0.6, ge=0)

    def sure(self, output: ExitOutput) -> Tensor:
        return output.scores.softmax(dim=-1).amax(dim=-1)

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return Step(self.sure(output) > self.threshold, output.scores, state)


class BatchMean(Bad):
    """DeeBERT's released code: the mean of the batch decides for all."""

    def sure(self, output: ExitOutput) -> Tensor:
        return super().sure(output).mean().expand(len(output.scores))


class SharedPatience(Bad):
    """PABEE's released code: one counter, reset when any row of the batch changes its label."""

    def start(self, rows: Rows) -> State:
        count = len(rows.ids)
        return {"count": torch.zeros(count), "label": torch.full((count,), -1)}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        label = output.scores.argmax(dim=-1)
        together = torch.equal(label, state["label"])
        count = state["count"] + 1 if together else torch.zeros_like(state["count"])
        return Step(count >= 1, output.scores, {"count": count, "label": label})


class TopShare(Bad):
    """The surest half of the batch leaves."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        sure = self.sure(output)
        return Step(sure >= sure.median(), output.scores, state)


class FirstRows(Bad):
    """The place in the batch decides."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        place = torch.arange(len(output.scores))
        return Step((place % 2 == 0) & (self.sure(output) > 0.5), output.scores, state)


class NormalisedAnswers(Bad):
    """Rows leave where they should, but their answers depend on the batch."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        answer = output.scores - output.scores.mean(dim=0)
        return Step(self.sure(output) > self.threshold, answer, state)


class Counts(Bad):
    """Keeps state on its class."""

    calls: ClassVar[list[int]] = []

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        self.calls.append(layer)
        return super().step(state, layer, output)


class Draws(Bad):
    """Throws dice that do not belong to the row."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return Step(torch.rand(len(output.scores)) > 0.5, output.scores, state)


class Overwrites(Bad):
    """Works in place on what it was given."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return Step(self.sure(output) > self.threshold, output.scores.softmax(dim=-1), state)

    def sure(self, output: ExitOutput) -> Tensor:
        output.scores.sub_(output.scores.amax(dim=-1, keepdim=True))
        return super().sure(output)


class Melts(Bad):
    """Its options can be changed."""

    model_config: ClassVar[Any] = {**Policy.model_config, "frozen": False}


class Spreads(Bad):
    """A broken row breaks its neighbours."""

    def start(self, rows: Rows) -> State:
        return {"worst": torch.zeros(len(rows.ids))}

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        finite = torch.isfinite(output.scores).all()
        return Step((self.sure(output) > self.threshold) & finite, output.scores, state)


class Shapeless(Bad):
    """Says once for the whole batch who leaves."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return Step(torch.tensor(True), output.scores, state)


class Global(Bad):
    """Its state has no row."""

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        return Step(self.sure(output) > self.threshold, output.scores, {"seen": torch.zeros(())})


class Backwards(EvidencePolicy):
    """A stricter bar leaves earlier, since evidence depends on the bar."""

    name = "bad"
    threshold: float = 0.5

    @property
    def bar(self) -> float:
        return self.threshold

    def with_bar(self, bar: float) -> Backwards:
        return Backwards(threshold=bar)

    def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
        sure = output.scores.softmax(dim=-1).amax(dim=-1)
        return sure + 3 * (self.threshold - 0.5), state


class Forgets(MaxProbability):
    """`with_bar` loses what `bar` said."""

    name = "bad"

    def with_bar(self, bar: float) -> Forgets:
        return Forgets(threshold=0.5)


WHOLE_BATCH = (BatchMean, SharedPatience, TopShare, FirstRows, NormalisedAnswers)
FAULTS = {
    **dict.fromkeys(WHOLE_BATCH, "neighbours or its place"),
    Counts: "keeps state on itself",
    Draws: "differently the second time",
    Overwrites: "writes to the tensors it is given",
    Melts: "lets its option 'threshold' be changed",
    Spreads: "a broken row harms another",
    Shapeless: "for each row whether it leaves",
    Global: "the row as its first axis",
    Backwards: "at the stricter bar",
    Forgets: "with_bar",
}


@pytest.mark.parametrize("kind", FAULTS, ids=lambda kind: kind.__name__)
def test_a_policy_that_breaks_a_rule_is_found_and_told_which(kind: type[Policy]) -> None:
    POLICIES._items["bad"] = kind
    with pytest.raises(AssertionError, match=FAULTS[kind]):
        check_policy(kind(), SINGLE)


def test_a_rule_abiding_policy_of_a_third_party_passes_once_it_is_registered() -> None:
    with pytest.raises(AssertionError, match=r"does not come back from JSON: Unknown policy"):
        check_policy(Bad(), SINGLE)
    POLICIES.register("bad", Bad)
    check_policy(Bad(), SINGLE)


def test_a_policy_for_another_task_is_told_so() -> None:
    with pytest.raises(AssertionError, match="refuses regression"):
        check_policy(MaxProbability(), "regression")


@pytest.mark.parametrize("kind", [*WHOLE_BATCH, Draws], ids=lambda kind: kind.__name__)
def test_an_engine_under_a_policy_that_looks_at_the_batch_fails(kind: type[Policy]) -> None:
    with pytest.raises(AssertionError, match=r"layers|scores differ"):
        check_engine(TorchEngine, tiny_model(), policies=[kind()], rows=24)


# --- engines that must fail ---------------------------------------------------------------


class _Wrapped:
    """The torch engine, with its answers spoilt."""

    name = "spoilt"

    def __init__(self, model: Exitable) -> None:
        self.model = model
        self.inner: Engine = TorchEngine(model)

    def run(self, batch: Any, policy: Policy, *how: Any) -> Answers:
        answers = self.inner.run(batch, policy, *how)
        return Answers(*self.spoil(answers), answers.forced)

    def spoil(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        raise NotImplementedError


class Shuffles(_Wrapped):
    """Gives rows back in the order in which they left."""

    def spoil(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        order = answers.exit_layers.argsort(stable=True)
        return answers.scores[order], answers.exit_layers[order], answers.bad[order]


class Endless(_Wrapped):
    """Heeds no budget."""

    def run(self, batch: Any, policy: Policy, rows: Any = None, budget: Any = None) -> Answers:
        return self.inner.run(batch, policy, rows)


class Late(_Wrapped):
    """Counts exits from the wrong end."""

    def spoil(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        late = (answers.exit_layers + 1).clamp(max=self.model.depth)
        return answers.scores, late, answers.bad


class Imprecise(_Wrapped):
    """Answers are off by more than rounding explains."""

    def spoil(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        return answers.scores + 1e-3, answers.exit_layers, answers.bad


class Silent(_Wrapped):
    """Does not say which rows are broken."""

    def spoil(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        return answers.scores, answers.exit_layers, torch.zeros_like(answers.bad)


class Shares(_Wrapped):
    """Keeps the last call's policy on itself, where another thread's call overwrites it."""

    def run(self, batch: Any, policy: Policy, *how: Any) -> Answers:
        self.policy = policy
        time.sleep(0.02)
        return self.inner.run(batch, self.policy, *how)


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (Shuffles, "other layers"),
        (Late, "other layers"),
        (Imprecise, "scores differ"),
        (Silent, "marks rows"),
        (Shares, "other threads"),
        (Endless, "depth budget"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_broken_engine_is_found(engine: Any, said: str) -> None:
    chosen = [Patience(patience=1), MaxProbability(threshold=0.8), Patience(patience=4)]
    with pytest.raises(AssertionError, match=said):
        check_engine(engine, tiny_model(), policies=chosen, rows=24)


def test_shuffled_rows_are_found_on_the_echo_model() -> None:
    with pytest.raises(AssertionError, match="each other's answers"):
        check_bookkeeping(Shuffles)


# --- methods that must fail ---------------------------------------------------------------


class _LastOnly(Objective):
    def losses(self, outputs: Any, batch: Any, stage: Any) -> dict[str, Tensor]:
        return {"loss": outputs[-1].scores.square().mean()}


class _Infinite(Objective):
    def losses(self, outputs: Any, batch: Any, stage: Any) -> dict[str, Tensor]:
        return {"loss": sum(o.scores.sum() for o in outputs) / torch.zeros(())}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"objective": _LastOnly}, "no stage trains"),
        ({"objective": _Infinite}, "the loss of stage 'joint' is"),
        ({"policy": "energy"}, "its policy 'energy' is not for this task"),
        ({"problem_types": ()}, "declares no problem type"),
        ({"name": "nameless"}, "is not registered"),
    ],
)
def test_a_method_that_does_not_work_is_found(changes: dict[str, Any], said: str) -> None:
    options: dict[str, Any] = {
        "name": "mine",
        "paper": "a paper",
        "exits": ExitSpec(pooling="mean"),
        "objective": DepthWeighted,
        "policy": "patience",
    }
    method = Method(**options)
    METHODS.register("mine", method)
    check_method(method)
    broken = Method(**{**options, **changes})
    METHODS._items["mine"] = broken
    with pytest.raises(AssertionError, match=said):
        check_method(broken)


def test_tiny_batches_are_as_long_as_they_say() -> None:
    batch = tiny_batch(7, tokens=11)
    assert batch["input_ids"].shape == (7, 11)
    assert batch["attention_mask"].sum(dim=1).max() == 11
    assert ((batch["input_ids"] == 0) == (batch["attention_mask"] == 0)).all()
    assert "attention_mask" not in tiny_batch(2, padded=False)
