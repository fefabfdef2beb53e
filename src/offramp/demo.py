"""The whole road on the built-in set, in minutes: nothing is downloaded, nothing is prepared.

A tokenizer and a small encoder are trained on `docstrings` there and then, the exits together
with the backbone; a point is chosen on `tune`; `test` is read once.
"""

from __future__ import annotations

import logging
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

import offramp
from offramp.calibration import Calibration, calibrate
from offramp.data import data_fingerprint, load_examples
from offramp.engines import record
from offramp.errors import ConfigError, OutputError
from offramp.evaluation import Evaluation, Speed, evaluate
from offramp.policies import Policy
from offramp.prediction import Predictor, pipeline
from offramp.report import write_picture, write_report
from offramp.storage import Strict, read_document, whole_folder, write_document
from offramp.table import ExitTable, replay
from offramp.training import TrainOptions, train
from offramp.tuning import facts_of, speed_on

logger = logging.getLogger("offramp")

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
SPLITS = {"train": "train", "tune": "validation", "test": "test"}
MEASURED = ("tune", "test")
START, MODEL, REPORT, RECIPE = "untrained", "model", "report.html", "demo.json"
OURS = (START, MODEL, f"{MODEL}.work", *MEASURED)


class DemoSettings(Strict):
    """Sizes that learn well in two minutes on two cores.

    Attributes:
        pieces: of the tokenizer.
        max_disagreement: what the point is chosen for: the share of answers that may differ
            from full depth.
        max_rows: of each split; None is all.
    """

    layers: int = 6
    width: int = 128
    pieces: int = 4000
    max_length: int = 64
    epochs: float = 4
    batch_size: int = 64
    learning_rate: float = 1e-3
    max_disagreement: float = 0.02
    max_rows: int | None = None
    seed: int = 0


class _Recipe(Strict):
    """What the model of a demo folder was made from."""

    settings: DemoSettings
    data: str
    version: str


