"""What the loss of an optimizer update is a mean over, as a weight for each of its samples.

The loss is the sum over samples of `weight` times the sum of the sample's token losses. The weights are made from the
whole update, all ranks and micro-batches, so the gradient does not depend on how it is cut. They count all scored
samples and all of their sampled tokens, also those that a mask removes: a mask must not make the step larger.

A weight is 1 over the product of the sample's own part and a denominator that is counted over the whole update. The
second is the same for all samples, so it can be applied to the gradient afterwards (`batch.stream`).
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import Aggregation


def token_weights(
    lengths: Sequence[int],
    groups: Sequence[int],
    aggregation: Aggregation,
    max_tokens: int,
    denominator: float | None = None,
) -> NDArray[np.float64]:
    """[S] the weight of every sampled token of each sample.

    Args:
        lengths: [S] sampled tokens.
        groups: [S] the prompt each sample belongs to, any numbering.
        aggregation: N = all sampled tokens, S = samples, T = tokens of the sample, P = prompts, G = tokens of a group:
            token_mean 1/N, seq_mean_token_mean 1/(S T), seq_mean_token_sum 1/S, constant 1/(S max_tokens)
            (Dr.GRPO, 2503.20783), prompt_mean 1/(P G) (ScaleRL, 2510.13786). A sample without sampled tokens
            counts as a sample, and its own weight is finite and of no consequence.
        max_tokens: `sampling.max_tokens`.
        denominator: to use in the place of the counted one.
    """
    count = np.asarray(lengths, np.float64)
    samples = len(count)
    assert samples == len(groups), (samples, len(groups))
    if aggregation == "seq_mean_token_mean":
        part = np.maximum(count, 1.0)
    elif aggregation == "constant":
        part = np.full(samples, float(max_tokens))
    elif aggregation == "prompt_mean":
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        part = np.maximum(np.bincount(index, weights=count)[index], 1.0)
    else:
        part = np.ones(samples)
    counted = max(denominator_of(lengths, groups, aggregation), 1)
    return 1 / ((counted if denominator is None else denominator) * part)


def denominator_of(lengths: Sequence[int], groups: Sequence[int], aggregation: Aggregation) -> int:
    """N, S or P of `token_weights`, whichever the aggregation has. That of several sets of groups is their sum."""
    if aggregation == "token_mean":
        return sum(lengths)
    return len(set(groups)) if aggregation == "prompt_mean" else len(lengths)
