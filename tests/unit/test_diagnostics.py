import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.algo.diagnostics import Sums, token_sums

LN4 = math.log(4)
POLICY = {
    f"policy/{name}"
    for name in ("ratio_mean", "clip_rate", "kl_old_new", "entropy", "logprob_new", "logprob_rollout", "ess")
}
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

# (logprob_new, logprob_rollout, mask, entropy, clipped, version); lags from 0 to 10
token = st.tuples(st.floats(-6, 0), st.floats(-6, 0), st.booleans(), st.floats(0, 4), st.booleans(), st.integers(-5, 5))
batches = st.lists(token, min_size=0, max_size=20)


def buckets(*lags):
    """The names of all metrics of these lag buckets."""
    return {f"staleness/{name}_lag_{k}" for name in ("tokens", "abs_log_ratio", "k3", "clip_rate") for k in lags}


def sums(rows, version=5, sequence=None):
    """Each row is a token, and a sequence of its own unless `sequence` says otherwise."""
    new, rollout, mask, entropy, clipped, versions = zip(*rows, strict=True) if rows else ([],) * 6
    return token_sums(
        logprobs_new=torch.tensor(new, dtype=torch.float32, requires_grad=True),
        logprobs_rollout=torch.tensor(rollout, dtype=torch.float32),
        mask=torch.tensor(mask, dtype=torch.bool),
        entropy=torch.tensor(entropy, dtype=torch.float32),
        clipped=torch.tensor(clipped, dtype=torch.bool),
        versions=torch.tensor(versions, dtype=torch.int32),
        sequence=torch.tensor(range(len(rows)) if sequence is None else sequence, dtype=torch.int64),
        version=version,
    )


