"""Claims about `bench`: who takes part, in what turns, where rows leave, and what is skipped."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import Said, tree
from hypothesis import given
from hypothesis import strategies as st

from offramp import bench
from offramp.benchmark import Bench, race
from offramp.benchmark.contenders import Shop, line_up
from offramp.benchmark.document import BASELINE
from offramp.benchmark.memory import _taken_on_gpu, with_memory
from offramp.benchmark.runners import with_mask
from offramp.benchmark.subject import open_rows, open_subject
from offramp.benchmark.words import headline
from offramp.benchmark.workloads import STREAM_BATCH, plan_work
from offramp.calibration import calibrate
from offramp.engines import rows_of
from offramp.errors import ConfigError, ModelError, OutputError, PointError
from offramp.policies import Full
from offramp.storage import read_document
from offramp.table import ExitTable
from offramp.testing import save_tiny, tiny_batch, tiny_model

pytest_plugins = ("cli_fixtures",)

QUICK: dict[str, Any] = {
    "backends": ["torch"],
    "precisions": ["fp32"],
    "batch_sizes": [1, 4],
    "rows": 12,
    "passes": 2,
    "memory": False,
    "quiet": True,
}
OPTIONS = ("--backends", "torch", "--precisions", "fp32", "--batch-sizes", "1,4", "--rows", "12",
           "--passes", "2", "--no-memory", "--quiet")  # fmt: skip


@pytest.fixture(scope="module")
def measured(place: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bench, Path]:
    """A benchmark of a tiny model, and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    return bench(place / "exits", place / "rows.csv", folder, **QUICK), folder


# What is measured


def test_everyone_is_timed_on_every_workload(measured: tuple[Bench, Path]) -> None:
    done, _ = measured
    assert [work.name for work in done.workloads] == ["batch 1", "batch 4", "stream"]
    names = [one.name for one in done.contenders]
    assert names == [
        BASELINE,
        "transformers fp32, 3 of 6 layers",
        "offramp torch fp32, full depth",
        "offramp torch fp32, forced 25% depth",
        "offramp torch fp32, forced 50% depth",
        "offramp torch fp32, forced 75% depth",
    ]
    for work in done.workloads:
        assert [one.contender for one in work.timings] == names
        assert all(len(one.seconds) == work.passes == 2 for one in work.timings)
        assert work.of(BASELINE).times_baseline.median == 1
    assert (done.source, done.depth, done.forced) == ("a multi-exit model", 6, True)
    assert done.lengths.source == "rows.csv"


def test_figures_follow_from_the_seconds_that_stand_beside_them(
    measured: tuple[Bench, Path],
) -> None:
    work = measured[0].workloads[1]
    for one in work.timings:
        assert one.ms.median == pytest.approx(1000 * np.median(one.seconds) / work.rows)
        assert one.ms.low <= one.ms.median <= one.ms.high
        against = np.divide(work.of(BASELINE).seconds, one.seconds)
        assert one.times_baseline.median == pytest.approx(np.median(against))
        assert work.times(one.contender, BASELINE) == one.times_baseline


def test_early_exit_is_held_against_the_faster_full_depth_and_the_ideal(
    measured: tuple[Bench, Path],
) -> None:
    for work in measured[0].workloads:
        whole = [BASELINE, "offramp torch fp32, full depth"]
        fastest = work.fastest(whole)
        gains = {one.contender: one.early for one in work.timings if one.early is not None}
        named = [f"offramp torch fp32, forced {share}% depth" for share in (25, 50, 75)]
        assert list(gains) == named
        for gain in gains.values():
            assert fastest is not None
            assert gain.full_is == fastest.contender
            assert 0 < gain.fixed_ms < fastest.ms.median
            full = fastest.ms.median
            ideal = full / (gain.fixed_ms + gain.cost * (full - gain.fixed_ms))
            assert gain.ideal == pytest.approx(ideal)
            assert gain.realised_share == pytest.approx(gain.speed_up.median / ideal)


