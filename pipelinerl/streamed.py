"""A step that trains on its groups as they become ready (`batch.stream`): what is in it, how it is cut. Pure.

The gradient is that of the whole step. Advantages are of the group, so they do not wait for other groups. What the
loss is a mean over is known when the last group is there: until then samples are weighed with a denominator that is
planned, and the ratio of the two, `scale`, is applied to the accumulated gradient before it is clipped. It is 1 where
the plan was right.

Which groups are in a step does not depend on timing. How they are cut into chunks does: it follows their arrival. The
sum of the gradients is the same but for the order of additions, so a step repeats bit for bit only with the same
chunks, and what records a run records them (`StreamedStep.chunks`, tickets in order). Chunks that were recorded make
the same batches again.
"""

from collections.abc import Sequence
from dataclasses import replace

from pipelinerl.algo.aggregation import denominator_of
from pipelinerl.config.schema import RunConfig
from pipelinerl.types import GroupMeta, RankBatch, SampleKL
from pipelinerl.updates import StepBatches, make_batches, step_values


class StreamedStep:
    """A step of `batch.groups_per_step` groups, of which some are in training."""

    def __init__(self, config: RunConfig, step: int):
        """`step` counts from 1."""
        self._config = config
        self._step = step
        self._groups: list[GroupMeta] = []  # in training, in the order in which they came
        self._kl: list[SampleKL] = []  # numbered as `_groups`
        self.chunks: list[list[int]] = []  # ids of the groups that were added together
        batch = config.batch
        self._planned = {
            "token_mean": batch.groups_per_step * batch.group_size * config.sampling.max_tokens,
            "prompt_mean": batch.groups_per_step,
        }.get(config.algo.mean_over, batch.groups_per_step * batch.group_size)

    @property
    def complete(self) -> bool:
        """Whether all groups are in training."""
        return len(self._groups) == self._config.batch.groups_per_step

    @property
    def scale(self) -> float:
        """What the accumulated gradient is to be multiplied by, of a step that is complete."""
        assert self.complete, "the denominator is not known yet"
        scored = [(g, r) for g, group in enumerate(self._groups) for r in group.rollouts if r.outcome.scored]
        lengths, groups = [rollout.completion_len for _, rollout in scored], [group for group, _ in scored]
        return self._planned / max(denominator_of(lengths, groups, self._config.algo.mean_over), 1)

    def worth_starting(self, groups: Sequence[GroupMeta]) -> bool:
        """Whether these, which are not in training yet, fill a micro-batch of every rank, or are the rest."""
        if not groups:
            return False
        trainer = self._config.trainer
        tokens = sum(rollout.total_len for group in groups for rollout in group.rollouts if rollout.outcome.scored)
        rest = len(self._groups) + len(groups) == self._config.batch.groups_per_step
        return rest or tokens >= trainer.ranks // trainer.sequence_parallel * trainer.micro_batch_tokens

    def batches(self, groups: Sequence[GroupMeta], kl: Sequence[SampleKL] | None = None) -> list[RankBatch]:
        """[rank] the work that a chunk of groups makes, `SampleRef.group` and `kl` counting from its first. `kl` as in
        `make_batches`: first without it, to have it measured, and then with it."""
        (update,) = make_batches(groups, self._config, self._step, kl, self._planned).updates
        return update

    def add(self, groups: Sequence[GroupMeta], kl: Sequence[SampleKL] | None = None) -> None:
        """The chunk goes into training."""
        self._kl += [replace(sample, group=len(self._groups) + sample.group) for sample in kl or ()]
        self._groups += groups
        self.chunks.append([group.id for group in groups])
        assert len(self._groups) <= self._config.batch.groups_per_step, "a group of another step"

    def values(self) -> StepBatches:
        """Advantages and metrics of a step that is complete, as `make_batches` gives them for its groups in the order
        of admission; no updates."""
        assert self.complete, "advantages of a part of a step"
        order = sorted(range(len(self._groups)), key=lambda index: self._groups[index].id)
        place = {index: number for number, index in enumerate(order)}
        kl = [replace(sample, group=place[sample.group]) for sample in self._kl]
        groups = [self._groups[index] for index in order]
        made, metrics = step_values(groups, self._config, self._step, kl if self._measured else None)
        return StepBatches([], made.values, metrics)

    @property
    def _measured(self) -> bool:
        return self._config.algo.kl.on and self._config.algo.kl.place == "reward"
