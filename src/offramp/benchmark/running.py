"""`bench`: every engine and what a user has without them, in one run."""

from __future__ import annotations

import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, get_args

import torch

from offramp.benchmark.contenders import PRECISIONS, Shop, computes, line_up, with_pools
from offramp.benchmark.document import Bench, Contender, Runtime, Skipped
from offramp.benchmark.leaving import Leaving, choose_leaving
from offramp.benchmark.memory import with_memory
from offramp.benchmark.page import write_page
from offramp.benchmark.runners import with_mask
from offramp.benchmark.subject import Subject, open_rows, open_subject
from offramp.benchmark.trials import Trials, fastest
from offramp.benchmark.workloads import plan_work
from offramp.engines import as_device, dtype_name
from offramp.engines.making import ON_TORCH
from offramp.errors import ConfigError, OutputError
from offramp.registry import nearest
from offramp.storage import write_document

HTML, JSON = "bench.html", "bench.json"
RUNTIMES = get_args(Runtime)
USUAL: tuple[Runtime, ...] = ("torch", "onnx", "openvino")
"""Without the one that compiles for minutes."""
BATCH_SIZES = (1, 8, 32, 128)
_LIBRARIES = ("torch", "transformers", "onnx", "onnxruntime", "openvino")


def bench(
    model: str | os.PathLike[str],
    data: Any = None,
    output: str | os.PathLike[str] | None = "bench",
    *,
    points: Sequence[str] | None = None,
    depths: Sequence[float] | None = None,
    backends: Sequence[str] = USUAL,
    precisions: Sequence[str] = ("fp32", "int8"),
    batch_sizes: Sequence[int] | None = None,
    rows: int = 128,
    passes: int | None = None,
    minutes: float = 10.0,
    max_length: int | None = None,
    threads: int | Sequence[int] | None = None,
    device: str | None = None,
    memory: bool = True,
    quiet: bool = False,
    **columns: Any,
) -> Bench:
    """Time engines and precisions side by side, and what a user has without offramp.

    All run each batch in turns, warm, so that whatever else the machine does falls on all of
    them. Where rows leave is a point of the folder, or forced: then exits and a policy run at
    every layer, but rows leave by a pattern, which says what early exit could save and nothing
    about its answers.

    Args:
        model: folder or hub id of a multi-exit or a stock model, or the name of an architecture
            such as `bert-base`, which gets random weights.
        data: rows whose lengths are measured, as `load_examples` takes them; None is the
            built-in docstrings.
        output: folder for `bench.html` and `bench.json`; None writes nothing.
        points: names of operating points, each for the engines and precisions that it was chosen
            for; else `default` where the folder has it.
        depths: mean exit depths to force, as shares of all layers, one layer at least; else 0.25,
            0.5 and 0.75, where no point was chosen for an engine and precision.
        backends: of `torch`, `inductor`, `onnx` and `openvino`.
        precisions: of `fp32`, `bf16`, `fp16` and `int8`.
        batch_sizes: beside the stream of rows as they come; else those of 1, 8, 32 and 128 that
            there are rows for.
        rows: how many.
        passes: over all rows, at least 2; else as many as fit into `minutes`, 3 to 25.
        minutes: about how long the timing may take where `passes` are not given.
        max_length: longest row in tokens.
        threads: of every runtime; else torch's. Each of several numbers gets a race of its own, and
            the fastest is told.
        device: of what runs in torch, a GPU if there; the other runtimes are for the CPU.
        memory: measure the peak memory as well, each in a process of its own.
        columns: `split`, `text`, `text_pair`, as `load_examples` takes them.

    Raises:
        ConfigError: an option that means nothing.
        ModelError, PointError, DataError: what is wrong with model, point or rows.
        OutputError: the folder cannot be written.
    """
    counts = _counts(threads)
    numbers: dict[str, tuple[float | None, float]] = {
        "--rows": (rows, 2),
        "--passes": (passes, 2),
        "--minutes": (minutes, 0),
        "--threads": (min(counts), 1),
        "--max-length": (max_length, 1),
    }
    backends, precisions = list(dict.fromkeys(backends)), list(dict.fromkeys(precisions))
    fitting = [size for size in BATCH_SIZES if size <= rows]
    sizes = fitting if batch_sizes is None else list(dict.fromkeys(batch_sizes))
    _check(backends, precisions, sizes, depths, numbers)
    folder = _folder(output)
    where = as_device(device)
    subject = open_subject(model)
    found, lengths = open_rows(subject, data, rows, max_length, **columns)
    leaving = choose_leaving(subject, points, depths, rows)
    works = plan_work(found.lengths, sizes)
    wanted, unfit = _wanted(subject, leaving, backends, precisions, where)
    share = minutes / (len(works) * len(counts))
    with tempfile.TemporaryDirectory(prefix="offramp-bench-") as temp:
        example = with_mask(found.batch([0, 1]))

        def make_shop(count: int) -> Shop:
            return Shop(lambda: subject.model, example, Path(temp), count, where)

        course = Trials(make_shop, wanted, found, leaving.policies, works, passes, share, quiet)
        trials = [course.on(count) for count in counts]
        best = fastest(trials)
        able = best.able
        if memory:
            shop = make_shop(best.found.threads)
            able = with_memory(shop, os.fspath(model), able, found, quiet)
    done = Bench(
        model=subject.name,
        source=subject.source,
        depth=subject.model.depth,
        parameters=sum(leaf.numel() for leaf in subject.model.stock.parameters()),
        forced=any(one.leaves in leaving.forced for one in able),
        threads=best.found.threads,
        machine=_machine(where, precisions),
        lengths=lengths,
        contenders=tuple(able),
        workloads=best.found.workloads,
        skipped=(*unfit, *best.broken),
        others=tuple(one.found for one in trials if one is not best),
    )
    if folder is not None:
        write_document(folder / JSON, done)
        write_page(done, folder / HTML)
    return done