def test_forced_rows_leave_at_the_depths_that_are_named(measured: tuple[Bench, Path]) -> None:
    for work in measured[0].workloads:
        gains = [one.early for one in work.timings if one.early is not None]
        found = [gain.mean_exit_layer for gain in gains]
        assert found == pytest.approx([1.5, 3.0, 4.5], abs=0.3)
        assert [gain.cost for gain in gains] == sorted(gain.cost for gain in gains)


def test_the_folder_holds_the_same_as_json_and_as_a_page(measured: tuple[Bench, Path]) -> None:
    done, folder = measured
    assert tree(folder) == ["bench.html", "bench.json"]
    assert read_document(Bench, folder / "bench.json") == done


def test_a_point_is_used_where_the_folder_has_one(place: Path, exits: Path) -> None:
    table = ExitTable.open(place / "tune.table")
    calibrate(table, max_disagreement=0.5).point.save(exits)
    calibrate(table, max_disagreement=0.2, name="careful").point.save(exits)
    said = {}
    for options in ({}, {"points": ["careful"]}, {"depths": [0.5]}):
        done = bench(exits, place / "rows.csv", None, **{**QUICK, "batch_sizes": [4]}, **options)
        said[repr(options)] = [one.leaves for one in done.contenders if one.leaves], done.forced
    assert list(said.values()) == [
        (["point default"], False),
        (["point careful"], False),
        (["forced 50% depth"], True),
    ]


def test_a_point_runs_only_where_its_figures_hold_and_force_stands_in_elsewhere(
    place: Path, exits: Path
) -> None:
    calibrate(ExitTable.open(place / "tune.table"), max_disagreement=0.5).point.save(exits)
    options = {**QUICK, "batch_sizes": [4], "precisions": ["fp32", "bf16"]}
    done = bench(exits, place / "rows.csv", None, **options)
    assert done.names("offramp") == [
        "offramp torch fp32, full depth",
        "offramp torch fp32, point default",
        "offramp torch bf16, full depth",
        "offramp torch bf16, forced 25% depth",
        "offramp torch bf16, forced 50% depth",
        "offramp torch bf16, forced 75% depth",
    ]
    assert done.forced
    assert "fp32, point default" in headline(done)
    (skipped,) = done.skipped
    assert skipped.names == ("offramp torch bf16, point default",)
    assert "--dtype bfloat16" in skipped.why


def test_an_architecture_is_measured_without_a_network_or_a_tokenizer() -> None:
    done = bench("bert-tiny", None, None, **{**QUICK, "depths": [0.5]})
    assert (done.source, done.depth) == ("an architecture with random weights", 2)
    assert 4e6 < done.parameters < 5e6
    assert "words and signs" in done.lengths.source


def test_batches_are_those_that_there_are_rows_for(place: Path) -> None:
    options = {name: value for name, value in QUICK.items() if name != "batch_sizes"}
    done = bench(place / "exits", place / "rows.csv", None, **options)
    assert [work.batch_size for work in done.workloads] == [1, 8, None]


def test_what_is_random_is_the_same_every_time(place: Path) -> None:
    # so that files made of it are found again, by the process that measures memory as well
    for name in ("bert-tiny", place / "stock"):
        first, other = (open_subject(name).model.fingerprint() for _ in range(2))
        assert first == other


def test_shared_weights_show_their_depth_pool_on_the_stream_alone(tmp_path: Path) -> None:
    options = {**QUICK, "batch_sizes": [4], "depths": [0.5], "rows": 40}
    done = bench(save_tiny(tmp_path / "albert", "albert"), None, tmp_path / "out", **options)
    sorted_batches = "offramp torch fp32, forced 50% depth"
    pool = f"{sorted_batches}, depth pool"
    assert [one.name for one in done.contenders if one.pool] == [pool]
    assert [work.name for work in done.workloads if work.has(pool)] == ["stream"]
    found, usual = (done.workloads[-1].of(name).early for name in (pool, sorted_batches))
    assert found is not None
    assert usual is not None
    assert found.mean_exit_layer == usual.mean_exit_layer
    assert found.cost == pytest.approx(usual.cost)
    assert "depth pool" in (tmp_path / "out" / "bench.html").read_text(encoding="utf-8")


