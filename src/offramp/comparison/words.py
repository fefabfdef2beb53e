"""A board in words: who wins, and how it stands to what it is compared with."""

from __future__ import annotations

from offramp.comparison.board import Board, Difference, Figure, MethodRow

LEVEL = 0.05
"""A paired difference whose p after Holm is smaller is significant."""
ABOVE, BELOW, OPEN = "above", "below", "not told apart"


def verdict(found: Difference) -> str:
    """What a difference from the reference says: ABOVE, BELOW or OPEN."""
    if found.p_holm >= LEVEL:
        return OPEN
    return ABOVE if found.value > 0 else BELOW


def signed(value: float, digits: int = 4) -> str:
    """'+0.0120', with a true minus sign; no sign for what rounds to nothing."""
    said = f"{value:+.{digits}f}"
    return said[1:] if float(said) == 0 else said.replace("-", "\N{MINUS SIGN}")


def written(value: float, digits: int = 4) -> str:
    """'0.8612', with a true minus sign."""
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def interval(found: Figure, digits: int = 4) -> str:
    """'0.8512 to 0.8634', of differences with their signs."""
    if isinstance(found, Difference):
        return f"{signed(found.low, digits)} to {signed(found.high, digits)}"
    return f"{written(found.low, digits)} to {written(found.high, digits)}"


def chance(found: Difference) -> str:
    """'p = 0.03 after Holm'."""
    p = f"= {found.p_holm:.2g}" if found.p_holm >= 0.001 else "< 0.001"
    return f"p {p} after Holm"


def partial(board: Board, row: MethodRow) -> str:
    """'2 of 3 seeds' of a method that lacks some; '' of others."""
    there, wanted = row.seeds, len(board.seeds)
    return f"{there} of {wanted} seeds" if there < wanted else ""


def remarks(board: Board, row: MethodRow) -> str:
    """What a reader of its row has to know: lacking seeds, a learning rate that none chose."""
    own = row.learning_rate is None and any(one.learning_rate for one in board.methods)
    return ", ".join(filter(None, (partial(board, row), "a learning rate of its own" * own)))


def headline(board: Board) -> str:
    """One sentence: which method is best, by how much, against what, and whether that counts."""
    if not board.methods:
        return "No run has finished, so there is nothing to compare."
    best = board.methods[0]
    area = written(best.row.area.value)
    found = f"the best mean {board.metric} over all costs from 20 % to full depth, {area}"
    if lacking := partial(board, best):  # those that lack none would stand before it
        return f"No method has all seeds yet. {best.name} has {found}, with {lacking}."
    rival, difference = _rival(board)
    if rival is None:
        return f"{best.name} has {found}; no other method was run."
    if difference is None:
        return f"{best.name} has {found}; its difference from {rival.name} was not tested."
    said = f"significantly above {rival.name}: {_by(difference)}."
    if verdict(difference) == ABOVE:
        return f"{best.name} wins: it has {found}, {said}"
    return f"{best.name} has {found}, but is not {said}"


def _by(found: Difference) -> str:
    return f"{signed(found.value)} (95 % interval {interval(found)}, {chance(found)})"


def _rival(board: Board) -> tuple[MethodRow | None, Difference | None]:
    """Whom the best is told to be better than, and by how much: the reference, or who follows."""
    best, *others = board.methods
    if best.name != board.reference:
        reference = [one for one in others if one.name == board.reference]
        return (*reference, *others, None)[0], best.against.get("area")
    if not others:
        return None, None
    found = others[0].against.get("area")
    return others[0], found and turned(found)


def turned(found: Difference) -> Difference:
    """The same difference seen from the other side."""
    return found.model_copy(update={"value": -found.value, "low": -found.high, "high": -found.low})


def tally(board: Board) -> str:
    """How many methods are above, below and level with the reference; '' without any tested."""
    found = [verdict(one.against["area"]) for one in board.methods if "area" in one.against]
    if not found:
        return ""
    counts = ", ".join(f"{found.count(word)} {word}" for word in (ABOVE, OPEN, BELOW))
    return f"Against {board.reference}, of {len(found)} other methods: {counts}."


def beside_plain(board: Board) -> str:
    """What the best method gives for half of the cost; '' where that was not tested."""
    found = board.methods[0].against_plain.get("2") if board.methods else None
    if found is None:
        return ""
    said = verdict(found).replace(OPEN, f"{OPEN} from")
    return (
        f"At half the cost, {board.methods[0].name} is {said} the plain fine-tune at full depth: "
        f"{_by(found)}."
    )


def duration(seconds: float) -> str:
    """'48 s', '12 min', '1.4 h'."""
    if seconds < 100:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def count(number: int) -> str:
    """'830', '12.3 k', '1.20 M'."""
    if number < 1000:
        return str(number)
    value, unit = (number / 1e3, "k") if number < 999_500 else (number / 1e6, "M")
    return f"{value:.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"
