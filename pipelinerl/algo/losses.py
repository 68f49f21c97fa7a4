"""Policy losses, per token and to be minimised. All tensors are flat: [N] tokens of one packed micro-batch.

Nothing is reduced here. The trainer multiplies `token_loss` by the weights of algo/aggregation.py and sums: what the loss
is a mean over, over all ranks and micro-batches, is in the weights. A sequence is never split. So the gradient does not
depend on how the step was cut into ranks and micro-batches.

Notation:  mu = the engine's logprob of the sampled token, pi = the trainer's,  rho = exp(pi - mu),  A = advantage.
No proximal policy is recomputed: rho is the only ratio ("bypass" form of decoupled PPO).

To add a loss, write one function `(LossInputs, its config) -> LossOutputs`, name it with `@loss("kind")`, and add the
section with this `kind` to `AlgoConfig` (config/schema.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelinerl.config.schema import GSPO, AlgoConfig, PPOClip, ReinforceIS

MAX_LOG_RATIO = 20.0  # exp(20) = 5e8: far beyond every cap, far from overflow


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """What a loss may look at. All [N]; index t is the position whose hidden state predicted the token in question."""

    logprobs_new: Tensor  # current policy, nats, with gradient
    logprobs_rollout: Tensor  # engine, at the version that sampled the token, nats
    advantages: Tensor
    mask: Tensor  # bool, True where the policy sampled the token
    sequence: Tensor  # int64, index of the token's sequence in the micro-batch, for sequence-level losses

    def __post_init__(self) -> None:
        shape = self.logprobs_new.shape
        assert len(shape) == 1, shape
        for name in ("logprobs_rollout", "advantages", "mask", "sequence"):
            assert getattr(self, name).shape == shape, (name, getattr(self, name).shape, shape)
        assert self.mask.dtype == torch.bool, self.mask.dtype
        assert self.sequence.dtype == torch.int64, self.sequence.dtype


@dataclass(frozen=True, slots=True, eq=False)
class LossOutputs:
    """`token_loss` [N] float32, 0 outside the mask. `clipped` [N] bool: the bound of the loss was active there."""

    token_loss: Tensor
    clipped: Tensor


LossFn = Callable[[LossInputs, Any], LossOutputs]
LOSSES: dict[str, LossFn] = {}


def loss(kind: str) -> Callable[[LossFn], LossFn]:
    """Makes a function the loss of `algo.kind=kind`. Its inputs are float32 and 0 outside the mask."""

    def register(function: LossFn) -> LossFn:
        assert kind not in LOSSES, kind
        LOSSES[kind] = function
        return function

    return register


def policy_loss(inputs: LossInputs, config: AlgoConfig) -> LossOutputs:
    """The loss that `config.kind` names.

    Whatever stands at positions outside the mask, NaN and infinity included, reaches neither loss nor gradient.
    A non-finite logprob or advantage inside the mask makes its `token_loss` non-finite, so that the step is skipped.
    """
    outputs = LOSSES[config.kind](_masked(inputs), config)
    assert outputs.token_loss.shape == outputs.clipped.shape == inputs.mask.shape, outputs.token_loss.shape
    return LossOutputs(torch.where(inputs.mask, outputs.token_loss, 0.0), outputs.clipped & inputs.mask)


def importance_ratio(inputs: LossInputs) -> Tensor:
    """rho [N] with gradient, its logarithm clamped to +-20. A non-finite log-ratio gives NaN, not a clamped value."""
    return _bounded_exp(inputs.logprobs_new - inputs.logprobs_rollout)


@loss("ppo_clip")
def ppo_clip(inputs: LossInputs, config: PPOClip) -> LossOutputs:
    """-min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)   (1707.06347; separate bounds: 2503.14476).

    Clipped, and then without gradient: rho above the upper bound where A > 0, below the lower one where A < 0.
    """
    return _clipped_objective(importance_ratio(inputs), inputs.advantages, config.clip_low, config.clip_high)


@loss("gspo")
def gspo(inputs: LossInputs, config: GSPO) -> LossOutputs:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) per sequence, s = exp(mean of log rho over its sampled tokens).

    (2507.18071.) Each sampled token of a sequence carries the sequence's loss, so that the mean over them is that too.
    Clipped, and then without gradient, as in PPO-clip.
    """
    log_ratio = inputs.logprobs_new - inputs.logprobs_rollout
    length = _sequence_sum(inputs.mask.float(), inputs.sequence).clamp(min=1)
    ratio = _bounded_exp(_sequence_sum(log_ratio, inputs.sequence) / length)
    return _clipped_objective(ratio, inputs.advantages, config.clip_low, config.clip_high)


@loss("reinforce_is")
def reinforce_is(inputs: LossInputs, config: ReinforceIS) -> LossOutputs:
    """-sg(min(rho, max_ratio)) A log pi   (2505.24034). Clipped where rho > max_ratio; the gradient stays, capped."""
    ratio = importance_ratio(inputs).detach()
    weight = ratio.clamp(max=config.max_ratio)
    return LossOutputs(-weight * inputs.advantages * inputs.logprobs_new, ratio > config.max_ratio)


def _bounded_exp(log_ratio: Tensor) -> Tensor:
    """exp of the argument clamped to +-20; NaN where it is not finite, which a clamp would hide."""
    clamped = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.where(log_ratio.isfinite(), clamped, math.nan).exp()


def _clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> LossOutputs:
    """-min(ratio A, clip(ratio) A), and where the second is the smaller one."""
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return LossOutputs(-torch.minimum(free, bounded), bounded < free)


def _sequence_sum(values: Tensor, sequence: Tensor) -> Tensor:
    """For each token [N] the sum of `values` [N] over its sequence."""
    _, index = sequence.unique(return_inverse=True)
    return torch.zeros_like(values).index_add(0, index, values)[index]


def _masked(inputs: LossInputs) -> LossInputs:
    """float32 inputs that are 0 outside the mask. `where`, because 0 * NaN is NaN, forward and backward."""

    def keep(values: Tensor) -> Tensor:
        return torch.where(inputs.mask, values.float(), 0.0)

    return LossInputs(
        logprobs_new=keep(inputs.logprobs_new),
        logprobs_rollout=keep(inputs.logprobs_rollout.detach()),
        advantages=keep(inputs.advantages.detach()),
        mask=inputs.mask,
        sequence=inputs.sequence,
    )
