"""Confidence intervals: values from tables and worked by hand, invariances, and how often they hold."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.metrics.intervals import Estimate, Values, mean_interval, paired_difference, student_quantile

SHARES = st.lists(st.integers(0, 840).map(lambda n: n / 840), min_size=1, max_size=40)


def binary(passed: int, count: int) -> Values:
    return np.array([1.0] * passed + [0.0] * (count - passed))


@pytest.mark.parametrize(
    ("passed", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # as in textbooks
        (1, 10, 0.0179, 0.4042),
        (0, 10, 0.0, 0.2775),  # z^2 / (n + z^2)
        (10, 10, 0.7225, 1.0),
        (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I
        (1, 1, 0.2065, 1.0),
    ],
)
def test_one_yes_or_no_per_problem_gives_wilsons_interval(passed: int, count: int, low: float, high: float) -> None:
    found = mean_interval(binary(passed, count), count)
    assert (found.value, found.problems) == (passed / count, count)
    # the effective size never falls below the number of problems, so n/(n-1) does not widen it
    assert (found.low, found.high) == (pytest.approx(low, abs=6e-5), pytest.approx(high, abs=6e-5))


def test_completions_of_a_problem_that_agree_count_once_and_independent_ones_each() -> None:
    alike = mean_interval(binary(8, 10), 40)  # 4 completions each, all 4 alike
    assert alike == mean_interval(binary(8, 10), 10)
    # All means equal: problems do not differ, so 10 problems x 4 completions are 40 independent outcomes, half passed.
    mixed = mean_interval(np.full(10, 0.5), 40)
    z2 = 1.959963984540054**2
    half = math.sqrt(z2 * 0.25 / 40 + z2**2 / (4 * 40**2)) / (1 + z2 / 40)
    assert (mixed.low, mixed.high) == (pytest.approx(0.5 - half), pytest.approx(0.5 + half))


def test_an_effective_size_by_hand() -> None:
    # Means 0, .5, .5, 1: mean .5, variance (.25 + .25) / 3 = 1/6, so 4 * .25 / (1/6) = 6 outcomes: 3 of 6 by Wilson.
    found = mean_interval(np.array([0.0, 0.5, 0.5, 1.0]), 8)
    assert (found.low, found.high) == (pytest.approx(0.1876, abs=5e-5), pytest.approx(0.8124, abs=5e-5))


def test_rewards_that_are_no_shares_get_students_interval() -> None:
    # mean 2, standard deviation 1, t(2) = 4.3027: 2 +- 4.3027 / sqrt(3)
    found = mean_interval(np.array([1.0, 2.0, 3.0]), 3)
    assert found == Estimate(2.0, pytest.approx(-0.4841, abs=5e-5), pytest.approx(4.4841, abs=5e-5), 3)
    assert math.isnan(mean_interval(np.array([-1.0]), 1).low)


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (5, 2.5706), (10, 2.2281), (30, 2.0423), (1000, 1.9623)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_quantile(freedom) == pytest.approx(quantile, rel=1.3e-3 if freedom == 3 else 5e-4)


def test_a_paired_difference_by_hand() -> None:
    # 10 problems: 4 gained, 1 lost, 5 alike. Agresti and Min: sum 3 over 12, squares 5 + 1.
    before, after = np.array([0] * 4 + [1] + [1] * 5, float), np.array([1] * 4 + [0] + [1] * 5, float)
    found = paired_difference(before, after)
    half = 1.959964 * math.sqrt((6 / 12 - (3 / 12) ** 2) / 12)
    assert found == Estimate(0.3, pytest.approx(0.25 - half), pytest.approx(0.25 + half), 10)
    assert found.low < 0 < found.high


def test_pairing_narrows_where_problems_stay_as_they_were() -> None:
    before = binary(50, 100)
    after = before.copy()
    after[50:60] = 1.0
    paired = paired_difference(before, after)
    a, b = mean_interval(before, 100), mean_interval(after, 100)
    assert paired.high - paired.low < 0.65 * ((a.high - a.low) + (b.high - b.low)) / 2
    assert paired.low > 0  # 10 of 100 gained, none lost; the two intervals overlap
    assert b.low < a.high


def test_no_change_at_all_is_no_certainty() -> None:
    same = paired_difference(binary(3, 8), binary(3, 8))
    assert same.value == 0 and same.low == -same.high < -0.1


def test_differences_of_other_rewards_get_students_interval() -> None:
    found = paired_difference(np.array([0.0, 5.0, -2.0]), np.array([1.0, 7.0, 1.0]))
    assert found == mean_interval(np.array([1.0, 2.0, 3.0]), 3)


@settings(deadline=None)  # a busy machine
@given(SHARES, st.integers(1, 8))
def test_an_interval_of_shares_holds_its_mean_within_0_and_1_in_any_order(values: list[float], samples: int) -> None:
    outcomes = samples * len(values)
    found = mean_interval(np.array(values), outcomes)
    assert 0 <= found.low <= found.value + 1e-12 and found.value - 1e-12 <= found.high <= 1
    turned = mean_interval(np.array(values[::-1]), outcomes)
    assert (turned.low, turned.high) == (pytest.approx(found.low, abs=1e-9), pytest.approx(found.high, abs=1e-9))
    mirrored = mean_interval(1 - np.array(values), outcomes)
    assert mirrored.low == pytest.approx(1 - found.high, abs=1e-6)


@settings(deadline=None)  # a busy machine
@given(SHARES, st.integers(0, 2**32 - 1))
def test_a_difference_lies_in_its_interval_and_changes_sign_with_the_order(values: list[float], seed: int) -> None:
    before, after = np.array(values), np.random.default_rng(seed).random(len(values)).round()
    found, back = paired_difference(before, after), paired_difference(after, before)
    assert -1 <= found.low <= found.value <= found.high <= 1
    assert (back.low, back.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


@pytest.mark.parametrize("problems", [16, 64, 256])
@pytest.mark.parametrize("samples", [1, 4])
@pytest.mark.parametrize("mean", [0.5, 0.95])
def test_intervals_hold_the_truth_as_often_as_they_say(problems: int, samples: int, mean: float) -> None:
    """Problems of different difficulty, drawn anew each time, as in a benchmark that stands for a larger set."""
    rng, hits, runs = np.random.default_rng(problems + samples), 0, 400
    for _ in range(runs):
        difficulty = rng.beta(2 * mean, 2 * (1 - mean), problems)
        values = rng.binomial(samples, difficulty) / samples
        found = mean_interval(values, samples * problems)
        hits += found.low <= mean <= found.high
    # 95%, give or take 1% of chance; with 16 yes-or-no problems of mean .5 the exact coverage of Wilson is 92.3%
    assert 0.91 <= hits / runs <= 0.99


@pytest.mark.parametrize("problems", [16, 64, 256])
@pytest.mark.parametrize(("gained", "lost"), [(0.3, 0.05), (0.05, 0.0), (0.1, 0.1)])
def test_differences_hold_the_truth_as_often_as_they_say(problems: int, gained: float, lost: float) -> None:
    rng, hits, runs = np.random.default_rng(problems), 0, 400
    for _ in range(runs):
        change = rng.choice([1, -1, 0], p=[gained, lost, 1 - gained - lost], size=problems)
        before = np.where(change == 0, rng.integers(0, 2, problems), change < 0).astype(float)
        found = paired_difference(before, before + change)
        hits += found.low <= gained - lost <= found.high
    assert hits / runs >= 0.92
