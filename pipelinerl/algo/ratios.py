"""Policy ratios and sums over sequences: what losses and corrections share. All tensors are flat, [N] tokens."""

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond every cap, far from overflow


def bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the argument clamped to +-20; NaN where it is not finite, which a clamp would hide."""
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(log_ratio.isfinite(), clamped, math.nan).exp()


def dense(sequence: Tensor) -> Tensor:
    """The same sequences, numbered from 0 without gaps."""
    index: Tensor = sequence.unique(return_inverse=True)[1]
    return index


def sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token the sum of `values` over its sequence; sequences numbered as `dense` does."""
    return torch.zeros_like(values).index_add(0, sequence, values)[sequence]


def sequence_mean(values: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """For each token the mean of `values`, which are 0 outside the mask, over the mask of its sequence."""
    length = sequence_sum(mask.to(values.dtype), sequence).clamp(min=1)
    return sequence_sum(values, sequence) / length
