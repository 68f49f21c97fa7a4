"""What the loss of an optimizer update is a mean over, as a weight for each of its samples.

The loss is the sum over samples of `weight` times the sum of the sample's token losses. The weights are made from the
whole update, all ranks and micro-batches, so the gradient does not depend on how it is cut. They count all scored
samples and all of their sampled tokens, also those that a mask removes: a mask must not make the step larger.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import Aggregation


def token_weights(
    lengths: Sequence[int], groups: Sequence[int], aggregation: Aggregation, max_tokens: int
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
    """
    count = np.asarray(lengths, np.float64)
    samples = len(count)
    assert samples == len(groups), (samples, len(groups))
    if aggregation == "token_mean":
        return np.full(samples, 1 / max(count.sum(), 1.0))
    if aggregation == "seq_mean_token_mean":
        return 1 / (samples * np.maximum(count, 1.0))
    if aggregation == "seq_mean_token_sum":
        return np.full(samples, 1 / max(samples, 1))
    if aggregation == "constant":
        return np.full(samples, 1 / (max(samples, 1) * max_tokens))
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    of_group = np.bincount(index, weights=count)
    return 1 / (len(of_group) * np.maximum(of_group[index], 1.0))
