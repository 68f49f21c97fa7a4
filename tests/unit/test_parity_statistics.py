"""Statistics of differences that are known; ln 4 because exp of it is exact."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.config.schema import (
    CISPO,
    DPPOTV,
    GSPO,
    SAPO,
    TOPR,
    CorrectionConfig,
    DualClip,
    PPOClip,
    ReinforceIS,
    TwoSided,
)
from pipelinerl.parity.statistics import measure, standard_error, statistics
from tests.unit.evidence import by_hand

LN4 = math.log(4)
PPO = PPOClip(clip_low=0.2, clip_high=0.28)


def test_by_hand():
    # rho = 4, 1/4, 1 and Delta = ln 4, -ln 4, 0
    found = statistics(by_hand([LN4, -LN4, 0.0], flips=[True, False, False]), PPO)
    assert found.tokens == 3
    assert found.mean_abs == pytest.approx(2 * LN4 / 3, rel=1e-6)
    assert found.max_abs == pytest.approx(LN4, rel=1e-6)
    assert found.mean_signed == pytest.approx(0, abs=1e-7)
    assert found.k3 == pytest.approx(0.75, rel=1e-6)  # 3 - ln4, -3/4 + ln4, 0; sum 9/4
    assert found.ratio_mean == pytest.approx(1.75, rel=1e-6)
    assert found.token_mult_prob_error == pytest.approx(3, rel=1e-6)  # 4, 4, 1
    assert found.frac_out == pytest.approx(2 / 3)
    assert found.clip_rate == pytest.approx(2 / 3)  # 4 for A > 0, 1/4 for A < 0
    assert found.argmax_flips == pytest.approx(1 / 3)


def test_the_standard_error_takes_tokens_of_a_sequence_together():
    values = np.array([1.0, 1.0, -1.0, -1.0])
    # of 4 sequences: sqrt(4/3 * 4) / 4; of 2 whose tokens agree, sums 2 and -2: sqrt(2/1 * 8) / 4 = 1
    assert standard_error(values, np.array([0, 1, 2, 3])) == pytest.approx(math.sqrt(16 / 3) / 4)
    assert standard_error(values, np.array([7, 7, 3, 3])) == pytest.approx(1)
    assert standard_error(values, np.array([0, 0, 0, 0])) == math.inf
    evidence = by_hand([1.0, 1.0, -1.0, -1.0], sequence=[7, 7, 3, 3], engine=-2.0)
    assert statistics(evidence, PPO).mean_signed_error == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize(
    ("ratio", "algo", "clipped"),
    [
        (1.27, PPO, 0), (1.29, PPO, 1), (0.81, PPO, 0), (0.79, PPO, 1),
        (1.9, ReinforceIS(max_ratio=2.0), 0), (2.1, ReinforceIS(max_ratio=2.0), 1), (0.1, ReinforceIS(), 0),
        (0.6, CISPO(min_ratio=0.5), 0), (0.4, CISPO(min_ratio=0.5), 1), (5.1, CISPO(), 1),
        (1.4, DualClip(clip_high=0.5, bound=1.3), 1), (1.2, DualClip(clip_high=0.5, bound=1.3), 0),
        (0.7, TwoSided(clip_low=0.2), 1), (1.9, DPPOTV(max_rise=0.3), 1), (1.7, DPPOTV(max_rise=0.3), 0),
        (2.0, SAPO(), 0), (1.2, TOPR(max_ratio=1.1), 1), (1.0, TOPR(max_ratio=1.1), 0),
    ],
)  # fmt: skip
def test_the_clip_rate_is_that_of_the_configured_objective_for_either_sign(ratio, algo, clipped):
    assert statistics(by_hand([math.log(ratio)] * 3), algo).clip_rate == clipped


@pytest.mark.parametrize("algo", [TOPR(), ReinforceIS(max_ratio=1.0)])
def test_a_cap_at_a_ratio_of_one_is_not_taken_for_a_narrow_one(algo):
    assert statistics(by_hand([0.02, -0.02, 1e-6]), algo).clip_rate == 0
    assert statistics(by_hand([0.02, math.nan]), algo).clip_rate == 0.5


@pytest.mark.parametrize("proximal", ["recompute", "interpolate"])
def test_noise_is_not_clipped_where_it_is_weighed(proximal):
    algo = PPOClip(proximal=proximal, correction=CorrectionConfig(tis_token=2.0))
    assert statistics(by_hand([LN4, -LN4]), algo).clip_rate == 0


def test_a_sequence_level_objective_clips_whole_sequences():
    # mean log-ratios 0 and 0.1, bounds [0.95, 1.05]
    evidence = by_hand([1.0, -1.0, 0.2, 0.0], sequence=[0, 0, 1, 1], engine=-3.0)
    algo = GSPO(clip_low=0.05, clip_high=0.05)
    assert statistics(evidence, algo).clip_rate == 0.5
    # the mask picks tokens, and leaves the ratio of their sequences as it is
    assert statistics(evidence, algo, np.array([True, False, False, True])).clip_rate == 0.5
    assert statistics(evidence, algo, np.array([False, False, False, True])).clip_rate == 1


def test_each_phase_has_its_own_statistics():
    measured = measure(by_hand([0.0, LN4, LN4, -LN4], phase=[0, 2, 2, 2]), PPO)
    assert list(measured.phases) == ["fresh", "after"]
    assert measured.phases["fresh"].mean_abs == 0
    assert measured.phases["after"].mean_signed == pytest.approx(LN4 / 3, rel=1e-6)
    assert (measured.whole.tokens, measured.phases["after"].tokens) == (4, 3)


def test_another_temperature_of_the_trainer_can_be_asked_for():
    evidence = by_hand([LN4, LN4])
    evidence = replace(evidence, trainer={**evidence.trainer, 0.5: evidence.engine})
    assert statistics(evidence, PPO).clip_rate == 1
    at_half = statistics(evidence, PPO, temperature=0.5)
    assert at_half.mean_abs == 0 and at_half.clip_rate == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["engine", "trainer"])
def test_a_non_finite_logprob_shows_in_every_statistic(side, bad):
    evidence = by_hand([0.0, 0.0, 0.0, 0.0])
    values = (evidence.engine if side == "engine" else evidence.trainer[1.0]).copy()
    values[2] = bad
    evidence = replace(evidence, engine=values) if side == "engine" else replace(evidence, trainer={1.0: values})
    found = statistics(evidence, PPO)
    shown = (found.mean_abs, found.max_abs, found.mean_signed, found.k3, found.ratio_mean, found.token_mult_prob_error)
    assert shown == (math.inf,) * 6
    assert (found.frac_out, found.clip_rate) == (0.25, 0.25)
    assert statistics(evidence, PPO, np.array([True, True, False, True])).mean_abs == 0


def test_a_token_that_is_impossible_on_both_sides_is_no_agreement():
    evidence = by_hand([0.0, 0.0])
    gone = np.array([-math.inf, -1.0], np.float32)
    assert statistics(replace(evidence, engine=gone, trainer={1.0: gone}), PPO).mean_abs == math.inf


def test_nothing_measured_is_not_no_difference():
    found = statistics(by_hand([0.0]), PPO, np.array([False]))
    assert found.tokens == 0 and math.isnan(found.mean_abs) and math.isnan(found.clip_rate)
    assert found.argmax_flips is None
    assert measure(by_hand([]), PPO).phases == {}


def test_tiny_differences_are_not_lost_to_cancellation():
    # k3 = Delta^2 / 2 = 25 * 2^-53, which rho - 1 - Delta would miss by 4%: float64 has steps of 2^-52 at 1
    assert statistics(by_hand([5 * 2.0**-26], engine=-0.25), PPO).k3 == pytest.approx(25 * 2.0**-53, rel=1e-4, abs=0)


def test_ratios_outside_one_half_to_two_are_out():
    ratios = [0.49, 0.51, 1.0, 1.99, 2.01]
    assert statistics(by_hand([math.log(ratio) for ratio in ratios]), PPO).frac_out == pytest.approx(2 / 5)


@given(st.lists(st.tuples(st.floats(-3, 3), st.integers(0, 3)), min_size=1, max_size=20), st.randoms())
def test_order_does_not_matter_and_ranges_hold(rows, random):
    def found(given_rows):
        return statistics(by_hand([d for d, _ in given_rows], sequence=[s for _, s in given_rows], engine=-5.0), PPO)

    one, other = found(rows), found(random.sample(rows, len(rows)))
    for name in (
        "mean_abs",
        "max_abs",
        "mean_signed",
        "mean_signed_error",
        "k3",
        "ratio_mean",
        "frac_out",
        "clip_rate",
    ):
        assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-9, abs=1e-12), name
    assert (
        one.k3 >= 0 and one.token_mult_prob_error >= 1 and abs(one.mean_signed) <= one.mean_abs <= one.max_abs + 1e-12
    )
    # mean Delta + k3 = mean rho - 1
    assert one.mean_signed + one.k3 == pytest.approx(one.ratio_mean - 1, rel=1e-9, abs=1e-9)
