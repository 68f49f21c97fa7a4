"""Which layer is named for which fault, on two softmaxes that differ in a known way (see evidence.py)."""

import math
from dataclasses import replace

import numpy as np
import pytest

from pipelinerl.parity.limits import exceeded, limits
from pipelinerl.parity.results import REFERENCE, LagEvidence
from pipelinerl.parity.statistics import statistics
from pipelinerl.parity.verdict import judge
from tests.unit.evidence import BF16_NOISE, by_hand, case, run_config, sampled

FLOAT32 = {"dtype": "float32"}


def verdict(evidence, config=None, lags=(), reference=None):
    results = [case(evidence)] + ([case(reference, REFERENCE)] if reference else [])
    return judge(results, lags, config or run_config())


def notes(found):
    return [finding.text for finding in found.findings if finding.layer is None]


def test_bfloat16_noise_passes():
    found = verdict(sampled(BF16_NOISE))
    assert (found.passed, found.layer, found.findings, found.gain) == (True, None, (), None)
    assert "nothing to change" in found.advice and "1,920 tokens" in found.advice


def test_float32_is_held_to_the_limits_of_float32():
    config = run_config(model=FLOAT32)
    assert verdict(sampled(1e-6), config).passed
    found = verdict(sampled(BF16_NOISE), config)
    assert (found.passed, found.layer) == (False, "inference_path")


def test_limits_are_resolved_by_the_precision_of_the_body_unless_they_are_given():
    assert (limits(run_config(model=FLOAT32)).mean_abs, limits(run_config(model=FLOAT32)).k3) == (1e-4, 1e-7)
    assert (limits(run_config()).mean_abs, limits(run_config()).k3) == (5e-2, 1e-3)
    given = limits(run_config(parity={"max_abs_mean": 0.3, "max_k3": 0.2, "max_frac_out": 0.1, "max_clip_rate": 0.5}))
    assert (given.mean_abs, given.k3, given.frac_out, given.clip_rate) == (0.3, 0.2, 0.1, 0.5)


# --- semantic


def test_raw_logprobs_are_named_with_the_gain_of_processed_ones():
    found = verdict(sampled(returned_at=1.0), run_config(engine={"logprobs_mode": "raw_logprobs"}))
    assert (found.passed, found.layer) == (False, "semantic")
    assert found.advice.startswith("engine.logprobs_mode=processed_logprobs: mean |Δ| 0.32 -> 0.019 nats, k3 0.07 ->")
    assert found.gain.before.clip_rate > 0.5 and found.gain.after.clip_rate == 0
    assert any("fix 1 logprob semantics is off" in note for note in notes(found))


def test_raw_logprobs_are_found_without_knowing_the_settings():
    found = verdict(sampled(returned_at=1.0))
    assert found.layer == "semantic" and "temperature 0.7 is not applied on one of the sides" in found.advice


@pytest.mark.parametrize(("returned_at", "words"), [(0.77, "give both the same"), (0.49, "its square")])
def test_another_temperature_is_named(returned_at, words):
    found = verdict(sampled(returned_at=returned_at))
    assert found.layer == "semantic" and words in found.advice
    assert f"fit temperature {returned_at}, the trainer scores at 0.7" in found.advice


def test_of_neighbours_that_fit_alike_the_temperature_with_a_cause_is_named():
    # 0.99 is on the grid around 0.9 and fits these a little better than 1 does
    config = run_config(sampling={"temperature": 0.9}, engine={"logprobs_mode": "raw_logprobs"})
    evidence = sampled(0.03, temperature=0.9, returned_at=0.993)
    one, grid = (statistics(evidence, config.algo, temperature=t).mean_abs for t in (1.0, 0.9 * 1.1))
    assert grid < one
    assert verdict(evidence, config).advice.startswith("engine.logprobs_mode=processed_logprobs")
    # without the noise the two can be told apart
    exact = sampled(0.01, temperature=0.9, returned_at=0.99)
    assert "fit temperature 0.99" in verdict(exact, config).advice


def test_a_wrong_temperature_fails_within_the_limits_too():
    # a small error of meaning in little noise: mean |Delta| 0.09 would pass these limits
    config = run_config(parity={"max_abs_mean": 1.0, "max_k3": 1.0, "max_mult_prob_error": 9.0, "max_frac_out": 1.0})
    assert verdict(sampled(returned_at=0.77), config).layer == "semantic"


def test_a_temperature_that_fits_only_a_little_better_is_no_meaning():
    # noise of 0.2 hides a temperature of 0.77: twice as good is not three times
    found = verdict(sampled(0.2, returned_at=0.77))
    assert found.layer == "inference_path"


