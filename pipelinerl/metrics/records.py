"""What one optimizer step's groups say about reward, staleness and length. Pure functions of the driver's metadata.

A token's lag is the version that trains on it minus the version that sampled it, in optimizer steps; in samples it is
that times the samples of a step. `staleness/fraction_lag_k` is the fraction of the tokens whose lag is k steps. Only
scored rollouts are trained on, so only they enter the statistics of reward, staleness and completion; the others are
counted under `outcome/` and `groups/errored`.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from pipelinerl.errors import ConfigError
from pipelinerl.types import FloatArray, GroupMeta, Outcome, RolloutMeta

REWARD_STATISTICS = ("mean", "std", "max", "min", "shaped_mean", "shaped_std", "kl_mean")
SAME_REWARD = 1e-6  # rewards closer than this are equal: their advantages carry no signal


def group_metrics(
    groups: Sequence[GroupMeta], version: int, dropped: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Metrics of the groups that are trained on while the policy is at `version` (before the update).

    Args:
        groups: the groups of one optimizer step.
        version: optimizer version that trains on them, so a token sampled by it has lag 0.
        dropped: groups thrown away since the last step, by reason. "stale" is reported as `staleness/dropped`,
            any other reason as `groups/<reason>` ("errored" adds to the groups of the step that hold an error;
            "zero_variance" is always there).

    Returns:
        Metric name -> value. A statistic of nothing (no scored rollout) is nan; every name is always present,
        except `reward/<component>`, which depend on the task.

    Raises:
        ConfigError: a reward component is called like a statistic of the reward itself.
    """
    rollouts = [meta for group in groups for meta in group.rollouts]
    scored = [meta for meta in rollouts if meta.outcome.scored]
    counts = Counter(dropped or {})
    return {
        **_reward(scored),
        **_staleness(scored, version, samples=len(rollouts)),
        "staleness/dropped": float(counts.pop("stale", 0)),
        **_groups(groups, counts),
        **_completion(scored),
        **_outcomes(rollouts),
    }


def trained_metrics(
    groups: Sequence[GroupMeta],
    rewards: Sequence[FloatArray],
    advantages: Sequence[FloatArray],
    kl_taken_off: Sequence[float] = (),
) -> dict[str, float]:
    """What the scored rollouts of a step are trained on, where it is not what the task returned.

    Args:
        groups: of the step.
        rewards, advantages: [group] of [G].
        kl_taken_off: coefficient times KL of each scored rollout, with a KL in the reward.

    Returns:
        `adv/abs_mean` always; `reward/shaped_mean` and `reward/shaped_std` where shaping changed a reward;
        `reward/kl_mean` with a KL in the reward. Means over scored rollouts.
    """
    scored = [(g, r) for g, group in enumerate(groups) for r, meta in enumerate(group.rollouts) if meta.outcome.scored]
    shaped = np.array([rewards[g][r] for g, r in scored], np.float64)
    asked = np.array([groups[g].rollouts[r].reward for g, r in scored], np.float64)
    metrics = {"adv/abs_mean": _mean([abs(float(advantages[g][r])) for g, r in scored])}
    if not np.array_equal(shaped, asked.astype(np.float32), equal_nan=True):
        metrics |= {"reward/shaped_mean": _mean(shaped), "reward/shaped_std": float(shaped.std())}
    if len(kl_taken_off):
        metrics["reward/kl_mean"] = _mean(kl_taken_off)
    return metrics


def tokens_by_lag(rollouts: Iterable[RolloutMeta], version: int) -> dict[int, int]:
    """Lag in optimizer steps -> number of sampled tokens that have it when trained at `version`; lags ascending."""
    counts: Counter[int] = Counter()
    for meta in rollouts:
        for sampled_by, tokens in meta.tokens_by_version.items():
            assert sampled_by <= version, f"sampled by version {sampled_by}, trained at {version}"
            counts[version - sampled_by] += tokens
    return {lag: counts[lag] for lag in sorted(counts) if counts[lag]}


