"""Policy losses, per token and to be minimised. All tensors are flat: [N] tokens of one packed micro-batch.

Nothing is reduced here. The trainer multiplies `token_loss` by the weights of algo/aggregation.py and sums: what the
loss is a mean over, over all ranks and micro-batches, is in the weights. A sequence is never split. So the gradient
does not depend on how the step was cut into ranks and micro-batches.

Notation:  mu = the engine's policy, p = the proximal one (mu itself unless `algo.proximal` says otherwise), pi = the
current one; r = pi/p, rho = pi/mu, both of the sampled token; A = advantage; sg = stop-gradient.

To add a loss, write one function `(LossInputs, its config) -> LossOutputs`, name it with `@loss("kind")`, and add the
section with this `kind` to `AlgoConfig` (config/schema.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelinerl.algo.ratios import bounded_exp, dense, sequence_mean, sequence_sum
from pipelinerl.config.schema import (
    CISPO,
    DPPOTV,
    GSPO,
    SAPO,
    TOPR,
    AlgoConfig,
    DualClip,
    GSPOToken,
    PPOClip,
    ReinforceIS,
    TwoSided,
)


@dataclass(frozen=True, slots=True, eq=False)
class LossInputs:
    """What a loss may look at. All [N]; index t is the position whose hidden state predicted the token in question."""

    logprobs_new: Tensor  # current policy, nats, with gradient
    logprobs_old: Tensor  # proximal policy, nats; those of the engine when `algo.proximal` is rollout
    logprobs_rollout: Tensor  # engine, at the version that sampled the token, nats
    advantages: Tensor
    mask: Tensor  # bool, True where the policy sampled the token
    sequence: Tensor  # int64, names the token's sequence, for sequence-level losses

    def __post_init__(self) -> None:
        shape = self.logprobs_new.shape
        assert len(shape) == 1, shape
        for name in ("logprobs_old", "logprobs_rollout", "advantages", "mask", "sequence"):
            assert getattr(self, name).shape == shape, (name, getattr(self, name).shape, shape)
        assert self.mask.dtype == torch.bool, self.mask.dtype
        assert self.sequence.dtype == torch.int64, self.sequence.dtype


@dataclass(frozen=True, slots=True, eq=False)
class LossOutputs:
    """Both [N] and 0 outside the mask."""

    token_loss: Tensor  # float32
    clipped: Tensor  # int8: -1 where the lower bound on the ratio was active, +1 where the upper one was, else 0


LossFn = Callable[[LossInputs, Any], LossOutputs]
LOSSES: dict[str, LossFn] = {}


def loss(kind: str) -> Callable[[LossFn], LossFn]:
    """Makes a function the loss of `algo.kind=kind`.

    Its inputs are float32 and 0 outside the mask, sequences are numbered from 0 without gaps, and only `logprobs_new`
    carries a gradient.
    """

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
    given = _masked(inputs)
    outputs = LOSSES[config.kind](given, config)
    assert outputs.token_loss.shape == outputs.clipped.shape == inputs.mask.shape, outputs.token_loss.shape
    assert outputs.clipped.dtype == torch.int8, outputs.clipped.dtype
    # Some losses do not look at all inputs: TOPR ignores the engine where A >= 0.
    usable = given.logprobs_new.isfinite() & given.logprobs_old.isfinite()
    usable &= given.logprobs_rollout.isfinite() & given.advantages.isfinite()
    token_loss = torch.where(usable, outputs.token_loss, math.nan)
    return LossOutputs(torch.where(inputs.mask, token_loss, 0.0), outputs.clipped * inputs.mask)


@loss("ppo_clip")
def ppo_clip(inputs: LossInputs, config: PPOClip) -> LossOutputs:
    """-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)   (1707.06347; separate bounds: 2503.14476).

    Clipped, and then without gradient: r above the upper bound where A > 0, below the lower one where A < 0.
    """
    return _clipped_objective(_proximal_ratio(inputs), inputs.advantages, config.clip_low, config.clip_high)


@loss("dual_clip")
def dual_clip(inputs: LossInputs, config: DualClip) -> LossOutputs:
    """PPO-clip, and where A < 0 at most bound * |A|   (1912.09729).

    Clipped as in PPO-clip, and above (+1), without gradient, where A < 0 and r > bound.
    """
    return _bounded_above(inputs, config.clip_low, config.clip_high, config.bound)


@loss("two_sided")
def two_sided(inputs: LossInputs, config: TwoSided) -> LossOutputs:
    """-min(min(r, max_ratio) A, clip(r, 1 - clip_low, 1 + clip_high) A)   (2505.07291).

    Clipped as in PPO-clip, and above (+1), without gradient, where A < 0 and r > max_ratio. With one bound this is
    dual clip.
    """
    return _bounded_above(inputs, config.clip_low, config.clip_high, config.max_ratio)


@loss("gspo")
def gspo(inputs: LossInputs, config: GSPO) -> LossOutputs:
    """-min(s A, clip(s, 1 - clip_low, 1 + clip_high) A) per sequence, s = exp(mean of log r over its sampled tokens).

    (2507.18071.) Each sampled token of a sequence carries the sequence's loss, so that the mean over them is that too.
    Clipped, and then without gradient, as in PPO-clip.
    """
    return _clipped_objective(_sequence_ratio(inputs), inputs.advantages, config.clip_low, config.clip_high)


@loss("gspo_token")
def gspo_token(inputs: LossInputs, config: GSPOToken) -> LossOutputs:
    """GSPO with s replaced by sg(s) pi / sg(pi): the same value, and each token has a gradient of its own (2507.18071).

    With one advantage per sequence the gradient of the sum over a sequence is that of GSPO. Clipped as in GSPO.
    """
    one = (inputs.logprobs_new - inputs.logprobs_new.detach()).exp()
    ratio = _sequence_ratio(inputs).detach() * one
    return _clipped_objective(ratio, inputs.advantages, config.clip_low, config.clip_high)


@loss("sapo")
def sapo(inputs: LossInputs, config: SAPO) -> LossOutputs:
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A   (2511.20347). The gate has no bound: never clipped."""
    tau = torch.where(inputs.advantages > 0, config.tau_positive, config.tau_negative)
    gate = 4 / tau * torch.sigmoid(tau * (_proximal_ratio(inputs) - 1))
    return LossOutputs(-gate * inputs.advantages, torch.zeros_like(inputs.mask, dtype=torch.int8))