def _counts(threads: int | Sequence[int] | None) -> list[int]:
    """Numbers of threads."""
    if threads is None:
        return [torch.get_num_threads()]
    several = isinstance(threads, Sequence) and not isinstance(threads, str)
    given: Sequence[Any] = threads if several else [threads]  # type: ignore[assignment]
    for count in given:
        if type(count) is not int:
            raise ConfigError(f"--threads is {count!r}; give numbers such as 1,2,4.")
    if not given:
        raise ConfigError("--threads is empty; give numbers such as 1,2,4.")
    return list(dict.fromkeys(given))


def _folder(output: str | os.PathLike[str] | None) -> Path | None:
    folder = None if output is None else Path(output)
    if folder is not None:
        # now, and not when everything has been timed
        there = next(part for part in (folder, *folder.absolute().parents) if part.exists())
        if not there.is_dir():
            raise OutputError(f"{there} is a file; give the name of a folder.")
        if not os.access(there, os.W_OK):
            raise OutputError(f"{folder} cannot be written: no permission for {there}.")
    return folder


def _wanted(
    subject: Subject,
    leaving: Leaving,
    backends: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
) -> tuple[list[Contender], list[Skipped]]:
    """Those to time, and those for which there is no point or no room on the device."""
    names = list(leaving.policies)
    line = line_up(subject.model.depth, cast(Any, backends), precisions, names)
    wanted, unfit = leaving.fitting(line)
    if subject.model.backbone.shared_weights:
        wanted = with_pools(wanted)
    wanted, elsewhere = _on_device(wanted, device)
    return wanted, [*unfit, *elsewhere]


def _on_device(
    wanted: Sequence[Contender], device: torch.device
) -> tuple[list[Contender], list[Skipped]]:
    """Those that can run where the torch ones do, and the others."""
    if device.type == "cpu":
        return list(wanted), []
    there = [one for one in wanted if one.runtime in ON_TORCH]
    names = tuple(one.name for one in wanted if one.runtime not in ON_TORCH)
    why = f"is for the CPU, and the others run on {device}: give --device cpu to compare"
    return there, [Skipped(names=names, why=why)] if names else []


def _machine(device: torch.device, precisions: Sequence[str] = ()) -> dict[str, str]:
    """What the figures hold for."""
    facts = {"processor": _processor(), "cores": str(os.cpu_count() or 1)}
    if device.type == "cuda":
        facts["GPU"] = torch.cuda.get_device_name(device)
    elif "int8" in precisions and dtype_name("int8") == "int7":
        facts["int8"] = "offramp's has weights of 7 bits, since the processor has no VNNI"
    facts["system"] = f"{platform.system()} {platform.machine()}"
    facts["Python"] = platform.python_version()
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            facts[name] = version(name)
    return facts


def _processor() -> str:
    """Its name, where the system tells."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _check(
    backends: Sequence[str],
    precisions: Sequence[str],
    batch_sizes: Sequence[int],
    depths: Sequence[float] | None,
    numbers: Mapping[str, tuple[float | None, float]],
) -> None:
    """Refuse what means nothing."""
    for given, option, known in (
        (backends, "--backends", RUNTIMES),
        (precisions, "--precisions", PRECISIONS),
    ):
        for name in given:
            if name not in known:
                raise ConfigError(
                    f"{option}: '{name}' is unknown.{nearest(name, list(known))} "
                    f"Known: {', '.join(known)}."
                )
        if not given:
            raise ConfigError(f"{option} is empty. Known: {', '.join(known)}.")
    if not any(computes(cast(Any, one), kind) for one in backends for kind in precisions):
        raise ConfigError(
            f"No engine computes as asked: {', '.join(backends)} in {', '.join(precisions)}. Add a "
            "backend or a precision; int8 is for onnx and openvino."
        )
    for option, (value, least) in numbers.items():
        if value is not None and not value >= least:
            raise ConfigError(f"{option} is {value}; it must be at least {least:g}.")
    if depths is not None and not depths:
        raise ConfigError("--depths is empty; give shares of the layers, such as 25,50.")
    for share in depths or ():
        if not 0 < share <= 1:
            raise ConfigError(f"--depths: {share:g} is no share of the layers: above 0, up to 1.")
    rows = numbers["--rows"][0] or 0
    for size in batch_sizes:
        if not 1 <= size <= rows:
            raise ConfigError(
                f"--batch-sizes: {size} is not from 1 to the number of rows, {rows:g}. "
                "Give more --rows or smaller batches."
            )
