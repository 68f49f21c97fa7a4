"""Advantages of all samples of a step, from their rewards.

Shape legend:  G = rollouts of a group, V = scored rollouts of the step, group after group.

To add a form, write one function from a `ScoredStep` to advantages [V], name it with `@advantage("...")`, and allow
that name in `algo.advantage` (config/schema.py). What every form gets for free: rollouts that were not scored are not
in the step at all, and `per_group` leaves exactly 0 in groups that cannot teach anything.

All divisions by a standard deviation are by the population one (ddof=0) plus `EPS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import Advantage
from pipelinerl.errors import DataError
from pipelinerl.types import BoolArray, FloatArray, IntArray, SampleKL

Values = NDArray[np.float64]

EPS = 1e-6


@dataclass(frozen=True, slots=True)
class GroupScores:
    """What the advantages of a group are made from.

    Example, with arrays: `GroupScores("train/17", rewards=[1, 0], valid=[True, True], lengths=[12, 9], ({}, {}))`.
    """

    name: str  # for error messages
    rewards: FloatArray  # [G] that are trained on; read where `valid`
    valid: BoolArray  # [G] True where the outcome was scored
    lengths: IntArray  # [G] sampled tokens
    components: Sequence[Mapping[str, float]]  # [G] the task's parts of the reward, {} where there are none; for gdpo
    kl: Mapping[int, SampleKL] = field(default_factory=dict)  # by rollout; where `beta` is above 0, of all valid ones


@dataclass(frozen=True, slots=True)
class StepAdvantages:
    """One advantage per rollout, and what the trainer takes off it token by token (`RankBatch.kl_to_go`)."""

    values: list[FloatArray]  # [group] of [G]; 0 where not scored
    kl_to_go: float


@dataclass(frozen=True, slots=True)
class ScoredStep:
    """The scored rollouts of a step, side by side."""

    rewards: Values  # [V] with the KL taken off, but for forms that do it token by token
    lengths: Values  # [V] sampled tokens
    groups: tuple[slice, ...]  # where each group's rollouts are
    components: tuple[tuple[float, Values], ...]  # weight, and [V] with NaN where a rollout does not have it; gdpo only
    kl: Values  # [3, V] beta * total, beta * to_go_sum, beta^2 * to_go_squares of `SampleKL`

    def per_group(self, values: Values, form: Callable[[Values], Values]) -> Values:
        """`form` of each group's finite values; exactly 0 elsewhere, and where they are fewer than two or all equal."""
        result = np.zeros_like(values)
        for group in self.groups:
            there = np.isfinite(values[group])
            if _differ(values[group][there]):
                result[group][there] = form(values[group][there])
        return result


AdvantageFn = Callable[[ScoredStep], Values]

ADVANTAGES: dict[str, AdvantageFn] = {}


def advantage(name: Advantage) -> Callable[[AdvantageFn], AdvantageFn]:
    """Makes a function selectable as `algo.advantage=name`."""

    def register(function: AdvantageFn) -> AdvantageFn:
        assert name not in ADVANTAGES, name
        ADVANTAGES[name] = function
        return function

    return register


def step_advantages(
    groups: Sequence[GroupScores],
    form: Advantage,
    beta: float = 0.0,
    component_weights: Mapping[str, float] | None = None,
) -> StepAdvantages:
    """The advantages of a step; every sampled token of a rollout gets its rollout's.

    Args:
        groups: all groups of the step, at least one.
        form: `algo.advantage`.
        beta: coefficient of the KL in the reward; 0 = none. Group forms train on R - beta * `SampleKL.total`.
        component_weights: of gdpo's components; empty or None: all that the task has, each with weight 1.

    Raises:
        DataError: a reward that a form reads is not finite, or is negative where it must not be; names the group.
    """
    for group in groups:
        check_rewards(group, form)
    step = _scored_step(groups, form, beta, component_weights or {})
    if not len(step.rewards):
        return StepAdvantages([np.zeros(len(group.rewards), np.float32) for group in groups], 0.0)
    computed, values = ADVANTAGES[form](step), []
    for group, where in zip(groups, step.groups, strict=True):
        values.append(np.zeros(len(group.rewards), np.float32))
        values[-1][group.valid] = computed[where]
    return StepAdvantages(values, beta / (_token_moments(step)[1] + EPS) if form == "reinforce_pp" else 0.0)


