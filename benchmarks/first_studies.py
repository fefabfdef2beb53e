"""Write docs/results/first-studies.md from the studies' JSON: python benchmarks/first_studies.py

Takes whatever files lie in docs/results/first-road; those without paired differences are named
on stderr and left out (`first_road.py SET --seed N --part scores` adds them from its tables).
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from first_road import MAX_DROP, RESULTS
from scipy.stats import t

PAGE = Path(__file__).parents[1] / "docs" / "results" / "first-studies.md"
MARGIN = 0.01
TARGETS = (1.5, 2.0)
CONFIDENCE = ("entropy", "margin", "max_probability")
ANSWERS = ("yes", "no", "undecided")
COMPARISONS = {
    ("train", "against_plain"): "`train`, against the plain fine-tune",
    ("train", "against_full"): "`train`, against its own full depth",
    ("attach", "against_full"): "`attach`, against full depth",
}
PREFACE = f"""# Is patience as good as full depth?

PABEE's authors report that patience, at about 1.5x, is at least as good as the same model
fine-tuned without early exit. Here that is checked on small models, with the studies of
[first-road.md](first-road.md), which says how they are trained and how thresholds are chosen.

Made by `python benchmarks/first_road.py SET --seed N --part scores` for each set and seed below,
and this page by `python benchmarks/first_studies.py` from the JSON files in `first-road/`. A seed
draws the cut of train into train and tune, the weights that start anew and the order of rows. Dev
rows (test rows of SICK, 20newsgroups and CIFAR-10) are the same for all seeds, recorded once per
model and read once. 20newsgroups is without headers, signatures and quotes, which give the group
away, and cut at 128 tokens; rows that this leaves empty are dropped. The CIFAR-10 networks come
trained on CIFAR-10: what is tune here they have seen, so thresholds chosen on it are too bold.
Their `train` was run twice: at first its exits hardly learned, which tune showed, and a higher
learning rate for exits was then chosen on tune; so its test rows were read twice. `attach` is that
of before [defaults.md](defaults.md): a probe chose what exits pool, at rate 0.003.

## How it is decided

Three comparisons of the policy `patience`, chosen on tune near 1.5x:

- `train`, against the plain fine-tune: the model trained with PABEE's loss leaves early; the other
  is an ordinary fine-tune of the same encoder on the same rows. This is the authors' comparison.
- `train`, against its own full depth: what leaving early alone costs.
- `attach`, against full depth: exits on the frozen plain fine-tune.

The difference is patience minus the other, paired by row. Seeds share their dev rows, so these are
not new rows with every seed: the difference of a row is first averaged over seeds, and the
variance of the mean is that of these averages over rows (the normal interval, *over rows*). It
holds for the models that were trained. For others, the variance between seeds divided by their
number is added, with Student's t and Satterthwaite's degrees of freedom (*over rows and seeds*;
part of the noise counts twice, so it is rather too wide). With one seed the two are the same, and
the answer stands in brackets. For a correlation the interval of a seed is the percentile bootstrap
over rows, and that of several seeds is as wide as theirs on average, which is never too narrow.
Where hardly a row differs the normal interval is too narrow: that none of n rows was won or lost
still allows for 3/n.

The answer comes from the interval over rows and seeds, with a margin of {100 * MARGIN:g} point:

- **yes**: its lower end is above -{100 * MARGIN:g} point (not worse, or by less than the margin);
- **no**: not yes, and its upper end is below 0;
- **undecided**: neither; also where the full depth compared with is not above always giving the
  commonest answer by 1.96 standard errors: little was learned, so early and late are alike.

What the interval over rows alone says stands in the tables of differences: the answer for the very
models that were trained.

This rule was written down when seed 1 of MRPC, RTE, SST-2, STS-B and uspto_50k had been seen, and
nothing of the others; the answer for the very models came later, when SICK had been seen, and
decides nothing. Intervals are 95 %, not corrected for the number of comparisons. Cost
reduction is counted FLOPs, not time; patience has few steps, so it is not always near the target.
"""
NOTE = """
## Scores by set

