"""Statistics of comparisons: closed forms, published figures, brute force, and rates over thousands of simulations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from analysis.statistics import (
    Acceptance,
    Arm,
    accepted,
    algoperf_score,
    bootstrap_interval,
    expected_best,
    holm,
    median_time,
    octaves_within,
    paired_bootstrap,
    paired_t,
    performance_profile,
    probability_best,
    t_interval,
    unequal,
)

INF, NAN = math.inf, math.nan


def seeds(values: Any) -> dict[int, float]:
    return dict(enumerate(values))


def covered(interval: Callable[[np.ndarray], Any], draws: np.ndarray, truth: float) -> float:
    """Share of samples, a row each, whose interval holds the truth."""
    found = [interval(row) for row in draws]
    return float(np.mean([each.low <= truth <= each.high for each in found]))


def test_the_t_interval_of_a_published_sample() -> None:
    # Student's sleep data (1908), the differences of his two drugs: R prints [0.7001142, 2.4598858] and p = 0.002833.
    first = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    second = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    found = paired_t(seeds(second), seeds(first))
    assert (found.interval.low, found.interval.high) == pytest.approx((0.7001142, 2.4598858), abs=1e-7)
    assert found.interval.middle == pytest.approx(1.58) and found.p == pytest.approx(0.00283289, abs=1e-8)
    assert t_interval(np.subtract(second, first)) == found.interval
    wide = t_interval(np.subtract(second, first), 0.99)
    assert wide.level == 0.99 and wide.low < found.interval.low and wide.high > found.interval.high


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    normal = generator.standard_normal((10_000, 5))
    assert covered(t_interval, normal, 0) == pytest.approx(0.95, abs=0.01)
    assert covered(lambda row: t_interval(row, 0.8), normal, 0) == pytest.approx(0.8, abs=0.01)
    # Order statistics know no distribution; 10 and 20 times make 97.9 and 95.9 % of it (tables of the sign test).
    for count, share in ((10, 0.9785), (20, 0.9586)):
        ends = median_time(np.arange(count))  # places in the order
        times = np.sort(generator.exponential(size=(10_000, count)), axis=1)
        low, high = times[:, int(ends.low)], times[:, int(ends.high)]
        assert np.mean((low <= math.log(2)) & (math.log(2) <= high)) == pytest.approx(share, abs=0.01)
        assert median_time(times[0]).low == low[0] and median_time(times[0]).high == high[0]


@pytest.mark.parametrize(("count", "share"), [(5, 0.83), (20, 0.93)])
def test_the_bootstrap_of_few_seeds_says_more_than_it_knows(count: int, share: float) -> None:
    normal = np.random.default_rng(1).standard_normal((2000, count))
    assert covered(lambda row: bootstrap_interval(row, draws=999), normal, 0) == pytest.approx(share, abs=0.02)


def test_the_bootstrap_of_many_values_of_any_statistic() -> None:
    values = np.random.default_rng(2).exponential(size=400)
    mean, student = bootstrap_interval(values), t_interval(values)
    assert (mean.low, mean.high) == pytest.approx((student.low, student.high), abs=0.02)
    assert mean.low > student.low and mean.high > student.high  # it leans to the long tail, as the mean's error does
    median = bootstrap_interval(values, np.median)
    assert median.low < np.log(2) < median.high and median.middle == np.median(values)
    assert bootstrap_interval(values, seed=1) != mean == bootstrap_interval(values)
    slow = bootstrap_interval(values[:20], lambda x: float(np.sort(x)[3:-3].mean()), draws=500)  # has no axis
    assert slow.low < slow.middle < slow.high


def test_intervals_of_values_without_spread_say_so() -> None:
    single = t_interval([3.0])
    assert (single.low, single.middle, single.high) == (-INF, 3, INF) and "one value" in single.note
    assert bootstrap_interval([3.0]) == single
    for interval in (t_interval([0.1] * 3), bootstrap_interval([0.1] * 3)):
        assert interval.low == interval.middle == interval.high == pytest.approx(0.1)
        assert "all 3 values are equal" in interval.note
    assert t_interval([1, 2]).note == ""
    first = bootstrap_interval([1.0, 2.0, 3.0, 9.0], lambda x: float(x[x < 9].max(initial=3)), draws=200)
    assert "percentiles" in first.note and first.low <= first.middle <= first.high


def test_paired_comparisons_take_common_seeds_alone() -> None:
    a, b = {0: 1.0, 1: 2.0, 2: 3.5, 7: 99.0}, {0: 0.5, 1: 1.0, 2: 2.0, 3: -50.0}
    for compare in (paired_t, paired_bootstrap):
        found = compare(a, b)
        assert found.seeds == (0, 1, 2) and found.interval.middle == pytest.approx(1.0)
        turned = compare(b, a)
        assert turned.interval.middle == pytest.approx(-1) and turned.p == pytest.approx(found.p, rel=0.05)
    expected = stats.ttest_rel([1, 2, 3.5], [0.5, 1, 2])
    assert paired_t(a, b).p == pytest.approx(expected.pvalue)


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    # Five seeds, whose own scatter of 3 both share: a difference of two standard deviations of a run is found by t in
    # 67 % of simulations (of which the closed form is the noncentral t) and by BCa in 95; unpaired it would be lost.
    generator = np.random.default_rng(3)
    shared = 3 * generator.standard_normal((2000, 5))
    a, b = (shared + generator.standard_normal((2000, 5)) for _ in range(2))
    power = np.mean([paired_t(seeds(x + 2), seeds(y)).p < 0.05 for x, y in zip(a, b, strict=True)])
    limit, centre = stats.t.ppf(0.975, 4), 2 / math.sqrt(2 / 5)
    assert power == pytest.approx(stats.nct.sf(limit, 4, centre) + stats.nct.cdf(-limit, 4, centre), abs=0.03)
    assert power > 0.6
    lost = np.mean(stats.ttest_ind(a + 2, b, axis=1).pvalue < 0.05)
    assert lost < 0.25
    false = np.mean([paired_t(seeds(x), seeds(y)).p < 0.05 for x, y in zip(a, b, strict=True)])
    assert false == pytest.approx(0.05, abs=0.015)
    found, wrong = (
        np.mean([paired_bootstrap(seeds(a[i] + shift), seeds(b[i]), draws=999).p < 0.05 for i in range(200)])
        for shift in (2, 0)
    )
    assert found > 0.9 and 0.1 < wrong < 0.24  # what the docstring warns of


def test_the_bootstraps_p_and_interval_agree() -> None:
    generator = np.random.default_rng(4)
    for _ in range(20):
        a, b = seeds(generator.standard_normal(12)), seeds(generator.standard_normal(12))
        found = paired_bootstrap(a, b, draws=2000)
        assert (found.p < 0.05) == (not found.interval.low <= 0 <= found.interval.high)
        at = paired_bootstrap(a, b, level=1 - found.p, draws=2000).interval
        assert min(abs(at.low), abs(at.high)) < 0.05  # that interval ends at zero
    far = paired_bootstrap(seeds(np.arange(12) + 100.0), seeds(generator.standard_normal(12)), draws=2000)
    assert 0 < far.p <= 1 / 1000


def test_equal_differences_prove_no_more_than_their_signs() -> None:
    for compare in (paired_t, paired_bootstrap):
        found = compare({0: 0.75, 1: 0.5}, {0: 0.5, 1: 0.25})
        assert found.p == 0.5 and found.interval.low == found.interval.high == 0.25
        assert "all 2 values are equal" in found.interval.note
        assert compare(seeds([1.0] * 6), seeds([0.5] * 6)).p == 1 / 32
        assert compare({0: 0.75, 1: 0.5}, {0: 0.75, 1: 0.5}).p == 1
        assert compare({0: 0.85, 1: 0.75}, {0: 0.8, 1: 0.7}).p == 0.5  # equal but for rounding


def test_holms_adjustment() -> None:
    # The four values of the usual worked example (0.005, 0.01, 0.03, 0.04), of which the first two are rejected at 5 %.
    found = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert found == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(found) == ["a", "b", "c", "d"]
    assert holm({"a": 0.6, "b": 0.5}) == {"a": 1, "b": 1} and holm({"a": 0.04}) == {"a": 0.04}
    # Any false find among ten true nulls: 5 % at most, where unadjusted ones make 40.
    p = np.random.default_rng(5).uniform(size=(2000, 10))
    assert np.mean([min(holm(dict(enumerate(row))).values()) < 0.05 for row in p]) == pytest.approx(0.05, abs=0.015)


def test_who_is_best_of_two_is_the_one_sided_paired_t_test() -> None:
    generator = np.random.default_rng(6)
    a, b = generator.standard_normal(5) + 0.5, generator.standard_normal(5) * 3
    found = probability_best({"a": seeds(a), "b": seeds(b)}, higher=True, draws=200_000)
    assert found["a"] == pytest.approx(1 - stats.ttest_rel(a, b, alternative="greater").pvalue, abs=0.005)
    lower = probability_best({"a": seeds(a), "b": seeds(b)}, higher=False, draws=200_000)
    assert lower["a"] == pytest.approx(1 - found["a"], abs=0.005) and sum(lower.values()) == pytest.approx(1)


def test_who_is_best_shares_ties_and_stays_modest() -> None:
    a, b = [1.0, 2.0, 3.5], [0.5, 1.7, 3.1]
    found = probability_best({"a": seeds(a), "b": seeds(b), "again": seeds(a)}, higher=True)
    assert found["a"] == found["again"] and sum(found.values()) == pytest.approx(1)
    alone = probability_best({"a": seeds(a), "b": seeds(b)}, higher=True)
    assert 0.9 < alone["a"] < 0.999 and found["b"] == alone["b"]  # ahead on all three seeds, and yet not certain
    assert probability_best({"a": seeds(a)}, higher=True) == {"a": 1}
    assert probability_best({"a": {0: 1, 1: 2, 5: 0}, "b": {0: 0, 1: 1, 6: 9}}, higher=True)["a"] == 1


def test_who_is_best_is_right_as_often_as_it_says() -> None:
    generator = np.random.default_rng(7)
    said, right, equal = [], [], []
    for _ in range(2000):
        truth = 3 * generator.standard_normal(3)
        noise = 2 * generator.standard_normal((5, 1)) + generator.standard_normal((5, 3)) * [1, 2, 3]
        for shift, found in ((truth, said), (0, equal)):
            table = shift + noise
            chances = probability_best({str(i): seeds(table[:, i]) for i in range(3)}, higher=True, draws=200)
            found.append(list(chances.values()))
        right.append(np.eye(3)[truth.argmax()])
    said, right = np.array(said), np.array(right)
    for low, high in ((0, 0.1), (0.1, 0.35), (0.35, 0.65), (0.65, 0.9), (0.9, 1.01)):
        some = (said >= low) & (said < high)
        assert right[some].mean() == pytest.approx(said[some].mean(), abs=0.05)
    assert np.mean(np.array(equal) > 0.95) < 0.05  # nobody is best; one of three is said to be, at times


def test_the_median_of_times_of_which_some_are_not_reached() -> None:
    found = median_time([5, 1, 2, INF, 3, 4])
    assert (found.low, found.middle, found.high, found.note) == (1, 3.5, INF, "")
    few = median_time([1, 2, INF])
    assert (few.low, few.middle, few.high) == (0, 2, INF) and "too few" in few.note
    assert median_time([1, INF]).middle == INF and median_time([INF] * 8).low == INF
    ten = median_time(np.arange(1.0, 11))  # the 2nd and the 9th of ten (tables of the sign test)
    assert (ten.low, ten.middle, ten.high) == (2, 5.5, 9)
    assert median_time([1, 2, 3], 0.5).high == 3


#: Seconds to nine targets on AlgoPerf's public leaderboard (MLCommons, self-tuning), and the scores published with it.
PUBLISHED = {
    "AdEMAMix": ([7839.193164110184, 1517.7321906089785, 18025.89689064026, INF, INF, 48894.85426735878, INF,
                  6329.966245889664, 17399.639942407608], 0.5190796857463527),
    "Cautious NAdamW": ([INF, 1608.188658952713, 25738.981688261032, INF, INF, INF, INF, 4992.686820983887,
                         14232.458706855774], 0.31425364758698043),
    "Lion": ([INF, 1394.1750195026398, 23172.039316177368, INF, INF, INF, INF, 7223.987207174301,
              15475.552730083466], 0.27833894500561146),
    "Muon (JAX)": ([INF, 1869.765276670456, 20594.037749767303, INF, 77162.91657114029, INF, INF, INF, INF],
                   0.2845117845117842),
    "Muon (PyTorch)": ([7141.604691028595, INF, 15471.922557115557, INF, INF, INF, INF, 1833.473667144776,
                        14214.779582500458], 0.4231200897867556),
    "NAdamW": ([7492.6946766376495, 1800.7732002735138, 25733.847669363025, INF, 72015.5787293911, INF, INF, INF, INF],
               0.384399551066217),
    "NAdamW (baseline)": ([8206.103132247925, 1620.5153810977936, 20589.912857055664, INF, INF, INF, INF,
                           4089.775626659393, 14865.7885992527], 0.4506172839506181),
    "NAdamW (ResNet)": ([INF, 1920.545307636261, 23163.02198767662, INF, INF, INF, INF, 6349.506216049194, INF],
                        0.18574635241301896),
    "Schedule-Free (PyTorch)": ([10337.671689033508, 1188.9131379127502, INF, INF, INF, INF, 40463.388149023056,
                                 3640.148542404175, 19957.71787595749], 0.466891133557801),
    "Schedule-Free (JAX)": ([INF, 2397.40203499794, 12875.283079862596, INF, 87468.86081624031, INF, INF,
                             5446.973826885223, 16161.202248096466], 0.4107744107744111),
    "Schedule-Free v2 (JAX)": ([8204.54053902626, 1850.625381946564, 15451.99134683609, INF, 84891.75501847267, INF,
                                INF, 5444.019295454025, INF], 0.4405162738496074),
    "Schedule-Free v2 (PyTorch)": ([7480.571330547333, 1128.837876081467, INF, INF, INF, 55846.44081497192,
                                    41911.17554831505, 6325.430662155151, 10325.45705485344], 0.5679012345679016),
    "DiLoCo": ([INF, 2379.3425666093826, 28314.819189310077, INF, INF, INF, INF, INF, INF], 0.1369248035914701),
    "DiLoCo v2": ([INF, 2578.1419467926025, 28313.97388148308, INF, INF, INF, INF, INF, INF], 0.1301907968574634),
}  # fmt: skip


def test_algoperfs_scores_are_those_published() -> None:
    times = {name: given for name, (given, _) in PUBLISHED.items()}
    published = {name: score for name, (_, score) in PUBLISHED.items()}
    assert algoperf_score(times, points=100) == pytest.approx(published, abs=1e-9)
    exact = algoperf_score(times)
    assert exact == pytest.approx(published, abs=0.005) and exact != pytest.approx(published, abs=1e-4)
    assert exact == pytest.approx(algoperf_score(times, points=300_001), abs=1e-5)


def test_profiles_by_hand() -> None:
    times = {"a": [10, 20, INF, INF], "b": [20, 10, 30, INF], "c": [50, 10, INF, INF]}
    profile = performance_profile(times, [1, 1.9, 2, 5])
    np.testing.assert_array_equal(profile["a"], [0.25, 0.25, 0.5, 0.5])
    np.testing.assert_array_equal(profile["b"], [0.5, 0.5, 0.75, 0.75])  # nobody's problem is one of the four
    np.testing.assert_array_equal(profile["c"], [0.25, 0.25, 0.25, 0.5])
    assert algoperf_score(times) == pytest.approx({"a": 5 / 12, "b": 8 / 12, "c": 3 / 12})
    assert algoperf_score(times, max_ratio=2)["a"] == 0.25
    assert algoperf_score({"alone": [3, 4]}) == {"alone": 1}


@pytest.mark.parametrize("higher", [True, False])
def test_the_expected_best_is_that_of_all_draws(higher: bool) -> None:
    values = [0.3, 0.9, 0.9, 0.1, 0.5]
    mean, std = expected_best(values, higher=higher)
    assert len(mean) == len(std) == 5
    for k in range(1, 6):
        best = [(max if higher else min)(draw) for draw in itertools.product(values, repeat=k)]
        assert (mean[k - 1], std[k - 1]) == pytest.approx((np.mean(best), np.std(best)))
    far, spread = expected_best(values, 500, higher)
    assert far[-1] == pytest.approx(0.9 if higher else 0.1) and spread[-1] == pytest.approx(0, abs=1e-6)


def test_failed_trials_cost_a_trial() -> None:
    for failed in (NAN, INF, -INF):
        assert expected_best([0.9, failed, 0.5])[0] == pytest.approx(expected_best([0.9, 0.5, 0.5])[0])
        assert expected_best([0.9, failed, 0.5], worst=0.1)[0] == pytest.approx(expected_best([0.9, 0.1, 0.5])[0])
        lower = expected_best([2.0, failed, 3.0], higher=False)
        assert lower[0] == pytest.approx(expected_best([2, 3, 3], higher=False)[0])
    assert expected_best([NAN, NAN], worst=0.1)[0].tolist() == [0.1, 0.1]
    given = np.array([0.9, NAN])
    expected_best(given)
    assert np.isnan(given[1])  # what is given stays


def test_octaves_of_good_rates() -> None:
    accuracy = {0.4: 0.96, 0.1: 0.97, 0.05: 0.9, 0.2: 0.98, 0.8: NAN}
    assert octaves_within(accuracy, higher=True) == pytest.approx(2)
    assert octaves_within(accuracy, higher=True, near=0.005) == 0
    assert octaves_within({1e-3: 1.0, 1e-2: 1.01, 1e-1: INF}, higher=False) == pytest.approx(math.log2(10))


def test_a_target_is_met_beyond_chance() -> None:
    found = accepted([3.2770, 3.2790, 3.2780, 3.2780], 3.28, 0.004, higher=False)
    assert found.accepted and found.evidence == pytest.approx(0.004) and (found.runs, found.needed) == (4, 4)
    few = accepted([3.278, 3.278, 3.278], 3.28, 0.004, higher=False)
    assert not few.accepted and few.needed == 4 and few.mean == pytest.approx(3.278)
    assert accepted([0.85, 0.87], 0.85, 0.01, higher=True).accepted
    assert accepted([0.8], 0.85, 0.01, higher=True) == Acceptance(False, 0.8, pytest.approx(-0.05), 0.01, 1, None)
    runs = np.random.default_rng(8).normal(3.28, 0.0013, (10_000, 4))  # one that just misses: 1 in 1000
    assert np.mean([accepted(row, 3.28, 0.004, higher=False).accepted for row in runs]) < 0.003


def test_what_was_unequal_is_said() -> None:
    fair = [Arm("adamw", (0, 1, 2), 100.0, 900.0, 9), Arm("kfac", (0, 1, 2), 104.9, 900.0, 9)]
    assert unequal(fair) == [] and unequal([]) == []
    said = unequal([*fair, Arm("sgd", (0, 1), 150.0, 0.0, 20)])
    assert said == [
        "training is unequal: sgd had 150 s a run, adamw 100 s a run (50 % more)",
        "numbers of seeds are unequal: adamw had 3, sgd 2 (50 % more)",
        "tuning is unequal: adamw had 900 s, sgd 0 s",
        "numbers of trials are unequal: sgd had 20, adamw 9 (122 % more)",
    ]
    assert unequal([fair[0], Arm("soap", (0, 1, 3), 100.0, 900.0, 9)]) == [
        "seeds differ: adamw has 0 1 2, soap has 0 1 3; paired comparisons take the common ones alone"
    ]


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: t_interval([]), "values: there is no number"),
        (lambda: t_interval([1, NAN, INF]), "values: 2 of 3 are nan, which has no mean"),
        (lambda: bootstrap_interval([1, -INF]), "values: 1 of 2 is -inf"),
        (lambda: t_interval([1, 2], 1), r"level must be a share in \(0, 1\), such as 0.95, got 1"),
        (lambda: bootstrap_interval([1, 2], level=0), "level must be"),
        (lambda: bootstrap_interval([1, 2], draws=0), "draws must be at least 1, got 0"),
        (lambda: paired_t({0: 1}, {1: 1}), r"two common seeds or more, and none is common to \[0\] and \[1\]"),
        (lambda: paired_bootstrap({0: 1, 2: 1}, {1: 1, 2: 0}), r"and 2 is common to \[0, 2\] and \[1, 2\]"),
        (lambda: paired_t({0: 1, 1: NAN}, {0: 1, 1: 2}), "scores: 1 of 2 is nan"),
        (lambda: paired_bootstrap({0: 1, 1: 2}, {0: 1, 1: 2}, level=NAN), "level must be"),
        (lambda: probability_best({}, True), "scores: there is no optimizer"),
        (lambda: probability_best({"a": {0: 1}, "b": {1: 1}}, True), "two seeds or more that all have, and none is"),
        (lambda: probability_best({"a": {0: 1, 1: INF}}, True), "scores of a: 1 of 2 is inf"),
        (lambda: holm({}), "p: there is no comparison"),
        (lambda: holm({"a": NAN}), r"p of a must be a probability in \[0, 1\], got nan"),
        (lambda: median_time([]), "times: there is no number"),
        (lambda: median_time([1, NAN]), "times must be zero or more, and inf where the target was not reached"),
        (lambda: median_time([1, -1]), "times must be zero or more"),
        (lambda: median_time([1], 1.5), "level must be"),
        (lambda: performance_profile({}, [1]), "times: there is no optimizer"),
        (lambda: performance_profile({"a": [1], "b": [1, 2]}, [1]), "there are a 1, b 2"),
        (lambda: performance_profile({"a": [0.0]}, [1]), "times must be above zero"),
        (lambda: performance_profile({"a": [NAN]}, [1]), "times of a must be zero or more"),
        (lambda: performance_profile({"a": [1]}, []), "taus: there is no number"),
        (lambda: algoperf_score({"a": [1]}, max_ratio=1), "max_ratio must be a number above 1, got 1"),
        (lambda: algoperf_score({"a": [1]}, points=1), "points must be 2 or more, got 1"),
        (lambda: expected_best([]), "values: there is no trial"),
        (lambda: expected_best([NAN]), "no trial has ended"),
        (lambda: expected_best([1], 0), "k_max must be 1 or more, got 0"),
        (lambda: expected_best([0.5, NAN], worst=0.6), "worst must be no better than any trial that ended, got 0.6"),
        (lambda: expected_best([0.5, NAN], worst=-INF), "worst must be a finite number"),
        (lambda: octaves_within({0.0: 1, 1.0: 2}, True), "values above zero alone"),
        (lambda: octaves_within({1.0: NAN}, True), "no run of the row has come to an end"),
        (lambda: accepted([], 1, 0, True), "values: there is no number"),
        (lambda: accepted([1], NAN, 0, True), "target: 1 of 1 is nan"),
        (lambda: accepted([1], 1, -1, True), "margin must be zero or more, got -1"),
        (lambda: unequal([Arm("a", (0,), NAN, 0, 1)]), "training of a must be zero or more, got nan"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_a_sentence(call: Callable[[], Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        call()
