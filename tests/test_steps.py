"""Claims about steps: what the caches hold, the same answers, and none where they do not pay."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp.engines import TorchEngine, plan_batches
from offramp.engines.steps import (
    STEP_VALUES,
    in_steps,
    join_answers,
    most_padding,
    rows_a_step,
    widest,
)
from offramp.policies import MaxProbability, Rows
from offramp.prediction import Predictor
from offramp.testing import Scripted, save_tiny, tiny_batch, tiny_model

shapes = st.tuples(st.integers(1, 300), st.integers(1, 600))


def tokens(rows: int, length: int, device: str = "cpu") -> dict[str, torch.Tensor]:
    return {"input_ids": torch.zeros(rows, length, dtype=torch.long, device=device)}


@given(shapes, st.integers(1, 4096), st.integers(1, 8))
def test_a_step_holds_what_the_caches_do_and_no_step_is_needless(
    shape: tuple[int, int], width: int, threads: int
) -> None:
    size, row = rows_a_step(tokens(*shape), width, threads), shape[1] * width
    most = threads * STEP_VALUES
    steps = -(-shape[0] // size)
    assert (size - 1) * row < most
    assert (steps - 1) * most < shape[0] * row


def test_batches_stay_whole_on_a_gpu_and_those_of_images_everywhere() -> None:
    assert rows_a_step(tokens(512, 512, "meta"), 3072, 1) == 512
    assert rows_a_step({"pixel_values": torch.zeros(64, 3, 8, 8)}, 10**6, 1) == 64


def test_what_all_rows_share_is_not_cut() -> None:
    shared = {"position_ids": torch.arange(512)[None]}
    assert rows_a_step(tokens(512, 512) | shared, 3072, 1) == 512


def test_widths_of_real_models_are_those_of_the_feed_forward_part() -> None:
    model = tiny_model()
    config: Any = model.stock.config
    assert widest(model.backbone.layers) == config.intermediate_size
    assert widest([]) == 0


@given(st.integers(1, 40), st.integers(1, 40))
def test_ids_and_lengths_go_with_their_rows(count: int, size: int) -> None:
    rows = Rows(torch.arange(count) + 7, torch.arange(count) + 1)
    seen: list[list[int]] = []

    def run(batch: Any, mine: Rows) -> list[int]:
        assert torch.equal(batch["input_ids"][:, 0], mine.ids)
        seen.append((mine.ids - mine.lengths).tolist())
        return list(mine.ids.tolist())

    batch = {"input_ids": rows.ids[:, None].expand(count, 3)}
    found = in_steps(batch, rows, size, run, lambda parts: [row for part in parts for row in part])
    assert found == rows.ids.tolist()
    assert all(len(part) <= size and set(part) == {6} for part in seen)


@pytest.mark.parametrize("scripted", [True, False])
def test_a_batch_in_steps_is_answered_as_it_is_whole(scripted: bool) -> None:
    model = tiny_model()
    batch = tiny_batch(12)
    confident = MaxProbability(threshold=0.6)
    layers = tuple(1 + n % model.depth for n in range(12))
    policy: Any = Scripted(layers=layers, inner=confident) if scripted else confident
    whole, cut = TorchEngine(model), TorchEngine(model)
    whole.widest, cut.widest = 0, STEP_VALUES // (2 * batch["input_ids"].shape[1])
    assert rows_a_step(batch, cut.widest, torch.get_num_threads()) < 12
    ours, theirs = cut.run(batch, policy), whole.run(batch, policy)
    torch.testing.assert_close(ours.scores, theirs.scores)
    assert torch.equal(ours.exit_layers, theirs.exit_layers)
    assert torch.equal(ours.bad, theirs.bad)
    for mine, other in zip(cut.all_exits(batch), whole.all_exits(batch), strict=True):
        torch.testing.assert_close(mine.scores, other.scores)


def test_answers_of_one_part_are_what_they_were() -> None:
    model = tiny_model()
    answers = TorchEngine(model).run(tiny_batch(3), MaxProbability(threshold=0.6))
    assert torch.equal(join_answers([answers]).scores, answers.scores)


@given(st.lists(st.integers(1, 600), max_size=100), st.integers(0, 300))
def test_a_batch_has_no_more_padding_than_asked_for(lengths: list[int], most: int) -> None:
    batches = plan_batches(lengths, max_padding=most)
    assert sorted(row for batch in batches for row in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[row] for row in batch)
        assert sum(longest - lengths[row] for row in batch) <= most


def test_threads_of_onnx_do_not_spin_while_they_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from offramp.engines.onnx_engine import _Session

    given: list[Any] = []

    class Silent:
        def __init__(self, file: bytes, options: Any, **others: Any) -> None:
            given.append(options)

        def get_inputs(self) -> list[Any]:
            return []

        get_outputs = get_inputs

    monkeypatch.setattr(onnxruntime, "InferenceSession", Silent)
    _Session(b"", 3)
    assert given[0].get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (given[0].intra_op_num_threads, given[0].inter_op_num_threads) == (3, 1)


def test_a_predictor_makes_no_batch_whose_padding_would_pay_for_another(tmp_path: Path) -> None:
    predictor = Predictor.load(save_tiny(tmp_path / "model"), "full", device="cpu")
    texts = ["short"] * 20 + ["one two three four " * 12] * 3
    seen: list[int] = []
    whole = Predictor(predictor.model, predictor.processor, "full")
    whole.engine.widest = 0  # type: ignore[attr-defined]
    most = 64 * torch.get_num_threads()
    assert most_padding(whole.engine, whole.model.device) is None
    assert most_padding(predictor.engine, predictor.model.device) == most
    ours, _ = predictor.answer(texts, seen=lambda answers: seen.append(len(answers)))
    theirs, _ = whole.answer(texts)
    assert len(seen) > 1 or most > 20 * 40
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine.scores, other.scores, atol=1e-4)
