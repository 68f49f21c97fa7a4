"""The alarm, fed with the metrics of steps as training logs them."""

import math
from dataclasses import replace

import pytest

from pipelinerl.parity.alarm import Alarm
from pipelinerl.parity.limits import limits
from pipelinerl.parity.statistics import statistics
from tests.unit.evidence import by_hand, run_config

LIMITS = limits(run_config())  # bfloat16: 5e-2 and 1e-3
CALIBRATED = statistics(by_hand([0.004, -0.004]), run_config().algo)  # mean |Delta| 0.004, k3 8e-6


def step(size=0.004, tokens=5000, signed=0.0, clip_rate=0.01, kl=0.001, lags=None, **others):
    """A step whose lag-0 tokens differ by `size`; `lags` is {lag: (tokens, clip rate, k3)}."""
    lags = {0: (4000, clip_rate, kl)} if lags is None else lags
    metrics = {"mismatch/tokens": float(tokens), "policy/clip_rate": clip_rate, "policy/kl_old_new": kl}
    if tokens:
        metrics |= {
            "mismatch/abs_logprob_mean": size,
            "mismatch/abs_logprob_max": 4 * size,
            "mismatch/signed_logprob_mean": signed,
            "mismatch/k3": size**2 / 2,
            "mismatch/token_mult_prob_error": math.exp(size),
            "mismatch/frac_out_0.5_2": 0.0,
        }
    for lag, (count, clipped, k3) in lags.items():
        metrics[f"staleness/tokens_lag_{lag}"] = count
        metrics[f"staleness/clip_rate_lag_{lag}"] = clipped
        metrics[f"staleness/k3_lag_{lag}"] = k3
    return metrics


def feed(alarm, *steps):
    """The messages of each step."""
    return [alarm.check(metrics) for metrics in steps]


def test_a_calm_run_is_never_reported():
    alarm = Alarm(LIMITS, CALIBRATED)
    assert feed(alarm, *[step(size=0.002 + 0.004 * (index % 3)) for index in range(60)]) == [[]] * 60


def test_mismatch_beyond_the_limit_is_reported_once_while_it_lasts_and_again_when_it_returns():
    alarm = Alarm(LIMITS, None)
    found = feed(alarm, step(), step(0.08), step(0.09), step(), step(0.08))
    assert [len(messages) for messages in found] == [0, 1, 0, 0, 1]
    assert found[1][0].startswith("inference path: mean |Δ| 0.08 > 0.05, k3 0.0032 > 0.001")
    assert "over 5,000 tokens of the last 1 step(s)" in found[1][0]


def test_five_times_the_preflight_is_reported_long_before_the_limit():
    assert feed(Alarm(LIMITS, None), step(0.03)) == [[]]
    assert feed(Alarm(LIMITS, CALIBRATED), step(0.019)) == [[]]
    (message,) = Alarm(LIMITS, CALIBRATED).check(step(0.021))
    assert message.startswith("inference path: mean |Δ| 0.021 > 0.02")
    assert "k3 0.000221 > 0.0002" in message  # 25 times 8e-6
    assert "the preflight had mean |Δ| 0.004, k3 8e-06" in message


def test_a_bad_preflight_does_not_raise_the_limit():
    bad = statistics(by_hand([0.5, -0.5]), run_config().algo)
    (message,) = Alarm(LIMITS, bad).check(step(0.08))
    assert "mean |Δ| 0.08 > 0.05" in message


def test_a_preflight_that_found_no_difference_leaves_room_for_rounding():
    nothing = statistics(by_hand([0.0, 0.0]), run_config().algo)
    assert feed(Alarm(LIMITS, nothing), step(0.0008), step(0.0011)) != [[], []]
    assert feed(Alarm(LIMITS, nothing), step(0.0008)) == [[]]


def test_an_offset_names_the_semantic_layer_and_a_large_kl_does_not():
    (message,) = Alarm(LIMITS, None).check(step(0.3, signed=0.25))
    assert message.startswith("semantic: ")
    # the signed mean of two distributions is -KL, here -k3 = -0.45: nothing is shifted
    (message,) = Alarm(LIMITS, None).check(step(0.95, signed=-0.5))
    assert message.startswith("inference path: ")


def test_a_few_tokens_do_not_alarm_and_many_such_steps_do():
    alarm = Alarm(LIMITS, CALIBRATED)
    assert feed(alarm, *[step(0.2, tokens=3) for _ in range(20)]) == [[]] * 20
    alarm = Alarm(LIMITS, CALIBRATED)
    found = feed(alarm, *[step(0.2, tokens=10) for _ in range(12)])
    assert [len(messages) for messages in found] == [0] * 9 + [1, 0, 0]  # with the hundredth token


