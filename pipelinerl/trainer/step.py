"""One optimizer step on one rank: micro-batches in, gradients accumulated, weights updated, metrics reduced.

The loss of an update is the sum of its token losses times their weights, which hold what it is a mean over (see
algo/aggregation.py). Each micro-batch contributes its part times `world_size`, which DeepSpeed's mean over ranks cancels.
So the gradient does not depend on ranks, micro-batches or packing.
"""

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from pipelinerl.algo.diagnostics import Sums, token_sums
from pipelinerl.algo.losses import LossInputs, policy_loss
from pipelinerl.batch.samples import PackedBatch
from pipelinerl.config.schema import AlgoConfig
from pipelinerl.trainer.attention import runs_of_equal_length
from pipelinerl.trainer.backend import DeepSpeedBackend


def train_step(
    backend: DeepSpeedBackend, rows: Sequence[PackedBatch], version: int, algo: AlgoConfig
) -> tuple[bool, dict[str, float]]:
    """Train on this rank's micro-batches. Returns (applied, metrics); the metrics are the same on all ranks.

    `rows` are the micro-batches, packed; one without sampled tokens is a dummy, which keeps a rank in step
    that has less to do than others. `version` is the optimizer version that trains, that is, before the step.
    """
    world_size = dist.get_world_size()
    lr = backend.lr
    sums = Sums.zero(backend.device)
    loss_sum = torch.zeros((), dtype=torch.float64, device=backend.device)
    for index, row in enumerate(rows):
        loss, row_sums = _micro_batch(backend, row, version, algo)
        backend.backward(loss * world_size, last=index == len(rows) - 1)
        loss_sum += loss.detach().double()
        sums += row_sums
    applied, grad_norm = backend.step()

    dist.all_reduce(loss_sum)
    dist.all_reduce(sums.totals)
    dist.all_reduce(sums.maxima, op=dist.ReduceOp.MAX)
    metrics = sums.finish()
    metrics |= {
        "optim/loss": float(loss_sum),
        "optim/grad_norm": grad_norm,
        "optim/lr": lr,
        "optim/skipped": float(not applied),
    }
    return applied, metrics


def _micro_batch(backend: DeepSpeedBackend, batch: PackedBatch, version: int, algo: AlgoConfig) -> tuple[Tensor, Sums]:
    """Summed token loss (a scalar with gradient) and the diagnostics of one packed row."""
    positions = torch.from_numpy(batch.loss_mask.nonzero()[0]).to(backend.device)

    def at_loss(array: object) -> Tensor:
        return torch.as_tensor(array, device=backend.device)[positions]

    # A dummy row has no sampled token: score its first position with weight zero, so that every parameter gets a
    # (zero) gradient and this rank takes part in the same collectives as the others.
    scored = positions if len(positions) else torch.zeros(1, dtype=torch.long, device=backend.device)
    targets = torch.as_tensor(batch.target_ids, dtype=torch.long, device=backend.device)[scored]
    logprobs, entropy = backend.forward(
        torch.as_tensor(batch.input_ids, dtype=torch.long, device=backend.device),
        torch.as_tensor(batch.position_ids, dtype=torch.long, device=backend.device),
        runs_of_equal_length([int(n) for n in batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]]),
        scored,
        targets,
    )
    keep_graph = 0.0 if len(positions) else logprobs.sum() * 0.0
    logprobs, entropy = logprobs[: len(positions)], entropy[: len(positions)]
    inputs = LossInputs(
        logprobs_new=logprobs,
        logprobs_rollout=at_loss(batch.logprobs),
        advantages=at_loss(batch.advantages),
        mask=torch.ones_like(logprobs, dtype=torch.bool),
        sequence=at_loss(batch.sequence).long(),
    )
    outputs = policy_loss(inputs, algo)
    sums = token_sums(
        logprobs_new=inputs.logprobs_new.detach(),
        logprobs_rollout=inputs.logprobs_rollout,
        mask=inputs.mask,
        entropy=entropy,
        clipped=outputs.clipped,
        versions=at_loss(batch.versions),
        sequence=inputs.sequence,
        version=version,
    )
    loss = (outputs.token_loss * at_loss(batch.weights)).sum() + keep_graph
    # A non-finite loss can have a finite gradient (a clamp cuts it off). Make every gradient NaN, so that DeepSpeed's
    # check, which is agreed on over all ranks, skips the step.
    return loss if torch.isfinite(loss) else logprobs.sum() * math.nan, sums
