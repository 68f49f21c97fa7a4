import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.algo.diagnostics import Sums
from pipelinerl.algo.ratio_histogram import histogram, quantiles
from pipelinerl.config.schema import PPOClip
from tests.unit.objective_tokens import ROLLOUT, sums, tokens

LN4 = math.log(4)
QUANTILES = {f"policy/ratio_p{name}" for name in ("01", "05", "50", "95", "99")}
CLIPS = {f"policy/clip_{side}_{sign}" for side in ("low", "high") for sign in ("pos", "neg")}
POLICY = {
    f"policy/{name}"
    for name in (
        "ratio_mean",
        "chi2",
        "clip_rate",
        "kl_old_new",
        "kl_k1",
        "kl_k2",
        "entropy",
        "logprob_new",
        "logprob_rollout",
        "ess",
        "ess_sequence",
    )
}
POLICY |= QUANTILES | CLIPS
MISMATCH = {
    f"mismatch/{name}"
    for name in (
        "tokens",
        "abs_logprob_mean",
        "abs_logprob_max",
        "signed_logprob_mean",
        "k3",
        "token_mult_prob_error",
        "frac_out_0.5_2",
    )
}

# (log ratio, advantage, entropy, clipped, lag)
ROW = st.tuples(st.floats(-6, 6), st.floats(-2, 2), st.floats(0, 4), st.sampled_from([-1, 0, 1]), st.integers(0, 10))
BATCH = st.lists(ROW, min_size=0, max_size=12)


def buckets(*lags):
    """The names of all metrics of these lag buckets."""
    return {f"staleness/{name}_lag_{k}" for name in ("tokens", "abs_log_ratio", "k3", "clip_rate") for k in lags}


def of(rows, sequence=None, algo=None, first=True):
    """Each row is a token, and a sequence of its own unless `sequence` says otherwise."""
    log_ratio, advantages, entropy, clipped, lag = zip(*rows, strict=True) if rows else ((),) * 5
    made = tokens(log_ratio, advantages, entropy=entropy, sequence=sequence, lag=lag, dtype=torch.float64)
    return sums(made, algo, clipped, first)


def metrics_of(log_ratio, **values):
    return sums(tokens(log_ratio, dtype=torch.float64, **values)).finish()


def own(metrics):
    """Without the panel of the corrections, which has tests of its own."""
    return {name: value for name, value in metrics.items() if not name.startswith(("counterfactual/", "correction/"))}


def test_by_hand():
    rows = [
        (0.0, 1.0, 1.0, 0, 0),  # rho 1, lag 0
        (LN4, 1.0, 2.0, 1, 0),  # rho 4, lag 0
        (-LN4, 1.0, 3.0, 0, 1),  # rho 1/4, lag 1
    ]
    metrics = own(of(rows).finish())
    assert set(metrics) == POLICY | MISMATCH | buckets(0, 1)
    found = {name: value for name, value in metrics.items() if name not in QUANTILES}
    assert found == pytest.approx(
        {
            "policy/ratio_mean": 1.75,  # (1 + 4 + 1/4) / 3
            "policy/chi2": 3.1875,  # (0 + 9 + 9/16) / 3
            "policy/clip_rate": 1 / 3,
            "policy/clip_high_pos": 1 / 3,
            "policy/clip_high_neg": 0,
            "policy/clip_low_pos": 0,
            "policy/clip_low_neg": 0,
            "policy/kl_old_new": 0.75,  # k3: 0, 3 - ln4, -3/4 + ln4; sum 9/4
            "policy/kl_k1": 0,
            "policy/kl_k2": LN4**2 / 3,
            "policy/entropy": 2.0,
            "policy/logprob_new": ROLLOUT,
            "policy/logprob_rollout": ROLLOUT,
            "policy/ess": 5.25**2 / (3 * 17.0625),  # sum rho^2 = 1 + 16 + 1/16
            "policy/ess_sequence": 5.25**2 / (3 * 17.0625),  # of one token each
            "mismatch/tokens": 2,
            "mismatch/abs_logprob_mean": LN4 / 2,
            "mismatch/abs_logprob_max": LN4,
            "mismatch/signed_logprob_mean": LN4 / 2,
            "mismatch/k3": (3 - LN4) / 2,
            "mismatch/token_mult_prob_error": 2.5,  # (1 + 4) / 2
            "mismatch/frac_out_0.5_2": 0.5,
            "staleness/tokens_lag_0": 2,
            "staleness/abs_log_ratio_lag_0": LN4 / 2,
            "staleness/k3_lag_0": (3 - LN4) / 2,
            "staleness/clip_rate_lag_0": 0.5,
            "staleness/tokens_lag_1": 1,
            "staleness/abs_log_ratio_lag_1": LN4,
            "staleness/k3_lag_1": LN4 - 3 / 4,
            "staleness/clip_rate_lag_1": 0,
        },
        rel=1e-6,
        abs=1e-12,
    )


