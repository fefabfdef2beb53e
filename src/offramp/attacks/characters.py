"""Slips of the fingers: letters swapped, left out, doubled, or hit beside their key.

Such changes are those of SAME (arXiv 2305.12228). They need no list, in any language with an
alphabet; the keys are those of an English keyboard.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from pydantic import Field

from offramp.attacks.base import ATTACKS
from offramp.attacks.search import TextAttack

_KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST = 3
"""Letters of the shortest word that is changed; shorter ones would become others."""


@ATTACKS.register("characters")
class Characters(TextAttack):
    """Words get a typing error each.

    Args:
        slips: errors to choose from, for each word.
        seed: the same word gets the same slips, wherever it stands.
    """

    name = "characters"
    slips: int = Field(default=4, ge=1, le=64)
    seed: int = 0

    def candidates(self, word: str) -> Sequence[str]:
        if len(word) < SHORTEST:
            return ()
        draw = random.Random(f"{self.seed} {word}")
        kinds = list(_SLIPS)
        draw.shuffle(kinds)
        tries = [kinds[n % len(kinds)](word, draw) for n in range(4 * self.slips)]
        fresh = dict.fromkeys(one for one in tries if one not in ("", word))
        return list(fresh)[: self.slips]


def _swapped(word: str, draw: random.Random) -> str:
    at = draw.randrange(len(word) - 1)
    return word[:at] + word[at + 1] + word[at] + word[at + 2 :]


def _dropped(word: str, draw: random.Random) -> str:
    at = draw.randrange(len(word))
    return word[:at] + word[at + 1 :]


def _doubled(word: str, draw: random.Random) -> str:
    at = draw.randrange(len(word))
    return word[: at + 1] + word[at:]


def _beside(word: str, draw: random.Random) -> str:
    at = draw.randrange(len(word))
    near = _NEAR.get(word[at].lower(), "")
    if not near:
        return word
    key = draw.choice(near)
    return word[:at] + (key.upper() if word[at].isupper() else key) + word[at + 1 :]


_SLIPS: tuple[Callable[[str, random.Random], str], ...] = (_swapped, _dropped, _doubled, _beside)
_NEAR = {
    key: row[max(0, at - 1) : at] + row[at + 1 : at + 2]
    for row in _KEYS
    for at, key in enumerate(row)
}
