"""`offramp attack`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from offramp.cli import console
from offramp.cli import options as o

if TYPE_CHECKING:
    from offramp.attacks import AttackReport

_HOW = "The attacks"
_JUDGED = "What is judged"

Kind = Annotated[
    str | None,
    typer.Option(
        "--kind",
        help="Of embedding, characters and words, with commas; else all that can be.",
        rich_help_panel=_HOW,
        show_default=False,
    ),
]
Synonyms = Annotated[
    Path | None,
    typer.Option(
        "--synonyms",
        help='For words: JSON {"good": ["fine", ...]}, or lines of word, tab, synonym.',
        rich_help_panel=_HOW,
        show_default=False,
    ),
]
Eps = Annotated[
    float | None,
    typer.Option(
        "--eps",
        help="For embedding: largest change, in standard deviations of the row's.",
        rich_help_panel=_HOW,
    ),
]
Steps = Annotated[
    int | None,
    typer.Option("--steps", help="For embedding: gradients a row.", rich_help_panel=_HOW),
]
Share = Annotated[
    float | None,
    typer.Option(
        "--share", help="For texts: part of the words that may change.", rich_help_panel=_HOW
    ),
]
Objective = Annotated[
    str | None,
    typer.Option(
        "--objective",
        help="What is raised: uniform, even, disagree, stay; else each attack's own.",
        rich_help_panel=_HOW,
    ),
]
TargetSpeedup = Annotated[
    float,
    typer.Option(
        "--target-speedup",
        help="Cost reduction of every policy on the rows as they are.",
        rich_help_panel=_JUDGED,
    ),
]
Policies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        help="Only this one, at those savings; repeatable; else all that fit.",
        rich_help_panel=_JUDGED,
    ),
]
Points = Annotated[
    list[str] | None,
    typer.Option(
        "--point", help="Operating point of the folder, too; repeatable.", rich_help_panel=_JUDGED
    ),
]
MaxDepth = Annotated[
    int | None,
    typer.Option(
        "--max-depth",
        help="Budget in layers; else what costs as much as asked for.",
        rich_help_panel=_JUDGED,
    ),
]
MaxRows = Annotated[
    int, typer.Option("--max-rows", help="Attack a sample of this many.", rich_help_panel="Rows")
]
Seed = Annotated[
    int, typer.Option("--seed", help="Of the sample and of slips.", rich_help_panel="Rows")
]
Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        help="Folder for report, exit tables and changed texts; given again, it goes on.",
        show_default=False,
    ),
]


def attack(
    folder: o.Folder,
    data: o.Data,
    output: Output = None,
    kind: Kind = None,
    synonyms: Synonyms = None,
    eps: Eps = None,
    steps: Steps = None,
    share: Share = None,
    objective: Objective = None,
    target_speedup: TargetSpeedup = 2.0,
    policy: Policies = None,
    point: Points = None,
    max_depth: MaxDepth = None,
    metric: o.Metric = None,
    split: o.Split = None,
    text: o.Text = None,
    text_pair: o.TextPair = None,
    image: o.Image = None,
    label: o.Label = None,
    max_rows: MaxRows = 200,
    seed: Seed = 0,
    device: o.Device = None,
    json: o.Json = False,
    quiet: o.Quiet = False,
    verbose: o.Verbose = False,
) -> None:
    """Measure how far somebody who means harm can delay the exits, and what a budget saves.

    Rows are changed so that exits become uncertain: noise on the embedding, which shows what some
    change of that size can do, typing errors, or synonyms of yours. All policies save as much
    before, so that they can be compared.

    Examples:
      offramp attack my-offramp --data test.csv
      offramp attack my-offramp -d test.csv --kind words --synonyms words.json -o attacked
      offramp attack my-offramp -d test.csv --kind embedding --eps 0.05 --point default
      offramp attack my-offramp -d test.csv --policy patience --objective disagree --max-depth 4
    """
    given = dict(locals())
    console.setup(quiet, verbose)
    from offramp.attacks import attack as run

    wanted = ("synonyms", "eps", "steps", "share", "objective")
    given["kinds"] = None if kind is None else [one.strip() for one in kind.split(",")]
    given |= {"model": folder, "policies": policy or None, "points": point or ()}
    options = {name: given[name] for name in wanted if given[name] is not None}
    report = run(**o.passed(run, given), **options)
    if json:
        console.say_json(report.model_dump(mode="json"))
    else:
        _show(report, output)


def _show(report: AttackReport, output: Path | None) -> None:
    from offramp.attacks.page import HEAD, HOW_TO_READ, cells, summary, told

    console.say(summary(report))
    for one in report.attacks:
        console.say("", f"{one.name}: {told(one, report.metric)}")
        console.columns(HEAD, [cells(row) for row in report.policies if row.attack == one.name])
    console.say("", " ".join(HOW_TO_READ.replace("**", "").split()))
    if output is not None:
        console.say(f"All of it: {output / 'attack.md'} (also attack.json, tables, texts).")
