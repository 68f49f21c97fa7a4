"""Where the run's own objective would clip noise: the one part of the statistics that computes a loss, in torch."""

import math

import numpy as np
import torch

from pipelinerl.algo.losses import LossInputs, policy_loss
from pipelinerl.algo.proximal import proximal_of
from pipelinerl.config.schema import AlgoConfig
from pipelinerl.parity.results import Evidence
from pipelinerl.parity.statistics import differences
from pipelinerl.types import BoolArray


def clipped(evidence: Evidence, algo: AlgoConfig, temperature: float | None) -> BoolArray:
    """[N] where the run's own loss reports a bound as active for A = +1 or for A = -1.

    A token without a finite ratio counts too: the objective cannot use it. At lag 0, which this is about, a proximal
    policy of its own is the trainer's: then the objective clips no noise, a correction weighs it.
    """
    finite = np.isfinite(differences(evidence, temperature))
    trainer = evidence.trainer[evidence.temperature if temperature is None else temperature]
    proximal = evidence.engine if proximal_of(algo) == "rollout" else trainer
    found = ~finite
    if _capped_at_one(algo):
        return found
    for advantage in (1.0, -1.0):
        inputs = LossInputs(
            logprobs_new=torch.tensor(trainer),
            logprobs_old=torch.tensor(proximal),
            logprobs_rollout=torch.tensor(evidence.engine),
            advantages=torch.full((len(finite),), advantage),
            mask=torch.tensor(finite),
            sequence=torch.tensor(evidence.sequence.astype(np.int64)),
        )
        found |= policy_loss(inputs, algo).clipped.numpy() != 0
    return found


def _capped_at_one(algo: AlgoConfig) -> bool:
    """True of importance weights of at most 1 (TOPR): whatever the noise, half of the tokens are at the cap by design,
    and what the cap takes from a weight, whose gradient stays, is the noise and no more."""
    return float(getattr(algo, "max_ratio", math.inf)) <= 1
