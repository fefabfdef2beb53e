"""Which exits to hang by default: pooling, hidden layer and learning rate, measured.

    python benchmarks/defaults.py sst2   (or uspto_50k, docstrings ...; --seed, --work, --part)

`train` fine-tunes a pretrained encoder and its exits together on some 1,000 rows; `attach` fits
exits to a fine-tuned model that stays frozen. Held out are rows of train alone, cut by input hash;
dev and test sets are not read. Every seed draws its own training rows, weights and held-out rows.
`attach` starts from the plain fine-tunes of first_road.py (--starts, its --work, seed 1), or from
one made here where the setting says so.

Results go to docs/results/defaults/<set>-seed<N>.json, one configuration after the other; what
each held-out row says stays in --work, so a killed study goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from first_road import SHARED, STUDIES, model_path
from scipy.stats import rankdata
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import default_collate
from transformers import set_seed

from offramp.data import load_examples, split_examples
from offramp.demo import DemoSettings, make_start
from offramp.engines.batching import plan_batches
from offramp.exits import POOLINGS, ExitOutput, ExitSpec, Pooling
from offramp.methods import METHODS, Method
from offramp.model import MultiExitModel, MultiExitOutput
from offramp.objectives import DepthWeighted, SelfDistillation
from offramp.storage import read_json, write_json
from offramp.training import ATTACH, ATTACH_TOKENS, TRAIN, TrainOptions, train
from offramp.training.batches import Rows
from offramp.training.cache import CachedExits
from offramp.training.preparing import gather, head_for
from offramp.training.probe import rehearse
from offramp.training.running import move, run_stage
from offramp.training.standard import moments, standardised
from offramp.training.trainer import Trainee
from offramp.training.work import WorkFolder

RESULTS = Path(
    os.environ.get("OFFRAMP_RESULTS", Path(__file__).parents[1] / "docs" / "results" / "defaults")
)
CUT = 1  # the cut of train is that of first_road.py with seed 1, whatever --seed is
SEEDS = 2  # held-out rows are cut into so many parts, one a seed
ATTACH_RATES = (1e-3, 3e-3, 1e-2, 3e-2)


@dataclass(frozen=True)
class Setting:
    """A backbone and a set, small enough to train two dozen times.

    Attributes:
        learning_rate: of the backbone.
        epochs: of `train`, and of a plain start made here; so is batch_size.
        rows: to train on; `attach` takes `attach_rows`.
        longest: texts of more characters are left out.
        plain_rows: make the start of `attach` from so many rows; None takes first_road's.
    """

    learning_rate: float
    epochs: float = 2
    batch_size: int = 32
    rows: int = 1200
    attach_rows: int = 1200
    held_out: int = 800
    longest: int | None = None
    plain_rows: int | None = None


SETTINGS = {
    "sst2": Setting(learning_rate=3e-4, held_out=1000, longest=60),
    "uspto_50k": Setting(
        learning_rate=3e-4, batch_size=16, rows=2000, attach_rows=1000, held_out=400, longest=65
    ),
    "docstrings": Setting(
        learning_rate=1e-3,
        epochs=4,
        rows=2000,
        attach_rows=2000,
        held_out=1200,
        longest=200,
        plain_rows=3000,
    ),
    "stsb": Setting(learning_rate=1e-4),
    "mrpc": Setting(learning_rate=1e-4),
}
ATTACH_ONLY = ("stsb", "mrpc")


@dataclass(frozen=True)
class Config:
    """One choice of exits and their learning rate; of how many updates at least, in `attach`."""

    pooling: Pooling
    hidden: bool
    rate: float
    updates: int = 0

    @property
    def name(self) -> str:
        more = "+hidden" if self.hidden else "+updates" if self.updates else ""
        return f"{self.pooling}{more}@{self.rate:g}"

    @property
    def spec(self) -> ExitSpec:
        return ExitSpec(pooling=self.pooling, hidden=self.hidden)


class Bench:
    """One setting and seed on its way: its rows, models and results."""

    def __init__(self, name: str, seed: int, rows: int | None, work: Path, starts: Path) -> None:
        self.name, self.seed, self.setting = name, seed, SETTINGS[name]
        title = f"{name}-{rows}-rows-seed{seed}" if rows else f"{name}-seed{seed}"
        self.work, self.shared, self.starts = work / title, work / name, starts
        self.file = RESULTS / f"{title}.json"
        self.results: dict[str, Any] = read_json(self.file) if self.file.is_file() else {}
        self.rows = rows
        self.whole, held_out = self._parts()
        mine = np.random.default_rng(CUT).permutation(len(held_out))[seed - 1 :: SEEDS]
        self.held_out = held_out.select(np.sort(mine[: self.setting.held_out]))

    def _parts(self) -> tuple[Dataset, Dataset]:
        """The rows of train that may be trained on, and those held out."""
        if self.name == "docstrings":
            rows, share = load_examples("docstrings", split="train"), 0.4
        else:
            study = STUDIES[self.name]
            path = SHARED / "data" / self.name / study.train_file
            rows, share = load_examples(str(path), **study.columns), study.tune_share
        parts = split_examples(rows, {"train": 1 - share, "tune": share}, CUT)
        longest = self.setting.longest
        if longest:
            parts = {
                role: part.filter(lambda row: len(row["text"]) <= longest)
                for role, part in parts.items()
            }
        return parts["train"], parts["tune"]

    def note(self, part: str, **facts: Any) -> None:
        self.results.setdefault(part, {}).update(facts)
        write_json(self.file, self.results)

    @property
    def problem_type(self) -> str | None:
        return STUDIES[self.name].problem_type if self.name in STUDIES else None

    @cached_property
    def pretrained(self) -> Path:
        """Where `train` starts."""
        if self.name == "docstrings":
            return make_start(self.shared, DemoSettings(), self.whole)
        return model_path(STUDIES[self.name].model)

    @cached_property
    def fine_tuned(self) -> Path:
        """Where `attach` starts: the same for every seed."""
        count = self.setting.plain_rows
        if count is None:
            return self.starts / f"{self.name}-seed{CUT}" / "plain"
        path = self.shared / "plain"
        if not path.is_dir():
            rows = load_examples(self.whole, max_rows=count, seed=CUT)
            options = self.train_options(1e-3, seed=CUT)
            train(self.pretrained, rows, path, method="plain", options=options)
        return path

    def train_options(self, rate: float, seed: int | None = None) -> TrainOptions:
        return TrainOptions(
            epochs=self.setting.epochs,
            batch_size=self.setting.batch_size,
            learning_rate=self.setting.learning_rate,
            head_learning_rate=rate,
            seed=self.seed if seed is None else seed,
            quiet=True,
            bf16=False,
        )

    def run(self, part: str, first: int | None) -> None:
        """The first so many configurations of `train` or of `attach`."""
        rows = self.setting.rows if part == "train" else self.setting.attach_rows
        self.training = load_examples(self.whole, max_rows=self.rows or rows, seed=self.seed)
        self.note(part, rows=len(self.training), held_out=len(self.held_out))
        measure = {"train": self.trained, "attach": self.attached}[part]
        configs = train_configs(self.setting) if part == "train" else attach_configs()
        if part == "train" and "chosen" not in self.results[part]:
            self.note(part, chosen=self.rehearsed())
        for config in configs[:first]:
            path = self.work / "rows" / part / f"{config.name}.npy"
            if not path.is_file():
                began = time.monotonic()
                scores = measure(config)
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path, row_shares(scores, self.labels, self.kind).astype(np.float32))
                print(f"{path} {time.monotonic() - began:.0f} s", flush=True)
            self.summarise(part, configs)

    def summarise(self, part: str, configs: list[Config]) -> None:
        """Scores of what was measured so far, and standard errors of their differences."""
        folder = self.work / "rows" / part
        paths = {config.name: folder / f"{config.name}.npy" for config in configs}
        found = {name: np.load(path) for name, path in paths.items() if path.is_file()}
        early = np.stack([shares[:, :-1].mean(axis=1) for shares in found.values()])
        full = np.stack([shares[:, -1] for shares in found.values()])
        entries = {
            name: {
                "early": round(float(early[place].mean()), 5),
                "full": round(float(full[place].mean()), 5),
                "exits": [round(float(score), 4) for score in shares.mean(axis=0)],
                "early_errors": errors(early, place),
                "full_errors": errors(full, place),
            }
            for place, (name, shares) in enumerate(found.items())
        }
        self.note(part, configs=entries)

    @cached_property
    def kind(self) -> str:
        return self.problem_type or "single_label_classification"

    @cached_property
    def labels(self) -> np.ndarray:
        return np.array(self.held_out["label"][:])

    def trained(self, config: Config) -> np.ndarray:
        path = self.work / "model"
        shutil.rmtree(path, ignore_errors=True)
        with as_method(config.spec) as method:
            model = train(
                self.pretrained,
                self.training,
                path,
                method=method,
                pooling=config.pooling,
                options=self.train_options(config.rate),
                problem_type=self.problem_type,
            )
        scores = answers(model, self._rows(path, self.held_out))
        shutil.rmtree(path)
        return scores

    def attached(self, config: Config) -> np.ndarray:
        """What `attach` does, but the frozen model runs once for all configurations."""
        known, unseen = self._tokens
        set_seed(self.seed)
        model = MultiExitModel.from_stock(self._stock, config.spec, "attach").eval()
        fed: CachedExits | ReplayedTokens
        if config.pooling == "attention":
            fed, rows, defaults = ReplayedTokens(model, known), known.rows(), ATTACH_TOKENS
        else:
            fed, rows, defaults = CachedExits(model), vectors(model, known), ATTACH
        options = TrainOptions(learning_rate=config.rate, seed=self.seed, quiet=True, bf16=False)
        options = options.filled(defaults)
        fewest = config.updates * (options.batch_size or 1) / len(rows.lengths)
        options = options.model_copy(update={"epochs": max(options.epochs or 1, fewest)})
        with standardised(model, moments(pooled(model, known))):
            self._fit(fed, rows, options)
        with torch.inference_mode():
            exits = CachedExits(model).eval()
            return stacked(exits(together(pooled(model, unseen)), unseen.teacher).exits)

    def _fit(self, part: torch.nn.Module, rows: Rows, options: TrainOptions) -> None:
        objective, work = SelfDistillation(), WorkFolder(self.work / "exits")
        (stage,) = objective.stages()
        work.remove()
        run_stage(Trainee(part, objective, stage, self.kind), rows, options, work)
        work.remove()

    @cached_property
    def _tokens(self) -> tuple[Tokens, Tokens]:
        model = MultiExitModel.from_stock(self._stock).eval()
        known, unseen = (
            Tokens(model, self._rows(self.fine_tuned, rows))
            for rows in (self.training, self.held_out)
        )
        return known, unseen

    @cached_property
    def _stock(self) -> Any:
        return gather(self.fine_tuned, self.training, None, CUT, None, None).model.stock

    def _rows(self, folder: Path, dataset: Dataset) -> Rows:
        return gather(folder, dataset, None, self.seed, None, None).rows

    def rehearsed(self) -> Pooling:
        """What `train` chooses where no pooling is given."""
        head = head_for(self.pretrained, self.training, self.problem_type, False)
        material = gather(self.pretrained, self.training, head, self.seed, None, None)
        options = self.train_options(TRAIN.head_learning_rate or 1e-3).filled(TRAIN)
        return rehearse(material.model, DepthWeighted(), material.rows, options, head is not None)


class Tokens:
    """Hidden states of layers 1..L-1 of a frozen model for every row, in memory."""

    def __init__(self, model: MultiExitModel, rows: Rows) -> None:
        count = len(rows.lengths)
        self.lengths, self.labels = rows.lengths, rows.dataset["label"][:]
        self.hidden: list[Tensor] = [torch.empty(0)] * count
        self.teacher = torch.empty(count, model.config.num_labels)
        for block in plan_batches(rows.lengths.numpy()):
            self._run(model, rows, block)

    @torch.no_grad()
    def _run(self, model: MultiExitModel, rows: Rows, block: np.ndarray) -> None:
        batch = {name: value for name, value in rows.batch(block).items() if name != "labels"}
        flow, found = model.backbone.embed(batch), []
        for layer in range(1, model.depth + 1):
            flow = model.backbone.layer(layer, flow)
            found.append(flow.hidden)
        self.teacher[block] = model.backbone.head(flow.hidden, flow.mask)
        for place, hidden in zip(block, torch.stack(found[:-1], dim=1), strict=True):
            self.hidden[place] = hidden[:, : self.lengths[place]].clone()

    def rows(self) -> Rows:
        """Numbers of rows, and their labels, as the rows of a stage."""
        places = [{"place": place, "labels": label} for place, label in enumerate(self.labels)]
        return Rows(places, self.lengths, default_collate)

    def padded(self, places: Tensor) -> tuple[Sequence[Tensor], Tensor]:
        """Hidden states of each layer, (rows, tokens, width), and the mask, (rows, tokens)."""
        rows = [self.hidden[place].transpose(0, 1) for place in places.tolist()]
        padded = pad_sequence(rows, batch_first=True)
        mask = torch.arange(padded.shape[1]) < self.lengths[places][:, None]
        return padded.unbind(dim=2), mask.long()


class ReplayedTokens(torch.nn.Module):
    """The exits of a model, fed with kept hidden states; a batch is numbers of rows."""

    def __init__(self, model: MultiExitModel, tokens: Tokens) -> None:
        super().__init__()
        self.exits, self._tokens = model.exits, tokens

    def forward(self, place: Tensor) -> MultiExitOutput:
        layers, mask = self._tokens.padded(place)
        early = [made(x, mask)[0] for made, x in zip(self.exits.values(), layers, strict=True)]
        return MultiExitOutput(exits=(*early, ExitOutput(self._tokens.teacher[place])))


@torch.no_grad()
def pooled(model: MultiExitModel, tokens: Tokens) -> Iterator[list[Tensor]]:
    """What each exit pools, (some rows, width)."""
    for block in torch.arange(len(tokens.teacher)).split(64):
        layers, mask = tokens.padded(block)
        yield [made.pool(x, mask) for made, x in zip(model.exits.values(), layers, strict=True)]


def together(parts: Iterable[list[Tensor]]) -> Tensor:
    """All rows, the vectors of all exits one after the other, (rows, widths)."""
    return torch.cat([torch.cat(part, dim=1) for part in parts])


def vectors(model: MultiExitModel, tokens: Tokens) -> Rows:
    """Pooled vectors, full-depth scores and labels, as the rows of a stage."""
    columns = zip(together(pooled(model, tokens)), tokens.teacher, tokens.labels, strict=True)
    rows = [{"pooled": x, "teacher": scores, "labels": label} for x, scores, label in columns]
    return Rows(rows, torch.ones(len(rows), dtype=torch.long), default_collate)


def train_configs(setting: Setting) -> list[Config]:
    """Pooling x hidden at one rate, other rates for linear exits; what decides most comes first."""
    some: tuple[Pooling, ...] = ("cls", "mean", "attention")
    others = sorted({setting.learning_rate, 3e-3} - {1e-3}, reverse=True)
    faster, *slower = ([Config(pooling, False, rate) for pooling in some] for rate in others)
    crossed = [Config(pooling, False, 1e-3) for pooling in (*some, "pooler")]
    hidden = [Config(pooling, True, 1e-3) for pooling in POOLINGS]
    return [*crossed[:3], *faster, crossed[3], *hidden, *chain.from_iterable(slower)]


def attach_configs() -> list[Config]:
    """Pooling x rate for linear exits; a hidden layer at one rate; attention with more updates."""
    longer = Config("attention", False, 1e-2, updates=400)
    linear = [Config(pooling, False, rate) for rate in ATTACH_RATES for pooling in POOLINGS]
    return [longer, *linear, *(Config(pooling, True, 3e-3) for pooling in POOLINGS)]


@contextlib.contextmanager
def as_method(spec: ExitSpec) -> Iterator[str]:
    """PABEE's loss with these exits, as a method for the time being."""
    name = "measured"
    METHODS.register(name, Method(name, "", spec, DepthWeighted, "patience"))
    yield name
    del METHODS._items[name]


