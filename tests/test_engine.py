"""The torch engine: whatever leaves where, every row gets its own answer and nothing else."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from engine_support import outputs_of, run_table, same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp.backbones import Batch
from offramp.engines import TorchEngine, rows_of
from offramp.errors import ConfigError
from offramp.exits import ExitOutput
from offramp.model import MultiExitModel
from offramp.policies import (
    Entropy,
    Fixed,
    Full,
    Margin,
    MaxProbability,
    Patience,
    Policy,
    Rows,
    State,
    Step,
    bars_of,
)
from offramp.testing import (
    EchoModel,
    Scripted,
    check_bookkeeping,
    echo_batch,
    random_outputs,
    spread_policies,
    tiny_batch,
    tiny_model,
    walk,
)
from offramp.testing.strategies import batches, policies, problem_types, score_tables


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Tiny models are fastest on one thread, and threads of ours do not wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# --- replay equals live -------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(data=st.data(), problem_type=problem_types())
def test_live_is_what_replay_says_for_every_policy_on_any_table(
    data: st.DataObject, problem_type: str
) -> None:
    table = data.draw(score_tables(problem_type))
    policy = data.draw(policies(problem_type, depth=table.shape[1]))
    rows = Rows(torch.arange(len(table)), torch.ones(len(table), dtype=torch.long))
    assert same(run_table(table, policy), walk(policy, outputs_of(table), rows))


@settings(max_examples=200, deadline=None)
@given(data=st.data(), problem_type=problem_types())
def test_a_row_leaves_alone_as_in_any_company_and_order(
    data: st.DataObject, problem_type: str
) -> None:
    table = data.draw(score_tables(problem_type))
    policy = data.draw(policies(problem_type, depth=table.shape[1]))
    whole = run_table(table, policy)
    company = data.draw(st.lists(st.integers(0, len(table) - 1), min_size=1, max_size=20))
    part = run_table(table, policy, company)
    assert part.exit_layers.tolist() == whole.exit_layers[company].tolist()
    assert torch.equal(part.scores, whole.scores[company])


@settings(max_examples=25, deadline=None)
@given(batch=batches(), data=st.data())
def test_a_row_of_a_real_model_gets_its_own_answer_in_any_batch(
    model: MultiExitModel, batch: Batch, data: st.DataObject
) -> None:
    policy = data.draw(policies(depth=model.depth))
    whole = TorchEngine(model).run(batch, policy)
    row = data.draw(st.integers(0, len(whole.bad) - 1))
    length = int(batch["attention_mask"][row].sum()) if "attention_mask" in batch else None
    alone = TorchEngine(model).run(
        {"input_ids": batch["input_ids"][row : row + 1, :length]}, policy
    )
    if int(alone.exit_layers) != int(whole.exit_layers[row]):
        assert _near_the_bar(model, policy, batch, row)
        return
    assert torch.allclose(alone.scores[0], whole.scores[row], atol=1e-4)


class Late(MaxProbability):
    """Its evidence and its bar do not say all."""

    name = "late"

    def step(self, state: State, layer: int, output: ExitOutput) -> Step:
        said = super().step(state, layer, output)
        return said._replace(leave=said.leave & (layer >= 3))


def test_a_policy_with_a_step_of_its_own_is_asked_by_it(model: MultiExitModel) -> None:
    batch, late = tiny_batch(6), Late(threshold=0.0)
    engine = TorchEngine(model)
    assert engine.run(batch, late).exit_layers.tolist() == [3] * 6
    rows = [(n, {name: leaf[n : n + 1] for name, leaf in batch.items()}) for n in range(6)]
    assert {answer.exit_layer for _, answer in engine.stream(rows, late)} == {3}
    assert bars_of(late, 4) == [None] * 4


def _near_the_bar(model: MultiExitModel, policy: Policy, batch: Batch, row: int) -> bool:
    """Whether a nudge of 1e-5 moves the row's exit."""
    with torch.inference_mode():
        outputs = [ExitOutput(one.scores[row : row + 1]) for one in model.all_exits(batch)]
    rows = Rows(torch.tensor([row]), torch.tensor([1]))
    exits = set()
    for seed in range(64):
        draw = torch.Generator().manual_seed(seed)
        nudged = [
            ExitOutput(one.scores + 1e-5 * torch.randn(one.scores.shape, generator=draw))
            for one in outputs
        ]
        exits.add(int(walk(policy, nudged, rows).exit_layers))
    return len(exits) > 1