def weighted_percentile(counts: Mapping[int, int], percent: int) -> float:
    """Smallest value v such that at least `percent` % of the weight lies at values <= v; nan without weight.

    This is the percentile of the list in which each value occurs `counts[value]` times ("inverted CDF"): always a
    value that occurred. In integers, so that 95 % of 20 tokens is 19 tokens and not 19.000000000000004.
    """
    total = sum(counts.values())
    below = 0
    for value in sorted(counts):
        below += counts[value]
        if counts[value] and 100 * below >= percent * total:
            return float(value)
    return math.nan


def _reward(scored: Sequence[RolloutMeta]) -> dict[str, float]:
    rewards = np.array([meta.reward for meta in scored], dtype=np.float64)
    metrics = {
        "reward/mean": _mean(rewards),
        "reward/std": float(rewards.std()) if rewards.size else math.nan,
        "reward/max": float(rewards.max()) if rewards.size else math.nan,
        "reward/min": float(rewards.min()) if rewards.size else math.nan,
    }
    for name in sorted({name for meta in scored for name in meta.components}):
        if name in REWARD_STATISTICS:
            raise ConfigError(f"the task names a reward component {name!r}, which is a statistic of reward/: rename it")
        metrics[f"reward/{name}"] = _mean([meta.components[name] for meta in scored if name in meta.components])
    return metrics


def _staleness(scored: Sequence[RolloutMeta], version: int, samples: int) -> dict[str, float]:
    lags = tokens_by_lag(scored, version)
    tokens = sum(lags.values())
    oldest = float(max(lags)) if lags else math.nan
    mean = sum(lag * count for lag, count in lags.items()) / tokens if tokens else math.nan
    several = [sum(count > 0 for count in meta.tokens_by_version.values()) >= 2 for meta in scored]
    return {
        "staleness/mean": mean,
        "staleness/p50": weighted_percentile(lags, 50),
        "staleness/p95": weighted_percentile(lags, 95),
        "staleness/max": oldest,
        **{f"staleness/fraction_lag_{lag}": count / tokens for lag, count in lags.items()},
        "staleness/samples_mean": mean * samples,
        "staleness/samples_p50": samples * weighted_percentile(lags, 50),
        "staleness/samples_p95": samples * weighted_percentile(lags, 95),
        "staleness/samples_max": oldest * samples,
        "staleness/multi_version_frac": _mean(several),
    }


def _groups(groups: Sequence[GroupMeta], dropped: Mapping[str, int]) -> dict[str, float]:
    rewards = [[meta.reward for meta in group.rollouts if meta.outcome.scored] for group in groups]
    flat = [max(values) - min(values) <= SAME_REWARD for values in rewards if values]
    errored = sum(group.scored < len(group.rollouts) for group in groups)
    counted = {f"groups/{reason}": float(count) for reason, count in dropped.items()}
    return counted | {
        "groups/zero_var_frac": _mean(flat),
        "groups/errored": float(errored + dropped.get("errored", 0)),
        "groups/zero_variance": float(dropped.get("zero_variance", 0)),
    }


def _completion(scored: Sequence[RolloutMeta]) -> dict[str, float]:
    lengths = [meta.completion_len for meta in scored]
    return {
        "completion/tokens_mean": _mean(lengths),
        "completion/tokens_max": float(max(lengths)) if lengths else math.nan,
        "completion/tokens_sum": float(sum(lengths)),
        "completion/truncated_frac": _mean([meta.outcome is Outcome.TRUNCATED for meta in scored]),
    }


def _outcomes(rollouts: Sequence[RolloutMeta]) -> dict[str, float]:
    counts = Counter(meta.outcome for meta in rollouts)
    return {f"outcome/{outcome}": float(counts[outcome]) for outcome in Outcome}


def _mean(values: "Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    return float(np.mean(values)) if len(values) else math.nan