@torch.inference_mode()
def answers(model: MultiExitModel, rows: Rows) -> np.ndarray:
    """Raw scores of all exits, (rows, L, classes)."""
    model.eval()
    move(model, torch.device("cpu"))
    found: Any = None
    for block in plan_batches(rows.lengths.numpy()):
        batch = {name: value for name, value in rows.batch(block).items() if name != "labels"}
        scores = stacked(model(**batch).exits)
        found = np.empty((len(rows.lengths), *scores.shape[1:])) if found is None else found
        found[block] = scores
    return found


def stacked(exits: Any) -> np.ndarray:
    return torch.stack([output.scores for output in exits], dim=1).float().numpy()


def row_shares(scores: np.ndarray, labels: np.ndarray, problem_type: str) -> np.ndarray:
    """What every row adds to the score of every exit, (rows, L): the mean over rows is the score.

    Accuracy: right or wrong. Regression: Spearman's correlation and its influence function, so
    that means and standard errors over rows are those of the correlation (delta method).
    """
    if problem_type != "regression":
        return (scores.argmax(axis=-1) == labels[:, None]).astype(np.float64)
    x, y = standard_ranks(scores[..., 0]), standard_ranks(labels[:, None])
    correlation = (x * y).mean(axis=0)
    return x * y - correlation * (x**2 + y**2) / 2 + correlation


