"""Claims about bars of each exit: where there is none, the exit is not looked at."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from engine_support import TableModel, numbered, run_table, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.calibration.everything import per_exit_path
from offramp.calibration.judge import Judge
from offramp.engines import Budget, TorchEngine, make_engine
from offramp.engines.graphs import Graphs, rule_of
from offramp.exits import ExitOutput
from offramp.policies import (
    POLICIES,
    Averaged,
    EvidencePolicy,
    Fixed,
    Full,
    MaxProbability,
    Patience,
    PerExit,
    State,
    bars_of,
)
from offramp.report.figures import curves_of
from offramp.table import ExitTable, replay, sweep
from offramp.testing import (
    PROBLEM_TYPES,
    check_policy,
    echo_batch,
    random_outputs,
    tiny_batch_for,
    tiny_model,
)
from offramp.testing.strategies import score_tables

SINGLE = PROBLEM_TYPES[0]
LAST = (None, None, 0.99)
INNER: list[EvidencePolicy] = [
    one
    for name in POLICIES
    if name not in ("per_exit", Fixed.name, Full.name)
    for one in POLICIES[name].variants(SINGLE, 4)
    if isinstance(one, EvidencePolicy) and not one.needs
]


class _ReadsAll(PerExit):
    def reads(self, layer: int) -> bool:
        return True


class _Counting(TableModel):
    """Says which exits are asked."""

    def exit_at(self, layer: int) -> Any:
        read = super().exit_at(layer)

        def counted(*given: Any) -> Any:
            self.asked.add(layer)
            return read(*given)

        return counted

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__(table)
        self.asked: set[int] = set()


@given(score_tables(), st.data())
@settings(deadline=None)
def test_answers_do_not_depend_on_exits_without_a_bar(scores: torch.Tensor, data: Any) -> None:
    exits = scores.shape[1] - 1
    inner = data.draw(st.sampled_from(INNER))
    bar = st.none() | st.floats(-1, 1.1) | st.integers(0, 3).map(lambda count: count - 0.5)
    options = {"policy": inner, "bars": data.draw(st.lists(bar, min_size=exits, max_size=exits))}
    few, every = PerExit.model_validate(options), _ReadsAll.model_validate(options)
    assert same(run_table(scores, few), run_table(scores, every))


@pytest.mark.parametrize(
    ("policy", "asked"),
    [
        (PerExit(policy=MaxProbability(), bars=LAST), {3, 4}),
        (PerExit(policy=MaxProbability(), bars=(0.99, None, None)), {1, 4}),
        (PerExit(policy=MaxProbability(), bars=(None,)), {4}),
        (PerExit(policy=Patience(), bars=(None, None, 5.5)), {1, 2, 3, 4}),
        (PerExit(policy=Averaged(policy=MaxProbability()), bars=LAST), {1, 2, 3, 4}),
    ],
    ids=str,
)
def test_an_exit_without_a_bar_is_evaluated_only_for_what_is_remembered(
    policy: PerExit, asked: set[int]
) -> None:
    model = _Counting(torch.zeros(6, 4, 3))
    TorchEngine(model).run(echo_batch(range(6)), policy, numbered(list(range(6))))
    assert model.asked == asked
    model.asked.clear()
    rows = [(number, echo_batch([number])) for number in range(6)]
    assert len(list(TorchEngine(model).stream(rows, policy))) == 6
    assert model.asked == asked


@pytest.mark.parametrize("policy", INNER, ids=str)
def test_bars_of_each_exit_keep_what_every_policy_must(policy: EvidencePolicy) -> None:
    check_policy(PerExit(policy=policy, bars=(policy.bar,) * 5 + (None,) * 6), SINGLE)


def test_a_policy_that_hides_its_memory_is_found_out() -> None:
    class Hides(Patience):
        remembers = False

    with pytest.raises(AssertionError, match="remembers nothing, but earlier exits count"):
        check_policy(Hides(), SINGLE)


def test_bars_inside_an_average_are_no_others_than_those_of_the_policy() -> None:
    inside = Averaged(policy=PerExit(policy=MaxProbability(), bars=(0.5, None)))
    assert bars_of(inside, 3) == [None] * 3
    assert rule_of(inside, 3) != rule_of(Averaged(policy=PerExit(bars=(0.6, None))), 3)


class Falling(MaxProbability):
    """Asks less of later exits."""

    def bar_at(self, layer: int) -> float:
        return self.threshold - 0.05 * layer


def some_table(rows: int) -> ExitTable:
    scores = [output.scores for output in random_outputs(SINGLE, rows=rows)]
    return ExitTable.from_arrays(torch.stack(scores, 1).numpy(), problem_type=SINGLE)


def test_a_policy_with_bars_of_its_own_is_searched_as_it_is() -> None:
    table = some_table(rows=200)
    bars = [0.5, 0.7, 0.9]
    for bar, exits in zip(bars, sweep(table, Falling(), bars), strict=True):
        assert exits.tolist() == replay(table, Falling(threshold=bar)).exit_layers.tolist()
    (found,) = Judge(table).search(Falling(threshold=0.7))
    replayed = replay(table, Falling(threshold=0.7))
    assert found.exit_histogram == replayed.histogram


def test_a_sweep_of_an_average_is_its_replay_whatever_the_policy_inside_reads() -> None:
    table, policy = some_table(rows=20), Averaged(policy=Fixed(layer=4))
    bars = [0.5, 1.5, 2.5, 3.5]
    for layer, exits in enumerate(sweep(table, policy, bars), start=1):
        assert exits.tolist() == replay(table, policy.with_bar(layer - 0.5)).exit_layers.tolist()
        assert set(exits.tolist()) == {layer}


def test_an_exit_that_the_policy_inside_does_not_read_has_no_bar() -> None:
    class Late(MaxProbability):
        def reads(self, layer: int) -> bool:
            return layer >= 3

    scores = torch.tensor([8.0, 0.0, 0.0]).expand(6, 4, 3)
    assert run_table(scores, PerExit(policy=Late(), bars=(0.5,))).exit_layers.tolist() == [3] * 6


def test_who_writes_evidence_anew_remembers_unless_he_says_not() -> None:
    class Twice(MaxProbability):
        def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
            found, _ = super().evidence(state, layer, output)
            return torch.minimum(found, state.get("sure", found)), {"sure": found}

    class Renamed(MaxProbability):
        threshold: float = 0.7

    assert Twice.remembers
    assert not Renamed.remembers


def test_a_memory_in_answers_is_found_out() -> None:
    class Sums(MaxProbability):
        remembers = False

        def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
            found, _ = super().evidence(state, layer, output)
            return found, {"sum": output.scores + state.get("sum", 0)}

        def answer(self, state: State, output: ExitOutput) -> Tensor:
            return state["sum"]

    with pytest.raises(AssertionError, match="remembers nothing, but earlier exits count"):
        check_policy(Sums(), SINGLE)


def test_evidence_that_depends_on_the_bar_is_found_out() -> None:
    class Leans(MaxProbability):
        def evidence(self, state: State, layer: int, output: ExitOutput) -> tuple[Tensor, State]:
            found, state = super().evidence(state, layer, output)
            return found - 0.5 * (1 - self.threshold), state

    with pytest.raises(AssertionError, match="elsewhere than its evidence says"):
        check_policy(Leans(), SINGLE)


def test_a_picture_has_one_curve_for_all_bars_of_exits() -> None:
    found = list(per_exit_path(Judge(some_table(rows=200)), MaxProbability()))
    assert len(found) > 10
    assert len(curves_of(found)) == 1


# files


def test_what_no_input_changes_makes_files_of_their_own() -> None:
    for one, other in (
        (Falling(threshold=0.5), Falling(threshold=0.9)),
        (Fixed(layer=1), Fixed(layer=2)),
    ):
        assert rule_of(Averaged(policy=one), 4) != rule_of(Averaged(policy=other), 4)


def _file_for(policy: PerExit) -> Any:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    return Graphs(tiny_model("bert", layers=4), progress=False).early_exit(policy).graph


def test_a_file_holds_no_exit_without_a_bar() -> None:
    weights = _file_for(PerExit(policy=MaxProbability(), bars=LAST)).initializer
    exits = {weight.name.split(".")[0] for weight in weights if ".exits." in weight.name}
    assert exits == {"layer3"}  # the last is the model's own


def test_bars_are_an_input_of_the_file_and_one_bar_is_none() -> None:
    inputs = {value.name for value in _file_for(PerExit(bars=(0.5, 0.6, 0.7))).input}
    assert "bars" in inputs
    assert "bar" not in inputs


def test_files_are_shared_by_all_bars_at_the_same_exits() -> None:
    def rule(*bars: float | None) -> str:
        return rule_of(PerExit(policy=MaxProbability(threshold=0.5), bars=bars), 4)

    assert rule(0.5, None, 0.7) == rule(0.1, None, 0.2)
    assert rule(0.5, 0.5, 0.5) == rule(0.6)
    assert rule(0.5, None, 0.7) != rule(0.5, 0.6, 0.7)


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_compiled_engines_leave_at_the_bar_of_each_exit(backend: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = tiny_model("bert", layers=4)
    engine, torch_engine = make_engine(model, backend, progress=False), TorchEngine(model)
    batch = tiny_batch_for(model.stock, 12, seed=4)
    sure = [output.scores.softmax(-1).amax(-1) for output in torch_engine.all_exits(batch)]
    a, b, c = (middle(one) for one in sure[:3])
    seen: set[int] = set()
    for bars in ((a, b, c), (None, b, c), (a, None, c), (None, None, c), (a,)):
        policy = PerExit(policy=MaxProbability(), bars=bars)
        for budget in (Budget(), Budget(depth=2)):
            ours = engine.run(batch, policy, budget=budget)
            theirs = torch_engine.run(batch, policy, budget=budget)
            assert torch.equal(ours.exit_layers, theirs.exit_layers), (bars, budget)
            seen |= set(ours.exit_layers.tolist())
    assert seen == {1, 2, 3, 4}


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_compiled_engines_average_up_to_the_layer_that_is_fixed(backend: str) -> None:
    pytest.importorskip({"onnx": "onnxruntime"}.get(backend, backend))
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model = tiny_model("bert", layers=4)
    engine, batch = make_engine(model, backend, progress=False), tiny_batch_for(model.stock, 3)
    for layer in (3, 2, 1):
        ours = engine.run(batch, Averaged(policy=Fixed(layer=layer)))
        assert ours.exit_layers.tolist() == [layer] * 3


def middle(evidence: torch.Tensor) -> float:
    """A bar that half of the rows pass, and none is near."""
    ordered = evidence.sort().values
    return float(ordered[5] + ordered[6]) / 2
