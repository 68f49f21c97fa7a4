"""What the completions of the held-out problems come to: avg@k, pass@k and the gain over version 0.

Completions without a reward (an error of environment or grader, an aborted request) are counted and left out. A problem
enters avg@k with the mean of those that are scored, and pass@k if at least k are; how many problems a figure rests on
is reported with it.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from pipelinerl.config.schema import EvalConfig
from pipelinerl.metrics.intervals import Estimate, mean_interval, paired_difference
from pipelinerl.types import GroupMeta, Outcome

ACCURACY = "accuracy"
GAIN = "gain"


def pass_at_k(scored: int, passed: int, k: int) -> float:
    """Probability that at least one of k completions passes, by the unbiased estimator of 2107.03374.

    `passed` of `scored` completions did; k of them are drawn without replacement. `scored` must be at least k.
    """
    assert 0 <= passed <= scored and 1 <= k <= scored, (scored, passed, k)
    return 1.0 - math.comb(scored - passed, k) / math.comb(scored, k)


def pass_ks(samples: int) -> list[int]:
    """The k of pass@k: 1, 2, 4, ... below `samples`, and `samples`."""
    return sorted({2**power for power in range(samples.bit_length()) if 2**power <= samples} | {samples})


def mean_rewards(groups: Sequence[GroupMeta]) -> dict[str, float]:
    """Problem -> mean reward of its scored completions; problems without any are left out."""
    return {group.problem_id: float(np.mean(scored)) for group in groups if (scored := _rewards(group))}


def figures(
    groups: Sequence[GroupMeta], config: EvalConfig, before: Mapping[str, float] | None = None
) -> dict[str, Estimate]:
    """`avg@<samples>`, `pass@1`, `pass@2`, ... and `gain`, with intervals.

    A figure that no problem enters is left out. `before` holds version 0's mean rewards, for the gain.
    """
    means, rewards = mean_rewards(groups), [_rewards(group) for group in groups]
    found: dict[str, Estimate] = {}
    if means:
        found[f"avg@{config.samples}"] = mean_interval(np.array(list(means.values())), sum(map(len, rewards)))
    for k in pass_ks(config.samples):
        counts = [(len(each), sum(reward >= config.pass_reward for reward in each)) for each in rewards]
        counts = [(scored, passed) for scored, passed in counts if scored >= k]
        if counts:
            values = np.array([pass_at_k(scored, passed, k) for scored, passed in counts])
            found[f"pass@{k}"] = mean_interval(values, sum(scored // k for scored, _ in counts))
    common = [problem for problem in means if problem in (before or {})]
    if before and common:
        pairs = np.array([(before[problem], means[problem]) for problem in common])
        found[GAIN] = paired_difference(pairs[:, 0], pairs[:, 1])
    return found


def evaluation_metrics(
    task: str,
    version: int,
    groups: Sequence[GroupMeta],
    config: EvalConfig,
    before: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """The figures and counts of an evaluation as `eval/<task>/*`.

    Each figure F comes with F/ci_low, F/ci_high and F/problems. `accuracy` is avg@<samples>, under a name that does not
    depend on a setting.
    """
    name, found = f"eval/{task}", figures(groups, config, before)
    metrics = {f"{name}/version": float(version)} | {f"{name}/{key}": value for key, value in counts(groups).items()}
    if (average := found.get(f"avg@{config.samples}")) is not None:
        found[ACCURACY] = average
    for key, estimate in found.items():
        metrics |= {
            f"{name}/{key}": estimate.value,
            f"{name}/{key}/ci_low": estimate.low,
            f"{name}/{key}/ci_high": estimate.high,
            f"{name}/{key}/problems": float(estimate.problems),
        }
    return metrics


def counts(groups: Sequence[GroupMeta]) -> dict[str, float]:
    """Problems, completions without a reward, tokens of a completion, and the share of the scored that was cut off."""
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    scored = [rollout for rollout in rollouts if rollout.outcome.scored]
    truncated = [rollout.outcome is Outcome.TRUNCATED for rollout in scored]
    return {
        "problems": float(len(groups)),
        "errored": float(len(rollouts) - len(scored)),
        "tokens_mean": float(np.mean([rollout.completion_len for rollout in rollouts])),
        "truncated_frac": float(np.mean(truncated)) if truncated else math.nan,
    }


def _rewards(group: GroupMeta) -> list[float]:
    return [rollout.reward for rollout in group.rollouts if rollout.outcome.scored]
