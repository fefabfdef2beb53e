"""Claims about benchmarks/speed.py: answers come from intervals, and finished cells are kept."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from speed_layers import Idle, stages_of
from speed_page import ORDER, write_page
from speed_stages import ProfiledOnnx, ProfiledTorch, purpose, stages
from speed_study import (
    Cell,
    Cells,
    Figure,
    Options,
    Part,
    joined,
    middle,
    neighbours,
    run_part,
    singles,
)
from speed_texts import as_original

from offramp.backbones import Batch
from offramp.engines import TorchEngine
from offramp.model import MultiExitModel
from offramp.policies import Full, Patience
from offramp.storage import read_document
from offramp.testing import tiny_model

pytest_plugins = ("engine_fixtures",)


@pytest.mark.parametrize(
    ("low", "high", "least", "answer"),
    [
        (0.91, 0.99, True, "yes"),
        (0.90, 0.99, True, "yes"),
        (0.85, 0.95, True, "undecided"),
        (0.80, 0.89, True, "no"),
        (0.80, 0.90, False, "yes"),
        (0.85, 0.95, False, "undecided"),
        (0.91, 0.99, False, "no"),
    ],
)
def test_the_interval_alone_says_yes_no_or_undecided(
    low: float, high: float, least: bool, answer: str
) -> None:
    figure = Figure(name="share", value=0.9, low=low, high=high, target=0.9, least=least)
    assert figure.answer == answer


def test_what_nobody_asked_for_has_no_answer() -> None:
    assert Figure.count("rows", 3).answer == ""


@given(st.integers(10, 41), st.randoms(use_true_random=False))
def test_a_few_disturbed_passes_do_not_move_the_interval(passes: int, draw: object) -> None:
    calm = np.linspace(0.99, 1.01, passes)
    disturbed = calm.copy()
    disturbed[-1] = 50.0
    assert middle(disturbed) == middle(calm)


def test_an_interval_of_passes_covers_the_true_middle_nineteen_times_of_twenty() -> None:
    draws = np.random.default_rng(0).normal(size=(4000, 11))
    held = [low <= 0 <= high for _, low, high in map(middle, draws)]
    assert np.mean(held) > 0.95


def test_cells_of_several_processes_are_as_far_apart_as_these_were() -> None:
    def cell(share: float) -> Cell:
        figure = Figure(name="share", value=share, low=share, high=share, target=0.95)
        return Cell(figures=(figure,), facts={"passes": round(100 * share)})

    found = joined([cell(share) for share in (0.96, 0.92, 0.95, 0.94, 0.97, 0.98)])
    (figure,) = found.figures
    assert (figure.value, figure.low, figure.high) == (0.955, 0.92, 0.98)
    assert figure.answer == "undecided"
    assert found.facts == {"passes": 96, "processes": 6}


def test_finished_cells_are_measured_again_only_when_asked_or_with_other_weights(
    tmp_path: Path,
) -> None:
    runs: list[str] = []

    def cell(name: str) -> Cell:
        runs.append(name)
        return Cell(figures=(Figure.of("share", [1.0, 1.1, 1.2], 0.9),))

    cells: Cells = {"sst2, batch 1": lambda: cell("a"), "other": lambda: cell("b")}
    run_part("share", cells, tmp_path, Options(), again=False)
    run_part("share", cells, tmp_path, Options(), again=False)
    assert runs == ["a", "b"]
    run_part("share", cells, tmp_path, Options(), again=True, only="other")
    assert runs == ["a", "b", "b"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"trained")
    options = Options(folders={"sst2": tmp_path / "model"})
    run_part("share", cells, tmp_path, options, again=False)
    assert runs == ["a", "b", "b", "a"]
    kept = read_document(Part, tmp_path / "share-1.json")
    assert list(kept.cells) == list(cells)


def test_the_page_shows_every_figure_beside_its_target_and_what_is_missing(tmp_path: Path) -> None:
    figures = (Figure.of("realised", [0.7, 0.8, 0.9], 0.95), Figure.count("beside", 7))
    cells: Cells = {"MiniLM-6, batch 1": lambda: Cell(figures=figures, facts={"rows": 32})}
    run_part("share", cells, tmp_path / "speed", Options(), again=False)
    write_page(tmp_path / "speed", tmp_path / "speed.md")
    page = (tmp_path / "speed.md").read_text()
    row = "| MiniLM-6, batch 1 | realised | 0.8 [0.7, 0.9] | ≥ 0.95 | **no** |  |"
    assert row in page
    assert page.count("not measured yet") == len(ORDER) - 1


def test_single_rows_and_batches_are_taken_from_all_lengths() -> None:
    lengths = np.random.default_rng(0).integers(3, 60, 200)
    ones = lengths[[place for [place] in singles(lengths, 20)]]
    assert ones.min() == lengths.min()
    assert ones.max() == lengths.max()
    batches = neighbours(lengths, 8, 3)
    assert [len(batch) for batch in batches] == [8, 8, 8]
    means = [lengths[list(batch)].mean() for batch in batches]
    assert means == sorted(means)


def _batch(rows: int) -> Batch:
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 60, (rows, 9), generator=draw)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": torch.zeros_like(ids),
    }


@torch.inference_mode()
def test_the_loop_as_the_originals_answers_as_our_engine_does() -> None:
    model, batch = tiny_model(), _batch(24)
    ours = TorchEngine(model).run(batch, Patience(patience=2))
    for row in range(24):
        alone = {name: leaf[row : row + 1] for name, leaf in batch.items()}
        layer, label = as_original(model, alone, patience=2)
        assert (layer, label) == (int(ours.exit_layers[row]), int(ours.scores[row].argmax()))


def test_stages_are_the_rows_that_ran_together() -> None:
    model, batch = tiny_model(), _batch(24)
    engine, policy = TorchEngine(model), Patience(patience=1)
    layers = engine.run(batch, policy).exit_layers
    stages = stages_of([range(24)], [lambda: engine.run(batch, policy)])
    calls = sum(count * len(rows) for count, those in stages.items() for rows in those)
    assert calls == int(layers.sum())
    assert sum(count * len(those) for count, those in stages.items()) == int(layers.max())


def test_idle_layers_leave_the_embedding_as_it_is() -> None:
    model, batch = tiny_model(), _batch(4)
    idle = TorchEngine(Idle(model))  # type: ignore[arg-type]
    last = idle.run(batch, Full()).scores
    with torch.inference_mode():
        flow = model.backbone.embed(batch)
        wanted = model.backbone.head(flow.hidden, flow.mask)
    assert torch.equal(last, wanted)


@pytest.mark.parametrize("kind", [ProfiledTorch, ProfiledOnnx])
def test_a_profile_counts_the_layers_that_ran_and_names_what_is_not_theirs(
    kind: Any, bert_model: MultiExitModel
) -> None:
    if kind is ProfiledOnnx:
        pytest.importorskip("onnxruntime", reason="needs the extra onnx")
        pytest.importorskip("onnxscript", reason="needs the extra onnx")
    model, batch, policy = bert_model, _batch(24), Patience(patience=1)
    deepest = int(TorchEngine(model).run(batch, policy).exit_layers.max())
    engine = kind(model)
    passes = engine.spent([partial(engine.run, batch, policy)] * 2, passes=3)
    assert [one["layers"] for one in passes] == [2 * deepest] * 3
    named = {f"{stage}, us" for stage in ("layer", "exit", "policy", "answers", "compaction")}
    assert named <= stages(passes).keys()


def test_a_nodes_name_says_what_it_is_for() -> None:
    names = ("layer3.linear", "layer3.out/scores", "decide12.gt", "keep1.hidden", "if2.left")
    found = [purpose(name, {"layer3.linear"}) for name in (*names, "GPT2Gelu")]
    assert found == ["layer", "exit", "policy", "compaction", "branch", "layer"]
