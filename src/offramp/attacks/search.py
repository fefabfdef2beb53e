"""Greedy search for words to change: which word matters most, and what to put in its place.

TextFooler's search with the goal of WAFFLE (arXiv 2310.19152). A row's search is a generator that
asks for the scores of texts, so that many rows ask in one batch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from datasets import Dataset, Value
from pydantic import Field
from tqdm.auto import tqdm

from offramp.attacks.base import Attack, Victim
from offramp.attacks.kept import Kept
from offramp.data.memory import with_columns
from offramp.engines import Engine, TorchEngine
from offramp.errors import DataError

Parts: TypeAlias = tuple[str, ...]
"""A text, or a text and its pair."""
AT_ONCE = 32
"""Rows whose searches ask together."""
_WORD = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")
_COLUMNS = ("text", "text_pair")


class Spot(NamedTuple):
    """Where a word stands."""

    part: int
    first: int
    end: int
    word: str


class Found(NamedTuple):
    """What a search came to.

    Attributes:
        changed: words that are others now.
        before, after: the objective of the row as it was and as it is.
        queries: texts that the model was asked about.
    """

    parts: Parts
    changed: int = 0
    before: float = 0.0
    after: float = 0.0
    queries: int = 0


Search: TypeAlias = Generator[Sequence[Parts], Sequence[float], Found]


def spots(parts: Parts) -> list[Spot]:
    """All words of a row."""
    return [
        Spot(number, match.start(), match.end(), match.group())
        for number, text in enumerate(parts)
        for match in _WORD.finditer(text)
    ]


def replaced(parts: Parts, changes: Mapping[Spot, str]) -> Parts:
    """The row with other words in some spots."""
    texts = list(parts)
    for spot in sorted(changes, reverse=True):  # from the end, so that spots stay where they are
        text = texts[spot.part]
        texts[spot.part] = text[: spot.first] + changes[spot] + text[spot.end :]
    return tuple(texts)


def in_sight(text: str, tokens: int | None) -> int:
    """Where that part of a text ends that a model of so many tokens can see, at the latest: a word
    has one token at least."""
    if tokens is None:
        return len(text)
    words = list(islice(_WORD.finditer(text), tokens + 1))
    return words[-1].end() if len(words) > tokens else len(text)


def search(parts: Parts, candidates: Callable[[str], Sequence[str]], share: float) -> Search:
    """Change at most `share` of the words, but always one if that helps.

    Words whose absence raises the score most come first. Of the candidates for a word the best one
    is kept, if the score rises.
    """
    every = spots(parts)
    most = max(1, int(share * len(every)))
    choices = {spot: options for spot in every if (options := candidates(spot.word))}
    if not choices:
        return Found(parts)
    before, *without = yield [parts, *(replaced(parts, {spot: ""}) for spot in choices)]
    queries, best = 1 + len(choices), before
    changes: dict[Spot, str] = {}
    order = np.argsort(-np.array(without), kind="stable")
    for spot in (list(choices)[place] for place in order):
        tries = [{**changes, spot: other} for other in choices[spot]]
        scores = yield [replaced(parts, tried) for tried in tries]
        queries += len(tries)
        top = int(np.argmax(scores))
        if scores[top] > best:
            changes, best = tries[top], scores[top]
        if len(changes) == most:
            break
    return Found(replaced(parts, changes), len(changes), before, best, queries)


def side_by_side(
    searches: Iterator[tuple[int, Search]],
    ask: Callable[[Sequence[Parts]], Sequence[float]],
    at_once: int = AT_ONCE,
) -> Iterator[tuple[int, Found]]:
    """Run searches together and give each one's number and end as it comes."""
    running: dict[int, tuple[Search, Sequence[Parts]]] = {}
    while True:
        while len(running) < at_once and (begun := next(searches, None)) is not None:
            number, fresh = begun
            if (ended := _go_on(running, number, fresh, None)) is not None:
                yield number, ended
        if not running:
            return
        scores = iter(ask([text for _, texts in running.values() for text in texts]))
        for number, (one, texts) in list(running.items()):
            if (
                ended := _go_on(running, number, one, list(islice(scores, len(texts))))
            ) is not None:
                yield number, ended


def _go_on(
    running: dict[int, tuple[Search, Sequence[Parts]]],
    number: int,
    one: Search,
    scores: list[float] | None,
) -> Found | None:
    """Let a search see scores; its end, or None where it has another question."""
    try:
        running[number] = one, next(one) if scores is None else one.send(scores)
        return None
    except StopIteration as end:
        running.pop(number, None)
        return end.value


class TextAttack(Attack):
    """An attack that puts other words in the place of some.

    Args:
        share: of a row's words that may change, of those that the model can see; one always may.
    """

    searches: ClassVar[bool] = True
    objective: str = "even"
    share: float = Field(default=0.2, gt=0, le=1)

    def candidates(self, word: str) -> Sequence[str]:
        """What may stand in the place of a word; none leaves it as it is."""
        raise NotImplementedError

    def on(self, victim: Victim, rows: Dataset, kept: Kept) -> tuple[Dataset, Engine]:
        names = [name for name in _COLUMNS if name in rows.column_names]
        parts = zip(*(rows[name][:] for name in names), strict=True)
        texts: dict[int, Parts] = dict(zip(rows["row"][:], parts, strict=True))
        left = [row for row in texts if row not in kept.rows]
        from_left = getattr(victim.processor, "truncation_side", "right") == "left"
        seen = None if from_left else victim.items.longest
        heads = {row: tuple(text[: in_sight(text, seen)] for text in texts[row]) for row in left}
        searches = ((row, search(heads[row], self.candidates, self.share)) for row in left)

        def ask(questions: Sequence[Parts]) -> list[float]:
            return victim.score(questions, self.objective)

        # disable=None: no bar where nobody watches
        quiet = None if victim.progress else True
        with tqdm(total=len(texts), initial=len(texts) - len(left), desc=self.name,
                  unit="row", disable=quiet) as bar:  # fmt: skip
            for row, found in side_by_side(searches, ask):
                kept.add(row, _told(names, texts[row], heads[row], found))
                bar.update()
        victim.queries += sum(found["queries"] for found in kept.rows.values())
        if not victim.queries:
            mend = "Give other rows, or more synonyms." if self.name == "words" else "Give others."
            raise DataError(
                f"No word of {len(texts)} rows is one that attack '{self.name}' knows another for. "
                + mend
            )
        changed = [kept.rows[row]["attacked"] for row in texts]
        columns = {name: ([one[name] for one in changed], Value("string")) for name in names}
        return with_columns(rows, columns), TorchEngine(victim.model)


def _told(names: Sequence[str], texts: Parts, heads: Parts, found: Found) -> dict[str, Any]:
    """What is kept of a row of these texts, whose heads were searched."""
    tails = (text[len(head) :] for text, head in zip(texts, heads, strict=True))
    attacked = [head + tail for head, tail in zip(found.parts, tails, strict=True)]
    return {
        "original": dict(zip(names, texts, strict=True)),
        "attacked": dict(zip(names, attacked, strict=True)),
        "words_changed": found.changed,
        "objective": [found.before, found.after],
        "queries": found.queries,
    }
