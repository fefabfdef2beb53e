"""Claims about the page of a benchmark: one file that needs nothing and says what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from page_support import Page, assert_named

from offramp.benchmark.document import (
    BASELINE,
    Bench,
    Contender,
    EarlyExit,
    Lengths,
    Skipped,
    Spread,
    Threaded,
    Timing,
    Workload,
)
from offramp.benchmark.leaving import check_depths
from offramp.benchmark.page import write_page
from offramp.benchmark.words import TIMES, about, exits, figure, headline
from offramp.errors import ConfigError, OutputError

HOSTILE = '</script><script>alert(1)</script><img src=x onerror="alert(1)"><!--{{ 7 * 7 }}'
SECONDS = {
    BASELINE: 10.0,
    "onnxruntime int8": 4.0,
    "onnxruntime int8, 3 of 6 layers": 2.0,
    "offramp onnx int8, full depth": 3.9,
    "offramp onnx int8, forced 25% depth": 1.2,
    "offramp onnx int8, forced 50% depth": 2.1,
    "offramp onnx int8, forced 75% depth": 3.0,
}


def contender(name: str) -> Contender:
    early = name.split(", ")[1] if name.endswith("% depth") else None
    return Contender(
        name=name,
        side="offramp" if name.startswith("offramp") else "plain",
        runtime="torch" if name == BASELINE else "onnx",
        precision="fp32" if name == BASELINE else "int8",
        layers=3 if "3 of 6" in name else 6,
        leaves=early,
        peak_megabytes=None if early else 100.0 + len(name),
    )


def timing(name: str) -> Timing:
    seconds = (SECONDS[name], SECONDS[name] * 1.1, SECONDS[name] * 1.2)
    early = EarlyExit(
        mean_exit_layer=3.0,
        cost=0.5,
        speed_up=Spread.of([1.8, 1.9, 2.0]),
        full_is="onnxruntime int8",
        fixed_ms=0.0,
        ideal=1.95,
        realised_share=1.9 / 1.95,
    )
    return Timing(
        contender=name,
        seconds=seconds,
        ms=Spread.of([10 * one for one in seconds]),
        rows_per_second=Spread.of([100 / one for one in seconds]),
        times_baseline=Spread.of([10.0 / SECONDS[name]] * 3),
        early=early if name.endswith("% depth") else None,
    )


def make_bench(**changes: Any) -> Bench:
    works = [
        Workload(
            name=name, batch_size=size, rows=100, passes=3, timings=tuple(map(timing, SECONDS))
        )
        for name, size in (("batch 1", 1), ("batch 32", 32), ("stream", None))
    ]
    done = Bench(
        model="my-offramp",
        source="a multi-exit model",
        depth=6,
        parameters=22_000_000,
        forced=True,
        threads=1,
        machine={"processor": "one of many"},
        lengths=Lengths(source="rows.csv", shortest=3, median=20, mean=25.4, longest=80),
        contenders=tuple(map(contender, SECONDS)),
        workloads=tuple(works),
        skipped=(Skipped(names=("openvino fp32",), why="pip install 'offramp[openvino]'"),),
    )
    return done.model_copy(update=changes)


def page_of(tmp_path: Path, done: Bench) -> Page:
    return Page(write_page(done, tmp_path / "bench.html"))


def test_the_page_asks_for_no_address_and_allows_no_script(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_bench())
    links = [a[name] for _, a in page.tags for name in ("src", "href") if name in a]
    assert links == ["data:,"]
    assert not re.search(r"url\(|@import|fetch\(", page.source)
    (policy,) = (a["content"] for _, a in page.tags if "http-equiv" in a)
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "script-src 'none'" in policy
    assert [a.get("type") for tag, a in page.tags if tag == "script"] == ["application/json"]


def test_its_parts_are_named(tmp_path: Path) -> None:
    assert_named(page_of(tmp_path, make_bench()))


def test_every_contender_workload_and_reason_is_in_it(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_bench())
    for name in SECONDS:
        assert page.texts.count(name) >= 4, "the whole and each workload"
    assert f"of 1.95{TIMES}, 97 %" in page.text
    assert "pip install 'offramp[openvino]'" in page.text
    assert "Where rows leave is forced" in page.text
    assert page.headings[2:5] == [
        "One row at a time",
        "Batches of 32",
        "A stream of rows as they come",
    ]


def test_the_document_is_in_the_page(tmp_path: Path) -> None:
    done = make_bench()
    page = page_of(tmp_path, done)
    assert Bench.model_validate(json.loads(page.scripts[-1])) == done


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    done = make_bench(
        model=HOSTILE, machine={HOSTILE: HOSTILE}, skipped=(Skipped(names=(HOSTILE,), why=HOSTILE),)
    )
    page = page_of(tmp_path, done)
    assert not any(tag == "img" or "onerror" in attrs for tag, attrs in page.tags)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert len([text for text in page.texts if HOSTILE in text]) >= 5


def test_memory_on_a_gpu_is_called_so(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_bench(machine={"GPU": "one of many"}))
    assert "Of tensors on the GPU" in page.text
    assert "above what Python" not in page.text


def test_what_was_not_measured_is_a_dash_or_left_out(tmp_path: Path) -> None:
    plain = tuple(
        one.model_copy(update={"peak_megabytes": None}) for one in make_bench().contenders
    )
    page = page_of(tmp_path, make_bench(contenders=plain, skipped=()))
    assert not {"Peak memory", "What did not take part"} & set(page.headings)
    assert not re.search(r"\b(NaN|nan|None|inf|undefined|null)\b", page.text)


def test_a_benchmark_without_an_engine_of_ours_has_a_page(tmp_path: Path) -> None:
    done = make_bench()
    plain = tuple(one for one in done.contenders if one.side == "plain")
    works = tuple(
        work.model_copy(
            update={"timings": tuple(t for t in work.timings if "offramp" not in t.contender)}
        )
        for work in done.workloads
    )
    page = page_of(tmp_path, make_bench(contenders=plain, workloads=works))
    assert "No engine of offramp could take part" in page.text


def test_a_folder_is_no_place_for_it(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="is a folder"):
        write_page(make_bench(), tmp_path)


def test_numbers_of_threads_stand_side_by_side_where_several_were_tried(tmp_path: Path) -> None:
    done = make_bench()
    assert "Threads" not in page_of(tmp_path, done).headings
    slower = tuple(
        work.model_copy(
            update={
                "timings": tuple(
                    one.model_copy(update={"ms": Spread.of([2 * one.ms.median])})
                    for one in work.timings
                )
            }
        )
        for work in done.workloads
    )
    done = make_bench(others=(Threaded(threads=4, workloads=slower),))
    page = page_of(tmp_path, done)
    assert "Of 1, 4 threads, 1 did best" in page.text
    assert page.texts.count("1: 110, 4: 220") == len(done.workloads)
    assert headline(done).endswith("both on 1 thread.")


# Words


def test_the_headline_holds_the_middle_depth_against_the_fastest_whole_model() -> None:
    said = headline(make_bench())
    assert said == (
        "One row at a time, offramp onnx int8, forced 50% depth (23.1 ms) is 1.90"
        f"{TIMES} as fast as the fastest runtime without offramp, onnxruntime int8 (44.0 ms)."
    )


def test_the_headline_does_not_hide_that_ours_is_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SECONDS, "offramp onnx int8, forced 50% depth", 5.0)
    assert "is slower than the fastest runtime without offramp" in headline(make_bench())


def test_a_point_is_named_and_nothing_is_called_forced() -> None:
    done = make_bench(forced=False)
    some = tuple(
        one.model_copy(update={"leaves": "point fast"}) if one.leaves else one
        for one in done.contenders
    )
    assert exits(done.model_copy(update={"contenders": some})) == (
        "Rows leave at the operating point fast."
    )


def test_figures_have_three_digits_and_times_a_unit() -> None:
    assert [figure(n) for n in (0.1234, 4.567, 78.94, 1234.5)] == ["0.123", "4.57", "78.9", "1,234"]
    assert [about(s) for s in (4.2, 89, 600, 7200)] == ["4 s", "89 s", "10 min", "2.0 h"]


@pytest.mark.parametrize("depth", [2, 3, 12, 32, 48])
def test_no_depth_is_less_than_one_layer(depth: int) -> None:
    check_depths([float(f"{1 / depth:.3g}"), 1.0], depth)
    with pytest.raises(ConfigError, match=f"of {depth} layers is less than one layer"):
        check_depths([0.5 / depth], depth)