def test_images_are_measured_too(tmp_path: Path) -> None:
    done = bench(save_tiny(tmp_path / "vit", "vit"), None, None, **QUICK)
    assert (done.lengths.shortest, done.lengths.longest) == (1, 1)
    with pytest.raises(ConfigError, match="leave --data out"):
        bench(tmp_path / "vit", "digits", None, **QUICK)


def test_threads_are_as_before_when_it_is_done(place: Path) -> None:
    before = torch.get_num_threads()
    options = {**QUICK, "batch_sizes": [4], "depths": [0.5], "threads": before + 1}
    done = bench(place / "stock", place / "rows.csv", None, **options)
    assert done.threads == before + 1
    assert torch.get_num_threads() == before


def test_of_several_numbers_of_threads_all_are_kept_and_the_fastest_is_shown(place: Path) -> None:
    options = {**QUICK, "batch_sizes": [4], "depths": [0.5], "threads": [2, 1, 2]}
    done = bench(place / "exits", place / "rows.csv", None, **options)
    (other,) = done.others
    assert {done.threads, other.threads} == {1, 2}
    times = [
        np.log([timing.ms.median for work in works for timing in work.timings]).mean()
        for works in (done.workloads, other.workloads)
    ]
    assert times[0] <= times[1]
    tried = done.by_threads("stream", BASELINE)
    assert list(tried) == [1, 2]
    assert tried[done.threads] == done.workloads[-1].of(BASELINE).ms.median


# Turns and time


def test_passes_fill_the_time_within_bounds() -> None:
    def fitting(seconds: float) -> int:
        made: Any = race.Race(None, (), None, {}, None, minutes=1.0)  # type: ignore[arg-type]
        return made._fitting(seconds)

    assert [fitting(s) for s in (0.0, 1.0, 4.0, 12.0, 600.0)] == [25, 25, 14, 4, 3]


