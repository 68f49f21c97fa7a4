"""Sampled tokens for tests of objective, diagnostics and counterfactual panel."""

import torch

from pipelinerl.algo.diagnostics import token_sums
from pipelinerl.algo.objective import Coefficients, Objective, Tokens, objective
from pipelinerl.config.schema import PPOClip

ROLLOUT = -1.0  # logprob of the engine


def tokens(
    log_ratio,
    advantages=None,
    *,
    old=None,
    reference=None,
    entropy=None,
    weights=None,
    sequence=None,
    lag=None,
    dtype=torch.float32,
):
    """Tokens of these log(new/engine). By default the proximal policy is the engine's, each is a sequence of its own of
    advantage 1, weight 1, lag 0 and entropy 1. `old` and `reference` are logs of ratios to the engine too."""
    count = len(log_ratio)

    def tensor(values, default, kind=dtype):
        return torch.tensor([default] * count if values is None else list(values), dtype=kind)

    return Tokens(
        logprobs_new=(ROLLOUT + tensor(log_ratio, 0.0)).requires_grad_(),
        entropy=tensor(entropy, 1.0).requires_grad_(),
        logprobs_old=ROLLOUT + tensor(old, 0.0),
        logprobs_rollout=tensor(None, ROLLOUT),
        logprobs_reference=None if reference is None else ROLLOUT + tensor(reference, 0.0),
        advantages=tensor(advantages, 1.0),
        weights=tensor(weights, 1.0),
        sequence=tensor(range(count) if sequence is None else sequence, 0, torch.int64),
        lag=tensor(lag, 0, torch.int32),
    )


def evaluate(given, algo=None, **coefficients):
    """The objective, and the gradients of its loss by logprobs and entropies."""
    found = objective(given, algo or PPOClip(), Coefficients(**coefficients))
    by = torch.autograd.grad(found.loss, [given.logprobs_new, given.entropy], allow_unused=True)
    return found, *(torch.zeros(len(given.entropy)) if gradient is None else gradient for gradient in by)


def sums(given, algo=None, clipped=None, first=True, **coefficients):
    """The diagnostics. `clipped` replaces what the loss says."""
    algo = algo or PPOClip()
    found, gradient, _ = evaluate(given, algo, **coefficients)
    if clipped is not None:
        sides = torch.tensor(clipped, dtype=torch.int8)
        found = Objective(found.loss, sides, found.correction, found.correction_inputs)
    return token_sums(given, found, gradient, algo.correction, first=first)
