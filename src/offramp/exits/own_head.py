"""The stock model's own head after every layer: no parameter is added (ELBERT)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, Widened


@EXITS.register("own_head")
class OwnHeadSpec(ExitKind):
    """Every layer answers through the pooler and classifier of full depth.

    Where layers differ in width, pooled vectors are made as wide as the head wants them, see
    `Widened`. Layers have to learn to be read so: the model is trained with its exits, and there
    is nothing to attach.
    """

    kind = "own_head"
    own_answers = False

    @property
    def reads(self) -> str:
        return "what the model's own head makes of the tokens"

    def build(self, host: Host, num_scores: int) -> Exits:
        widened = Widened(host)
        made = {str(n): OwnHead(host, widened) for n in range(1, host.depth)}
        return Exits({**made, "widened": widened} if widened else made)


class OwnHead(nn.Module):
    """Asks the host's head.

    Args:
        host: the model it hangs on.
        widened: of all exits.
    """

    def __init__(self, host: Host, widened: Widened) -> None:
        super().__init__()
        self._head, self._pool, self._answer = host.head, host.pool, host.answer
        view = host.view
        self._view: Callable[[Tensor], Tensor] | None = None if view is None else view.__call__
        # a bound method, so that what is shared is not registered here as well
        self._widened: Callable[[Tensor], Tensor] | None = widened.forward if widened else None

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        if self._widened is None:
            return ExitOutput(self._head(hidden, mask)), carry
        viewed = hidden if self._view is None else self._view(hidden)
        return ExitOutput(self._answer(self._widened(self._pool(viewed, mask)))), carry