def test_ctrl_c_leaves_nothing_behind(
    place: Path,
    tmp_path: Path,
    offramp: Callable[..., Said],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(race, "laps", interrupted)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    output = tmp_path / "bench"
    said = offramp("bench", place / "exits", "-d", place / "rows.csv", "-o", output, *OPTIONS)
    assert said.code == 130
    assert tree(tmp_path) == []


# Rows


@given(
    lengths=st.lists(st.integers(2, 60), min_size=2, max_size=300),
    sizes=st.sets(st.sampled_from([1, 2, 7, 32]), min_size=1),
)
def test_every_batch_is_full_and_the_stream_holds_every_row_once(
    lengths: list[int], sizes: set[int]
) -> None:
    sizes = {size for size in sizes if size <= len(lengths)} or {1}
    *batches, stream = plan_work(np.array(lengths), sorted(sizes))
    for work in batches:
        assert work.plain == work.ours
        assert {len(batch) for batch in work.plain} == {work.batch_size}
    everyone = list(range(len(lengths)))
    assert [row for batch in stream.plain for row in batch] == everyone
    assert sorted(row for batch in stream.ours for row in batch) == everyone
    assert all(len(batch) <= STREAM_BATCH for batch in stream.ours)


def test_the_stream_is_sorted_for_ours_alone() -> None:
    lengths = np.tile([10, 90], 64)
    stream = plan_work(lengths, [1])[-1]
    padded = {
        side: sum(len(b) * max(lengths[list(b)]) for b in batches)
        for side, batches in (("plain", stream.plain), ("ours", stream.ours))
    }
    assert padded["ours"] == lengths.sum()
    assert padded["plain"] == 128 * 90


def test_rows_come_again_where_there_are_too_few(place: Path) -> None:
    subject = open_subject(place / "exits")
    few, said = open_rows(subject, place / "rows.csv", 200, None)
    assert len(few.lengths) == 200
    assert (few.lengths[160:] == few.lengths[:40]).all()
    cut, _ = open_rows(subject, place / "rows.csv", 50, 9)
    assert cut.lengths.max() == 9
    assert said.shortest <= said.median <= said.longest


# Runtimes


@pytest.mark.parametrize("runtime", ["onnx", "openvino"])
def test_a_plain_runtime_answers_as_transformers_do_at_any_shape(
    runtime: Any, tmp_path: Path
) -> None:
    for package in ("onnxscript", "onnxruntime" if runtime == "onnx" else "openvino"):
        pytest.importorskip(package)
    model = tiny_model("bert")
    example = with_mask(tiny_batch(2, 12))
    shop = Shop(lambda: model, example, tmp_path, 1, torch.device("cpu"))
    contender = next(one for one in line_up(6, [runtime], ["fp32"], []) if one.runtime == runtime)
    runner = shop.prepare(contender)
    for rows, tokens, padded in ((1, 5, False), (1, 40, False), (7, 23, True)):
        batch = tiny_batch(rows, tokens, seed=rows, padded=padded)
        found: Any = runner.job(batch, rows_of(batch), Full())()
        assert np.asarray(found[0]) == pytest.approx(model.stock(**batch).logits.detach(), abs=1e-4)


def test_engines_of_ours_bring_the_time_before_their_first_layer(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    model = tiny_model("bert")
    shop = Shop(lambda: model, with_mask(tiny_batch(2, 12)), tmp_path, 1, torch.device("cpu"))
    batch = tiny_batch(5, 30)
    hidden = model.backbone.embed(batch).hidden.detach()
    for one in line_up(6, ["torch", "onnx"], ["fp32"], []):
        if one.side == "offramp":
            runner: Any = shop.prepare(one)
            found: Any = runner.front.job(batch, rows_of(batch), Full())()
            assert torch.as_tensor(found[0]).detach().numpy() == pytest.approx(
                hidden.numpy(), abs=1e-5
            )


def test_what_is_not_installed_is_left_out_with_the_line_that_installs_it(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for package in ("onnxruntime", "openvino"):
        monkeypatch.setitem(sys.modules, package, None)
    options = {**QUICK, "backends": ["torch", "onnx", "openvino"]}
    done = bench(place / "exits", place / "rows.csv", None, **options)
    reasons = {name: one.why for one in done.skipped for name in one.names}
    assert "pip install 'offramp[onnx]'" in reasons["onnxruntime fp32"]
    assert "pip install 'offramp[openvino]'" in reasons["openvino fp32"]
    assert {one.runtime for one in done.contenders} == {"torch"}


def test_a_contender_that_breaks_is_left_out_and_the_others_go_on(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such kernel\nand a long trace")

    monkeypatch.setattr("offramp.benchmark.contenders.truncated", broken)
    done = bench(place / "exits", place / "rows.csv", None, **QUICK)
    assert [(one.names, one.why) for one in done.skipped] == [((BASELINE,), "no such kernel")]
    assert BASELINE in [one.name for one in done.contenders]


def test_the_baseline_takes_part_whatever_is_asked_for() -> None:
    for runtimes, precisions in ((["onnx"], ["int8"]), (["torch"], ["bf16"])):
        assert line_up(4, runtimes, precisions, [])[0].name == BASELINE


def test_memory_is_that_of_a_process_of_its_own_and_of_full_depth(
    place: Path, tmp_path: Path
) -> None:
    subject = open_subject(place / "exits")
    rows, _ = open_rows(subject, place / "rows.csv", 40, None)
    shop = Shop(lambda: subject.model, rows.batch([0]), tmp_path, 1, torch.device("cpu"))
    ours = [one for one in line_up(6, ["torch"], ["fp32"], ["here"]) if one.side == "offramp"]
    found = with_memory(shop, str(place / "exits"), ours, rows, quiet=True)
    full, early = (one.peak_megabytes for one in found)
    assert early is None
    assert full is not None
    assert 0 < full < 500


def test_memory_on_a_gpu_is_that_of_the_tensors_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = open_subject("bert-tiny")
    rows, _ = open_rows(subject, None, 4, None)
    shop = Shop(lambda: subject.model, rows.batch([0]), tmp_path, 1, torch.device("cuda:1"))
    asked = []

    def child(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        asked.append(json.loads((tmp_path / "order.json").read_text())["device"])
        return subprocess.CompletedProcess(command, 0, stdout="12.5\n", stderr="")

    monkeypatch.setattr("offramp.benchmark.memory.subprocess.run", child)
    (found,) = with_memory(shop, "bert-tiny", line_up(2, ["torch"], ["fp32"], [])[:1], rows, True)
    assert (asked, found.peak_megabytes) == (["cuda:1"], 12.5)


def test_what_loading_takes_on_a_gpu_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now, peak = 0, 0

    def take(more: int) -> None:
        nonlocal now, peak
        now += more
        peak = max(peak, now)

    def forget(_: torch.device) -> None:
        nonlocal peak
        peak = now

    def answer() -> None:
        take(30)
        take(-30)

    def prepare() -> Callable[[], None]:
        take(500)  # weights in fp32
        take(-400)
        return answer

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forget)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: peak)
    assert _taken_on_gpu(prepare, torch.device("cuda")) == 130


def test_what_is_named_twice_runs_once(place: Path) -> None:
    twice = {"backends": ["torch"] * 2, "precisions": ["fp32"] * 2, "batch_sizes": [1, 1]}
    done = bench(place / "exits", place / "rows.csv", None, **{**QUICK, **twice})
    names = [one.name for one in done.contenders]
    assert len(names) == len(set(names))
    assert [work.name for work in done.workloads] == ["batch 1", "stream"]


# Mistakes


def test_a_machine_on_which_the_baseline_does_not_run_is_told_why(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("offramp.benchmark.race._hindrance", lambda *_: "no memory")
    with pytest.raises(ConfigError, match="does not run here: no memory"):
        bench(place / "exits", place / "rows.csv", None, **QUICK)


def test_a_place_that_cannot_be_written_is_found_before_anything_is_timed(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("offramp.benchmark.running.open_subject")
    with pytest.raises(OutputError, match=r"rows\.csv is a file"):
        bench(place / "exits", None, place / "rows.csv" / "below", **QUICK)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"backends": ["tensorflow"]}, "'tensorflow' is unknown"),
        ({"backends": ["onxx"]}, "onnx"),
        ({"backends": []}, "--backends is empty"),
        ({"precisions": ["int4"]}, "Known: fp32, bf16, fp16, int8"),
        ({"max_length": -3}, "--max-length is -3"),
        ({"batch_sizes": [0]}, "from 1 to the number of rows, 12"),
        ({"batch_sizes": [13]}, "Give more --rows or smaller batches"),
        ({"rows": 1}, "--rows is 1; it must be at least 2"),
        ({"passes": 1}, "--passes is 1; it must be at least 2"),
        ({"minutes": float("nan")}, "--minutes is nan"),
        ({"threads": 0}, "--threads is 0"),
        ({"threads": [2, 0]}, "--threads is 0"),
        ({"threads": []}, "--threads is empty"),
        ({"threads": "1,2"}, "--threads is '1,2'; give numbers such as"),
        ({"threads": [1, 1.5]}, "--threads is 1.5"),
        ({"depths": [1.5]}, "1.5 is no share of the layers"),
        ({"depths": [0.0]}, "above 0"),
        ({"depths": []}, "--depths is empty"),
    ],
)
def test_options_that_mean_nothing_are_refused_before_anything_runs(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        bench("there-is-no-such-folder", None, None, **{**QUICK, **options})


def test_a_name_that_is_neither_model_nor_architecture_gets_a_hint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(*_: object, **__: object) -> None:
        raise ModelError("'bert-bsae' is neither a folder here nor a model that the hub gives.")

    monkeypatch.setattr("offramp.benchmark.subject.resolve", nowhere)
    with pytest.raises(ModelError, match=r"Did you mean 'bert-base'\?.*minilm-l6"):
        bench("bert-bsae", None, None, **QUICK)


def test_points_belong_to_folders_that_have_them(place: Path) -> None:
    with pytest.raises(PointError, match="no operating point 'fast'"):
        bench(place / "exits", place / "rows.csv", None, points=["fast"], **QUICK)
    with pytest.raises(ConfigError, match="Leave it out"):
        bench("bert-tiny", None, None, points=["fast"], **QUICK)


def test_a_file_is_no_folder_to_write(place: Path, tmp_path: Path) -> None:
    (tmp_path / "bench").write_text("before")
    with pytest.raises(OutputError, match="is a file"):
        bench(place / "exits", place / "rows.csv", tmp_path / "bench", **QUICK)
    assert (tmp_path / "bench").read_text() == "before"
