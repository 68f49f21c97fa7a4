"""The proximal policy of decoupled PPO (2110.00641, 2505.24298): what an update is kept close to.

mu is the engine's logprob of the sampled token, pi the trainer's. Where the proximal policy is mu itself ("bypass"),
one ratio pi/mu both corrects for what sampled the token and says how far the policy has moved. Otherwise these are two:
r = pi/proximal, which the objective clips, and w = proximal/mu, which a correction weighs with.
"""

from torch import Tensor

from pipelinerl.config.schema import AlgoConfig, Proximal


def proximal_of(algo: AlgoConfig) -> Proximal:
    """Which proximal policy the objective is about. Those whose ratio is to the engine by definition have no choice."""
    kind: Proximal = getattr(algo, "proximal", "rollout")
    return kind


def proximal_logprobs(
    kind: Proximal, logprobs_new: Tensor, logprobs_rollout: Tensor, lag: Tensor, start: Tensor | None = None
) -> Tensor:
    """[N] log proximal of the sampled tokens, without gradient.

    rollout      the engine's.
    recompute    the trainer's at the start of the step: `start`. While the weights have not moved since, which is so in
                 the first update of a step, they are the current ones exactly, and no forward pass is needed for them.
    interpolate  A-3PO (2512.06547): log mu + alpha (log pi - log mu), the trainer's policy of one version ago seen as
                 that far on the way from the sampling policy to the current one:
                 alpha = (v_proximal - v_sampled) / (v_current - v_sampled) = 1 - 1/lag, as v_proximal = v_current - 1.
                 A token of lag 1 has mu, one of lag 0 the current policy (alpha = 1): nothing holds it back.

    Args:
        logprobs_new: [N] of the weights in this forward pass.
        lag: [N] versions from the one that sampled the token to the one being trained.
        start: [N] logprobs at the start of the step; None = the weights are still those.
    """
    new = logprobs_new.detach()
    if kind == "rollout":
        return logprobs_rollout
    if kind == "recompute":
        return new if start is None else start
    alpha = ((lag - 1) / lag.clamp(min=1)).clamp(0, 1).masked_fill(lag <= 0, 1.0)
    return logprobs_rollout + alpha * (new - logprobs_rollout)