@pytest.fixture(scope="module")
def model() -> MultiExitModel:
    return tiny_model()


def test_needle_the_same_text_in_many_crowds_gets_the_same_answer(model: MultiExitModel) -> None:
    engine = TorchEngine(model)
    draw = random.Random(0)
    texts = [tiny_batch(1, draw.randint(2, 64), seed, padded=False) for seed in range(400)]
    needles = range(20)
    policy = MaxProbability(threshold=0.8)
    alone = {needle: engine.run(texts[needle], policy) for needle in needles}
    for _ in range(100):
        needle = draw.choice(needles)
        crowd = draw.sample(range(20, 400), draw.randint(1, 40))
        slot = draw.randint(0, len(crowd))
        batch = _pad([texts[n] for n in [*crowd[:slot], needle, *crowd[slot:]]])
        answers = engine.run(batch, policy)
        assert int(answers.exit_layers[slot]) == int(alone[needle].exit_layers)
        assert torch.allclose(answers.scores[slot], alone[needle].scores[0], atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_equal_shape_not_one_bit_depends_on_the_neighbours_or_the_slot(
    dtype: torch.dtype,
) -> None:
    engine = TorchEngine(tiny_model().to(dtype))
    needle = tiny_batch(1, 11, seed=1, padded=False)
    seen = set()
    for seed in range(20):
        crowd = [tiny_batch(1, 3 + (seed * n) % 22, 100 * seed + n, False) for n in range(14)]
        longest = tiny_batch(1, 24, seed=2, padded=False)
        slot = seed % 14
        answers = engine.run(_pad([*crowd[:slot], needle, *crowd[slot:], longest]), Full())
        seen.add(tuple(answers.scores[slot].tolist()))
    assert len(seen) == 1


def _pad(texts: list[Batch]) -> Batch:
    longest = max(text["input_ids"].shape[1] for text in texts)
    ids = torch.zeros(len(texts), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        length = text["input_ids"].shape[1]
        ids[row, :length], mask[row, :length] = text["input_ids"][0], 1
    return {"input_ids": ids, "attention_mask": mask}


# --- bookkeeping (R12) --------------------------------------------------------------------


def test_ten_thousand_exit_patterns_and_no_row_gets_anothers_answer() -> None:
    check_bookkeeping(TorchEngine, patterns=10_000)


def test_eight_threads_with_a_thousand_requests_each_mix_nothing_up() -> None:
    engine = TorchEngine(EchoModel(depth=4))
    script = Scripted(layers=tuple(1 + n % 4 for n in range(8192)), inner=Patience(patience=1))

    def client(number: int) -> int:
        for request in range(1000):
            ids = [1000 * number + request, (request * 7 + number) % 8192]
            rows = Rows(torch.tensor(ids), torch.ones(2, dtype=torch.long))
            answers = engine.run(echo_batch(ids), script, rows)
            if answers.scores[:, 0].tolist() != ids:
                return request
            if answers.exit_layers.tolist() != [1 + n % 4 for n in ids]:
                return request
        return 1000

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(client, range(8))) == [1000] * 8


def test_eight_policies_in_eight_threads_answer_as_one_after_another(
    model: MultiExitModel,
) -> None:
    engine, batch = TorchEngine(model), tiny_batch(6, seed=4)
    jobs: list[Policy] = [
        Fixed(layer=2),
        Full(),
        Patience(patience=1),
        Patience(patience=3),
        MaxProbability(threshold=0.6),
        MaxProbability(threshold=0.95),
        Entropy(threshold=0.5),
        Margin(threshold=0.3),
    ]
    serial = [engine.run(batch, policy) for policy in jobs]

    def client(number: int) -> bool:
        return all(same(engine.run(batch, jobs[number]), serial[number]) for _ in range(125))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(client, range(8)))


