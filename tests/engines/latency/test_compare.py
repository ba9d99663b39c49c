"""Two reports compared: the interval against scipy's exact test, planted changes, and what can't be compared."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from engines.latency.compare import compare, rank_sum
from engines.latency.report import Load, Report
from engines.latency.sequential import ERROR
from engines.latency.verdict import AGAIN, BASE, MERGED, UNMERGED
from lora.errors import LorafuseError

MakeReport = Callable[..., Report]
MARGIN = 0.01


@pytest.mark.parametrize(
    ("sizes", "error"),
    [((6, 6), 0.05), ((6, 12), 0.05), ((12, 12), 0.05), ((24, 6), 0.05), ((24, 24), 0.01), ((20, 30), 0.05)],
)
def test_bounds_are_no_closer_than_scipys_exact_test_allows_and_hardly_farther(sizes: tuple[int, int], error: float):
    """Just outside the interval the one-sided test rejects at ``error``; one more difference inside, it rejects no
    longer.
    """
    random = np.random.default_rng(sum(sizes))
    logs, others = random.normal(0, 0.01, sizes[0]), random.normal(0, 0.01, sizes[1])
    ratio = rank_sum(logs, others, error)
    differences = np.sort((logs[:, None] - others).ravel())
    for bound, alternative, outwards in ((ratio.low, "greater", -1), (ratio.high, "less", 1)):
        index = int(np.abs(differences - math.log(bound)).argmin())
        assert differences[index] == pytest.approx(math.log(bound), abs=1e-12)

        def p_value(shift: float, alternative: str = alternative) -> float:
            return float(scipy.stats.mannwhitneyu(logs - shift, others, alternative=alternative, method="exact").pvalue)

        assert p_value(math.log(bound) + outwards * 1e-9) <= error
        assert p_value(differences[index - 2 * outwards] - outwards * 1e-9) > error


def test_each_bound_excludes_the_truth_no_more_often_than_declared():
    random, runs = np.random.default_rng(0), 2000
    ratios = [
        rank_sum(0.05 + random.standard_t(3, 6) * 0.01, random.standard_t(3, 12) * 0.01, ERROR) for _ in range(runs)
    ]
    most = scipy.stats.binom.ppf(0.9999, runs, ERROR) / runs
    assert sum(ratio.low > math.exp(0.05) for ratio in ratios) / runs <= most
    assert sum(ratio.high < math.exp(0.05) for ratio in ratios) / runs <= most


@given(seed=st.integers(0, 2**32 - 1), sizes=st.tuples(st.integers(6, 30), st.integers(6, 30)))
def test_swapping_inverts_the_ratio(seed: int, sizes: tuple[int, int]):
    random = np.random.default_rng(seed)
    logs, others = (random.normal(0, 0.1, size) for size in sizes)
    forth, back = rank_sum(logs, others, ERROR), rank_sum(others, logs, ERROR)
    assert (forth.median, forth.low, forth.high, forth.error) == pytest.approx(
        (1 / back.median, 1 / back.high, 1 / back.low, ERROR)
    )
    assert forth.low <= forth.median <= forth.high


def test_sets_too_few_for_the_error_are_refused():
    with pytest.raises(LorafuseError, match=r"^2 and 3 sets can't bound a ratio with an error of 0\.05; measure again"):
        rank_sum(np.zeros(2), np.zeros(3), ERROR)


@pytest.mark.parametrize("sets", [6, 12, 48])
def test_the_same_report_twice_is_not_slower(make_report: MakeReport, sets: int):
    report = make_report(sets=sets)
    for one in compare(report, report, MARGIN):
        assert one.decision in ("equivalent", "inconclusive")
        assert one.before == one.after == report.points[0].reading(one.arm).p50
        assert one.time.median == pytest.approx(1)
        assert one.time.low <= 1 <= one.time.high


def test_what_takes_longer_on_the_whole_is_slower_and_costs_no_more(make_report: MakeReport):
    compared = compare(make_report(seed=1), make_report(seed=2, scale=1.3), MARGIN)
    assert [(one.arm, one.load, one.decision) for one in compared] == [
        (arm, Load(1, 8), "slower") for arm in (BASE, AGAIN, MERGED, UNMERGED)
    ]
    for one in compared:
        assert one.time.median == pytest.approx(1.3, rel=0.01)
        assert one.after / one.before == pytest.approx(1.3, rel=0.01)
        assert (one.cost is None) == (one.arm == BASE)
        if one.cost is not None:
            assert one.cost.decide(MARGIN) == "equivalent"


def test_an_arm_that_alone_takes_longer_costs_more_beside_its_base(make_report: MakeReport):
    compared = {one.arm: one for one in compare(make_report(seed=1), make_report(seed=2, slow={MERGED: 1.3}), MARGIN)}
    assert {arm: one.decision for arm, one in compared.items()} == {
        BASE: "equivalent",
        AGAIN: "equivalent",
        MERGED: "slower",
        UNMERGED: "equivalent",
    }
    assert compared[MERGED].cost.median == pytest.approx(1.3, rel=0.01)
    assert compared[UNMERGED].cost.median == pytest.approx(1, rel=0.01)


def test_declared_margin_decides(make_report: MakeReport):
    first, second = make_report(seed=1), make_report(seed=2, scale=1.05)
    assert {one.decision for one in compare(first, second, 0.01)} == {"slower"}
    assert {one.decision for one in compare(first, second, 0.10)} == {"equivalent"}
    assert {one.decision for one in compare(second, first, 0.01)} == {"faster"}


def test_only_what_both_have_is_compared(make_report: MakeReport):
    one = make_report(loads=[Load(1, 8), Load(1, 16)], arms=[BASE, AGAIN, MERGED, "resident"], slow={"resident": 1.5})
    other = make_report(
        loads=[Load(2, 8), Load(1, 16)], arms=[BASE, AGAIN, "resident", MERGED], slow={"resident": 3.0}, seed=1
    )
    compared = {each.arm: each for each in compare(one, make_report(loads=[Load(1, 16), Load(1, 8, past=2)]), MARGIN)}
    assert list(compared) == [BASE, AGAIN, MERGED]
    compared = {each.arm: each for each in compare(one, other, MARGIN)}
    assert {each.load for each in compared.values()} == {Load(1, 16)}
    assert compared["resident"].time.median == pytest.approx(2, rel=0.01)  # by name, wherever it stands
    assert compared[MERGED].time.median == pytest.approx(1, rel=0.01)


def test_reports_that_share_nothing_are_refused(make_report: MakeReport):
    with pytest.raises(LorafuseError, match="no load and arm in common; measure the same batch and length twice"):
        compare(make_report(loads=[Load(1, 8)]), make_report(loads=[Load(1, 16)]), MARGIN)
