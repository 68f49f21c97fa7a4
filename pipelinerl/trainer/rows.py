"""The packed rows of a step: what one forward pass runs over, and which rollouts are in it.

M = the positions of a row that predict a sampled token, in row order: sequence after sequence, token after token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from pipelinerl.algo.kl import to_go
from pipelinerl.batch.samples import PackedBatch, collate, dummy_sample, train_sample
from pipelinerl.trainer.attention import Segments, runs_of_equal_length
from pipelinerl.types import FloatArray, RankBatch, RolloutGroup, SampleRef

Key = tuple[int, int]  # a rollout, for the whole run: id of its group, and its index there
ForwardInputs = tuple[Tensor, Tensor, Segments, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Row:
    """A micro-batch. One without samples is a dummy, which keeps a rank in step that has less to do than others."""

    batch: PackedBatch
    refs: tuple[SampleRef, ...]
    keys: tuple[Key, ...]  # of the refs
    kl_to_go: float = 0.0  # as in RankBatch
    reference: FloatArray | None = None  # [M] logprobs under the reference policy

    @property
    def positions(self) -> np.ndarray:
        """[M] int64."""
        return np.flatnonzero(self.batch.loss_mask)

    def split(self, values: FloatArray) -> list[FloatArray]:
        """Values [M] by sample."""
        counts = np.bincount(self.batch.sequence[self.batch.loss_mask], minlength=len(self.refs))
        return np.split(values, np.cumsum(counts)[:-1]) if self.refs else []

    def with_reference(self, logprobs: Sequence[FloatArray]) -> "Row":
        """With the reference's logprobs of each sample, and `kl_to_go` taken off the advantages.

        What is taken off at a token is kl_to_go * K_t, with K_t the sum of log(engine/reference) over the sampled
        tokens of the sample from t on: the KL of what follows, which the token can be blamed for.
        """
        reference = np.concatenate([*logprobs, np.zeros(0, np.float32)])
        assert len(reference) == len(self.positions), (len(reference), len(self.positions))
        if not self.kl_to_go:
            return replace(self, reference=reference)
        k1 = self.split(self.batch.logprobs[self.batch.loss_mask] - reference)
        advantages = self.batch.advantages.copy()
        advantages[self.batch.loss_mask] -= self.kl_to_go * np.concatenate([*map(to_go, k1), np.zeros(0)])
        return replace(self, reference=reference, batch=replace(self.batch, advantages=advantages))


def make_rows(batch: RankBatch, payloads: Sequence[RolloutGroup]) -> list[Row]:
    """The rows of a rank in one optimizer update. `payloads[i]` is the group that `SampleRef.group == i` names."""
    rows = []
    for refs in batch.micro_batches:
        samples = [train_sample(payloads[ref.group].rollouts[ref.rollout], ref.advantage, ref.weight) for ref in refs]
        keys = tuple((payloads[ref.group].id, ref.rollout) for ref in refs)
        rows.append(Row(collate(samples or [dummy_sample()]), tuple(refs), keys, batch.kl_to_go))
    return rows


def forward_inputs(row: Row, device: torch.device) -> ForwardInputs:
    """The arguments of `PolicyModel.forward`.

    A dummy has no sampled token. Its first position is scored instead, so that every parameter gets a gradient (of
    zero, see step.py) and the rank takes part in the same collectives as the others.
    """
    batch = row.batch
    positions = row.positions if len(row.positions) else np.zeros(1, np.int64)
    return (
        torch.as_tensor(batch.input_ids, dtype=torch.long, device=device),
        torch.as_tensor(batch.position_ids, dtype=torch.long, device=device),
        runs_of_equal_length([int(n) for n in np.diff(batch.cu_seqlens)]),
        torch.as_tensor(positions, device=device),
        torch.as_tensor(batch.target_ids[positions], dtype=torch.long, device=device),
    )
