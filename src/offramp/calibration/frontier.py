"""The candidates among which a point is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from offramp.calibration.everything import everything, per_exit_path
from offramp.calibration.fitting import FITS
from offramp.calibration.judge import Judge, Outcome
from offramp.errors import ConfigError
from offramp.policies import POLICIES, Fixed, PerExit, Policy, make_policy
from offramp.table import ExitTable

PolicySpec = str | Mapping[str, Any] | Policy
BASELINE, ALL = Fixed.name, "all"


def measure(
    table: ExitTable, policy: PolicySpec, metric: str | None = None, per_class: bool = False
) -> Outcome:
    """What a policy does on a table of any role; nothing is chosen here."""
    policy = fitting_policy(policy, table)
    return Judge(table, metric, per_class).measure(policy)


def frontier(
    table: ExitTable,
    metric: str | None = None,
    policies: Sequence[PolicySpec] | None = None,
) -> list[Outcome]:
    """Every candidate's cost and score, `full` and the `fixed` baseline always among them.

    Args:
        policies: a name means the best bars of that policy are searched, `all` everything that
            fits; a policy with its options is tried as it is. By default as `applicable` says.
    """
    judge = Judge(table, metric)
    specs = applicable(table) if policies is None else policies
    return explore(judge, [*specs, BASELINE, "full"])


def applicable(table: ExitTable) -> list[str]:
    """Names of the policies for a search that names none, without the baseline.

    Those that fit the table's task, read no signal that it lacks, and are `searched`.
    """
    signals = set(table.header.signals)

    def fits(kind: type[Policy]) -> bool:
        known = table.problem_type in kind.problem_types and signals.issuperset(kind.signals)
        return known and kind.searched

    return [name for name in POLICIES if name != BASELINE and fits(POLICIES[name])]


def fitting_policy(spec: PolicySpec, table: ExitTable) -> Policy:
    """The policy of a spec, if the table's task and signals allow it. Raises ConfigError."""
    policy = make_policy(spec)
    policy.check(table.problem_type, table.depth)
    policy.check_signals(table.header.signals)
    return policy


def explore(judge: Judge, specs: Sequence[PolicySpec], progress: bool = False) -> list[Outcome]:
    """The outcome of every candidate, each policy once.

    Args:
        specs: see `frontier`; the name `all` is everything that fits, see `everything`.
        progress: show a bar.
    """
    searches: list[Iterable[Outcome]] = []
    for spec in specs:
        searches += everything(judge) if spec == ALL else _searches(judge, spec)
    outcomes: dict[Policy, Outcome] = {}
    with tqdm(searches, desc="search", unit="policy", disable=None if progress else True) as bar:
        for found in bar:
            for outcome in found:
                outcomes.setdefault(outcome.policy, outcome)
            bar.set_postfix_str(f"{len(outcomes):,} candidates", refresh=False)
    return list(outcomes.values())


def _searches(judge: Judge, spec: PolicySpec) -> Iterator[Iterator[Outcome]]:
    for policy, bars in _starts(spec, judge.table):
        if bars and isinstance(policy, PerExit):
            yield per_exit_path(judge, policy.policy)
        else:
            yield judge.search(policy, bars)


def _starts(spec: PolicySpec, table: ExitTable) -> Iterator[tuple[Policy, bool]]:
    """Policies to try, and whether their bars are to be searched."""
    if not isinstance(spec, str):
        yield fitting_policy(spec, table), False
        return
    kind = POLICIES[spec]
    variants = kind.variants(table.problem_type, table.depth)
    if not variants and table.depth > 1:
        why = f"Policy '{spec}' is not for {table.problem_type}. {kind.why_not}"
        raise ConfigError(why.rstrip())
    for policy in variants:
        policy.check_signals(table.header.signals)
    if spec in FITS and variants:
        variants = [FITS[spec](table)]
    yield from ((policy, True) for policy in variants)