def has_signal(group: GroupScores, form: Advantage, component_weights: Mapping[str, float] | None = None) -> bool:
    """Whether the group's scored rewards (for gdpo: any component) differ: those that do not are a zero-variance group.

    Raises: DataError as in `step_advantages`.
    """
    check_rewards(group, form)
    step = _scored_step([group], form, 0.0, component_weights or {})
    values = [values for _, values in step.components] if form == "gdpo" else [step.rewards]
    return any(_differ(of_group[np.isfinite(of_group)]) for of_group in values)


def check_rewards(group: GroupScores, form: Advantage) -> None:
    """Raises: DataError as in `step_advantages`."""
    assert group.rewards.shape == group.valid.shape == group.lengths.shape, group
    assert group.valid.dtype == np.bool_, group.valid.dtype
    for index in map(int, np.flatnonzero(group.valid)):
        components = group.components[index] if form == "gdpo" else {}
        for name, value in components.items():
            if np.isinf(value):
                raise DataError(f"{group.name}: component {name}={value} of rollout {index}; it must be finite, or nan")
        reward = float(group.rewards[index])
        if not np.isfinite(reward) and not components:
            raise DataError(f"{group.name}: reward {reward} of rollout {index}; a scorer must return finite numbers")
        if form == "maxrl" and reward < 0:
            raise DataError(
                f"{group.name}: reward {reward:g} of rollout {index} with algo.advantage=maxrl, which divides by the "
                "mean reward and needs rewards of 0 or more; use another advantage"
            )


@advantage("rloo")
def rloo(step: ScoredStep) -> Values:
    """RLOO (2402.14740): reward minus the mean reward of the others, which equals V/(V-1) * (reward - mean)."""

    def form(rewards: Values) -> Values:
        others: Values = (rewards.sum() - rewards) / (len(rewards) - 1)
        return rewards - others

    return step.per_group(step.rewards, form)


@advantage("dr_grpo")
def dr_grpo(step: ScoredStep) -> Values:
    """Dr. GRPO (2503.20783): reward minus the mean reward of the group, itself included."""
    return step.per_group(step.rewards, _centred)


@advantage("grpo")
def grpo(step: ScoredStep) -> Values:
    """GRPO (2402.03300): (reward - mean) / std of the group."""
    return step.per_group(step.rewards, _normalised)


@advantage("maxrl")
def maxrl(step: ScoredStep) -> Values:
    """MaxRL (2602.02710): (reward - mean) / mean of the group, which is maximum likelihood where rewards are 0 or 1."""
    return step.per_group(step.rewards, lambda rewards: _over(_centred(rewards), rewards.mean()))


@advantage("batch_std")
def batch_std(step: ScoredStep) -> Values:
    """(reward - mean of the group) / std over the samples of the step of just that (2510.13786, 2506.10910)."""
    return _over_std(step.per_group(step.rewards, _centred))


@advantage("reinforce_pp")
def reinforce_pp(step: ScoredStep) -> Values:
    """REINFORCE++ (2501.03262): R - beta * K_t, whitened over the sampled tokens of the step. No group baseline.

    This is the part that all tokens of a rollout share. The trainer takes `kl_to_go` * K_t off it, where K_t is the sum
    of k1 from token t to the end.
    """
    mean, std = _token_moments(step)
    # Both relative to the first reward, so that equal rewards leave no rounding error to divide.
    return _over(step.rewards - step.rewards[0] - mean, std)