def test_clipped_tokens_are_counted_by_side_and_sign_of_the_advantage():
    rows = [(0.0, advantage, 1.0, side, 0) for advantage, side in [(2, 1), (2, 1), (-2, 1), (-1, -1), (1, -1), (0, 1)]]
    found = of([*rows, (0.0, 1.0, 1.0, 0, 0), (0.0, -1.0, 1.0, 0, 0)]).finish()
    assert {name: found[name] * 8 for name in CLIPS} == {
        "policy/clip_high_pos": 2,
        "policy/clip_high_neg": 1,
        "policy/clip_low_neg": 1,
        "policy/clip_low_pos": 1,
    }
    assert found["policy/clip_rate"] * 8 == 6  # the one without an advantage too


def test_the_ratio_of_a_sequence_is_the_product_of_its_tokens():
    # products 2 * 2 = 4 and 4 / 4 = 1: (4 + 1)^2 / (2 * 17); the number 1 names no sequence
    found = metrics_of([math.log(2), math.log(2), LN4, -LN4], sequence=[0, 0, 2, 2])
    assert found["policy/ess_sequence"] == pytest.approx(25 / 34)
    assert found["policy/ess"] == pytest.approx((8.25 / 4) ** 2 / ((4 + 4 + 16 + 1 / 16) / 4))


def test_divergence_from_the_reference_by_hand():
    # d = ln 4 and -ln 4 from a policy that is where the engine is
    found = metrics_of([0.0, 0.0], reference=[-LN4, LN4])
    assert found["policy/kl_ref"] == pytest.approx((1 / 4 - 1 + LN4 + 4 - 1 - LN4) / 2)
    assert found["policy/kl_ref_k1"] == pytest.approx(0)
    assert "policy/kl_ref" not in metrics_of([0.0])
    # beyond every clamp of the loss
    assert metrics_of([0.0], reference=[30.0])["policy/kl_ref"] == pytest.approx(math.exp(30), rel=1e-6)


def test_what_a_correction_does_to_the_weights():
    algo = PPOClip(correction={"icepop": [0.5, 2.0]})
    found = of([(LN4, 1.0, 1.0, 0, 0), *[(0.0, 1.0, 1.0, 0, 0)] * 3], algo=algo).finish()
    assert found["correction/weight_mean"] == 0.75
    assert "correction/weight_mean" not in of([(0.0, 1.0, 1.0, 0, 0)]).finish()


def test_after_the_first_update_of_a_step_there_is_no_mismatch_to_see():
    rows = [(LN4, 1.0, 1.0, 0, 0), (0.0, 1.0, 1.0, 0, 0)]
    metrics = (of(rows) + of([(3 * LN4, 1.0, 1.0, 0, 0)], first=False)).finish()
    assert metrics["mismatch/tokens"] == 2 and metrics["mismatch/abs_logprob_max"] == pytest.approx(LN4)
    assert metrics["staleness/tokens_lag_0"] == 3 and metrics["policy/ratio_mean"] == pytest.approx((4 + 1 + 64) / 3)


def test_mismatch_errors_are_absolute():
    # lag-0 tokens with rho 1/4: |Delta| = ln 4, so the multiplicative error is 4 and not 1/4
    metrics = metrics_of([-LN4])
    assert metrics["mismatch/token_mult_prob_error"] == pytest.approx(4, rel=1e-6)
    assert metrics["mismatch/abs_logprob_max"] == pytest.approx(LN4, rel=1e-6)
    assert metrics["mismatch/signed_logprob_mean"] == pytest.approx(-LN4, rel=1e-6)
    assert metrics["mismatch/frac_out_0.5_2"] == 1


