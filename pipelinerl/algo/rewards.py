"""From the reward of a task to the reward that is trained on (`reward.*`): component weights, penalties for length.

Advantages and the zero-variance filter see the result; `reward/*` metrics and rollout files keep the task's reward.
"""

from collections.abc import Sequence

import numpy as np

from pipelinerl.config.schema import RewardConfig
from pipelinerl.errors import DataError
from pipelinerl.types import FloatArray, Outcome, RolloutMeta


def trained_rewards(name: str, rollouts: Sequence[RolloutMeta], config: RewardConfig, max_tokens: int) -> FloatArray:
    """[G] float32, the trained reward of each rollout of a group; NaN where the rollout was not scored.

    Args:
        name: of the group, for error messages.
        rollouts: [G] of one group.
        config: with `weights`, the reward is their weighted sum of components, and a component that a rollout does not
            have counts 0. Penalties come on top.
        max_tokens: `sampling.max_tokens`. Lengths are sampled tokens over all turns.

    Raises:
        DataError: a weight is for a component that no scored rollout of the group has; names those there are.
    """
    known = {component for rollout in rollouts if rollout.outcome.scored for component in rollout.components}
    for component in config.weights:
        if component not in known and any(rollout.outcome.scored for rollout in rollouts):
            raise DataError(
                f"{name}: reward.weights.{component} is for a component that the task does not have; "
                + (
                    f"it has {', '.join(sorted(known))}"
                    if known
                    else "it has none, only a reward; use reward.weights={}"
                )
            )
    return np.array([_trained(r, config, max_tokens) if r.outcome.scored else np.nan for r in rollouts], np.float32)


def _trained(rollout: RolloutMeta, config: RewardConfig, max_tokens: int) -> float:
    reward = rollout.reward
    if config.weights:
        reward = sum(weight * rollout.components.get(name, 0.0) for name, weight in config.weights.items())
    truncated = rollout.outcome is Outcome.TRUNCATED
    return (
        reward
        - config.overlong_penalty * overlong(rollout.completion_len, truncated, max_tokens, config.overlong_buffer)
        - config.length_penalty * rollout.completion_len / max_tokens
    )


def overlong(length: int, truncated: bool, max_tokens: int, buffer: int | None) -> float:
    """DAPO's soft punishment (2503.14476), as a share of the penalty from 0 to 1.

    0 up to `max_tokens - buffer` tokens, from there in proportion up to 1 at `max_tokens`; 1 when truncated.
    """
    if buffer is None:
        return 0.0
    return 1.0 if truncated else min(1.0, max(0.0, (length - (max_tokens - buffer)) / buffer))
