"""The loss of a micro-batch, composed of its terms:

    sum over tokens of  weight * (policy loss * correction  +  KL to the reference  -  coefficient * entropy)

The weights hold what the loss is a mean over (algo/aggregation.py). A correction acts on the policy loss alone: a token
whose ratio is not to be trusted says nothing about the reward, but its distribution is to stay near the reference and
to keep its entropy like any other.

N = the sampled tokens of the micro-batch; nothing else is in any of these tensors.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipelinerl.algo.corrections import Correction, CorrectionInputs, correct
from pipelinerl.algo.kl import kl_loss
from pipelinerl.algo.losses import LossInputs, policy_loss
from pipelinerl.algo.proximal import proximal_of
from pipelinerl.config.schema import AlgoConfig


@dataclass(frozen=True, slots=True, eq=False)
class Tokens:
    """What is known of the sampled tokens. All [N]; logprobs of the sampled token and entropies in nats."""

    logprobs_new: Tensor  # current policy, with gradient
    entropy: Tensor  # of the current policy, with gradient where the entropy bonus is on
    logprobs_old: Tensor  # proximal policy (algo/proximal.py)
    logprobs_rollout: Tensor  # engine
    logprobs_reference: Tensor | None  # frozen reference policy; None when there is none
    advantages: Tensor
    weights: Tensor  # of each token in the loss
    sequence: Tensor  # int64, names the token's sequence
    lag: Tensor  # integer, the version that trains on the token minus the one that sampled it


@dataclass(frozen=True, slots=True)
class Coefficients:
    """Those of the additional terms, in one step."""

    kl: float = 0.0
    entropy: float = 0.0

    @classmethod
    def at(cls, algo: AlgoConfig, step: int, steps: int) -> "Coefficients":
        """Optimizer step `step` (from 1) of `steps`. A KL that is taken off the reward is no term of the loss."""
        kl = algo.kl.at(step, steps) if algo.kl.place == "loss" else 0.0
        return cls(kl, algo.entropy.at(step, steps))

    def metrics(self, algo: AlgoConfig) -> dict[str, float]:
        """Those of terms that the run has at any step."""
        kl = {"optim/kl_coef": self.kl} if algo.kl.on and algo.kl.place == "loss" else {}
        return kl | ({"optim/entropy_coef": self.entropy} if algo.entropy.on else {})


@dataclass(frozen=True, slots=True, eq=False)
class Objective:
    """`loss` is a scalar with gradient, not finite if any logprob, advantage or entropy in use is not."""

    loss: Tensor
    clipped: Tensor  # [N] int8, as in LossOutputs
    correction: Correction
    correction_inputs: CorrectionInputs


def objective(tokens: Tokens, algo: AlgoConfig, coefficients: Coefficients) -> Objective:
    """The loss, and what the diagnostics need of how it came about."""
    mask = torch.ones_like(tokens.logprobs_new, dtype=torch.bool)
    inputs = LossInputs(
        logprobs_new=tokens.logprobs_new,
        logprobs_old=tokens.logprobs_old,
        logprobs_rollout=tokens.logprobs_rollout,
        advantages=tokens.advantages,
        mask=mask,
        sequence=tokens.sequence,
    )
    decoupled = proximal_of(algo) != "rollout"
    log_ratio = tokens.logprobs_new.detach() - tokens.logprobs_rollout
    correction_inputs = CorrectionInputs(
        log_x=tokens.logprobs_old - tokens.logprobs_rollout if decoupled else log_ratio,
        log_ratio=log_ratio,
        advantages=tokens.advantages,
        mask=mask,
        sequence=tokens.sequence,
        lag=tokens.lag,
    )
    policy = policy_loss(inputs, algo)
    correction = correct(correction_inputs, algo.correction, decoupled)
    token_loss = policy.token_loss * correction.weight
    if coefficients.kl > 0:
        assert tokens.logprobs_reference is not None, "a KL term without a reference policy"
        token_loss = token_loss + kl_loss(
            tokens.logprobs_new, tokens.logprobs_reference, tokens.logprobs_rollout, algo.kl, coefficients.kl
        )
    if coefficients.entropy > 0:
        token_loss = token_loss - coefficients.entropy * tokens.entropy
    return Objective((token_loss * tokens.weights).sum(), policy.clipped, correction, correction_inputs)
