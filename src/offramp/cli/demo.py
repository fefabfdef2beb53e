"""`offramp demo`."""

from __future__ import annotations

import os
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any

import typer

from offramp.cli import console, report
from offramp.cli.options import Json, Quiet, Verbose

if TYPE_CHECKING:
    from offramp.demo import Demo


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to work in.")] = Path(
        "runs/demo"
    ),
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train anew, even if the folder holds a model.")
    ] = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Show the whole road on a small model, with numbers at the end.

    A tokenizer and a small encoder with exits are trained on the built-in set (which library
    does this docstring come from?), a point is chosen on one part of it and measured on
    another that nothing has seen. It takes a few minutes on two cores and needs no network.

    Examples:
      offramp demo
      offramp demo --fresh --output runs/another
      offramp demo --json > demo.json
    """
    console.setup(quiet, verbose)
    # read when torch is loaded; threads that spin while they wait for each other take ten times
    # as long where another program wants the same cores
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from offramp.demo import run

    done = run(output, fresh=fresh)
    if json:
        console.say_json(_as_json(done))
    else:
        _show(done)


def _show(done: Demo) -> None:
    outcome = done.evaluation.outcome
    exits = done.evaluation.exits
    speed = report.speed_facts(done.speed)
    used = sum(count > 0 for count in outcome.exit_histogram)
    console.say("", "Which of seven libraries does this docstring come from?", "")
    console.facts(
        {
            "rows": ", ".join(f"{count:,} {role}" for role, count in done.rows.items()),
            "model": f"{len(outcome.exit_histogram)} layers, "
            f"{done.parameters / 1e6:.1f} million parameters",
            "TF-IDF": f"accuracy {done.baseline:.4f}, with logistic regression",
            "chosen point": report.policy_text(outcome.policy.to_dict()),
            **report.outcome_facts(outcome, done.calibration.point.problem_type),
            "exit layers in use": f"{used}",
            "each exit alone": "accuracy " + " ".join(f"{one.score:.4f}" for one in exits),
            "layers saved": f"{done.layers_saved:.1%}",
            **speed,
            "timed": f"{speed['timed']}, on one thread",
        }
    )
    if done.baseline > (outcome.full_score or 0.0):
        console.say(
            "",
            "TF-IDF is better here: a small encoder that starts from nothing learns little "
            "more than words from so few rows. What counts is early exit against full depth.",
        )
    report.show_histogram(outcome.exit_histogram)
    console.say("", "Three test rows:")
    for row in done.examples:
        right = "right" if row.label == row.truth else f"wrong, it is {row.truth}"
        console.say(
            f"  exit layer {row.exit_layer}: {row.label} ({row.score:.2f}, {right})",
            f"    {row.text[:100]}",
        )
    _show_next(done)


def _show_next(done: Demo) -> None:
    again = "that of an earlier run" if done.resumed else "trained in this run"
    table, folder = quote(str(done.folder.parent / "tune")), quote(str(done.folder))
    console.say(
        "",
        f"The model is in {done.folder} ({again}); this took {done.seconds:.0f} s.",
        f"All of it as a page: {done.report}. Try:",
        f'  offramp predict {folder} "Compute the eigenvalues of a sparse matrix."',
        f"  offramp calibrate {table} --model {folder} --target-speedup 3 --name fast",
        f"  offramp evaluate {folder} --data docstrings --split test --point fast",
    )


def _as_json(done: Demo) -> dict[str, Any]:
    from dataclasses import asdict

    return {
        "folder": str(done.folder),
        "resumed": done.resumed,
        "rows": done.rows,
        "parameters": done.parameters,
        "tfidf": done.baseline,
        "point": done.calibration.point.model_dump(mode="json"),
        "messages": list(done.calibration.messages),
        "test": done.evaluation.to_dict(),
        "layers_saved": done.layers_saved,
        "speed": report.speed_json(done.speed),
        "examples": [asdict(row) for row in done.examples],
        "report": str(done.report),
        "seconds": done.seconds,
    }