@loss("reinforce_is")
def reinforce_is(inputs: LossInputs, config: ReinforceIS) -> LossOutputs:
    """-sg(min(rho, max_ratio)) A log pi   (2505.24034). Clipped where rho > max_ratio; the gradient stays, capped."""
    return _weighted(inputs, _engine_ratio(inputs).detach(), 0.0, config.max_ratio)


@loss("cispo")
def cispo(inputs: LossInputs, config: CISPO) -> LossOutputs:
    """-sg(clip(rho, min_ratio, max_ratio)) A log pi   (2506.13585). Clipped outside the bounds; the gradient stays."""
    return _weighted(inputs, _engine_ratio(inputs).detach(), config.min_ratio, config.max_ratio)


@loss("topr")
def topr(inputs: LossInputs, config: TOPR) -> LossOutputs:
    """-A log pi where A >= 0, -sg(min(P, max_ratio)) A log pi where A < 0, P = product of rho over the sequence.

    (2503.14286: P is the ratio of whole completions.) Clipped where A < 0 and P > max_ratio; the gradient stays.
    """
    log_ratio = inputs.logprobs_new.detach() - inputs.logprobs_rollout
    ratio, negative = bounded_exp(sequence_sum(log_ratio, inputs.sequence)), inputs.advantages < 0
    weight = torch.where(negative, ratio.clamp(max=config.max_ratio), 1.0)
    capped = negative & (ratio > config.max_ratio)
    return LossOutputs(-weight * inputs.advantages * inputs.logprobs_new, capped.to(torch.int8))


