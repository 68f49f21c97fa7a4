"""From the groups of a step to the work of the trainer: rewards, advantages, weights, packing. Pure.

    rewards (of the task) -> trained rewards -> advantages over the step -> weights over each update -> rank batches

A step has `batch.updates` optimizer updates, each on its share of the groups. Advantages are those of the whole step;
what the loss is a mean over is the update's share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelinerl.algo.advantages import GroupScores, StepAdvantages, has_signal, step_advantages
from pipelinerl.algo.aggregation import token_weights
from pipelinerl.algo.rewards import trained_rewards
from pipelinerl.batch.packing import rank_batches
from pipelinerl.config.schema import RunConfig, TrainerConfig
from pipelinerl.metrics.records import trained_metrics
from pipelinerl.types import FloatArray, GroupMeta, Outcome, RankBatch, SampleKL, SampleRef


@dataclass(frozen=True, slots=True)
class StepBatches:
    """What a step trains on."""

    updates: list[list[RankBatch]]  # [update][rank]; `SampleRef.group` counts the groups of the whole step
    advantages: list[FloatArray]  # [group] of [G], 0 where not scored
    metrics: dict[str, float]


def make_batches(
    groups: Sequence[GroupMeta],
    config: RunConfig,
    step: int,
    kl: Sequence[SampleKL] | None = None,
    denominator: float | None = None,
) -> StepBatches:
    """The work of every rank in every update of a step. Completions that were not scored are in none of it.

    Args:
        groups: of the step, in order of admission; consecutive ones share an update.
        config: of the run.
        step: counted from 1, for the schedule of the KL's coefficient.
        kl: of every scored completion, with `algo.kl.place=reward`. Without it the KL is left out; the packing is the
            same, so that the batches made without it can be sent to measure it.
        denominator: of the loss, where these are not all groups of the step; None: that of each update.

    Raises:
        DataError: a reward that cannot be trained on; names the group.
    """
    made, metrics = step_values(groups, config, step, kl)
    shares = np.array_split(np.arange(len(groups)), config.batch.updates)
    updates = [
        _over_ranks(
            _references(groups, made.values, share.tolist(), config, denominator), made.kl_to_go, config.trainer
        )
        for share in shares
        if share.size
    ]
    return StepBatches(updates, made.values, metrics)


def step_values(
    groups: Sequence[GroupMeta], config: RunConfig, step: int, kl: Sequence[SampleKL] | None = None
) -> tuple[StepAdvantages, dict[str, float]]:
    """Advantages and metrics of a step. Arguments and errors as of `make_batches`."""
    algo = config.algo
    beta = algo.kl.at(step, config.steps) if kl is not None else 0.0
    kl_of: list[dict[int, SampleKL]] = [{} for _ in groups]
    for sample in kl or ():
        kl_of[sample.group][sample.rollout] = sample
    scores = [_scores(group, config, measured) for group, measured in zip(groups, kl_of, strict=True)]
    made = step_advantages(scores, algo.advantage, beta, config.reward.weights)
    taken_off = [beta * sample.total for sample in kl or ()]
    return made, trained_metrics(groups, [score.rewards for score in scores], made.values, taken_off)


def why_unusable(group: GroupMeta, config: RunConfig) -> str | None:
    """The reason for which a finished group is replaced, under which it is counted; None when it is trained on.

    "prompt_too_long": no completion has room. "errored": fewer than two scored completions, so no baseline.
    "zero_variance", with `batch.zero_variance=refill`: its trained rewards are all equal; with gdpo, those of each
    component are.

    Raises: DataError as `make_batches`.
    """
    if all(rollout.outcome is Outcome.PROMPT_TOO_LONG for rollout in group.rollouts):
        return "prompt_too_long"
    if group.scored < 2:
        return "errored"
    if config.batch.zero_variance == "refill":
        scores = _scores(group, config, {})
        if not has_signal(scores, config.algo.advantage, config.reward.weights):
            return "zero_variance"
    return None


def _scores(group: GroupMeta, config: RunConfig, kl: Mapping[int, SampleKL]) -> GroupScores:
    return GroupScores(
        name=group.problem_id,
        rewards=trained_rewards(group.problem_id, group.rollouts, config.reward, config.sampling.max_tokens),
        valid=np.array([rollout.outcome.scored for rollout in group.rollouts]),
        lengths=np.array([rollout.completion_len for rollout in group.rollouts], np.int32),
        components=tuple(rollout.components for rollout in group.rollouts),
        kl=kl,
    )


def _references(
    groups: Sequence[GroupMeta],
    advantages: Sequence[FloatArray],
    share: Sequence[int],
    config: RunConfig,
    denominator: float | None,
) -> list[SampleRef]:
    """The scored completions of the groups of one update, with weights that are 0 where truncation masks them."""
    samples = [(g, r, rollout) for g in share for r, rollout in enumerate(groups[g].rollouts) if rollout.outcome.scored]
    weights = token_weights(
        [rollout.completion_len for *_, rollout in samples],
        [group for group, *_ in samples],
        config.algo.mean_over,
        config.sampling.max_tokens,
        denominator,
    )
    return [
        SampleRef(
            group=group,
            rollout=number,
            advantage=float(advantages[group][number]),
            length=rollout.total_len,
            weight=0.0 if config.algo.mask_truncated and rollout.outcome is Outcome.TRUNCATED else float(weight),
        )
        for (group, number, rollout), weight in zip(samples, weights, strict=True)
    ]


def _over_ranks(refs: Sequence[SampleRef], kl_to_go: float, config: TrainerConfig) -> list[RankBatch]:
    """[rank]; with sequence parallelism, each group of consecutive ranks has the same work (Ulysses)."""
    together = config.sequence_parallel
    batches = rank_batches(refs, config.ranks // together, config.micro_batch_tokens, kl_to_go)
    return [batch for batch in batches for _ in range(together)]