def test_a_noisy_step_of_few_tokens_does_not_outweigh_the_steps_before_it():
    # 999 tokens of 0.004 and 3 of 1.0: the mean is 0.007
    assert feed(Alarm(LIMITS, CALIBRATED), step(tokens=999), step(0.2, tokens=3)) == [[], []]


def test_the_newest_tokens_decide_as_soon_as_they_are_enough():
    alarm = Alarm(LIMITS, CALIBRATED)
    found = feed(alarm, *[step(tokens=50_000)] * 20, step(0.05, tokens=1000))
    assert [len(messages) for messages in found] == [0] * 20 + [1]


def test_steps_of_stale_tokens_alone_leave_the_condition_as_it_was():
    alarm = Alarm(LIMITS, None)
    assert len(alarm.check(step(0.08))) == 1
    # nothing to compare for longer than the memory: it is not known to be gone
    assert feed(alarm, *[step(tokens=0) for _ in range(30)]) == [[]] * 30
    assert feed(alarm, step(0.08)) == [[]]
    assert [len(messages) for messages in feed(alarm, step(), step(0.08))] == [0, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_mismatch_alarms_however_few_tokens_have_it(bad):
    (message,) = Alarm(LIMITS, CALIBRATED).check(step(tokens=1) | {"mismatch/abs_logprob_mean": bad})
    assert message.startswith("inference path: mean |Δ|")


def test_single_outliers_are_the_business_of_their_own_limit():
    metrics = step(tokens=10_000) | {"mismatch/frac_out_0.5_2": 0.002}
    (message,) = Alarm(LIMITS, CALIBRATED).check(metrics)
    assert "fraction outside [0.5, 2] 0.002 > 0.001" in message


def test_a_failing_objective_says_how_much_of_it_is_staleness():
    # clip rate (1000 * 0.1 + 3000 * 0.9) / 4000 = 0.7, KL (1000 * 0.02 + 3000 * 0.2) / 4000 = 0.155
    lags = {0: (1000, 0.1, 0.02), 1: (2000, 0.9, 0.2), 8: (1000, 0.9, 0.2)}
    found = feed(Alarm(LIMITS, CALIBRATED), *[step(clip_rate=0.7, kl=0.155, lags=lags)] * 7)
    assert [len(messages) for messages in found] == [0, 0, 0, 0, 1, 0, 0]
    message = found[4][0]
    assert message.startswith("objective: clip rate 70.0% > 50.0%, 96.4% of it from tokens of lag >= 1")  # 2700 / 2800
    assert "KL 0.15 > 0.1 nats per token, 96.8% of it from tokens of lag >= 1" in message  # 600 / 620
    assert "engine and trainer agree" in message and "async.max_lag" in message


def test_the_objective_is_judged_when_no_mismatch_can_be_measured():
    lags = {2: (4000, 0.8, 0.01)}
    found = feed(Alarm(LIMITS, CALIBRATED), *[step(tokens=0, clip_rate=0.8, kl=0.01, lags=lags)] * 5)
    assert found[4][0].startswith("objective: clip rate 80.0% > 50.0%, 100.0% of it")
    assert "no mismatch could be measured" in found[4][0] and "KL" not in found[4][0]


def test_a_spike_of_the_objective_that_passes_is_no_condition():
    spike = step(clip_rate=0.3, kl=0.9, lags={2: (4000, 0.3, 0.9)})
    assert feed(Alarm(LIMITS, CALIBRATED), *[step()] * 10, spike, *[step()] * 10) == [[]] * 21


def test_steps_count_by_their_tokens():
    # 4 steps of 100 tokens with KL 0.5 and one of 4000 with 0.001
    small = step(kl=0.5, lags={1: (100, 0.1, 0.5)})
    assert feed(Alarm(LIMITS, None), *[small] * 4, step()) == [[]] * 5
    assert len(feed(Alarm(LIMITS, None), *[small] * 5)[4]) == 1


def test_mismatch_hides_the_objective_that_it_spoils():
    lags = {0: (4000, 0.9, 0.5)}
    broken = step(0.9, clip_rate=0.9, kl=0.5, lags=lags)
    found = feed(Alarm(LIMITS, CALIBRATED), *[broken] * 8)
    assert [[message.split(":")[0] for message in messages] for messages in found] == [["inference path"]] + [[]] * 7


def test_a_step_that_trained_on_nothing_says_nothing():
    assert Alarm(LIMITS, CALIBRATED).check({"mismatch/tokens": 0.0}) == []


def test_a_non_finite_kl_is_beyond_its_limit():
    found = feed(Alarm(LIMITS, None), *[step(tokens=0, kl=math.nan, lags={1: (10, 0.0, math.nan)})] * 5)
    assert "an unknown part of it" in found[4][0]


def test_a_preflight_without_a_number_calibrates_nothing():
    unknown = replace(CALIBRATED, mean_abs=math.inf)
    assert feed(Alarm(LIMITS, unknown), step(0.03)) == [[]]
