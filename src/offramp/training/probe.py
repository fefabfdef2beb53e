"""Which pooling suits a model: measured, because no rule of thumb holds.

Early layers of a sentence encoder keep their content in the mean of the tokens; a fine-tuned
ALBERT moves it to [CLS], and only fine-tuning shows that. So a frozen model is probed as it
is, and a model that will be trained is trained a little first, on a copy.
"""

from __future__ import annotations

import copy
import logging
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from transformers import PreTrainedModel, set_seed

from offramp.engines.batching import plan_batches
from offramp.exits import ExitOutput, ExitSpec, Pooling
from offramp.metrics import disagreement
from offramp.model import MultiExitModel, MultiExitOutput
from offramp.objectives import FullDepth, Objective, Stage, task_loss
from offramp.training.batches import SAMPLE, Rows
from offramp.training.cache import pooled_vectors
from offramp.training.options import TrainOptions
from offramp.training.running import StockAlone, fresh_parameters, make_trainer, move
from offramp.training.trainer import Trainee

logger = logging.getLogger("offramp")

PROBED: tuple[Pooling, ...] = ("cls", "mean")
REHEARSED: tuple[Pooling, ...] = ("cls", "mean")
FEWEST_STEPS, MAX_STEPS = 80, 150
RIDGE = 0.05
"""Strength of the ridge, as a share of the number of rows, on standardised vectors."""

Table = dict[Pooling, list[float]]
"""Score of exits 1..L-1 under each pooling; higher is better."""


def choose_pooling(model: MultiExitModel, rows: Rows, seed: int) -> Pooling:
    """The pooling whose vectors tell most about the frozen model's own full-depth answers.

    A ridge regression per layer from the pooled vectors of at most 2,000 rows to the
    full-depth scores, compared with these on a quarter of the rows that it has not seen.
    """
    move(model, PartialState().device)
    poolings = _fitting(PROBED, model)
    vectors, scores = _probe_vectors(_views(model.stock, poolings), rows.sample(seed))
    table: Table = {
        pooling: [_ridge_agreement(x, scores, model.problem_type) for x in found]
        for pooling, found in zip(poolings, vectors, strict=True)
    }
    return _best(table, "held-out agreement with full depth")


