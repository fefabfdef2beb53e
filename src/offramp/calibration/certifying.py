"""A point with a promise: searched on some rows, proven on others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from offramp.calibration import probabilities, sentences
from offramp.calibration.certificate import (
    Certificate,
    Procedure,
    Test,
    rows_needed,
    rows_on_average,
)
from offramp.calibration.conformal import Sets, parse_coverage
from offramp.calibration.frontier import PolicySpec, applicable, explore
from offramp.calibration.influence import influence
from offramp.calibration.judge import Judge, Outcome, finite_rows
from offramp.calibration.point import OperatingPoint, check_name
from offramp.calibration.proving import P_VALUES, Floats, bound, losses_under, path_of, prove
from offramp.calibration.risks import RISKS, Risk
from offramp.calibration.search import (
    WORTH_IT,
    Calibration,
    calibrate,
    for_sets,
    point_of,
    rows_for_sets,
    tempered,
)
from offramp.calibration.target import Target, parse_share
from offramp.errors import ConfigError, TableError
from offramp.policies import Full, Policy
from offramp.storage import fingerprint
from offramp.table import ExitTable, refuse_overlap, require_role

_NOTHING = 1e-4
"""What rounding may lose at full depth."""
_OF_SETS = 1
"""The digit of ids that says which rows of a proof serve sets; the last has chosen the proof."""
PROCEDURES: tuple[Procedure, ...] = ("fixed_sequence", "holm", "bonferroni", "expectation")


def certify(
    table: ExitTable,
    proof: ExitTable | None = None,
    *,
    max_drop: float | str | None = None,
    max_disagreement: float | str | None = None,
    max_risk: float | str | None = None,
    risk: str | None = None,
    confidence: float | str = 0.95,
    procedure: Procedure = "fixed_sequence",
    test: Test | None = None,
    policies: Sequence[PolicySpec] | None = None,
    name: str = "default",
    seed: int = 0,
    sets: float | str | None = None,
    temperatures: bool = False,
    progress: bool = False,
) -> Calibration:
    """Choose the fastest policy that is proven to lose no more than a limit.

    Every policy is tried at every threshold on some rows; those that no other beats there in both
    cost and safety form a path, which other rows then test from its safest end. The figures of the
    point are of these other rows. Where nothing is proven the point is full depth, which never
    loses anything, and the messages say about how many rows it would take.

    Args:
        table: to search on, role `tune` or `calibrate`.
        proof: to prove on, role `calibrate`, no row of it in `table`; without it, every second
            row of `table` by a hash of its input, and the search has the others.
        max_drop: accuracy that may be lost against full depth, 0.01 or '1%'. Needs labels.
        max_disagreement: share of rows that may be answered otherwise than at full depth.
        max_risk, risk: the mean of a loss that is one of `RISKS`.
        confidence: that the limit holds for rows like those of the proof, 0.95 or '95%'.
        procedure, test: see `prove`; by default exact where losses are whole numbers, else bets.
        policies, name: see `calibrate`.
        seed: of the order in which rows are bet on.
        sets: see `calibrate`; half of the rows of the proof then serve these alone.
        temperatures: see `calibrate`; fitted on the rows of the search.
        progress: show a bar while candidates are tried.

    Raises:
        ConfigError: demands that mean nothing.
        TableError: the role forbids it, labels are missing, rows are in both tables, or there
            are too few.
    """
    check_name(name)
    target = Target.of(None, max_drop, max_disagreement, False, max_risk, risk)
    measured, sure = RISKS[str(target.loss)], _confidence(confidence)
    _check(target, measured, procedure, test, seed)
    asked = _Asked(target, measured, sure, procedure, test or exact_test(measured) or "betting")
    share = None if sets is None else parse_coverage(sets)
    search, rest, excluded = _parts(table, proof)
    if share is not None:
        rest, apart = rows_for_sets(rest, _OF_SETS)
    _check_rows(measured, search, rest, temperatures)
    specs = applicable(search) if policies is None else policies
    tried = explore(Judge(search, risk=measured), [*specs, "full"], progress)
    path = [one for one in path_of(tried, target.value) if one.cost_reduction >= WORTH_IT]
    chosen = _Chosen.of(path, rest, asked, seed)
    judged = Judge(rest, risk=measured)
    outcome = judged.measure(chosen.policy)
    left_out = {"rows_excluded": excluded}
    point = point_of(name, target, judged, outcome).model_copy(update=left_out)
    if temperatures:
        point = tempered(point, search)
    if share is not None:
        point = point.model_copy(update={"sets": Sets.fit(apart, chosen.policy, share, search)})
    promised = _certificate(asked, chosen, search, rest, seed)
    said = _said(asked, chosen, outcome, promised, sets is not None)
    cautions = sentences.proof(search.rows, rest.rows, excluded, promised.repeated, point.sets)
    point = point.promising(promised)
    return Calibration(point, chosen.place is not None, (*said, *cautions), tuple(tried))


@dataclass(frozen=True)
class _Asked:
    """What is to be promised, and how it is to be proven."""

    target: Target
    risk: Risk
    sure: float
    procedure: Procedure
    test: Test


@dataclass(frozen=True)
class _Chosen:
    """What the rows of a proof choose.

    Attributes:
        path: candidates from the safest to the fastest.
        losses: (rows, candidates), in random order.
        place: of the one chosen, None for full depth.
    """

    path: Sequence[Outcome]
    losses: Floats
    place: int | None

    @classmethod
    def of(cls, path: Sequence[Outcome], rest: ExitTable, asked: _Asked, seed: int) -> _Chosen:
        """The fastest candidate that is proven on these rows."""
        losses = _losses(rest, path, asked.risk, seed)
        limit = asked.target.value
        proven = prove(losses, limit, asked.sure, asked.procedure, asked.test) if path else None
        return cls(path, losses, proven.place if proven else None)

    @property
    def policy(self) -> Policy:
        return Full() if self.place is None else self.path[self.place].policy

    @property
    def lost(self) -> Floats:
        """By the chosen policy, (rows,)."""
        rows = len(self.losses)
        return np.zeros(rows) if self.place is None else self.losses[:, self.place]


def _certificate(
    asked: _Asked, chosen: _Chosen, search: ExitTable, rest: ExitTable, seed: int
) -> Certificate:
    limit, procedure, test = asked.target.value, asked.procedure, asked.test
    moved = influence(
        chosen.losses, chosen.place, limit, asked.sure, procedure, test, asked.risk.lowest
    )
    return Certificate(
        risk=asked.risk.name,
        limit=limit,
        confidence=None if procedure == "expectation" else asked.sure,
        procedure=procedure,
        test="mean" if procedure == "expectation" else test,
        rows=rest.rows,
        repeated=rest.rows - len(np.unique(rest.ids)),
        estimate=float(chosen.lost.mean()),
        bound=_bound(asked, chosen),
        tested=max(1, len(chosen.path)),
        seed=seed,
        faster_after=moved.faster,
        withdrawn_after=moved.withdrawn,
        population=_population(rest),
        searched=search.header.data_fingerprint,
    )


def _said(
    asked: _Asked, chosen: _Chosen, outcome: Outcome, promised: Certificate, sets: bool
) -> list[str]:
    """What is promised, or why nothing is."""
    if chosen.place is not None:
        return sentences.promise(asked.target, outcome, promised)
    near = bool(chosen.path) and chosen.losses[:, 0].mean() >= asked.target.value
    needed = 0 if near else _needed(chosen.path, asked.target, asked.sure, asked.procedure)
    return sentences.no_promise(asked.target, promised, needed, sets)


_LEAST = 1e-9
"""What any number of rows could prove."""
DEMAND = (
    *("target_speedup", "max_drop", "max_disagreement", "max_risk", "risk", "metric", "per_class"),
    *("policies", "name", "sets", "confidence", "procedure"),
    "temperatures",
)
"""What users ask of `choose`, beside the tables."""
_OF_CHOICE = {"target_speedup": None, "metric": None, "per_class": False}
_OF_PROMISE = {"proof": None, "procedure": "fixed_sequence", "test": None, "seed": 0}


def choose(
    table: ExitTable, *, confidence: float | str | None = None, **demand: Any
) -> Calibration:
    """`certify` where there is a confidence, else `calibrate`.

    Raises ConfigError for what the other one takes, unless it is what that assumes anyway.
    """
    other = _OF_PROMISE if confidence is None else _OF_CHOICE
    for name, usual in other.items():
        if demand.pop(name, usual) != usual:
            why = "needs --confidence" if confidence is None else "does not go with --confidence"
            raise ConfigError(f"--{name.replace('_', '-')} {why}.")
    if confidence is None:
        return calibrate(table, **demand)
    return certify(table, confidence=confidence, **demand)


def _confidence(text: float | str) -> float:
    share = parse_share(text)
    if not 0.5 <= share < 1:
        raise ConfigError(f"A confidence of {text} is none. Write 95% or 0.95.")
    return share


def _check(target: Target, risk: Risk, procedure: Procedure, test: Test | None, seed: int) -> None:
    if procedure not in PROCEDURES:
        raise ConfigError(f"Procedure '{procedure}' is unknown. Known: {', '.join(PROCEDURES)}.")
    if test is not None and test not in P_VALUES:
        raise ConfigError(f"Test '{test}' is unknown. Known: {', '.join(P_VALUES)}.")
    if seed < 0:
        raise ConfigError(f"A seed is 0 or more, not {seed}.")
    if not _LEAST <= target.value < 1:
        raise ConfigError(
            f"{target.kind}={target.value:g} cannot be promised: a limit is well above 0 and "
            "below 1, such as 1% or 0.01."
        )
    if test not in (None, "betting", exact := exact_test(risk)):
        values = "0 and 1" if test == "binomial" else "-1, 0 and 1"
        raise ConfigError(
            f"The test '{test}' is for losses of {values}, which '{risk.name}' has not. "
            f"Use '{exact or 'betting'}'."
        )


def _check_rows(risk: Risk, search: ExitTable, rest: ExitTable, temperatures: bool) -> None:
    """Refuse rows that cannot say what is asked."""
    risk.check(search.problem_type, search.labels is not None)
    for part in (search, rest):
        _check_full_depth(risk, part)
    if temperatures:
        probabilities.check(search, risk)


def _check_full_depth(risk: Risk, table: ExitTable) -> None:
    """Refuse a risk by which full depth loses, too: it is taken to lose nothing."""
    worst = float(losses_under(table, Full(), risk).max())
    if worst > _NOTHING:
        raise ConfigError(
            f"Risk '{risk.name}' loses up to {worst:.4g} where a row is answered by full depth. A "
            "promise is of what leaving early loses: subtract what `rows.full` loses, with "
            "lowest=-1; or, if this is rounding, compute in float64."
        )


def exact_test(risk: Risk) -> Test | None:
    """The test that needs no more than to count its losses."""
    if not risk.whole:
        return None
    return "binomial" if risk.lowest == 0 else "paired"


def _parts(table: ExitTable, proof: ExitTable | None) -> tuple[ExitTable, ExitTable, int]:
    """Rows to search on, rows to prove on, both with finite scores, and how many have not."""
    require_role(table, ("tune", "calibrate"), "choose a policy")
    table.check_content()
    fine = finite_rows(table)
    if proof is not None:
        require_role(proof, ("calibrate",), "prove a promise")
        proof.check_content()
        proof.check_model(table.header.model_fingerprint)
        refuse_overlap(table, proof)
        good = finite_rows(proof)
        return _by_id(table, fine), _by_id(proof, good), int((~fine).sum() + (~good).sum())
    apart = for_proof(table)
    if not (fine & apart).any() or not (fine & ~apart).any():
        raise TableError(
            f"{int(fine.sum())} rows with finite scores, of {table.rows}, are too few to search "
            "on one half and prove on the other."
        )
    return _by_id(table, fine & ~apart), _by_id(table, fine & apart), int((~fine).sum())


def for_proof(table: ExitTable) -> npt.NDArray[np.bool_]:
    """Every second row, by a hash of its input: those to prove on where none are given apart."""
    return table.ids % 2 == 1


def proven_on(table: ExitTable, point: OperatingPoint) -> ExitTable:
    """The rows that a point was proven on, or chosen on, of a table that held all."""
    if point.certificate is None:
        return table if point.sets is None else table.take(~for_sets(table))
    mine = for_proof(table) & finite_rows(table)
    return table.take(mine if point.sets is None else mine & ~for_sets(table, _OF_SETS))


def _population(table: ExitTable) -> str:
    """Fingerprint of rows in the order of `_by_id`, with their labels."""
    labels = b"" if table.labels is None else np.ascontiguousarray(table.labels).tobytes()
    return fingerprint(np.ascontiguousarray(table.ids).tobytes(), labels)


def _by_id(table: ExitTable, chosen: npt.NDArray[np.bool_]) -> ExitTable:
    """These rows in an order that is not that of the file, on which sums depend in a last bit."""
    rows = np.flatnonzero(chosen)
    labels = np.zeros(len(rows)) if table.labels is None else np.asarray(table.labels)[rows]
    # inputs that stand twice, with other labels
    keys = (*labels.reshape(len(rows), -1).T, table.ids[rows])
    return table.take(rows[np.lexsort(keys)])


def _losses(table: ExitTable, path: Sequence[Outcome], risk: Risk, seed: int) -> Floats:
    """(rows, candidates), in random order."""
    if not path:
        return np.zeros((table.rows, 0))
    losses = np.stack([losses_under(table, one.policy, risk) for one in path], axis=1)
    return losses[np.random.default_rng(seed).permutation(table.rows)]


def _bound(asked: _Asked, chosen: _Chosen) -> float | None:
    if asked.procedure == "expectation":
        return None
    return 0.0 if chosen.place is None else bound(chosen.lost, asked.sure, asked.test)


def _needed(
    path: Sequence[Outcome], target: Target, sure: float, procedure: Procedure
) -> int | None:
    """About how many rows prove the safest of the path; 0 for none ever, None without a path."""
    if not path or path[0].risk is None or path[0].spread is None:
        return None
    if path[0].risk >= target.value:
        return 0
    if procedure == "expectation":
        return rows_on_average(target.value, path[0].risk)
    if procedure in ("holm", "bonferroni"):  # each candidate gets its part of what may go wrong
        sure = 1 - (1 - sure) / len(path)
    return rows_needed(target.value, sure, path[0].risk, path[0].spread)