@advantage("reinforce_pp_baseline")
def reinforce_pp_baseline(step: ScoredStep) -> Values:
    """REINFORCE++-baseline (2501.03262): reward - mean of the group, whitened over the sampled tokens of the step.

    A group whose rewards are all equal is in mean and std, but stays at 0.
    """
    centred = step.per_group(step.rewards, _centred)
    tokens = max(float(step.lengths.sum()), 1.0)
    mean = float(step.lengths @ centred) / tokens
    std = float(np.sqrt(step.lengths @ (centred - mean) ** 2 / tokens))
    return _over(step.per_group(step.rewards, np.ones_like) * (centred - mean), std)


@advantage("gdpo")
def gdpo(step: ScoredStep) -> Values:
    """GDPO (2601.05242): each component normalised in its group, their weighted sum, whitened over the samples.

    A component that a rollout does not have (or that is NaN) is in no mean and no std, and adds 0 there. The mean over
    the step is 0 as it is: every normalised component sums to 0 in its group.
    """
    total: Values = sum(
        (weight * step.per_group(values, _normalised) for weight, values in step.components),
        np.zeros_like(step.rewards),
    )
    return _over_std(total)


def _token_moments(step: ScoredStep) -> tuple[float, float]:
    """Mean, less the step's first reward, and std of R - beta * K_t over the sampled tokens of the step."""
    tokens = max(float(step.lengths.sum()), 1.0)
    rewards = step.rewards - step.rewards[0]
    _, to_go, squares = step.kl
    reward_mean, kl_mean = float(step.lengths @ rewards) / tokens, float(to_go.sum()) / tokens
    # The sum over tokens of ((R - reward_mean) - (beta K_t - kl_mean))^2, sample by sample.
    rewards = rewards - reward_mean
    spread = step.lengths * rewards**2 - 2 * rewards * (to_go - step.lengths * kl_mean)
    spread += squares - 2 * kl_mean * to_go + step.lengths * kl_mean**2
    return reward_mean - kl_mean, float(np.sqrt(max(spread.sum(), 0.0) / tokens))


def _scored_step(
    groups: Sequence[GroupScores], form: Advantage, beta: float, component_weights: Mapping[str, float]
) -> ScoredStep:
    rewards = np.concatenate([group.rewards[group.valid].astype(np.float64) for group in groups])
    ends = np.cumsum([0] + [int(group.valid.sum()) for group in groups])
    kl = np.zeros((3, len(rewards)))
    if beta:
        samples = [group.kl[int(index)] for group in groups for index in np.flatnonzero(group.valid)]
        kl = np.array([(k.total, k.to_go_sum, k.to_go_squares) for k in samples], np.float64).reshape(-1, 3).T
        kl *= np.array([[beta], [beta], [beta**2]])
    return ScoredStep(
        rewards=rewards if form == "reinforce_pp" else rewards - kl[0],
        lengths=np.concatenate([group.lengths[group.valid].astype(np.float64) for group in groups]),
        groups=tuple(slice(int(start), int(end)) for start, end in pairwise(ends)),
        components=_components(groups, rewards, component_weights) if form == "gdpo" else (),
        kl=kl,
    )


def _components(
    groups: Sequence[GroupScores], rewards: Values, weights: Mapping[str, float]
) -> tuple[tuple[float, Values], ...]:
    """The weighted components; of a task that has none, the reward itself."""
    rows = [group.components[int(i)] for group in groups for i in np.flatnonzero(group.valid)]
    weights = weights or {name: 1.0 for row in rows for name in sorted(row)}
    if not weights:
        return ((1.0, rewards),)
    return tuple(
        (weight, np.array([row.get(name, np.nan) for row in rows], np.float64)) for name, weight in weights.items()
    )


def _differ(values: Values) -> bool:
    """Whether there is anything to tell them apart by; false for fewer than two."""
    return bool(len(values)) and bool((values != values[0]).any())


def _centred(values: Values) -> Values:
    mean: float = values.mean()
    return np.subtract(values, mean)


def _normalised(values: Values) -> Values:
    return _over_std(_centred(values))


def _over_std(values: Values) -> Values:
    return _over(values, values.std())


def _over(values: Values, scale: float) -> Values:
    return np.divide(values, scale + EPS)