# --- what is not needed is not run --------------------------------------------------------


class _Counting(EchoModel):
    """Notes how many rows each layer and each exit saw."""

    def __init__(self) -> None:
        super().__init__(depth=5)
        self.layers: list[int] = []
        self.reads: list[int] = []
        layer = self.backbone.layer

        def counted(number: int, flow: Any) -> Any:
            self.layers.append(len(flow.hidden))
            return layer(number, flow)

        self.backbone.layer = counted  # type: ignore[method-assign]

    def exit_at(self, layer: int) -> Callable[..., tuple[ExitOutput, Any]]:
        def read(hidden: Tensor, mask: Tensor | None, carry: Any = None) -> tuple[ExitOutput, Any]:
            self.reads.append(len(hidden))
            return self._echo(hidden, mask, carry)

        return read


def test_layers_run_only_for_rows_that_need_them() -> None:
    model = _Counting()
    script = Scripted(layers=(1, 4, 2, 4), inner=Patience())
    answers = TorchEngine(model).run(echo_batch([0, 1, 2, 3]), script)
    assert model.layers == model.reads == [4, 3, 2, 2]
    assert answers.exit_layers.tolist() == [1, 4, 2, 4]


def test_an_exit_that_the_policy_does_not_read_is_not_evaluated() -> None:
    for policy, layers, reads in ((Fixed(layer=3), 3, 1), (Full(), 5, 1)):
        model = _Counting()
        answers = TorchEngine(model).run(echo_batch([0, 1]), policy)
        assert (len(model.layers), len(model.reads)) == (layers, reads)
        assert answers.exit_layers.tolist() == [layers, layers]


def test_every_layer_is_used_and_answers_are_those_of_the_exit_that_answered(
    model: MultiExitModel,
) -> None:
    batch = tiny_batch(200, tokens=24, seed=3)
    answers = TorchEngine(model).run(batch, MaxProbability(threshold=0.85))
    assert set(answers.exit_layers.tolist()) == set(range(1, 7))
    with torch.inference_mode():
        table = torch.stack([output.scores for output in model.all_exits(batch)])
    own = table[answers.exit_layers - 1, torch.arange(200)]
    assert torch.allclose(answers.scores, own, atol=1e-5)
    assert answers.scores.dtype == torch.float32
    assert not answers.bad.any()


def test_rows_are_numbered_by_their_place_unless_told_otherwise() -> None:
    rows = rows_of(tiny_batch(4, tokens=9))
    assert rows.ids.tolist() == [0, 1, 2, 3]
    assert int(rows.lengths.max()) == 9
    assert rows_of(tiny_batch(2, tokens=9, padded=False)).lengths.tolist() == [9, 9]


def test_decisions_are_made_in_full_precision_whatever_the_model_computes_in(
    model: MultiExitModel,
) -> None:
    half = tiny_model().to(torch.bfloat16)
    batch = tiny_batch(64, seed=3)
    answers = TorchEngine(half).run(batch, MaxProbability(threshold=0.8))
    assert answers.scores.dtype == torch.float32
    full = TorchEngine(model).run(batch, MaxProbability(threshold=0.8))
    assert (answers.exit_layers == full.exit_layers).float().mean() > 0.8


# --- broken and extreme scores (R7) -------------------------------------------------------

CONFIDENCE = (MaxProbability(), Margin(), Entropy())
ANY = (*CONFIDENCE, Patience(patience=1))


@pytest.mark.parametrize("policy", ANY, ids=lambda policy: policy.name)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_broken_score_at_any_exit_and_row_is_flagged_and_harms_nobody(
    value: float, policy: Policy
) -> None:
    table = torch.stack([one.scores for one in random_outputs("single_label_classification", 8, 6)])
    table = table.transpose(0, 1).contiguous()
    clean = run_table(table, policy)
    for layer in range(6):
        for row in range(8):
            harmed = table.clone()
            harmed[row, layer, 1] = value
            answers = run_table(harmed, policy)
            reached = int(clean.exit_layers[row]) >= layer + 1
            assert bool(answers.bad[row]) == reached
            if reached:
                assert int(answers.exit_layers[row]) == layer + 1
            others = torch.arange(8) != row
            assert torch.equal(answers.scores[others], clean.scores[others])
            assert torch.equal(answers.exit_layers[others], clean.exit_layers[others])
            assert not answers.bad[others].any()


