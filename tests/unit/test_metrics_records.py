"""group_metrics and its percentile, against values worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.errors import ConfigError
from pipelinerl.metrics.records import group_metrics, tokens_by_lag, trained_metrics, weighted_percentile
from pipelinerl.types import GroupMeta, Outcome, RolloutMeta


def rollout(
    reward: float,
    tokens_by_version: dict[int, int],
    outcome: Outcome = Outcome.OK,
    components: dict[str, float] | None = None,
) -> RolloutMeta:
    tokens = sum(tokens_by_version.values())
    return RolloutMeta(reward, outcome, components or {}, tokens + 3, 3, tokens, tokens_by_version)


def group(*rollouts: RolloutMeta, id: int = 0) -> GroupMeta:
    return GroupMeta(id=id, problem_id=f"train/{id}", worker=0, rollouts=rollouts, seconds=1.0)


def test_a_step_by_hand() -> None:
    groups = [
        group(
            rollout(1.0, {5: 10}, components={"match": 1.0, "format": 0.5}),
            rollout(0.0, {3: 6, 4: 4}, Outcome.TRUNCATED, {"match": 0.0}),
            id=0,
        ),
        group(rollout(1.0, {4: 1, 5: 4}), rollout(7.0, {0: 99}, Outcome.ENV_ERROR), id=1),
    ]
    metrics = group_metrics(groups, version=5, dropped={"stale": 2, "errored": 1, "zero_variance": 3, "overlong": 4})
    # scored rewards 1, 0, 1: mean 2/3, variance (1/9 + 4/9 + 1/9) / 3 = 2/9
    assert metrics["reward/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/std"] == pytest.approx(math.sqrt(2 / 9))
    assert (metrics["reward/max"], metrics["reward/min"]) == (1.0, 0.0)
    assert metrics["reward/match"] == 0.5  # (1 + 0) / 2, of the two rollouts that have it
    assert metrics["reward/format"] == 0.5
    # tokens by lag: lag 0: 10 + 4, lag 1: 4 + 1, lag 2: 6; 25 tokens; the errored rollout's 99 are not trained
    assert metrics["staleness/mean"] == pytest.approx((5 * 1 + 6 * 2) / 25)
    assert metrics["staleness/p50"] == 0  # 14 of 25 tokens have lag 0, which is more than half
    assert metrics["staleness/p95"] == 2  # lag <= 1 covers 19 of 25 = 76%
    assert metrics["staleness/max"] == 2
    assert metrics["staleness/samples_max"] == 2 * 4  # 4 rollouts a step
    assert metrics["staleness/multi_version_frac"] == pytest.approx(2 / 3)
    assert metrics["staleness/dropped"] == 2
    # group 0 has rewards 1 and 0; group 1 has one scored reward, so no spread
    assert metrics["groups/zero_var_frac"] == 0.5
    assert metrics["groups/errored"] == 1 + 1
    assert metrics["groups/zero_variance"] == 3
    assert metrics["groups/overlong"] == 4
    assert metrics["completion/tokens_mean"] == pytest.approx(25 / 3)
    assert metrics["completion/tokens_max"] == 10
    assert metrics["completion/tokens_sum"] == 25
    assert metrics["completion/truncated_frac"] == pytest.approx(1 / 3)
    assert {name: value for name, value in metrics.items() if name.startswith("outcome/")} == {
        "outcome/ok": 2, "outcome/truncated": 1, "outcome/env_error": 1,
        "outcome/verifier_timeout": 0, "outcome/infra_abort": 0, "outcome/bad_logprob": 0,
    }  # fmt: skip


def test_on_policy_tokens_have_no_lag() -> None:
    metrics = group_metrics([group(rollout(1.0, {7: 4}), rollout(0.0, {7: 2}))], version=7)
    assert metrics["staleness/max"] == metrics["staleness/mean"] == metrics["staleness/multi_version_frac"] == 0


def test_a_version_without_tokens_is_not_a_version_of_the_rollout() -> None:
    metrics = group_metrics([group(rollout(1.0, {1: 0, 7: 4}))], version=7)
    assert (metrics["staleness/multi_version_frac"], metrics["staleness/max"]) == (0, 0)


def test_nothing_scored_gives_nan_not_zero() -> None:
    metrics = group_metrics([group(rollout(0.0, {0: 5}, Outcome.INFRA_ABORT))], version=1)
    for name in ("reward/mean", "reward/std", "staleness/max", "staleness/p50", "completion/tokens_mean"):
        assert math.isnan(metrics[name]), name
    assert (metrics["groups/errored"], metrics["outcome/infra_abort"]) == (1, 1)


def test_tokens_from_the_future_are_a_bug() -> None:
    with pytest.raises(AssertionError, match="sampled by version 3, trained at 2"):
        tokens_by_lag([rollout(1.0, {3: 1})], version=2)


def test_component_that_would_hide_a_statistic_is_refused() -> None:
    with pytest.raises(ConfigError, match="'max'"):
        group_metrics([group(rollout(1.0, {0: 1}, components={"max": 1.0}))], version=0)


def test_what_is_trained_on_by_hand() -> None:
    groups = [
        group(rollout(1.0, {0: 1}), rollout(0.0, {0: 1})),
        group(rollout(1.0, {0: 1}), rollout(9.0, {0: 1}, Outcome.ENV_ERROR)),
    ]
    advantages = [np.array([1.5, -0.5], np.float32), np.array([0.25, 0.0], np.float32)]
    asked = [np.array([1.0, 0.0], np.float32), np.array([1.0, math.nan], np.float32)]
    # (1.5 + .5 + .25) / 3, the errored one left out
    assert trained_metrics(groups, asked, advantages) == {"adv/abs_mean": 0.75}
    # gdpo does not read the reward of a task that has components, so it may be nan
    without = [group(rollout(math.nan, {0: 1}), rollout(0.0, {0: 1}))]
    assert trained_metrics(without, [np.array([math.nan, 0.0], np.float32)], advantages) == {"adv/abs_mean": 1.0}
    shaped = [np.array([1.0, -1.0], np.float32), np.array([0.0, math.nan], np.float32)]
    # 1 -1 0: mean 0, variance 2/3
    assert trained_metrics(groups, shaped, advantages, [0.25, 0.0, 0.5]) == pytest.approx(
        {
            "adv/abs_mean": 0.75,
            "reward/shaped_mean": 0.0,
            "reward/shaped_std": math.sqrt(2 / 3),
            "reward/kl_mean": 0.25,
        }
    )


@pytest.mark.parametrize(
    ("counts", "percent", "expected"),
    [
        ({0: 19, 1: 1}, 95, 0),  # exactly 19 of 20 tokens at 0
        ({0: 18, 1: 2}, 95, 1),  # 18 of 20 is only 90%
        ({0: 1, 5: 1}, 50, 0),  # one of two is half
        ({0: 1, 5: 2}, 50, 5),  # one of three is a third
        ({3: 1}, 95, 3),
        ({0: 0, 2: 4}, 50, 2),  # a value without weight does not count
    ],
)
def test_weighted_percentile_by_hand(counts: dict[int, int], percent: int, expected: int) -> None:
    assert weighted_percentile(counts, percent) == expected


def test_percentile_of_nothing_is_nan() -> None:
    assert math.isnan(weighted_percentile({}, 50))


@given(st.dictionaries(st.integers(0, 20), st.integers(1, 30), min_size=1), st.sampled_from([25, 50, 75, 100]))
def test_weighted_percentile_is_that_of_the_tokens_written_out(counts: dict[int, int], percent: int) -> None:
    tokens = [lag for lag, count in counts.items() for _ in range(count)]
    # quarters are exact in binary, so numpy's float arithmetic has no rounding to disagree about
    assert weighted_percentile(counts, percent) == np.quantile(tokens, percent / 100, method="inverted_cdf")


@given(st.lists(st.dictionaries(st.integers(0, 9), st.integers(1, 50), min_size=1), min_size=1, max_size=8))
def test_staleness_statistics_are_ordered_and_bounded(spans: list[dict[int, int]]) -> None:
    metrics = group_metrics([group(*(rollout(0.0, by_version) for by_version in spans))], version=9)
    assert 0 <= metrics["staleness/p50"] <= metrics["staleness/p95"] <= metrics["staleness/max"]
    assert metrics["staleness/mean"] <= metrics["staleness/max"] == 9 - min(min(by_version) for by_version in spans)
