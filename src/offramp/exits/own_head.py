"""The stock model's own head after every layer: no parameter is added (ELBERT)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from offramp.exits.base import EXITS, ExitKind, ExitOutput, Exits, Host, one_width


@EXITS.register("own_head")
class OwnHeadSpec(ExitKind):
    """Every layer answers through the pooler and classifier of full depth.

    They have to learn that, so the model is trained with its exits; there is nothing to attach.
    """

    kind = "own_head"
    own_answers = False

    @property
    def reads(self) -> str:
        return "what the model's own head makes of the tokens"

    def build(self, host: Host, num_scores: int) -> Exits:
        one_width(host, self.kind)
        return Exits({str(number): OwnHead(host) for number in range(1, host.depth)})


class OwnHead(nn.Module):
    """Asks the host's head.

    Args:
        host: the model it hangs on.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self._head = host.head

    def forward(
        self, hidden: Tensor, mask: Tensor | None, carry: Any = None
    ) -> tuple[ExitOutput, Any]:
        return ExitOutput(self._head(hidden, mask)), carry
