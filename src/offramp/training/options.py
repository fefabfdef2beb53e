"""What a user may set about a training run, and its translation for transformers."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from transformers import TrainingArguments
from transformers.integrations import get_reporting_integration_callbacks

from offramp.engines import lacks
from offramp.errors import ConfigError
from offramp.storage import Strict

GIB = 2**30
logger = logging.getLogger("offramp")


class TrainOptions(Strict):
    """Settings of a run; None means the default of what is run, see `TRAIN` and `ATTACH`.

    Attributes:
        epochs: passes over the rows, may be a fraction.
        max_steps: ends a stage after this many updates, whatever `epochs` says.
        batch_size: rows per update and device, before accumulation.
        learning_rate: peak, linear decay to 0.
        head_learning_rate: of exits and of a new task head, which start from nothing.
        warmup: share of the updates over which the rate rises.
        weight_decay: on matrices, not on biases and norms.
        gradient_accumulation: batches per update.
        bf16: autocast; `auto` where a GPU supports it. On processors without instructions for it
            it is slower than fp32.
        seed: of new weights, the order of rows and dropout.
        checkpoint_minutes: a killed run loses at most about this much.
        save_steps: checkpoint every so many updates instead.
        report_to: trackers, such as `tensorboard`; none unless named.
        quiet: no progress bar.
        cache_limit: bytes of disk that pooled vectors may take, where the model is frozen.
    """

    epochs: float | None = Field(default=None, gt=0)
    max_steps: int | None = Field(default=None, gt=0)
    batch_size: int | None = Field(default=None, gt=0)
    learning_rate: float | None = Field(default=None, gt=0)
    head_learning_rate: float | None = Field(default=None, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    gradient_accumulation: int = Field(default=1, gt=0)
    bf16: bool | Literal["auto"] = "auto"
    seed: int = Field(default=42, ge=0, lt=2**32)
    checkpoint_minutes: float = Field(default=5.0, gt=0)
    save_steps: int | None = Field(default=None, gt=0)
    report_to: tuple[str, ...] = ()
    quiet: bool = False
    cache_limit: int = Field(default=8 * GIB, ge=0)

    def filled(self, defaults: TrainOptions) -> TrainOptions:
        """These options, and the defaults for those that were not given."""
        asked = {name: getattr(self, name) for name in self.model_fields_set}
        given = {name: value for name, value in asked.items() if value is not None}
        return TrainOptions.model_validate({**dict(defaults), **given})

    def what_changes_weights(self) -> dict[str, Any]:
        """Everything but how often to save and what to show."""
        silent = {"checkpoint_minutes", "save_steps", "report_to", "quiet", "cache_limit"}
        return self.model_dump(mode="json", exclude=silent)


TRAIN = TrainOptions(epochs=3, batch_size=32, learning_rate=3e-5, head_learning_rate=1e-3)
"""Defaults of fine-tuning backbone and exits."""

ATTACH = TrainOptions(epochs=30, batch_size=256, learning_rate=1e-2, weight_decay=0.0)
"""Defaults of fitting exits to cached vectors of a frozen model."""

ATTACH_TOKENS = TrainOptions(epochs=3, batch_size=32, learning_rate=1e-2, weight_decay=0.0)
"""Defaults of fitting exits to a frozen model that is run again for every batch."""

FEWEST_UPDATES = 400
"""There; few rows are passed more often than `epochs` says, unless the user says how often."""


def training_arguments(
    options: TrainOptions, folder: Path, epochs: float, decay: bool = True
) -> TrainingArguments:
    """Options as transformers' own, with the row order and checkpoints left to us."""
    try:
        arguments = TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=epochs,
            max_steps=options.max_steps or -1,
            per_device_train_batch_size=options.batch_size or 32,
            learning_rate=options.learning_rate or 3e-5,
            lr_scheduler_type="linear" if decay else "constant_with_warmup",
            warmup_steps=options.warmup,
            weight_decay=options.weight_decay,
            gradient_accumulation_steps=options.gradient_accumulation,
            bf16=_wants_bf16(options.bf16),
            use_cpu=not torch.accelerator.is_available(),
            seed=options.seed,
            save_strategy="steps" if options.save_steps else "no",
            save_steps=options.save_steps or 500,
            save_total_limit=2,
            logging_steps=50,
            logging_nan_inf_filter=False,
            report_to=list(options.report_to) or "none",
            disable_tqdm=options.quiet or not sys.stderr.isatty(),
            remove_unused_columns=False,
            label_names=["labels"],
            dataloader_pin_memory=torch.cuda.is_available(),
        )
    except (ValueError, ImportError, RuntimeError) as problem:
        raise ConfigError(f"These training options do not work here: {problem}") from problem
    # several GPUs in one process would mean nn.DataParallel, which copies modules but not
    # the backbone that points at them; use torchrun for several GPUs
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1
    return arguments


def check_here(options: TrainOptions) -> None:
    """Raise ConfigError now for what this machine cannot do, not when training starts."""
    warn_of_slow_bf16(options.bf16)
    arguments = training_arguments(options, Path("unused"), epochs=1.0)
    try:
        for tracker in get_reporting_integration_callbacks(arguments.report_to):
            tracker()
    except (ValueError, RuntimeError, ImportError) as problem:
        raise ConfigError(f"Trackers {', '.join(options.report_to)}: {problem}") from problem


def warn_of_slow_bf16(choice: bool | str | None) -> None:
    """Warn where bf16 was asked for and the processor has no instructions for it."""
    if choice is not True or torch.accelerator.is_available():
        return
    if lacks("avx512_bf16", "amx_bf16"):
        logger.warning(
            "This processor has no instructions for bf16: training will be slower than in fp32. "
            "Leave --bf16 out."
        )


def _wants_bf16(choice: bool | str) -> bool:
    if choice == "auto":
        return torch.cuda.is_available() and torch.cuda.is_bf16_supported()
    return bool(choice)