def rehearse(
    model: MultiExitModel, objective: Objective, rows: Rows, options: TrainOptions, new_head: bool
) -> Pooling:
    """The pooling that does better after a short training of a throw-away copy.

    Exits with `cls` and with `mean` are trained side by side on one backbone for an eighth of
    the run, 80 to 150 steps but at most half of it, and compared by their loss on rows held
    out, which tells sooner than accuracy does. Where the objective trains the stock model
    first, only that is rehearsed, and the copy is then probed; where it never trains it, the
    model is probed as it is.
    """
    poolings = _fitting(REHEARSED, model)
    if len(poolings) == 1:
        return poolings[0]
    stages = objective.ahead()
    if all(stage.trainable == "exits" for stage in stages):
        return choose_pooling(model, rows, options.seed)
    order = rows.shuffled(options.seed)
    held_out = max(1, min(SAMPLE // 4, len(order) // 5))
    seen, unseen = rows.part(order[held_out:]), rows.part(order[:held_out])
    stock = copy.deepcopy(model.stock)
    set_seed(options.seed)
    first = stages[0]
    part: nn.Module
    if first.trainable == "stock":
        part, objective = StockAlone(stock), FullDepth()
    else:
        # a copy as well: what an objective learns here would be lost in a run that is continued
        inner = copy.deepcopy(objective)
        part, objective = SideBySide(stock, poolings), Both(inner, poolings)
    trainee = Trainee(part, objective, first, model.problem_type)
    steps = _rehearsal_steps(len(seen.lengths), options)
    if PartialState().is_main_process:
        logger.info("Rehearsing %d steps to choose a pooling.", steps)
    short = options.model_copy(update={"max_steps": steps, "save_steps": None, "report_to": ()})
    with tempfile.TemporaryDirectory() as folder:
        fresh = fresh_parameters(trainee, stock, new_head)
        make_trainer(trainee, seen, short, Path(folder), fresh, decay=False).train()
    if isinstance(part, StockAlone):
        return choose_pooling(MultiExitModel.from_stock(stock), rows, options.seed)
    return _best(_losses(part, unseen, model.problem_type), "held-out loss")


class SideBySide(nn.Module):
    """One backbone with several sets of exits; gives the outputs of all sets in a row."""

    def __init__(self, stock: PreTrainedModel, poolings: Sequence[Pooling]) -> None:
        super().__init__()
        self.stock = stock
        self.poolings = poolings
        self._views = _views(stock, poolings)
        self.exits = nn.ModuleList(view.exits for view in self._views)

    def forward(self, **batch: Tensor) -> MultiExitOutput:
        first = self._views[0]
        flow = first.backbone.embed(batch)
        outputs: list[list[ExitOutput]] = [[] for _ in self._views]
        for layer in range(1, first.depth + 1):
            flow = first.backbone.layer(layer, flow)
            for view, found in zip(self._views, outputs, strict=True):
                found.append(view.exit_at(layer)(flow.hidden, flow.mask)[0])
        return MultiExitOutput(exits=tuple(output for found in outputs for output in found))


class Both(Objective):
    """An objective applied to each set of exits of a `SideBySide`."""

    def __init__(self, inner: Objective, poolings: Sequence[Pooling]) -> None:
        super().__init__()
        self.inner = inner
        self.poolings = poolings

    def losses(
        self, outputs: Sequence[ExitOutput], batch: Mapping[str, Any], stage: Stage
    ) -> dict[str, Tensor]:
        return {
            f"{pooling}.{name}": part
            for pooling, found in zip(self.poolings, self._sets(outputs), strict=True)
            for name, part in self.inner.losses(found, batch, stage).items()
        }

    def _sets(self, outputs: Sequence[ExitOutput]) -> list[Sequence[ExitOutput]]:
        depth = len(outputs) // len(self.poolings)
        return [outputs[start : start + depth] for start in range(0, len(outputs), depth)]


def _fitting(poolings: Sequence[Pooling], model: MultiExitModel) -> tuple[Pooling, ...]:
    """Those of the poolings that make sense for the model's states."""
    return tuple(pooling for pooling in poolings if pooling in model.backbone.poolings)


def _views(stock: PreTrainedModel, poolings: Sequence[Pooling]) -> list[MultiExitModel]:
    """Models that share `stock` and differ in pooling."""
    return [MultiExitModel.from_stock(stock, ExitSpec(pooling=p)) for p in poolings]


def _rehearsal_steps(count: int, options: TrainOptions) -> int:
    update = (options.batch_size or 1) * options.gradient_accumulation
    total = options.max_steps or math.ceil(count / update * (options.epochs or 1))
    # fewer tell little (docs/results/defaults.md), but no run must be mostly rehearsal
    return max(1, min(MAX_STEPS, max(total // 8, min(FEWEST_STEPS, total // 2))))


@torch.inference_mode()
def _losses(model: SideBySide, rows: Rows, problem_type: str) -> Table:
    """Minus the held-out task loss of exits 1..L-1 of each set."""
    model.eval()
    device = model.stock.device
    found = []
    for block in plan_batches(rows.lengths.numpy()):
        batch = {name: value.to(device) for name, value in rows.batch(block).items()}
        labels = batch.pop("labels")
        outputs = model(**batch).exits
        losses = torch.stack([task_loss(o.scores, labels, problem_type) for o in outputs])
        found.append(losses.cpu() * len(block) / len(rows.lengths))
    table = -torch.stack(found).sum(dim=0).view(len(model.poolings), -1)[:, :-1]
    return dict(zip(model.poolings, table.tolist(), strict=True))


def _probe_vectors(views: list[MultiExitModel], rows: Rows) -> tuple[list[list[Tensor]], Tensor]:
    """Per view what exits 1..L-1 pool, (rows, width) each, and full-depth scores."""
    views[0].eval()
    blocks = plan_batches(rows.lengths.numpy())
    made = [pooled_vectors(views, rows.batch(block)) for block in blocks]
    vectors = [
        [torch.cat(parts).cpu() for parts in zip(*(found[n] for found, _ in made), strict=True)]
        for n in range(len(views))
    ]
    return vectors, torch.cat([scores for _, scores in made]).cpu()


def _ridge_agreement(vectors: Tensor, scores: Tensor, problem_type: str) -> float:
    """1 - disagreement with `scores` of a ridge regression, on every fourth row."""
    held_out = torch.arange(len(vectors)) % 4 == 0
    known = ~held_out if len(vectors) > 4 else torch.ones_like(held_out)
    x = vectors.double()
    mean, spread = x[known].mean(dim=0), x[known].std(dim=0, correction=0) + 1e-6
    x, offset = (x - mean) / spread, scores[known].double().mean(dim=0)
    gram = x[known].T @ x[known]
    gram += RIDGE * int(known.sum()) * torch.eye(len(gram), dtype=gram.dtype)
    weights = torch.linalg.solve(gram, x[known].T @ (scores[known].double() - offset))
    guessed = x[held_out] @ weights + offset
    return 1 - disagreement(guessed.numpy(), scores[held_out].double().numpy(), problem_type)


def _best(table: Table, what: str) -> Pooling:
    """Log the table; the pooling with the best mean over exits."""
    means = {pooling: sum(row) / max(1, len(row)) for pooling, row in table.items()}
    best = max(means, key=lambda pooling: means[pooling])
    if PartialState().is_main_process:
        logger.info("Pooling '%s', by the mean %s of exits 1, 2, ...:", best, what)
        for pooling, row in table.items():
            cells = " ".join(f"{abs(value):.3f}" for value in row)
            logger.info("  %-7s %.3f = mean of %s", pooling, abs(means[pooling]), cells)
    return best
