"""Advantages of a group of completions of one prompt.

Shape legend:  G = rollouts of the group, V = those of them that were scored, in their order.

To add a form, write one function from the scored rewards [V] to advantages [V], name it with `@advantage("...")`, and
allow that name in `algo.advantage` (config/schema.py). Masking of errored rollouts, groups that are too small and std
normalisation are done around it, the same for all forms.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import AlgoConfig
from pipelinerl.errors import DataError
from pipelinerl.types import BoolArray, FloatArray

Rewards = NDArray[np.float64]
AdvantageFn = Callable[[Rewards], Rewards]

ADVANTAGES: dict[str, AdvantageFn] = {}

STD_EPS = 1e-6


def advantage(name: str) -> Callable[[AdvantageFn], AdvantageFn]:
    """Makes a function selectable as `algo.advantage=name`. It sees two or more rewards that are not all equal."""

    def register(function: AdvantageFn) -> AdvantageFn:
        assert name not in ADVANTAGES, name
        ADVANTAGES[name] = function
        return function

    return register


@advantage("rloo")
def leave_one_out(rewards: Rewards) -> Rewards:
    """RLOO (2402.14740): reward minus the mean reward of the others, which equals V/(V-1) * (reward - mean)."""
    others: Rewards = (rewards.sum() - rewards) / (len(rewards) - 1)
    return rewards - others


@advantage("grpo")
def group_mean(rewards: Rewards) -> Rewards:
    """GRPO (2402.03300) before its division by the std: reward minus the mean reward of all, itself included."""
    mean: float = rewards.mean()
    return np.subtract(rewards, mean)


def group_advantages(rewards: FloatArray, valid: BoolArray, config: AlgoConfig) -> FloatArray:
    """One advantage per rollout of a group; every token of a rollout gets it.

    Args:
        rewards: [G]; entries that are not valid are never read, so they may be NaN.
        valid: [G] True where the outcome was scored. The others get 0 and are in no baseline and no std.
        config: `advantage` names the form. `normalize_std` divides by (std + 1e-6), where std is the population
            standard deviation (ddof=0) of the group's valid rewards, as in GRPO (2402.03300).

    Returns:
        [G] float32. All 0 with fewer than two valid rollouts, and exactly 0 when all valid rewards are equal.

    Raises:
        DataError: a valid reward is NaN or infinite.
    """
    assert rewards.ndim == 1 and rewards.shape == valid.shape, (rewards.shape, valid.shape)
    assert valid.dtype == np.bool_, valid.dtype
    result = np.zeros(len(rewards), dtype=np.float32)
    scored = rewards[valid].astype(np.float64)
    if not np.isfinite(scored).all():
        index = int(np.flatnonzero(valid & ~np.isfinite(rewards))[0])
        raise DataError(f"reward {rewards[index]} of rollout {index} of a group: a scorer must return finite numbers")
    if len(scored) < 2 or (scored == scored[0]).all():
        return result
    values = ADVANTAGES[config.advantage](scored)
    result[valid] = values
    return result