@pytest.mark.parametrize("top_p", [0.8, 0.95])
def test_truncation_is_told_by_the_sign_of_the_differences(top_p):
    found = verdict(sampled(top_p=top_p))
    assert found.layer == "semantic"
    assert "renormalised over a subset of the vocabulary" in found.findings[0].text


def test_truncation_by_the_models_own_file_names_the_setting_and_its_measured_gain():
    found = verdict(sampled(top_p=0.9), run_config(engine={"generation_config": "auto"}), reference=sampled())
    assert found.advice.startswith("engine.generation_config=vllm")
    assert found.gain.after.mean_abs == statistics(sampled(), run_config().algo).mean_abs


@pytest.mark.parametrize("shift", [0.1, -0.1])
def test_an_offset_that_nothing_explains_is_still_one_of_meaning(shift):
    # +0.1 puts logprobs above 0, so it is no truncation; -0.1 has the other sign
    found = verdict(sampled(shift=shift))
    assert found.layer == "semantic" and "a systematic offset" in found.findings[0].text
    assert found.gain.after.mean_abs == pytest.approx(0.024, abs=2e-3)


def test_wrong_weights_are_no_offset_however_large_their_kl():
    # between two distributions the signed mean is -KL: -0.6 here, most of mean |Delta|, and yet nothing is shifted
    found = verdict(sampled(1.0))
    assert statistics(sampled(1.0), run_config().algo).mean_signed < -0.5
    assert found.layer == "inference_path"
    assert verdict(sampled(3.0)).layer == "inference_path"


def test_a_mean_ratio_far_below_1_proves_nothing_where_rare_tokens_would_make_it_up():
    # all below the engine by 1 or 5 nats, as samples of a flat policy are under a peaked one: no mass is missing
    found = verdict(by_hand([-1.0, -5.0] * 200, engine=-2.0))
    assert found.layer == "inference_path"


def test_meaning_is_decided_before_the_update():
    # after the update everything is wrong by as much as a temperature; fresh says that the meaning is right
    evidence = sampled(returned_at=1.0)
    fresh = sampled()
    mixed = replace(evidence, engine=np.where(evidence.phase == 0, fresh.engine, evidence.engine))
    assert verdict(mixed).layer == "inference_path"


# --- inference path


def test_stale_kv_after_an_update_blames_prefix_caching():
    config = run_config(engine={"prefix_caching": True})
    found = verdict(sampled({"after": 1.0}), config)
    assert found.layer == "inference_path" and found.findings[0].text.startswith("after: mean |Δ| 1.01 > 0.05")
    assert found.advice.startswith("engine.prefix_caching=false, or engine.cache_salt=version: mean |Δ| 1 -> 0.024")
    assert any("fix 2 runtime defaults is off" in note and "within limits" not in note for note in notes(found))


def test_without_prefix_caching_the_weights_did_not_arrive():
    found = verdict(sampled({"after": 1.0, "straddling": 0.7}))
    assert found.layer == "inference_path"
    assert "does not hold the weights that were sent" in found.findings[0].text
    salted = run_config(engine={"prefix_caching": True, "cache_salt": "version"})
    assert "does not hold the weights" in verdict(sampled({"after": 1.0}), salted).findings[0].text


@pytest.mark.parametrize(
    ("engine", "advice"),
    [
        ({"kv_policy": "recompute"}, "engine.kv_policy=keep"),
        ({"async_scheduling": True}, "engine.async_scheduling=false"),
        ({}, "look at the update path"),
    ],
)
def test_straddling_alone_blames_the_update_of_running_requests(engine, advice):
    found = verdict(sampled({"straddling": 1.0}), run_config(engine=engine))
    assert found.layer == "inference_path" and found.findings[0].text.startswith("straddling: ")
    assert found.advice.startswith(advice)


def test_noise_before_any_update_names_the_deviating_head_with_its_measured_gain():
    config = run_config(model={"head_dtype": "bfloat16"})
    found = verdict(sampled(0.15), config, reference=sampled())
    assert found.layer == "inference_path" and found.findings[0].text.startswith("fresh: mean |Δ| 0.12")
    assert found.advice.startswith("model.head_dtype=float32: mean |Δ| 0.12 -> 0.024")


def test_a_deviation_is_not_blamed_when_the_fixed_configuration_is_as_bad():
    config = run_config(model={"head_dtype": "bfloat16"})
    found = verdict(sampled(0.15), config, reference=sampled(0.14))
    assert found.layer == "inference_path" and "with all four fixes in force" in found.findings[0].text
    assert "model.head_dtype=float32" not in found.advice and "--ablate" in found.advice