Mean ± standard deviation over seeds, in percent. `fixed` is everyone leaving at one layer, read at
the cost of patience (between two layers in proportion). The confidence policy is the one of
`entropy`, `margin` and `max_probability` that is best on tune."""


@dataclass(frozen=True)
class Pooled:
    """A difference over seeds: two 95 % intervals, the spread, and rows won and lost."""

    difference: float
    rows: tuple[float, float]
    both: tuple[float, float]
    spread: float | None
    won: int | None
    lost: int | None


def decide(low: float, high: float) -> str:
    """The answer of an interval."""
    if low > -MARGIN:
        return "yes"
    return "no" if high < 0 else "undecided"


def pool(parts: Sequence[dict[str, Any]], rows: int) -> Pooled:
    """One difference from those of the seeds, rows first; see the page."""
    found = [part["difference"] for part in parts]
    of_rows, won, lost = row_variance(parts, rows)
    spread = stdev(found) if len(found) > 1 else None
    of_seeds = spread**2 / len(found) if spread else 0.0
    total = of_rows + of_seeds
    freedom: float = rows - 1
    if of_seeds:
        freedom = total**2 / (of_rows**2 / (rows - 1) + of_seeds**2 / (len(found) - 1))
    middle = mean(found)
    half, wide = 1.96 * of_rows**0.5, float(t.ppf(0.975, freedom)) * total**0.5
    if not of_seeds:
        wide = half
    return Pooled(
        middle, (middle - half, middle + half), (middle - wide, middle + wide), spread, won, lost
    )


def row_variance(
    parts: Sequence[dict[str, Any]], rows: int
) -> tuple[float, int | None, int | None]:
    """Variance of the mean over rows, and how often a row was won and lost."""
    if not all("won" in part for part in parts):
        # the standard deviation of a mean is at most the mean of the standard deviations
        halves = [(part["interval"][1] - part["interval"][0]) / 2 for part in parts]
        return (mean(halves) / 1.96) ** 2, None, None
    gains = np.zeros((len(parts), rows))
    for gain, part in zip(gains, parts, strict=True):
        gain[list(map(int, part["won"].split()))] = 1
        gain[list(map(int, part["lost"].split()))] = -1
    per_row = gains.mean(axis=0)
    return float(per_row.var(ddof=1)) / rows, int((gains > 0).sum()), int((gains < 0).sum())


class Studies:
    """The seeds of one set that were read on the same rows."""

    def __init__(self, name: str, seeds: dict[int, dict[str, Any]]) -> None:
        self.name = name
        self.numbers = sorted(seeds)
        self.all = [seeds[number] for number in self.numbers]
        if len({study["data"]["dev_fingerprint"] for study in self.all}) > 1:
            raise SystemExit(f"{name}: its seeds were not read on the same rows.")
        self.data = self.all[0]["data"]
        self.modes = [m for m in ("train", "attach") if all(m in study for study in self.all)]

    def entries(self, mode: str, families: Iterable[str], target: float) -> list[dict[str, Any]]:
        """Of each seed the entry of these families that is best on tune."""
        wanted = set(families)
        found = []
        for study in self.all:
            near = [
                entry
                for entry in study[mode]["near_targets"]
                if entry["family"] in wanted and entry["target"] == target
            ]
            found += [max(near, key=lambda entry: entry["tune_score"])] if near else []
        return found

    def fixed(self, mode: str, entries: Sequence[dict[str, Any]]) -> list[float]:
        """What everyone leaving at one layer scores at the cost of these entries.

        Between two layers in proportion, as by leaving at either at random.
        """
        parts = [study[mode] for study in self.all]
        return [
            float(
                np.interp(
                    1 / entry["dev_cost_reduction"], part["dev_exit_costs"], part["dev_exit_scores"]
                )
            )
            for part, entry in zip(parts, entries, strict=True)
        ]

    def full(self, mode: str) -> list[float]:
        return [study[mode]["dev_full_score"] for study in self.all]

    def learned(self, mode: str) -> bool:
        """Whether full depth is clearly above always giving the commonest answer."""
        commonest = self.data["dev_majority"]
        score = mean(self.full(mode))
        error = (score * (1 - score) / self.data["dev"]) ** 0.5
        return commonest is None or score - 1.96 * error > commonest


def load() -> Iterator[Studies]:
    """The sets whose results lie there, each with its seeds."""
    sets: dict[str, dict[int, dict[str, Any]]] = {}
    for file in sorted(RESULTS.glob("*.json")):
        named = re.fullmatch(r"(.+)-seed(\d+)", file.stem)
        study = json.loads(file.read_text())
        part = study.get("attach", {})
        if named and "chosen" in part and "against_full" in part["near_targets"][0]:
            sets.setdefault(named[1], {})[int(named[2])] = study
        else:
            print(f"{file.name}: not finished, or without paired differences", file=sys.stderr)
    for name, seeds in sorted(sets.items()):
        yield Studies(name, seeds)


def percent(value: float, sign: bool = False) -> str:
    rounded = round(100 * value, 1) + 0.0  # no -0.0
    return f"{rounded:{'+' if sign else ''}.1f}"


def pair(low: float, high: float) -> str:
    return f"[{percent(low, True)}, {percent(high, True)}]"


def spread(values: Sequence[float]) -> str:
    """The mean, and the standard deviation over seeds where there are several."""
    more = f" ± {percent(stdev(values))}" if len(values) > 1 else ""
    return percent(mean(values)) + more


def at(entries: Sequence[dict[str, Any]]) -> str:
    """The range of cost reductions on dev."""
    ends = sorted(f"{entry['dev_cost_reduction']:.2f}" for entry in entries)
    return f"{ends[0]}x" if ends[0] == ends[-1] else f"{ends[0]}-{ends[-1]}x"


def answers(every: Sequence[Studies]) -> Iterator[str]:
    """The answers by set, and how they fall."""
    yield "| set | seeds | " + " | ".join(COMPARISONS.values()) + " |"
    yield "|---" * (2 + len(COMPARISONS)) + "|"
    given = [
        {
            pair: Comparison.of(studies, *pair, 1.5)
            for pair in COMPARISONS
            if pair[0] in studies.modes
        }
        for studies in every
    ]
    for studies, found in zip(every, given, strict=True):
        cells = [found[pair].short() if pair in found else "" for pair in COMPARISONS]
        yield f"| {studies.name} | {len(studies.all)} | " + " | ".join(cells) + " |"
    yield ""
    for comparison, words in COMPARISONS.items():
        said = Counter(found[comparison].answer for found in given if comparison in found)
        yield f"- {words}: " + ", ".join(f"{said[a]} {a}" for a in ANSWERS) + "."


def details(every: Sequence[Studies], target: float) -> Iterator[str]:
    """The differences near a target, with all that belongs to them."""
    yield (
        "| set | comparison | rows read | cost reduction | difference, points | "
        "standard deviation of seeds | over rows | answer for these models | "
        "over rows and seeds | rows won, lost |"
    )
    yield "|---" * 10 + "|"
    for studies in every:
        for (mode, reference), words in COMPARISONS.items():
            if mode in studies.modes:
                found = Comparison.of(studies, mode, reference, target)
                yield f"| {studies.name} | {words} | " + " | ".join(found.cells()) + " |"


@dataclass(frozen=True)
class Comparison:
    """Patience and other answers to the same rows, near a target."""

    pooled: Pooled
    entries: Sequence[dict[str, Any]]
    rows: int
    learned: bool

    @classmethod
    def of(cls, studies: Studies, mode: str, reference: str, target: float) -> Comparison:
        entries = studies.entries(mode, ["patience"], target)
        rows = studies.data["dev"]
        other = "attach" if reference == "against_plain" else mode
        pooled = pool([entry[reference] for entry in entries], rows)
        return cls(pooled, entries, rows, studies.learned(other))

    @property
    def answer(self) -> str:
        return decide(*self.pooled.both) if self.learned else "undecided"

    def short(self) -> str:
        answer = f"**{self.answer}**" if len(self.entries) > 1 else f"({self.answer})"
        figures = f"{percent(self.pooled.difference, sign=True)} {pair(*self.pooled.both)}"
        return f"{answer} {figures}" + ("" if self.learned else ", little learned")

    def cells(self) -> list[str]:
        found = self.pooled
        return [
            f"{self.rows:,}",
            at(self.entries),
            percent(found.difference, sign=True),
            "" if found.spread is None else percent(found.spread),
            pair(*found.rows),
            decide(*found.rows) if self.learned else "undecided",
            pair(*found.both),
            "" if found.won is None else f"{found.won}, {found.lost}",
        ]


def scores(studies: Studies) -> Iterator[str]:
    """Means and spreads of one set."""
    data, first = studies.data, studies.all[0]
    metric = first[studies.modes[0]]["metric"]
    commonest = data["dev_majority"]
    seeds = f"Seed{'s' if len(studies.all) > 1 else ''} " + ", ".join(map(str, studies.numbers))
    training = ", ".join(f"{study['data']['train']:,}" for study in studies.all)
    yield f"\n### {studies.name}\n"
    yield (
        f"{seeds}; {training} rows to train on, {data['dev']:,} read; {metric}"
        + (f"; the commonest answer is right on {percent(commonest)}." if commonest else ".")
        + f" `{re.sub('--seed .*', '--seed N', first['made_with']['command'])}`\n"
    )
    yield (
        "| mode, pooling | full depth | near | patience | cost reduction | `fixed` at that cost "
        "| best confidence policy | cost reduction |"
    )
    yield "|---" * 8 + "|"
    for mode in studies.modes:
        for target in TARGETS:
            patient = studies.entries(mode, ["patience"], target)
            confident = studies.entries(mode, CONFIDENCE, target)
            cells = [
                f"`{mode}`, {', '.join(sorted({part[mode]['pooling'] for part in studies.all}))}",
                spread(studies.full(mode)),
                f"{target:g}x",
                spread([entry["dev_score"] for entry in patient]),
                at(patient),
                spread(studies.fixed(mode, patient)),
                spread([entry["dev_score"] for entry in confident]) if confident else "none",
                at(confident) if confident else "",
            ]
            yield "| " + " | ".join(cells) + " |"
    yield from chosen(studies)


def chosen(studies: Studies) -> Iterator[str]:
    """What a user gets who asks for a drop and not for a speed."""
    for mode in studies.modes:
        found = [study[mode]["chosen"]["dev"] for study in studies.all]
        losses = [entry["score"] - entry["full_score"] for entry in found]
        reductions = [entry["cost_reduction"] for entry in found]
        listed = ", ".join(
            f"{percent(loss, True)} at {reduction:.2f}x"
            for loss, reduction in zip(losses, reductions, strict=True)
        )
        yield f"\n`{mode}`, chosen on tune for at most {100 * MAX_DROP:g} point lost: {listed}."


def main() -> None:
    every = list(load())
    lines = [PREFACE, "## The answers, near 1.5x\n", *answers(every)]
    for target in TARGETS:
        lines += [f"\n## Differences near {target:g}x\n", *details(every, target)]
    lines.append(NOTE)
    for studies in every:
        lines += scores(studies)
    PAGE.write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