def standard_ranks(values: np.ndarray) -> np.ndarray:
    """Ranks within each column, mean 0 and spread 1; 0 where all values are the same."""
    ranks = rankdata(values, axis=0)
    ranks = ranks - ranks.mean(axis=0)
    spread = ranks.std(axis=0)
    return np.where(spread > 0, ranks / np.where(spread > 0, spread, 1), 0.0)


def errors(shares: np.ndarray, place: int) -> str:
    """Standard errors, in points, of each configuration's score minus that at `place`.

    The error of the score itself stands at `place`, where the difference would be 0.
    """
    minus = shares - shares[place]
    minus[place] = shares[place]
    spread = 100 * minus.std(axis=1, ddof=1) / np.sqrt(shares.shape[1])
    return " ".join(f"{value:.2f}" for value in spread)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--seed", type=int, default=1, choices=range(1, SEEDS + 1))
    parser.add_argument("--part", choices=("train", "attach", "all"), default="all")
    parser.add_argument("--first", type=int, help="only so many configurations of each part")
    parser.add_argument("--rows", type=int, help="training rows, instead of the setting's")
    parser.add_argument("--work", type=Path, default=Path("runs/defaults"))
    parser.add_argument("--starts", type=Path, default=Path("runs/first-road"))
    given = parser.parse_args()
    bench = Bench(given.name, given.seed, given.rows, given.work, given.starts)
    bench.note(
        "made_with",
        command=f"python benchmarks/defaults.py {given.name} --seed {given.seed}"
        + (f" --rows {given.rows} --part attach" if given.rows else ""),
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    for part in ("attach", "train"):
        if given.part in (part, "all") and not (part == "train" and given.name in ATTACH_ONLY):
            bench.run(part, given.first)


if __name__ == "__main__":
    main()
