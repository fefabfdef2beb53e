"""What transformers' classification pipelines return, and the exit layer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import partial
from typing import Any

import numpy as np
import torch

from offramp.engines import UNLIMITED, Budget, windows
from offramp.errors import ConfigError, DataError
from offramp.prediction.items import Item
from offramp.prediction.labels import BROKEN, Labels, Scores, function, none
from offramp.prediction.predictor import DEFAULT, Answer, Point, Predictor

_UNSET: Any = object()
_INSTEAD = {
    "batch_size": "rows are batched by length; max_rows and max_tokens of `pipeline` bound a batch",
    "max_length": "give it to `pipeline`, so that all calls cut alike",
    "padding": "batches are padded as little as their rows allow",
    "task": "the model says what it is for",
    "tokenizer": "the one that is saved beside the model is used",
    "truncation": "texts are cut at max_length, and that is said",
}
"""Options of transformers' pipelines that there are none of here, and why."""


def pipeline(
    model: str | os.PathLike[str],
    point: Point = DEFAULT,
    *,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    backend: str = "torch",
    **options: Any,
) -> Classifier:
    """A callable like `transformers.pipeline("text-classification", model)`, or for images like
    `transformers.pipeline("image-classification", model)`.

    Args:
        model: a folder or hub id of a multi-exit model.
        point: an operating point of the folder, a point, a policy, or `full`. Without a
            point in the folder every row runs to full depth, and that is said aloud.
        device: None is the first GPU, or the CPU where there is none.
        dtype, backend, options: as of `Predictor.load`.

    Example:
        >>> classify = pipeline("my-early-exit-model")
        >>> classify("A dull story.")
        [{'label': 'negative', 'score': 0.98, 'exit_layer': 3}]
    """
    _refuse(options.keys() - {"max_length"})
    how = {"device": device, "dtype": dtype, "backend": backend, **options}
    again = partial(pipeline, model, point, **how)
    return Classifier(Predictor.load(model, point, **how), again)


class Classifier:
    """Classifies texts or images; any number of threads may share one.

    Another process gets one of its own: a copy is loaded anew from where the model lies.

    Args:
        predictor: answers.
        again: makes the same one; without it there are no copies.
    """

    def __init__(self, predictor: Predictor, again: Callable[[], Classifier] | None = None) -> None:
        self.predictor, self._again = predictor, again
        self._names = Labels(predictor.model).names
        self._function = function(_usual_function(predictor))

    def __reduce__(self) -> tuple[Callable[[], Classifier], tuple[()]]:
        if self._again is None:
            raise TypeError("Only what `pipeline` made of a folder or hub id can be copied.")
        return self._again, ()

    def __call__(
        self,
        inputs: Item | Iterable[Item],
        *,
        point: Point | None = None,
        top_k: int | None = _UNSET,
        function_to_apply: str | None = None,
        budget: Budget = UNLIMITED,
        **others: Any,
    ) -> Any:
        """Classify one item, a list of them, or any iterable of them, lazily.

        Args:
            inputs: a str, (text, text_pair) or {"text": ..., "text_pair": ...}; of a model that
                reads images the path of a file, a PIL image or {"image": ...}.
            point: another operating point, for this call only; a dict may name its own `point`,
                `max_depth` and `max_seconds`.
            top_k: this many labels per item, best first; None is all of them.
            function_to_apply: `softmax`, `sigmoid` or `none`; by default the task's own.
            budget: of each item; answers that it forced have `forced`.
            others: refused, with what there is instead of those that transformers has.

        Returns:
            Dicts with label, score and exit_layer, nested as transformers nests them: a list
            with one for a str, one for a dict or pair, a list for a list; with `top_k`, which is
            5 for images, a list of them per item. A row whose scores are not finite has `error`
            instead.
        """
        _refuse(others.keys())
        if others:
            raise TypeError(f"Unknown options of a call: {', '.join(others)}.")
        if top_k is not _UNSET and top_k is not None and (type(top_k) is not int or top_k < 1):
            raise ConfigError(f"top_k={top_k!r}: give a whole number from 1, or None for all.")
        ready = self.predictor.ready(point)
        apply = self._function if function_to_apply is None else function(function_to_apply)

        items = self.predictor.items
        if top_k is _UNSET and items.usual_top_k is not None:
            top_k = items.usual_top_k

        def answers(asked: list[Item]) -> list[Any]:
            answered, cut = self.predictor.answer(asked, ready, budget=budget)
            self.predictor.say_cut(cut)
            return [self._said(answer, apply, top_k) for answer in answered]

        if items.is_one(inputs):
            said = answers([inputs])
            return said if top_k is _UNSET else said[0]
        if isinstance(inputs, Mapping | tuple):
            return answers([inputs])[0]
        if isinstance(inputs, list):
            return answers(inputs)
        try:
            # to go through a table is to go through the names of its columns
            if isinstance(inputs, bytes | np.ndarray) or hasattr(inputs, "columns"):
                raise TypeError
            asked = iter(inputs)
        except TypeError:
            raise DataError(
                f"Not an input: {inputs!r:.200}, a {type(inputs).__name__}. Give a text, a pair, "
                "an image, a dict or an iterable of them; of a table or an array a list, as in "
                "table['text'].tolist()."
            ) from None
        return self._lazily(asked, answers)

    def _lazily(
        self, items: Iterable[Item], answers: Callable[[list[Item]], list[Any]]
    ) -> Iterator[Any]:
        for window in windows(items, self.predictor.items.ahead * self.predictor.max_rows):
            yield from answers(window)

    def _said(
        self, answer: Answer, apply: Callable[[Scores], Scores], top_k: int | None
    ) -> dict[str, Any] | list[dict[str, Any]]:
        if answer.bad:
            broken = {"error": BROKEN, "exit_layer": answer.exit_layer}
            return broken if top_k is _UNSET else [broken]
        raw = apply is none  # as transformers gives them
        scores = answer.scores if raw else apply(answer.scores / answer.temperature)
        best = (-scores).argsort(kind="stable")[: 1 if top_k is _UNSET else top_k]
        said = [
            {
                "label": self._names[index],
                "score": float(scores[index]),
                "exit_layer": answer.exit_layer,
                **({"forced": True} if answer.forced else {}),
            }
            for index in best
        ]
        return said[0] if top_k is _UNSET else said


def _refuse(names: Set[str]) -> None:
    """Say what there is instead of an option of transformers. Raises ConfigError."""
    for name in sorted(names & _INSTEAD.keys()):
        raise ConfigError(f"There is no option '{name}' here: {_INSTEAD[name]}. Leave it out.")


def _usual_function(predictor: Predictor) -> str:
    """As transformers chooses: a config that names no task and one label means a probability."""
    kind = predictor.model.config.problem_type
    if kind == "regression":
        return "none"
    one = predictor.model.config.num_labels == 1
    return "sigmoid" if kind == "multi_label_classification" or one else "softmax"