def test_each_token_is_in_the_bucket_of_its_own_lag():
    # one sequence of lags 9, 8, 2 and 0 (three updates fell into it) and one of lag 7; the last bucket is 8 or more
    rows = [
        (LN4, 1.0, 1.0, 1, 9),
        (0.0, 1.0, 1.0, 0, 8),
        (-LN4, 1.0, 1.0, -1, 2),
        (2 * LN4, 1.0, 1.0, 0, 0),  # on old keys and values: no mismatch, but in the bucket
        (0.0, 1.0, 1.0, 0, 7),
    ]
    metrics = of(rows, sequence=[0, 0, 0, 0, 1]).finish()
    assert metrics["mismatch/tokens"] == 0
    found = {name: value for name, value in metrics.items() if "_lag_" in name}
    assert set(found) == buckets(0, 2, 7, 8)
    assert {name: value for name, value in found.items() if "tokens" in name} == {
        "staleness/tokens_lag_0": 1, "staleness/tokens_lag_2": 1, "staleness/tokens_lag_7": 1,
        "staleness/tokens_lag_8": 2,
    }  # fmt: skip
    assert [found[f"staleness/abs_log_ratio_lag_{k}"] for k in (0, 2, 7, 8)] == pytest.approx(
        [2 * LN4, LN4, 0, LN4 / 2], rel=1e-6
    )
    assert [found[f"staleness/k3_lag_{k}"] for k in (0, 2, 7, 8)] == pytest.approx(
        [15 - 2 * LN4, LN4 - 3 / 4, 0, (3 - LN4) / 2], rel=1e-6
    )
    assert [found[f"staleness/clip_rate_lag_{k}"] for k in (0, 2, 7, 8)] == [0, 1, 0, 0.5]


@settings(max_examples=30, deadline=None)
@given(BATCH)
def test_the_buckets_share_out_all_tokens_of_the_step(rows):
    metrics = of(rows).finish()
    count = {k: metrics.get(f"staleness/tokens_lag_{k}", 0) for k in range(9)}
    assert sum(count.values()) == len(rows)
    for name, total in (("clip_rate", "policy/clip_rate"), ("k3", "policy/kl_old_new")):
        if rows:
            parts = [n * metrics[f"staleness/{name}_lag_{k}"] for k, n in count.items() if n]
            assert sum(parts) / len(rows) == pytest.approx(metrics[total], rel=1e-9, abs=1e-12)


def test_equal_policies():
    metrics = metrics_of([0.0] * 9)
    assert metrics["policy/ratio_mean"] == metrics["policy/ess"] == metrics["mismatch/token_mult_prob_error"] == 1
    assert metrics["policy/kl_old_new"] == metrics["mismatch/k3"] == metrics["mismatch/abs_logprob_max"] == 0
    assert all(metrics[name] == 1 for name in QUANTILES)


def test_tiny_differences_are_not_lost_to_cancellation():
    # k3 = Delta^2 / 2 = 25 * 2^-53, which rho - 1 - Delta would miss by 4%: float64 has steps of 2^-52 at 1
    metrics = metrics_of([5 * 2.0**-26])
    assert metrics["mismatch/k3"] == pytest.approx(25 * 2.0**-53, rel=1e-4, abs=0)
    assert metrics["policy/chi2"] == pytest.approx(25 * 2.0**-52, rel=1e-4, abs=0)


def test_ratios_are_not_clamped():
    # the losses clamp log-ratios at 20; here exp(30) has to show
    assert metrics_of([30.0])["policy/ratio_mean"] == pytest.approx(math.exp(30))


def test_a_sequence_that_straddles_an_update_is_not_mismatch():
    # its later tokens are of lag 0, but attend to keys and values of older weights
    straddling = [(1.0, 1.0, 1.0, 0, lag) for lag in (1, 0, 0)]
    metrics = of([*straddling, *[(LN4, 1.0, 1.0, 0, 0)] * 2], sequence=[0, 0, 0, 1, 1]).finish()
    assert metrics["mismatch/tokens"] == 2
    assert metrics["mismatch/abs_logprob_mean"] == pytest.approx(LN4, rel=1e-6)


def test_without_lag_0_tokens_there_is_no_mismatch_to_report():
    metrics = own(metrics_of([1.0], lag=[1]))
    assert set(metrics) == POLICY | buckets(1) | {"mismatch/tokens"} and metrics["mismatch/tokens"] == 0


