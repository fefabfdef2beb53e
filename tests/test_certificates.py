"""Claims about promises: they are kept as often as said, and nothing unproven is promised."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from certificate_support import table_of
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.risk_control import control_fwer
from scipy.stats import binomtest, multinomial

from offramp import ExitTable, OperatingPoint
from offramp.calibration import RISKS, certify, choose
from offramp.calibration.bounds import betting, betting_bound, binomial, binomial_bound
from offramp.calibration.certificate import Procedure, percent, rows_needed
from offramp.calibration.certifying import PROCEDURES, _needed
from offramp.calibration.judge import Outcome
from offramp.calibration.paired import paired, paired_bound
from offramp.calibration.proving import prove
from offramp.calibration.risks import Answered, Risk
from offramp.calibration.target import Target
from offramp.errors import ConfigError, PointError, TableError
from offramp.policies import Full

# Bounds


def test_the_binomial_p_value_is_that_of_the_exact_test() -> None:
    losses = np.array([1.0] * 7 + [0.0] * 193)
    exact = binomtest(7, 200, 0.05, alternative="less").pvalue
    assert binomial(losses, 0.05) == pytest.approx(exact)


@pytest.mark.parametrize("rows", [60, 400])
@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_a_mean_at_the_limit_is_called_less_no_more_often_than_alpha(
    rows: int, limit: float
) -> None:
    rng, alpha, draws = np.random.default_rng(0), 0.1, 3000
    noise = alpha + 3 * np.sqrt(alpha * (1 - alpha) / draws)
    counted = (rng.random((rows, draws)) < limit).astype(float)
    up = rng.random((rows, draws))
    differences = np.where(up < 0.05 + limit, 1.0, np.where(up < 0.1 + limit, -1.0, 0.0))
    assert (binomial(counted, limit) <= alpha).mean() <= noise
    assert (betting(counted, limit, alpha) <= alpha).mean() <= noise
    assert (betting(differences, limit, alpha) <= alpha).mean() <= noise
    assert (paired(differences, limit) <= alpha).mean() <= noise


@pytest.mark.parametrize("limit", [0.02, 0.1])
def test_of_all_counts_the_paired_test_passes_no_more_than_alpha_at_any_share_of_gains(
    limit: float,
) -> None:
    rows = 60
    counts = np.array([(a, b) for a in range(rows + 1) for b in range(rows + 1 - a)])
    p_values = np.array([paired(differences(a, b, rows), limit) for a, b in counts])
    for gains in np.linspace(0, (1 - limit) / 2 - 1e-6, 40):
        shares = (gains + limit, gains, 1 - 2 * gains - limit)
        chances = multinomial.pmf(
            np.column_stack((counts, rows - counts.sum(axis=1))), rows, shares
        )
        for alpha in (0.01, 0.05, 0.1, 0.3):
            assert chances[p_values <= alpha].sum() <= alpha


def test_the_worst_share_of_gains_is_found() -> None:
    rows, limit = 80, 0.1
    assert paired(differences(10, 12, 60), limit) > 0.0507  # waves high at 0.44 of gains
    counts = np.array([(a, b) for a in range(12) for b in range(rows + 1 - a)])
    p_values = np.array([paired(differences(a, b, rows), limit) for a, b in counts[:300]])
    for gains in (0.01, 0.1, 0.4249):
        shares = (gains + limit, gains, 1 - 2 * gains - limit)
        chances = multinomial.pmf(
            np.column_stack((counts[:300], rows - counts[:300].sum(axis=1))), rows, shares
        )
        for alpha in np.unique(p_values[p_values < 0.5])[::7]:
            assert chances[p_values <= alpha].sum() <= alpha


@pytest.mark.parametrize("procedure", ["fixed_sequence", "holm", "bonferroni"])
def test_what_is_sure_is_proven_at_any_confidence(procedure: Procedure) -> None:
    losses = np.zeros((5000, 60))
    losses[:20], losses[20:40] = 1, -1
    assert prove(losses, 0.1, 0.9999999, procedure, "paired").place == 59


def differences(worse: int, better: int, rows: int) -> np.ndarray:
    return np.repeat([1.0, -1.0, 0.0], [worse, better, rows - worse - better])


def test_the_paired_test_finds_what_bets_do_not() -> None:
    rng, draws = np.random.default_rng(0), 300
    up = rng.random((500, draws))
    some = np.where(up < 0.06, 1.0, np.where(up < 0.09, -1.0, 0.0))  # a mean of 0.03
    found = (paired(some, 0.05) <= 0.05).mean()
    assert found > 1.4 * (betting(some, 0.05) <= 0.05).mean()
    assert (paired(rng.permutation(some), 0.05) == paired(some, 0.05)).all()


@given(
    rows=st.integers(1, 400),
    share=st.floats(0, 0.3),
    limit=st.floats(1e-9, 0.5),
    seed=st.integers(0, 99),
)
def test_more_losses_or_fewer_gains_never_speak_more_against_the_limit(
    rows: int, share: float, limit: float, seed: int
) -> None:
    some = np.random.default_rng(seed).choice(
        [1.0, -1.0, 0.0], rows, p=[share, share, 1 - 2 * share]
    )
    p_value = paired(some, limit)
    assert 0 < p_value <= 1
    place = int(some.argmin())
    worse = some.copy()
    worse[place] += 1
    assert paired(worse, limit) >= p_value - 1e-12


@pytest.mark.parametrize("bound", [betting_bound, binomial_bound, paired_bound])
def test_a_bound_is_where_the_test_turns(bound: object) -> None:
    rng = np.random.default_rng(1)
    losses = (rng.random((300, 5)) < 0.04).astype(float)
    if bound is paired_bound:
        losses -= (rng.random((300, 5)) < 0.02) & (losses == 0)
    tests = {betting_bound: betting, binomial_bound: binomial, paired_bound: paired}
    test = tests[bound]  # type: ignore[index]
    upper = bound(losses, 0.05)  # type: ignore[operator]
    for place in range(5):
        assert test(losses[:, place], upper[place] + 1e-6, 0.05) <= 0.05
        assert test(losses[:, place], upper[place] - 1e-6, 0.05) > 0.05


def test_gains_tighten_the_bound_of_bets() -> None:
    rng = np.random.default_rng(2)
    losses = (rng.random(500) < 0.03).astype(float)
    gains = np.where((losses == 0) & (rng.random(500) < 0.03), -1.0, losses)
    assert betting_bound(gains, 0.05) < betting_bound(losses, 0.05)


def test_no_loss_at_all_needs_as_many_rows_as_is_said() -> None:
    needed = rows_needed(0.02, 0.95, 0.0, 0.0)
    assert binomial(np.zeros(needed), 0.02) <= 0.05


@pytest.mark.parametrize("procedure", PROCEDURES)
@pytest.mark.parametrize("limit", [0.01, 0.02, 0.1])
def test_so_many_rows_that_lose_nothing_are_proven_and_few_less_are_not(
    procedure: Procedure, limit: float
) -> None:
    candidate = Outcome(Full(), 0.5, 0.0, (1,), None, None, None, risk=0.0, spread=0.0)
    path = [candidate] * 7
    target = Target.of(None, None, limit, False)
    needed = _needed(path, target, 0.95, procedure)
    assert needed is not None
    assert prove(np.zeros((needed, 7)), limit, 0.95, procedure, "binomial").place is not None
    less = math.floor(0.97 * needed) - 1
    assert prove(np.zeros((less, 7)), limit, 0.95, procedure, "binomial").place is None


# Procedures


def test_a_fixed_sequence_stops_at_the_first_that_is_not_proven() -> None:
    losses = np.zeros((400, 4))
    losses[:40, 1] = 1  # the second loses, the third does not
    assert prove(losses, 0.02, 0.95, "fixed_sequence", "binomial").place == 0
    assert prove(losses, 0.02, 0.95, "holm", "binomial").place == 3


def test_nothing_proven_is_no_place() -> None:
    losses = np.ones((400, 3))
    for procedure in ("fixed_sequence", "holm", "bonferroni", "expectation"):
        assert prove(losses, 0.02, 0.95, procedure, "betting").place is None


def test_in_expectation_the_most_that_each_row_lost_on_the_way_counts() -> None:
    losses = np.zeros((1000, 2))
    losses[:40, 0] = losses[40:80, 1] = 1  # other rows: their union loses 8%
    assert prove(losses, 0.05, procedure="expectation").place == 0
    assert prove(losses, 0.09, procedure="expectation").place == 1


def test_in_expectation_a_last_candidate_that_swings_cannot_pass_by_luck() -> None:
    """Losses of -1 and 1 that are 10% on average often have a small mean in 100 rows."""
    rng, limit, risks = np.random.default_rng(0), 0.05, []
    true = [0.04, 0.1]
    for _ in range(2000):
        safe = np.full(100, 0.039)
        swinging = np.where(rng.random(100) < 0.55, 1.0, -1.0)
        place = prove(np.stack((safe, swinging), axis=1), limit, procedure="expectation").place
        risks.append(0.0 if place is None else true[place])
    assert np.mean(risks) <= limit


def test_procedures_agree_with_mapie() -> None:
    losses = (np.random.default_rng(3).random((500, 8)) < np.linspace(0, 0.1, 8)).astype(float)
    p_values = prove(losses, 0.05, 0.9, "holm", "binomial").p_values
    assert p_values is not None
    assert prove(losses, 0.05, 0.9, "holm", "binomial").place == max(
        control_fwer(p_values, 0.1, "bonferroni_holm")
    )


@pytest.mark.parametrize(("risk", "limit"), [("drop", 0.03), ("disagreement", 0.05)])
@pytest.mark.parametrize("procedure", ["fixed_sequence", "holm"])
def test_a_promise_is_kept_as_often_as_said_and_a_plain_choice_is_not(
    risk: str, limit: float, procedure: str
) -> None:
    """Searched on one table; proof rows drawn from another, whose true risk is known."""
    from offramp.calibration.frontier import explore
    from offramp.calibration.judge import Judge
    from offramp.calibration.proving import losses_under, path_of

    confidence, rows, draws = 0.9, 500, 300
    measured = RISKS[risk]
    search, pool = table_of(400, seed=1), table_of(3000, seed=2)
    tried = explore(Judge(search, risk=measured), ["entropy", "patience", "full"])
    path = path_of(tried, limit)
    losses = np.stack([losses_under(pool, one.policy, measured) for one in path], axis=1)
    true = losses.mean(axis=0)
    rng = np.random.default_rng(0)
    broken, plainly, left = 0, 0, 0
    for _ in range(draws):
        drawn = losses[rng.integers(0, len(losses), rows)]
        place = prove(drawn, limit, confidence, procedure, "betting").place
        broken += place is not None and true[place] > limit
        left += place is not None and path[place].cost < 0.95
        plainly += true[np.flatnonzero(drawn.mean(axis=0) <= limit)[-1]] > limit
    noise = 3 * np.sqrt(0.1 * 0.9 / draws)
    assert broken / draws <= 0.1 + noise
    assert left / draws > 0.9  # not by never leaving
    assert plainly / draws > 0.25


# Risks


@given(
    seed=st.integers(0, 1000), risk=st.sampled_from(["drop", "disagreement", "brier", "hellinger"])
)
@settings(max_examples=60)
def test_full_depth_loses_nothing_and_losses_stay_in_range(seed: int, risk: str) -> None:
    rng = np.random.default_rng(seed)
    full, early = rng.normal(size=(2, 20, 3)).astype(np.float32) * 10
    labels = rng.integers(0, 3, 20)
    measured = RISKS[risk]
    losses = measured.of(Answered(early, full, labels, "single_label_classification"))
    assert losses.min() >= measured.lowest
    assert losses.max() <= 1 + 1e-12
    same = measured.of(Answered(full, full, labels, "single_label_classification"))
    assert np.abs(same).max() < 1e-7


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        (lambda rows: np.full(len(rows.early), 2.0), "one number from 0 to 1"),
        (lambda rows: np.full(len(rows.early), np.nan), "one number from 0 to 1"),
        (lambda rows: np.zeros((len(rows.early), 2)), "one number from 0 to 1"),
        (lambda rows: np.full(len(rows.early), 0.5), "gives fractions"),
    ],
)
def test_a_risk_that_is_not_what_it_says_is_refused(losses: object, says: str) -> None:
    single = "single_label_classification"
    wrong = Risk("wrong", "wrong", losses, (single,), 0.0, False, True)  # type: ignore[arg-type]
    scores = np.zeros((4, 2), dtype=np.float32)
    with pytest.raises(ConfigError, match=says):
        wrong.of(Answered(scores, scores, None, single))


# Points


def test_a_stricter_limit_never_leaves_earlier() -> None:
    table = table_of(2000)
    costs = [
        certify(table, max_disagreement=limit, policies=["entropy"]).point.cost
        for limit in (0.2, 0.1, 0.05, 0.02)
    ]
    assert costs == sorted(costs)


@given(seed=st.integers(0, 100))
@settings(max_examples=10)
def test_the_order_of_rows_does_not_matter(seed: int) -> None:
    table = table_of(300)
    other = table.take(np.random.default_rng(seed).permutation(table.rows))
    first = certify(table, max_drop=0.1, policies=["entropy"])
    again = certify(other, max_drop=0.1, policies=["entropy"])
    assert again.point == first.point
    assert again.messages == first.messages


def test_too_few_rows_mean_full_depth_and_a_number() -> None:
    found = certify(table_of(100), max_drop="1%")
    assert not found.pays
    assert found.point.policy["name"] == "full"
    assert "It would take about" in found.messages[1]


def test_no_number_of_rows_is_named_where_none_would_do() -> None:
    found = certify(table_of(100), max_disagreement=0.01, policies=["fixed"])
    assert not found.pays
    assert "too near the limit" in found.messages[1]


def test_broken_and_repeated_rows_are_said() -> None:
    table = table_of(400)
    table.scores[:10, 2] = np.nan
    found = certify(table.take([*range(400), *range(50, 150)]), max_disagreement="20%")
    assert found.point.rows_excluded == 10
    said = " ".join(found.messages)
    assert "10 rows with NaN" in said
    assert "repeat the input of another" in said
    promise, certificate = found.point.promise(), found.point.certificate
    assert certificate is not None
    assert certificate.repeated > 20
    assert f"repeat as often ({certificate.repeated} of them did)" in str(promise)


@pytest.mark.parametrize(("share", "text"), [(0.00125, "0.125%"), (0.9999999, "99.99999%")])
def test_a_promise_is_not_rounded(share: float, text: str) -> None:
    assert percent(share) == text


def test_never_leaving_is_always_certified() -> None:
    certificate = certify(table_of(20), max_drop=0.001).point.certificate
    assert certificate is not None
    assert (certificate.estimate, certificate.bound) == (0.0, 0.0)


def test_the_proof_may_be_rows_of_their_own_but_no_row_twice() -> None:
    search, proof = table_of(400, seed=1), table_of(600, seed=2, role="calibrate")
    found = certify(search, proof, max_disagreement="10%")
    assert found.point.rows == 600
    assert found.point.role == "calibrate"
    with pytest.raises(TableError, match="600 inputs are in both"):
        certify(proof, proof, max_disagreement="10%")
    with pytest.raises(TableError, match="may not be used to prove"):
        certify(proof, search, max_disagreement="10%")


def test_a_point_knows_the_rows_of_its_search_and_of_its_proof() -> None:
    proof = table_of(600, seed=2, role="calibrate")
    scores, kind = table_of(400, seed=1).scores, "single_label_classification"
    search = ExitTable.from_arrays(scores, problem_type=kind, data_fingerprint="searched")
    point = certify(search, proof, max_disagreement="10%").point
    rows = ("searched", proof.header.data_fingerprint, "others")
    assert [point.made_with(one) for one in rows] == [True, True, False]


def test_a_point_sealed_before_certificates_knew_of_their_search_is_still_one() -> None:
    point = certify(table_of(2000), max_disagreement="5%").point
    assert point.certificate is not None
    older = point.promising(point.certificate.model_copy(update={"repeated": 0, "searched": None}))
    said = older.model_dump(mode="json")
    del said["certificate"]["repeated"], said["certificate"]["searched"]
    assert OperatingPoint.model_validate(said) == older


@pytest.mark.parametrize("confidence", [None, 0.95])
@pytest.mark.parametrize(("name", "says"), [("../x", "Take letters"), ("full", "full depth")])
def test_a_name_that_none_can_have_is_refused_before_the_search(
    confidence: float | None, name: str, says: str
) -> None:
    nothing = table_of(1, labelled=False)  # which is refused as well, but later
    with pytest.raises(PointError, match=says):
        choose(nothing, confidence=confidence, max_drop=0.1, name=name)


def test_a_changed_or_uncertified_point_cannot_be_loaded_as_certified(tmp_path: Path) -> None:
    found = certify(table_of(2000), max_disagreement="5%")
    assert found.pays
    found.point.save(tmp_path)
    assert OperatingPoint.load(tmp_path, certified=True) == found.point
    choose(table_of(2000), max_disagreement="5%", name="plain").point.save(tmp_path)
    with pytest.raises(PointError, match="without a certificate"):
        OperatingPoint.load(tmp_path, "plain", certified=True)
    mean = certify(table_of(2000), max_disagreement="5%", procedure="expectation", name="mean")
    mean.point.save(tmp_path)
    with pytest.raises(PointError, match="right on average alone"):
        OperatingPoint.load(tmp_path, "mean", certified=True)
    none = certify(table_of(60), max_disagreement="0.1%", procedure="expectation", name="none")
    assert not none.pays
    none.point.save(tmp_path)
    OperatingPoint.load(tmp_path, "none", certified=True)


@pytest.fixture(scope="module")
def certified() -> OperatingPoint:
    return certify(table_of(2000), max_disagreement="5%").point


@pytest.mark.parametrize("key", sorted(OperatingPoint.model_fields.keys() - {"name", "offramp"}))
def test_nothing_that_a_certified_point_says_can_be_changed(
    certified: OperatingPoint, tmp_path: Path, key: str
) -> None:
    path, said = certified.save(tmp_path), json.loads(certified.model_dump_json())
    other = said[key]
    if isinstance(other, list):
        other = [*other[1:], other[0]]
    elif isinstance(other, dict):
        other = {name: value for name, value in other.items() if name != next(iter(other))}
    elif isinstance(other, str):
        other = {"calibrate": "tune", "tune": "calibrate"}.get(other, f"{other}x")
    else:
        other = 0.123 if other is None else other / 2 + 1
    path.write_text(json.dumps(said | {key: other}))
    with pytest.raises(PointError):
        OperatingPoint.load(tmp_path)


@given(
    rows=st.integers(40, 400),
    seed=st.integers(0, 99),
    limit=st.sampled_from(["0.1%", "1%", "5%", "20%"]),
    procedure=st.sampled_from(["fixed_sequence", "holm", "bonferroni"]),
)
def test_there_is_always_a_point_that_keeps_its_promise_be_it_full_depth(
    rows: int, seed: int, limit: str, procedure: Procedure
) -> None:
    found = certify(table_of(rows, seed), max_disagreement=limit, procedure=procedure)
    assert found.point.certified
    assert found.pays == (found.point.policy["name"] != "full")
    assert found.pays or found.point.disagreement == 0


def test_the_claim_names_what_it_rests_on() -> None:
    found = certify(table_of(2000), max_drop="5%", confidence="90%")
    said = " ".join(found.messages)
    for word in ("90% confidence", "accuracy lost", "at most 5%,", "rows", "like those"):
        assert word in said


@pytest.mark.parametrize(
    ("demand", "says"),
    [
        ({"target_speedup": 2}, "target-speedup does not go with --confidence"),
        ({"max_drop": 0.01, "metric": "f1"}, "metric does not go with"),
        ({"max_drop": 0}, "cannot be promised"),
        ({"max_drop": 0.01, "procedure": "hope"}, "Procedure 'hope' is unknown"),
        ({"max_drop": 0.01, "test": "binomial"}, "for losses of 0 and 1.* Use 'paired'"),
        ({"max_disagreement": 0.01, "test": "paired"}, "for losses of -1, 0 and 1.*Use 'binomial'"),
        ({"max_drop": 0.01, "test": "mean"}, "Test 'mean' is unknown"),
        ({"max_drop": 0.01, "seed": -1}, "A seed is 0 or more"),
        ({"max_drop": "nan"}, "is not a share"),
        ({"max_risk": 0.01}, "go together"),
        ({"max_risk": 0.01, "risk": "brie"}, "Did you mean 'brier'"),
    ],
)
def test_demands_that_mean_nothing_are_refused(demand: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        choose(table_of(100), confidence=0.95, **demand)


def test_what_a_proof_takes_is_refused_without_a_confidence() -> None:
    with pytest.raises(ConfigError, match="procedure needs --confidence"):
        choose(table_of(100), max_drop=0.01, procedure="holm")


@pytest.mark.parametrize("confidence", [1, 1.5, "0", "much"])
def test_a_confidence_is_a_share(confidence: object) -> None:
    with pytest.raises(ConfigError):
        certify(table_of(100), max_drop=0.01, confidence=confidence)  # type: ignore[arg-type]


def test_a_drop_needs_labels_and_disagreement_does_not() -> None:
    bare = table_of(1000, labelled=False)
    assert certify(bare, max_disagreement="10%").pays
    with pytest.raises(TableError, match="needs labels"):
        certify(bare, max_drop="10%")