@pytest.mark.parametrize("policy", ANY, ids=lambda policy: policy.name)
@pytest.mark.parametrize("value", [0.0, 1e38, -1e38, 3e-45])
def test_an_extreme_but_finite_score_is_a_score(value: float, policy: Policy) -> None:
    table = torch.randn(8, 6, 3)
    table[3] = value
    answers = run_table(table, policy)
    assert not answers.bad.any()
    assert torch.isfinite(answers.scores).all()


@pytest.mark.parametrize("multi_label", [False, True])
@pytest.mark.parametrize("kind", [MaxProbability, Margin, Entropy])
def test_saturated_scores_leave_at_the_first_exit(
    kind: type[MaxProbability], multi_label: bool
) -> None:
    table = torch.full((4, 5, 3), -1000.0)
    table[torch.arange(4), :, torch.tensor([0, 1, 2, 1])] = 1000.0
    answers = run_table(table, kind(multi_label=multi_label))
    assert answers.exit_layers.tolist() == [1] * 4
    assert not answers.bad.any()


def test_a_broken_hidden_state_is_found_at_the_next_exit(model: MultiExitModel) -> None:
    batch = tiny_batch(8, seed=6)
    script = Scripted(layers=(6, 6, 3, 6, 6, 6, 6, 6), inner=Patience())
    clean = TorchEngine(model).run(batch, script)
    layer = model.stock.bert.encoder.layer[2]

    def poison(module: Any, args: Any, hidden: Tensor) -> Tensor:
        hidden = hidden.clone()
        hidden[2] = math.nan
        return hidden

    handle = layer.register_forward_hook(poison)
    try:
        answers = TorchEngine(model).run(batch, script)
    finally:
        handle.remove()
    assert answers.bad.tolist() == [row == 2 for row in range(8)]
    others = torch.arange(8) != 2
    assert torch.equal(answers.scores[others], clean.scores[others])


# --- the scripted policy ------------------------------------------------------------------


def test_a_script_overrides_only_the_decision() -> None:
    table = torch.randn(6, 5, 3)
    for inner in spread_policies("single_label_classification", outputs_of(table)):
        if inner.name == "averaged":
            continue  # its answer is not that of the exit a row left at
        script = Scripted(layers=(1, 5, 2, 3, 4, 9), inner=inner)
        answers = run_table(table, script)
        assert answers.exit_layers.tolist() == [1, 5, 2, 3, 4, 5]
        assert torch.equal(answers.scores, table[torch.arange(6), answers.exit_layers - 1])


def test_a_script_goes_by_the_id_of_a_row_not_by_its_place() -> None:
    script = Scripted(layers=(1, 2, 3, 4), inner=Entropy())
    answers = run_table(torch.randn(4, 4, 2), script, ids=[3, 0, 2])
    assert answers.exit_layers.tolist() == [4, 1, 3]


def test_the_echo_model_notices_when_rows_are_mixed_up() -> None:
    model = EchoModel()
    flow = model.backbone.embed(echo_batch([4, 5, 6]))
    part = model.backbone.take(flow, torch.tensor([2, 0]))
    mixed = type(part)(part.hidden.flip(0), part.mask, part.inputs, part.constants)
    with pytest.raises(AssertionError, match="mixed up"):
        model.backbone.layer(1, mixed)
    _, carry = model.exit_at(1)(flow.hidden, None, None)
    with pytest.raises(AssertionError, match="other rows"):
        model.exit_at(2)(flow.hidden.flip(0), None, carry)


def test_a_batch_without_rows_is_refused() -> None:
    nothing = {"input_ids": torch.zeros(0, 4, dtype=torch.long)}
    with pytest.raises(ConfigError, match="no rows"):
        TorchEngine(tiny_model()).run(nothing, Full())
