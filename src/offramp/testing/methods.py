"""What every method must keep: it trains its exits, for every task that it declares."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from offramp.exits import ExitKind
from offramp.methods import METHODS, Method
from offramp.model import MultiExitModel
from offramp.objectives import Clock
from offramp.policies import POLICIES
from offramp.testing.pictures import IMAGE_ARCHITECTURES
from offramp.testing.reference import ensure
from offramp.testing.tiny import tiny_batch_for, tiny_model

_ROWS = 8


def check_method(method: Method, arch: str = "bert") -> None:
    """Check a preset on tiny models of each problem type that it declares.

    Args:
        arch: of the models, such as `vit`, see `tiny_model`.

    Raises:
        AssertionError: saying which part does not work for which task.
    """
    ensure(method.problem_types, f"Method '{method.name}' declares no problem type.")
    for problem_type in method.problem_types:
        model = tiny_model(arch, problem_type, spec=exits_on(method, arch, problem_type))
        who = f"Method '{method.name}', {problem_type}"
        _check_training(method, model, who)
        _check_policy_fits(method, model, who)
        _check_saving(model, who)
    known = method.name in METHODS and METHODS[method.name] is method
    ensure(known, f"Method '{method.name}' is not registered: nobody can ask for it by name.")


def exits_on(method: Method, arch: str, problem_type: str) -> ExitKind:
    """A method's exits; of images those that pool take the mean, since a map has no first token."""
    exits = method.exits_for(problem_type)
    pools = hasattr(exits, "pooling") and arch in IMAGE_ARCHITECTURES
    return exits.model_copy(update={"pooling": "mean"}) if pools else exits


def _labels(model: MultiExitModel) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    if model.problem_type == "regression":
        return torch.randn(_ROWS, generator=draw)
    num_labels = cast(int, model.config.num_labels)
    if model.problem_type == "multi_label_classification":
        return torch.randint(2, (_ROWS, num_labels), generator=draw).float()
    return torch.arange(_ROWS) % num_labels


def _check_training(method: Method, model: MultiExitModel, who: str) -> None:
    """Each stage has a finite loss; together they reach every weight of every exit."""
    torch.manual_seed(0)
    objective = method.objective()
    objective.prepare(model.depth)
    model.train()
    reached: set[str] = set()
    # two steps, since some objectives take turns
    for stage, step in itertools.product(objective.stages(), range(2)):
        batch = {
            "labels": _labels(model),
            "problem_type": model.problem_type,
            "clock": Clock(step, 2),
        }
        model.zero_grad()
        losses = objective.training_step(model, tiny_batch_for(model.stock, _ROWS), batch, stage)
        loss = torch.stack(list(losses.values())).sum()
        ensure(math.isfinite(loss.item()), f"{who}: the loss of stage '{stage.name}' is {loss}.")
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        for name, grad in grads.items():
            ensure(torch.isfinite(grad).all(), f"{who}: the gradient of '{name}' is not finite.")
        reached |= {name for name, grad in grads.items() if grad.any()}
    model.eval()
    missed = [name for name, _ in model.exits.named_parameters() if f"exits.{name}" not in reached]
    ensure(not missed, f"{who}: no stage trains {', '.join(missed[:4])}.")


def _check_policy_fits(method: Method, model: MultiExitModel, who: str) -> None:
    policy_name = method.policy_for(model.problem_type)
    variants = POLICIES[policy_name].variants(model.problem_type, model.depth)
    ensure(variants, f"{who}: its policy '{policy_name}' is not for this task.")
    with torch.inference_mode():
        given = [output.signals for output in model.all_exits(tiny_batch_for(model.stock, 2))]
    for policy in variants:
        policy.check(model.problem_type, model.depth)
        for signals in given:
            policy.check_signals(signals)


def _check_saving(model: MultiExitModel, who: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(Path(folder) / "model")
        again = MultiExitModel.from_pretrained(Path(folder) / "model")
    ensure(again.fingerprint() == model.fingerprint(), f"{who}: loads as another model.")
    batch = tiny_batch_for(model.stock, 4)
    with torch.inference_mode():
        pairs = zip(model.all_exits(batch), again.all_exits(batch), strict=True)
        same = all(torch.equal(one.scores, other.scores) for one, other in pairs)
    ensure(same, f"{who}: answers otherwise after it was saved and loaded.")