def test_without_any_token_only_their_number_is_reported():
    assert of([]).finish() == Sums.zero().finish() == {"mismatch/tokens": 0}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_logprobs_are_visible(bad):
    fine = (0.1, 1.0, 1.0, 0, 0)
    metrics = own((of([fine]) + of([(bad, 1.0, 1.0, 0, 0)]) + of([fine])).finish())
    blind = {"policy/clip_rate", "policy/entropy", "mismatch/tokens", "policy/logprob_rollout", *CLIPS}
    blind |= {"staleness/tokens_lag_0", "staleness/clip_rate_lag_0"}
    assert {name for name, value in metrics.items() if math.isfinite(value)} == blind


def test_a_non_finite_logprob_spoils_only_the_bucket_of_its_lag():
    metrics = metrics_of([math.nan, 0.0], lag=[1, 0])
    assert math.isnan(metrics["staleness/k3_lag_1"]) and metrics["staleness/k3_lag_0"] == 0
    assert metrics["mismatch/k3"] == 0


def test_maximum_survives_a_reduction_that_drops_nan():
    assert of([(math.nan, 1.0, 1.0, 0, 0)]).maxima.tolist() == [math.inf]


def test_non_finite_entropy_is_visible():
    assert math.isnan(metrics_of([0.0], entropy=[math.nan])["policy/entropy"])


def test_sums_do_not_hold_the_graph():
    assert not of([(0.0, 1.0, 1.0, 0, 0)]).totals.requires_grad


@settings(max_examples=30, deadline=None)
@given(BATCH, st.lists(st.integers(0, 12), max_size=3))
def test_micro_batches_add_up_to_the_whole(rows, cuts):
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [of(rows[start:end]) for start, end in itertools.pairwise(edges)]
    merged, whole = sum(parts, Sums.zero()).finish(), of(rows).finish()
    assert set(merged) == set(whole)
    assert merged == pytest.approx(whole, rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(BATCH, BATCH)
def test_reduced_as_flat_tensors_over_ranks(first, second):
    ranks = [of(first), of(second)]
    reduced = Sums(
        torch.stack([rank.totals for rank in ranks]).sum(0), torch.stack([rank.maxima for rank in ranks]).amax(0)
    )
    assert reduced.finish() == pytest.approx(of(first + second).finish(), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12), st.randoms(use_true_random=False))
def test_order_does_not_matter(rows, random):
    moved = random.sample(rows, len(rows))
    assert of(moved).finish() == pytest.approx(of(rows).finish(), rel=1e-6, abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=12))
def test_ranges(rows):
    metrics = of(rows).finish()
    assert 0 < metrics["policy/ess"] <= 1 + 1e-12 and 0 < metrics["policy/ess_sequence"] <= 1 + 1e-12
    assert metrics["policy/kl_old_new"] >= 0
    ordered = [metrics[f"policy/ratio_p{name}"] for name in ("01", "05", "50", "95", "99")]
    assert ordered == sorted(ordered)
    if metrics["mismatch/tokens"]:
        assert metrics["mismatch/k3"] >= 0 and metrics["mismatch/token_mult_prob_error"] >= 1
        assert metrics["mismatch/abs_logprob_mean"] <= metrics["mismatch/abs_logprob_max"] * (1 + 1e-12)


def test_quantiles_of_counts_are_those_of_the_values_to_within_half_a_bin():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.1
    wanted = (0.01, 0.05, 0.3, 0.5, 0.95, 0.99)
    exact = values.sort().values[[math.ceil(q * 5000) - 1 for q in wanted]].tolist()
    for found, value in zip(quantiles(histogram(values[:17]) + histogram(values[17:]), wanted), exact, strict=True):
        assert found == pytest.approx(value, rel=10 ** (1 / 64) - 1 + 1e-9)


def test_the_histogram_holds_what_is_smaller_than_its_smallest_bin_and_larger_than_its_largest():
    counts = histogram(torch.tensor([1e-9, -1e-9, 0.0, 1e4, -1e4, math.nan, math.inf], dtype=torch.float64))
    assert counts.sum() == 5
    low, middle, high = quantiles(counts, (0.01, 0.5, 0.99))
    assert middle == 0 and high == -low == pytest.approx(100, rel=0.04)