def test_aborted_completions_fail_although_the_others_are_right():
    evidence = sampled(phases=("fresh", "after"), aborted=17, completions=68)
    found = verdict(evidence, run_config(engine={"update_pause": "abort"}))
    assert (found.passed, found.layer) == (False, "inference_path")
    assert "17 of 68 completions (25.0%)" in found.findings[0].text
    assert found.advice == "engine.update_pause=keep: 25.0% -> 0% of the completions aborted"
    assert any("'straddling'" in note for note in notes(found))


def test_when_all_completions_are_aborted_there_is_still_a_verdict():
    found = verdict(by_hand([], aborted=4, completions=4), run_config(engine={"update_pause": "abort"}))
    assert (found.passed, found.layer) == (False, "inference_path") and "100.0%" in found.advice


def test_a_mean_ratio_of_1_does_not_pass_a_failing_spread():
    # rho = 1.5 and 0.5 in equal numbers: the mean ratio is exactly 1
    evidence = by_hand([math.log(1.5), math.log(0.5)] * 200, engine=-3.0)
    found = statistics(evidence, run_config().algo)
    assert found.ratio_mean == pytest.approx(1.0, abs=1e-6) and f"{found.ratio_mean:.3f}" == "1.000"
    judged = verdict(evidence)
    assert (judged.passed, judged.layer) == (False, "inference_path")


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_one_non_finite_logprob_fails(bad):
    evidence = sampled()
    logprobs = evidence.trainer[0.7].copy()
    logprobs[5] = bad
    found = verdict(replace(evidence, trainer={**evidence.trainer, 0.7: logprobs}))
    assert (found.passed, found.layer) == (False, "inference_path") and "inf > 0.05" in found.findings[0].text


@pytest.mark.parametrize(
    ("differences", "beyond"),
    [
        ([0.06] * 400, {"mean_abs", "k3", "token_mult_prob_error"}),
        ([0.0] * 396 + [0.42, -0.42] * 2, set()),  # k3 0.0009
        ([0.0] * 396 + [0.69, -0.69] * 2, {"k3"}),  # k3 0.0024, none outside [0.5, 2]
        ([0.0] * 1998 + [0.8, 0.8], set()),  # exactly the limit of 1e-3
        ([0.0] * 1500 + [0.8, 0.8], {"frac_out"}),
        ([0.0] * 500 + [0.8], set()),  # one token is no rate
    ],
)
def test_each_quantity_has_its_limit(differences, beyond):
    found = statistics(by_hand(differences, engine=-3.0), run_config().algo)
    assert set(exceeded(found, limits(run_config()))) == beyond


# --- objective


def test_bounds_narrower_than_the_noise_are_named_with_bounds_that_hold():
    config = run_config(algo={"kind": "gspo"})
    found = verdict(sampled(), config)
    assert (found.passed, found.layer) == (False, "objective")
    assert "algo.kind=gspo clips 95" in found.findings[0].text
    assert found.advice.startswith("algo.clip_low=0.0173 algo.clip_high=0.0231")
    assert found.gain.before.clip_rate > 0.9 and found.gain.after.clip_rate <= 0.02
    widened = run_config(algo={"kind": "gspo", "clip_low": 0.0173, "clip_high": 0.0231})
    assert verdict(sampled(), widened).passed