@loss("dppo_tv")
def dppo_tv(inputs: LossInputs, config: DPPOTV) -> LossOutputs:
    """-rho A, 0 where the token's probability has moved too far already, plus squared_log_ratio * (log rho)^2.

    (2602.04879.) Too far: pi - mu > max_rise where A > 0 (+1), mu - pi > max_fall where A < 0 (-1). The squared term,
    off by default, is on all tokens.
    """
    moved = inputs.logprobs_new.detach().exp() - inputs.logprobs_rollout.exp()
    risen = (inputs.advantages > 0) & (moved > config.max_rise)
    fallen = (inputs.advantages < 0) & (-moved > config.max_fall)
    objective = torch.where(risen | fallen, 0.0, -_engine_ratio(inputs) * inputs.advantages)
    squared = (inputs.logprobs_new - inputs.logprobs_rollout).square()
    return LossOutputs(objective + config.squared_log_ratio * squared, risen.to(torch.int8) - fallen.to(torch.int8))


def _proximal_ratio(inputs: LossInputs) -> Tensor:
    """r [N] with gradient."""
    return bounded_exp(inputs.logprobs_new - inputs.logprobs_old)


def _engine_ratio(inputs: LossInputs) -> Tensor:
    """rho [N] with gradient."""
    return bounded_exp(inputs.logprobs_new - inputs.logprobs_rollout)


def _sequence_ratio(inputs: LossInputs) -> Tensor:
    """s [N] with gradient, the geometric mean of r over the sampled tokens of each token's sequence."""
    log_ratio = inputs.logprobs_new - inputs.logprobs_old
    return bounded_exp(sequence_mean(log_ratio, inputs.mask, inputs.sequence))


def _clipped_objective(ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float) -> LossOutputs:
    """-min(ratio A, clip(ratio) A), and where the second is the smaller one: above if A > 0, below if A < 0."""
    free = ratio * advantages
    bounded = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    side = torch.where(bounded < free, advantages.sign(), 0.0)
    return LossOutputs(-torch.minimum(free, bounded), side.to(torch.int8))


def _bounded_above(inputs: LossInputs, clip_low: float, clip_high: float, bound: float) -> LossOutputs:
    """PPO-clip with r at most `bound` where A < 0; elsewhere PPO-clip bounds it already."""
    ratio = _proximal_ratio(inputs)
    above = (inputs.advantages < 0) & (ratio > bound)
    outputs = _clipped_objective(torch.where(above, bound, ratio), inputs.advantages, clip_low, clip_high)
    return LossOutputs(outputs.token_loss, torch.where(above, 1, outputs.clipped))


def _weighted(inputs: LossInputs, ratio: Tensor, low: float, high: float) -> LossOutputs:
    """-clip(ratio, low, high) A log pi, the ratio being a constant."""
    side = (ratio > high).to(torch.int8) - (ratio < low).to(torch.int8)
    return LossOutputs(-ratio.clamp(low, high) * inputs.advantages * inputs.logprobs_new, side)


def _masked(inputs: LossInputs) -> LossInputs:
    """Inputs as `loss` promises them. `where`, because 0 * NaN is NaN, forward and backward."""

    def keep(values: Tensor) -> Tensor:
        return torch.where(inputs.mask, values.float(), 0.0)

    return LossInputs(
        logprobs_new=keep(inputs.logprobs_new),
        logprobs_old=keep(inputs.logprobs_old.detach()),
        logprobs_rollout=keep(inputs.logprobs_rollout.detach()),
        advantages=keep(inputs.advantages.detach()),
        mask=inputs.mask,
        sequence=dense(inputs.sequence),
    )
