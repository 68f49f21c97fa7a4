"""From a rollout to what the trainer computes on.

Shape legend:  T = tokens of a rollout, N = tokens of a packed row, S = sequences in it.

Two alignments, and `collate` is the one place where the first becomes the second:

- `TrainSample` is aligned to tokens: entry t of logprobs, versions and loss_mask belongs to token t.
- `PackedBatch` is aligned to predicting positions: entry t belongs to the token that follows position t, because the
  hidden state at position t predicts token t+1. The last position of a sequence predicts nothing and is masked.

Example: a prompt [11, 12] answered with [21, 22], packed with a prompt [13] answered with [23]; advantages 0.5 and -1.

    token              11    12    21    22  |  13    23        TrainSample (two of them)
      loss_mask         F     F     T     T  |   F     T
      logprobs          0     0   -.1   -.2  |   0   -.3
      versions         -1    -1     4     5  |  -1     5

    input_ids          11    12    21    22     13    23        PackedBatch
    position_ids        0     1     2     3      0     1
    target_ids         12    21    22     0     23     0        0 where nothing is predicted
    loss_mask           F     T     T     F      T     F
    logprobs            0   -.1   -.2     0    -.3     0
    versions           -1     4     5    -1      5    -1
    advantages          0    .5    .5     0     -1     0
    weights             0   1/3   1/3     0    1/3     0        of the tokens in the loss
    sequence            0     0     0     0      1     1
    cu_seqlens          0                 4            6        [S+1]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelinerl.types import BoolArray, FloatArray, IntArray, Rollout, TrainSample

LongArray = NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Several sequences in one row; see the example above. `torch.from_numpy` takes every array as it is."""

    input_ids: LongArray  # [N]
    position_ids: LongArray  # [N] from 0 in each sequence
    cu_seqlens: IntArray  # [S+1] where the sequences start, and N
    target_ids: LongArray  # [N] the next token of the same sequence, 0 at its last position
    loss_mask: BoolArray  # [N] True where the target was sampled by the policy
    logprobs: FloatArray  # [N] the engine's logprob of the target where loss_mask, else 0
    versions: IntArray  # [N] the version that sampled the target where loss_mask, else -1
    advantages: FloatArray  # [N] of the sequence where loss_mask, else 0
    weights: FloatArray  # [N] of the token in the loss of the step where loss_mask, else 0
    sequence: LongArray  # [N] index of the sequence, counted from 0


def train_sample(rollout: Rollout, advantage: float, weight: float = 1.0) -> TrainSample:
    """Contexts and completions of all turns in a row; only completion tokens are in the loss mask."""
    assert rollout.turns and len(rollout.turns[0].context), "nothing comes before the first sampled token"
    tokens, masks, logprobs, versions = [], [], [], []
    for turn in rollout.turns:
        context, completion = len(turn.context), len(turn.completion.tokens)
        tokens += [turn.context, turn.completion.tokens]
        masks += [np.zeros(context, np.bool_), np.ones(completion, np.bool_)]
        logprobs += [np.zeros(context, np.float32), turn.completion.logprobs]
        versions.append(np.full(context, -1, np.int32))
        versions += [np.full(span.end - span.start, span.version, np.int32) for span in turn.completion.spans]
    return TrainSample(
        tokens=np.concatenate(tokens).astype(np.int32),
        loss_mask=np.concatenate(masks),
        logprobs=np.concatenate(logprobs).astype(np.float32),
        versions=np.concatenate(versions),
        advantage=advantage,
        weight=weight,
    )


def dummy_sample() -> TrainSample:
    """One token without loss: what a rank computes on when it has fewer micro-batches than the others."""
    zero = np.zeros(1, np.int32)
    return TrainSample(zero, np.zeros(1, np.bool_), np.zeros(1, np.float32), zero - 1, 0.0)


def collate(samples: Sequence[TrainSample]) -> PackedBatch:
    """Packs one or more samples into a row, in their order. For an empty micro-batch pass `[dummy_sample()]`."""
    assert samples, "an empty micro-batch is collated from a dummy_sample()"
    assert all(len(s.tokens) and not s.loss_mask[0] for s in samples), "no position predicts a first token"
    lengths = np.array([len(sample.tokens) for sample in samples])
    loss_mask = _joined([_next(sample.loss_mask, False) for sample in samples], np.bool_)

    def per_token(values: list[float]) -> FloatArray:
        return np.where(loss_mask, np.repeat(np.array(values, np.float32), lengths), np.float32(0))

    return PackedBatch(
        input_ids=_joined([sample.tokens for sample in samples], np.int64),
        position_ids=_joined([np.arange(length) for length in lengths], np.int64),
        cu_seqlens=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
        target_ids=_joined([_next(sample.tokens, 0) for sample in samples], np.int64),
        loss_mask=loss_mask,
        logprobs=_joined([_next(sample.logprobs, 0.0) for sample in samples], np.float32),
        versions=_joined([_next(sample.versions, -1) for sample in samples], np.int32),
        advantages=per_token([sample.advantage for sample in samples]),
        weights=per_token([sample.weight for sample in samples]),
        sequence=np.repeat(np.arange(len(samples), dtype=np.int64), lengths),
    )


def _next(values: NDArray[Any], last: float) -> NDArray[Any]:
    """Entry t+1 at position t, and `last` at the last position."""
    return np.append(values[1:], values.dtype.type(last))


def _joined(parts: Sequence[NDArray[Any]], dtype: type[Scalar]) -> NDArray[Scalar]:
    joined: NDArray[Scalar] = np.concatenate(parts).astype(dtype)
    return joined