@pytest.mark.parametrize(
    ("algo", "advised"),
    [
        ({"kind": "reinforce_is", "max_ratio": 1.01}, {"max_ratio"}),
        ({"kind": "topr", "max_ratio": 1.01}, {"max_ratio"}),
        ({"kind": "cispo", "min_ratio": 0.995, "max_ratio": 1.005}, {"min_ratio", "max_ratio"}),
        ({"kind": "gspo_token"}, {"clip_low", "clip_high"}),
        ({"kind": "dual_clip", "clip_low": 0.005, "clip_high": 0.005}, {"clip_low", "clip_high", "bound"}),
        (
            {"kind": "two_sided", "clip_low": 0.005, "clip_high": 0.005, "max_ratio": 1.01},
            {"clip_low", "clip_high", "max_ratio"},
        ),
        ({"kind": "dppo_tv", "max_rise": 1e-3, "max_fall": 1e-3}, {"max_rise", "max_fall"}),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_the_advised_bounds_are_those_of_the_configured_objective_and_hold(algo, advised):
    found = verdict(sampled(), run_config(algo=algo))
    assert found.layer == "objective", found.advice
    pairs = [setting.removeprefix("algo.").split("=") for setting in found.advice.split(":")[0].split()]
    changes = {name: float(value) for name, value in pairs}
    assert set(changes) == advised
    assert verdict(sampled(), run_config(algo=algo | changes)).passed


@pytest.mark.parametrize(
    "kind", ["ppo_clip", "dual_clip", "two_sided", "sapo", "reinforce_is", "cispo", "topr", "dppo_tv"]
)
def test_the_published_bounds_hold_the_noise_of_bfloat16(kind):
    assert verdict(sampled(), run_config(algo={"kind": kind})).passed


CURVE = [LagEvidence(0, 0.02, 0.003, 0.01), LagEvidence(1, 0.2, 0.05, 0.3), LagEvidence(2, 0.5, 0.3, 0.6)]


def test_staleness_beyond_the_limits_says_its_share_and_a_lag_that_works():
    found = verdict(sampled(), lags=CURVE)
    assert (found.passed, found.layer) == (False, "objective")
    # (0.6 - 0.01) / 0.6 and (0.3 - 0.003) / 0.3
    assert "staleness: 98% of the clip rate, 99% of k3, 96% of mean |log ratio|" in found.findings[0].text
    # k3 falls with the square of the learning rate: sqrt(0.1 / 0.3) = 0.58
    assert found.advice.startswith("async.max_lag=1, trainer.lr=6e-07 or wider bounds: mean |Δ| 0.5 -> 0.2 nats")
    assert "clip rate 60.0% -> 30.0%" in found.advice


@pytest.mark.parametrize(("k3", "clip_rate", "passed"), [(0.09, 0.4, True), (0.2, 0.4, False), (0.09, 0.6, False)])
def test_either_k3_or_the_clip_rate_at_the_lag_bound_is_enough_to_fail(k3, clip_rate, passed):
    assert verdict(sampled(), lags=[LagEvidence(2, 0.3, k3, clip_rate)]).passed is passed


def test_only_lags_up_to_the_bound_count():
    assert verdict(sampled(), run_config(**{"async": {"max_lag": 1}}), lags=CURVE).passed
    assert verdict(sampled(), run_config(**{"async": {"mode": "sync"}}), lags=CURVE).passed


def test_when_no_lag_works_only_slower_learning_is_advised():
    curve = [LagEvidence(0, 0.02, 0.003, 0.01), LagEvidence(1, 0.9, 0.9, 0.8), LagEvidence(2, 1.5, 2.0, math.nan)]
    config = run_config(**{"async": {"max_lag": 2}, "weights": {"every": 2}})
    found = verdict(sampled(), config, lags=curve)
    assert found.layer == "objective" and found.advice.startswith("trainer.lr=1e-07 or wider bounds")
    curve[2] = LagEvidence(2, 1.5, 0.4, 0.9)  # sqrt(0.1 / 0.4) = 0.5 is less than 0.5 / 0.9
    assert verdict(sampled(), config, lags=curve).advice.startswith("trainer.lr=5e-07 or wider bounds")


def test_a_layer_is_not_judged_on_numbers_that_an_earlier_one_spoilt():
    found = verdict(sampled(returned_at=1.0), run_config(algo={"kind": "gspo"}), lags=CURVE)
    assert [finding.layer for finding in found.findings] == ["semantic"]


# --- notes, and what cannot be judged


def test_a_fix_that_is_off_and_did_not_show_is_a_note():
    config = run_config(model={"head_dtype": "bfloat16"}, engine={"prefix_caching": True})
    found = verdict(sampled(), config)
    assert found.passed
    assert [note.split(" is off")[0] for note in notes(found)] == ["fix 2 runtime defaults", "fix 4 fp32 lm_head"]
    assert all("but within limits here" in note for note in notes(found))


def test_a_fix_is_not_said_to_be_harmless_by_a_phase_that_was_not_measured():
    found = verdict(sampled(phases=("fresh",)), run_config(engine={"prefix_caching": True}))
    assert found.passed and not any("within limits" in note for note in notes(found))


def test_a_case_that_did_not_run_proves_nothing():
    found = judge([case(None, reason="no such model")], [], run_config())
    assert (found.passed, found.layer) == (False, None) and "no such model" in found.advice
    empty = verdict(by_hand([]))
    assert (empty.passed, empty.layer) == (False, None) and "not measured" in empty.advice


def test_advice_is_one_line():
    faults = [
        sampled(returned_at=1.0), sampled(top_p=0.9), sampled(shift=0.1), sampled(1.0), sampled({"after": 1.0}),
        sampled({"straddling": 1.0}), sampled(aborted=1), sampled(),
    ]  # fmt: skip
    for evidence in faults:
        assert "\n" not in verdict(evidence).advice != ""