@dataclass(frozen=True, slots=True)
class Example:
    """A test row and its answer."""

    text: str
    truth: str
    label: str
    score: float
    exit_layer: int


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo found; scores are accuracies on `test`, which was read once.

    Attributes:
        folder: of the model and its point.
        resumed: the model is that of an earlier run.
        baseline: TF-IDF and logistic regression.
        speed: on one thread.
        examples: rows that left early, in the middle and late.
        report: one HTML file that shows all of it.
    """

    folder: Path
    resumed: bool
    rows: dict[str, int]
    parameters: int
    baseline: float
    calibration: Calibration
    evaluation: Evaluation
    speed: Speed
    examples: tuple[Example, ...]
    report: Path
    seconds: float

    @property
    def layers_saved(self) -> float:
        """Share of all layers of all test rows that were not run."""
        counts = np.array(self.evaluation.outcome.exit_histogram)
        layers = np.arange(1, len(counts) + 1)
        return float(1 - (counts * layers).sum() / (counts.sum() * len(counts)))


def run(folder: str | Path, settings: DemoSettings | None = None, fresh: bool = False) -> Demo:
    """Train, record, calibrate and measure on the built-in set.

    A folder with the finished model of the same recipe is used again, a training that was
    stopped continues; `fresh` starts anew.

    Raises:
        ConfigError: the folder holds something else.
    """
    began = time.monotonic()
    settings = settings or DemoSettings()
    folder = Path(folder)
    _claim(folder)  # before the minute that the rows take
    splits = {
        role: load_examples("docstrings", split=split, max_rows=settings.max_rows)
        for role, split in SPLITS.items()
    }
    resumed = _open(folder, settings, splits["train"], fresh)
    _say(1, "TF-IDF and logistic regression, for comparison")
    baseline = tfidf_baseline(splits["train"], splits["test"])
    if not resumed:
        _train(folder, settings, splits["train"])
    predictor = Predictor.load(folder / MODEL, "full", device="cpu")
    _say(4, "recording every exit's answer on the rows of tune and test")
    tables = {role: _record(predictor, splits[role], folder / role, role) for role in MEASURED}
    _say(5, f"choosing a point on tune: at most {settings.max_disagreement:.0%} other answers")
    calibration = calibrate(tables["tune"], max_disagreement=settings.max_disagreement)
    calibration.point.save(folder / MODEL)
    write_picture(folder / MODEL, calibration)
    _say(6, "reading test, once, and measuring the clock")
    speed = _speed(predictor, splits["test"], calibration.point.build_policy())
    return Demo(
        folder=folder / MODEL,
        resumed=resumed,
        rows={role: len(split) for role, split in splits.items()},
        parameters=predictor.model.num_parameters(),
        baseline=baseline,
        calibration=calibration,
        evaluation=evaluate(tables["test"], calibration.point),
        speed=speed,
        examples=_examples(folder / MODEL, splits["test"], tables["test"], calibration),
        report=write_report(
            folder / REPORT,
            tables["test"],
            calibration.point,
            title="offramp demo",
            rows=splits["test"],
            speed=speed,
            made=facts_of(predictor, speed, threads=1),
        ),
        seconds=time.monotonic() - began,
    )


def _say(step: int, what: str) -> None:
    logger.info("%d/6 %s", step, what)


def tfidf_baseline(train_rows: Dataset, test_rows: Dataset) -> float:
    """Accuracy of logistic regression on words and pairs of words."""
    words = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True)
    baseline = make_pipeline(words, LogisticRegression(C=10, max_iter=1000))
    baseline.fit(train_rows["text"][:], train_rows["label"][:])
    return float(baseline.score(test_rows["text"][:], test_rows["label"][:]))


def _claim(folder: Path) -> None:
    """Make the folder. Raises ConfigError where it holds something else."""
    if folder.is_dir() and not (folder / RECIPE).is_file() and any(folder.iterdir()):
        raise ConfigError(f"{folder} holds something else than a demo. Give another folder.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise OutputError(f"{folder} cannot be written: {problem.strerror}.") from None


def _open(folder: Path, settings: DemoSettings, rows: Dataset, fresh: bool) -> bool:
    """Whether the folder holds the finished model of this recipe; otherwise it is begun."""
    recipe = _Recipe(
        settings=settings,
        data=data_fingerprint(rows),
        version=f"offramp {offramp.__version__}, torch {torch.__version__}",
    )
    path = folder / RECIPE
    if path.is_file() and (fresh or _recipe_in(path) != recipe):
        logger.info("%s is begun anew.", folder)
        for name in OURS:
            shutil.rmtree(folder / name, ignore_errors=True)
    write_document(path, recipe)
    finished = (folder / MODEL).is_dir()
    if finished:
        logger.info("Using the model of an earlier run in %s; --fresh trains anew.", folder)
    return finished


def _recipe_in(path: Path) -> _Recipe | None:
    try:
        return read_document(_Recipe, path)
    except ConfigError:
        return None


def make_start(folder: Path, settings: DemoSettings, rows: Dataset) -> Path:
    """A tokenizer of these rows and an encoder that knows nothing yet, unless they are there."""
    start = folder / START
    if start.is_dir():
        return start
    tokenizer = make_tokenizer(rows["text"][:], settings)
    torch.manual_seed(settings.seed)
    config = _config(settings, len(tokenizer), rows.features["label"].names)
    with whole_folder(start) as staged:
        BertForSequenceClassification(config).save_pretrained(staged)
        tokenizer.save_pretrained(staged)
    return start


def _train(folder: Path, settings: DemoSettings, rows: Dataset) -> None:
    _say(2, f"a tokenizer of {settings.pieces} pieces, and an encoder that knows nothing yet")
    start = make_start(folder, settings, rows)
    _say(3, f"training {settings.layers} layers and their exits together on {len(rows)} rows")
    options = TrainOptions(
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        head_learning_rate=settings.learning_rate,
        warmup=0.1,
        seed=settings.seed,
        checkpoint_minutes=0.5,
    )
    train(start, rows, folder / MODEL, method="pabee", pooling="mean", options=options)


def make_tokenizer(texts: list[str], settings: DemoSettings) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer of these texts."""
    inner = Tokenizer(models.WordPiece(unk_token=SPECIAL["unk"]))
    inner.normalizer = normalizers.BertNormalizer(lowercase=True)
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = list(SPECIAL.values())
    inner.train_from_iterator(
        texts,
        trainers.WordPieceTrainer(
            vocab_size=settings.pieces, special_tokens=special, show_progress=False
        ),
    )
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(sign, special.index(sign)) for sign in ("[CLS]", "[SEP]")],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        model_max_length=settings.max_length,
        model_input_names=["input_ids", "attention_mask"],
        **{f"{name}_token": sign for name, sign in SPECIAL.items()},
    )


def _config(settings: DemoSettings, pieces: int, labels: list[str]) -> BertConfig:
    return BertConfig(
        vocab_size=pieces,
        hidden_size=settings.width,
        num_hidden_layers=settings.layers,
        num_attention_heads=max(1, settings.width // 32),
        intermediate_size=4 * settings.width,
        max_position_embeddings=settings.max_length,
        type_vocab_size=1,
        attention_probs_dropout_prob=0.0,
        problem_type="single_label_classification",
        id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )


def _record(predictor: Predictor, rows: Dataset, path: Path, role: str) -> ExitTable:
    return record(predictor.model, rows, path, role, processor=predictor.processor)


def _speed(predictor: Predictor, rows: Dataset, policy: Policy) -> Speed:
    """On one thread: a model so small would mostly time how threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return speed_on(predictor, rows, policy)
    finally:
        torch.set_num_threads(threads)


def _examples(
    folder: Path, rows: Dataset, table: ExitTable, calibration: Calibration
) -> tuple[Example, ...]:
    """A row of the first exit in use, of one in the middle and of the last, answered live."""
    layers = replay(table, calibration.point.build_policy()).exit_layers
    used = np.unique(layers)
    classify: Any = pipeline(folder, device="cpu")
    found = []
    for layer in dict.fromkeys([used[0], used[len(used) // 2], used[-1]]):
        row = rows[int(np.flatnonzero(layers == layer)[0])]
        (said,) = classify([row["text"]])
        truth = rows.features["label"].int2str(row["label"])
        found.append(Example(row["text"], truth, **said))
    return tuple(found)
