"""KL to a frozen reference policy, from the sampled tokens alone.

With d = log(policy/reference) of a token that the policy sampled, each of these has the mean KL(policy || reference)
(Schulman's note):

    k1 = d                    unbiased, noisy, may be negative
    k2 = d^2 / 2              biased, low noise
    k3 = exp(-d) - 1 + d      unbiased, low noise, never negative

As a term of the loss what counts is the gradient (2506.09477, 2510.01555), with s the gradient of log policy:

    k1   E[s] = 0: it regularises nothing, so the configuration refuses it
    k2   E[d s]: that of KL(policy || reference)
    k3   E[(1 - exp(-d)) s]: the same to first order in d only, and far from it where the policy is far below

k1 belongs into the reward instead. All of this holds for tokens of the policy itself; for those of an older one, or of
an engine that rounds differently, the loss term is weighed by the importance ratio.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelinerl.algo.ratios import bounded_exp
from pipelinerl.config.schema import KLConfig

ESTIMATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "k1": lambda d: d,
    "k2": lambda d: d.square() / 2,
    "k3": lambda d: torch.expm1(-d) + d,  # without the cancellation of exp(-d) - 1 near 0
}


def kl_loss(
    logprobs_new: Tensor, logprobs_reference: Tensor, logprobs_rollout: Tensor, config: KLConfig, coef: float
) -> Tensor:
    """[N] the KL term of each token's loss, with gradient: coef * sg(min(new/rollout, importance_cap)) * estimate.

    log(new/reference) is clamped to `max_log_ratio`; a token beyond it has no gradient. Not-a-number where a logprob is
    not finite, which a clamp would hide.

    Args:
        logprobs_new: [N] of the current policy, with gradient, nats; the others [N] without.
        coef: of this step; that of `config` is where its schedule starts.
    """
    log_ratio = logprobs_new - logprobs_reference
    clamped = log_ratio.clamp(-config.max_log_ratio, config.max_log_ratio)
    estimate = ESTIMATORS[config.estimator](torch.where(log_ratio.isfinite(), clamped, math.nan))
    if config.importance_cap is None:
        return coef * estimate
    ratio = bounded_exp((logprobs_new - logprobs_rollout).detach())
    return coef * ratio.clamp(max=config.importance_cap) * estimate


def to_go(values: NDArray[np.floating]) -> NDArray[np.float64]:
    """[T] at each token the sum over it and all tokens after it, of the values [T] of one sequence."""
    return np.cumsum(np.asarray(values, np.float64)[::-1])[::-1]
