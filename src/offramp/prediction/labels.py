"""From raw scores to named answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration.conformal import Sets
from offramp.engines import label_names
from offramp.errors import ConfigError
from offramp.model import MultiExitModel
from offramp.prediction.predictor import Answer
from offramp.registry import nearest

Scores = npt.NDArray[np.floating[Any]]
BROKEN = "NonFiniteError: the model's scores for this row are NaN or infinite."


def softmax(scores: Scores) -> Scores:
    shifted = np.exp(scores - scores.max())
    return shifted / shifted.sum()


def sigmoid(scores: Scores) -> Scores:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-scores))


def none(scores: Scores) -> Scores:
    return scores


FUNCTIONS: dict[str, Callable[[Scores], Scores]] = {
    "softmax": softmax,
    "sigmoid": sigmoid,
    "none": none,
}


def function(name: str) -> Callable[[Scores], Scores]:
    """`softmax`, `sigmoid` or `none`. Raises ConfigError."""
    if name.lower() not in FUNCTIONS:
        known = list(FUNCTIONS)
        raise ConfigError(
            f"Unknown function_to_apply '{name}'.{nearest(name, known)} Known: {', '.join(known)}."
        )
    return FUNCTIONS[name.lower()]


class Labels:
    """Names the answers of a model.

    One class: its name and probability. Label sets: the names of all labels above one half,
    with their probabilities. Regression: the number, as `score`.

    Args:
        scores: also give the scores of all classes.
        sets: also give the classes that may be right, most likely first.
        forced: also give whether a row left because of its budget; rows that did always say so.
    """

    def __init__(
        self,
        model: MultiExitModel,
        scores: bool = False,
        sets: Sets | None = None,
        forced: bool = False,
    ) -> None:
        self.scores, self.sets, self.forced = scores, sets, forced
        self.problem_type = model.problem_type
        self.names = label_names(model)

    def entry(self, row: int, answer: Answer) -> dict[str, Any]:
        """A row of output: JSON data with the keys row, label, score, exit_layer, forced, set,
        scores."""
        if answer.bad:
            return {"row": row, "error": BROKEN}
        said: dict[str, Any] = {"row": row}
        left: dict[str, Any] = {"exit_layer": answer.exit_layer}
        if self.forced or answer.forced:
            left["forced"] = answer.forced
        if self.problem_type == "regression":
            return {**said, "score": float(answer.scores[0]), **left}
        if self.problem_type == "multi_label_classification":
            shares = sigmoid(answer.scores / answer.temperature)
            found = np.flatnonzero(answer.scores > 0)
            said["label"] = [self.names[index] for index in found]
            said["score"] = [float(shares[index]) for index in found]
        else:
            shares = softmax(answer.scores / answer.temperature)
            best = int(answer.scores.argmax())
            said["label"], said["score"] = self.names[best], float(shares[best])
        said |= left
        if self.sets is not None:
            said["set"] = self._set(answer, self.sets)
        if self.scores:
            said["scores"] = dict(zip(self.names, map(float, shares), strict=True))
        return said

    def _set(self, answer: Answer, sets: Sets) -> list[str]:
        """Of a forced answer all classes: limits come from rows that left there by themselves, and
        so the share of sets that hold the right class is no less than without a budget."""
        inside = sets.of(answer.scores[None], [answer.exit_layer])[0] | answer.forced
        order = (-answer.scores).argsort(kind="stable")
        return [self.names[index] for index in order if inside[index]]