def test_by_hand():
    rows = [
        (-1.0, -1.0, True, 1.0, False, 5),  # rho 1, lag 0
        (-1.0, -1.0 - LN4, True, 2.0, True, 5),  # rho 4, lag 0
        (-1.0 - LN4, -1.0, True, 3.0, False, 4),  # rho 1/4, lag 1
        (math.nan, 0.0, False, math.nan, True, 5),  # not sampled: does not count
    ]
    metrics = sums(rows).finish()
    assert set(metrics) == POLICY | MISMATCH | buckets(0, 1)
    assert metrics == pytest.approx(
        {
            "policy/ratio_mean": 1.75,  # (1 + 4 + 1/4) / 3
            "policy/clip_rate": 1 / 3,
            "policy/kl_old_new": 0.75,  # k3: 0, 3 - ln4, -3/4 + ln4; sum 9/4
            "policy/entropy": 2.0,
            "policy/logprob_new": -1 - LN4 / 3,
            "policy/logprob_rollout": -1 - LN4 / 3,
            "policy/ess": 5.25**2 / (3 * 17.0625),  # sum rho^2 = 1 + 16 + 1/16
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
    )


def test_mismatch_errors_are_absolute():
    # lag-0 tokens with rho 1/4: |Delta| = ln 4, so the multiplicative error is 4 and not 1/4
    metrics = sums([(-1.0 - LN4, -1.0, True, 1.0, False, 5)]).finish()
    assert metrics["mismatch/token_mult_prob_error"] == pytest.approx(4, rel=1e-6)
    assert metrics["mismatch/abs_logprob_max"] == pytest.approx(LN4, rel=1e-6)
    assert metrics["mismatch/signed_logprob_mean"] == pytest.approx(-LN4, rel=1e-6)
    assert metrics["mismatch/frac_out_0.5_2"] == 1


def test_each_token_is_in_the_bucket_of_its_own_lag():
    # one sequence of lags 9, 8, 2 and 0 (three updates fell into it) and one of lag 7; the last bucket is 8 or more
    rows = [
        (-1.0, -1.0 - LN4, True, 1.0, True, 11),  # lag 9, Delta ln 4
        (-1.0, -1.0, True, 1.0, False, 12),  # lag 8
        (-1.0 - LN4, -1.0, True, 1.0, True, 18),  # lag 2, Delta -ln 4
        (-1.0, -1.0 - 2 * LN4, True, 1.0, False, 20),  # lag 0, on old keys and values: no mismatch, but in the bucket
        (-1.0, -1.0, True, 1.0, False, 13),  # lag 7
        (math.nan, math.nan, False, math.nan, False, -1),  # a prompt token has no version
    ]
    metrics = sums(rows, version=20, sequence=[0, 0, 0, 0, 1, 1]).finish()
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


@given(batches)
def test_the_buckets_share_out_all_tokens_of_the_step(rows):
    metrics = sums(rows).finish()
    count = {k: metrics.get(f"staleness/tokens_lag_{k}", 0) for k in range(9)}
    assert sum(count.values()) == sum(row[2] for row in rows)
    for name, total in (("clip_rate", "policy/clip_rate"), ("k3", "policy/kl_old_new")):
        if total in metrics:
            parts = [n * metrics[f"staleness/{name}_lag_{k}"] for k, n in count.items() if n]
            assert sum(parts) / sum(count.values()) == pytest.approx(metrics[total], rel=1e-9, abs=1e-12)


def test_equal_policies():
    metrics = sums([(-0.7, -0.7, True, 1.0, False, 5)] * 9).finish()
    assert metrics["policy/ratio_mean"] == metrics["policy/ess"] == metrics["mismatch/token_mult_prob_error"] == 1
    assert metrics["policy/kl_old_new"] == metrics["mismatch/k3"] == metrics["mismatch/abs_logprob_max"] == 0


def test_tiny_differences_are_not_lost_to_cancellation():
    # k3 = Delta^2 / 2 = 25 * 2^-53, which rho - 1 - Delta would miss by 4%: float64 has steps of 2^-52 at 1
    metrics = sums([(-0.25 + 5 * 2.0**-26, -0.25, True, 1.0, False, 5)]).finish()
    assert metrics["mismatch/k3"] == pytest.approx(25 * 2.0**-53, rel=1e-4, abs=0)


def test_ratios_are_not_clamped():
    # the losses clamp log-ratios at 20; here exp(30) has to show
    assert sums([(0.0, -30.0, True, 1.0, True, 5)]).finish()["policy/ratio_mean"] == pytest.approx(math.exp(30))


def test_a_sequence_that_straddles_an_update_is_not_mismatch():
    # its later tokens are of lag 0, but attend to keys and values of older weights
    straddling = [(-1.0, -2.0, True, 1.0, False, version) for version in (4, 5, 5)]
    fresh = [(-1.0, -1.0 - LN4, True, 1.0, False, 5)] * 2
    prompt = [(math.nan, math.nan, False, math.nan, False, -1)]
    metrics = sums(straddling + prompt + fresh, sequence=[0, 0, 0, 1, 1, 1]).finish()
    assert metrics["mismatch/tokens"] == 2
    assert metrics["mismatch/abs_logprob_mean"] == pytest.approx(LN4, rel=1e-6)


def test_without_lag_0_tokens_there_is_no_mismatch_to_report():
    metrics = sums([(-1.0, -2.0, True, 1.0, False, 4)]).finish()
    assert set(metrics) == POLICY | buckets(1) | {"mismatch/tokens"} and metrics["mismatch/tokens"] == 0


@pytest.mark.parametrize("rows", [[], [(math.nan, math.nan, False, 1.0, True, 5)]])
def test_without_any_token_only_their_number_is_reported(rows):
    assert sums(rows).finish() == Sums.zero().finish() == {"mismatch/tokens": 0}


@pytest.mark.parametrize("bad", [(math.nan, -1.0), (-1.0, math.nan), (-math.inf, -1.0), (-1.0, -math.inf)])
def test_non_finite_logprobs_are_visible(bad):
    fine = (-1.0, -1.1, True, 1.0, False, 5)
    metrics = (sums([fine]) + sums([(*bad, True, 1.0, False, 5)]) + sums([fine])).finish()
    blind = {"policy/clip_rate", "policy/entropy", "mismatch/tokens"}  # do not depend on logprobs
    blind |= {"staleness/tokens_lag_0", "staleness/clip_rate_lag_0"}
    own = "policy/logprob_new" if math.isfinite(bad[0]) else "policy/logprob_rollout"
    finite = {name for name, value in metrics.items() if math.isfinite(value)}
    assert finite == blind | {own}


def test_a_non_finite_logprob_spoils_only_the_bucket_of_its_lag():
    metrics = sums([(math.nan, -1.0, True, 1.0, False, 4), (-1.0, -1.0, True, 1.0, False, 5)]).finish()
    assert math.isnan(metrics["staleness/k3_lag_1"]) and metrics["staleness/k3_lag_0"] == 0


def test_maximum_survives_a_reduction_that_drops_nan():
    assert sums([(math.nan, -1.0, True, 1.0, False, 5)]).maxima.tolist() == [math.inf]


def test_non_finite_entropy_is_visible():
    assert math.isnan(sums([(-1.0, -1.0, True, math.nan, False, 5)]).finish()["policy/entropy"])


def test_sums_do_not_hold_the_graph():
    assert not sums([(-1.0, -1.0, True, 1.0, False, 5)]).totals.requires_grad


@given(batches, st.lists(st.integers(0, 20), max_size=3))
def test_micro_batches_add_up_to_the_whole(rows, cuts):
    edges = [0, *sorted(min(cut, len(rows)) for cut in cuts), len(rows)]
    parts = [sums(rows[start:end]) for start, end in itertools.pairwise(edges)]
    merged, whole = sum(parts, Sums.zero()).finish(), sums(rows).finish()
    assert set(merged) == set(whole)
    assert merged == pytest.approx(whole, rel=1e-9, abs=1e-12)


@given(batches, batches)
def test_reduced_as_flat_tensors_over_ranks(first, second):
    ranks = [sums(first), sums(second)]
    reduced = Sums(
        torch.stack([rank.totals for rank in ranks]).sum(0), torch.stack([rank.maxima for rank in ranks]).amax(0)
    )
    assert reduced.finish() == pytest.approx(sums(first + second).finish(), rel=1e-9, abs=1e-12)


@given(st.lists(token, min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_order_and_padding_do_not_matter(rows, random):
    padding = [(math.nan, math.inf, False, math.nan, True, 5)] * 2
    moved = random.sample(rows + padding, len(rows) + 2)
    assert sums(moved).finish() == pytest.approx(sums(rows).finish(), rel=1e-9, abs=1e-12)


@given(st.lists(token, min_size=1, max_size=20))
def test_ranges(rows):
    metrics = sums(rows).finish()
    if "policy/ess" in metrics:
        assert 0 < metrics["policy/ess"] <= 1 + 1e-12
        assert metrics["policy/kl_old_new"] >= 0
    if metrics["mismatch/tokens"]:
        assert metrics["mismatch/k3"] >= 0 and metrics["mismatch/token_mult_prob_error"] >= 1
        assert metrics["mismatch/abs_logprob_mean"] <= metrics["mismatch/abs_logprob_max"] * (1 + 1e-12)
