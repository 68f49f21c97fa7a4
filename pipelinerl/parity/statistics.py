"""How far the trainer's logprobs are from the engine's, as numbers. Pure functions of the evidence of a case.

N = tokens of a case. With Delta = log pi_trainer - log mu_engine (nats) and rho = exp(Delta), in float64 and unclamped.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import AlgoConfig
from pipelinerl.parity.results import PHASES, Evidence
from pipelinerl.types import BoolArray, IntArray

Doubles = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Statistics:
    """Means over the tokens. A non-finite logprob makes each of them inf (a fraction counts the token as outside).

    Without tokens all are nan: nothing was measured, which is not the same as no difference.
    """

    tokens: int
    mean_abs: float  # mean |Delta|, nats
    max_abs: float  # largest |Delta|, nats
    mean_signed: float  # mean Delta, nats; -KL(engine || trainer) where both are distributions
    mean_signed_error: float  # its standard error over sequences; inf with fewer than two of them
    k3: float  # mean rho - 1 - Delta, the k3 estimate of KL(engine || trainer), nats
    ratio_mean: float  # mean rho: 1 in expectation whatever the spread, so it proves nothing
    token_mult_prob_error: float  # mean exp|Delta|
    frac_out: float  # fraction with rho outside [0.5, 2]
    clip_rate: float  # fraction that the objective would clip for at least one sign of the advantage
    argmax_flips: float | None  # fraction whose most likely token differs; None when not known


_NOTHING = Statistics(
    tokens=0,
    mean_abs=math.nan,
    max_abs=math.nan,
    mean_signed=math.nan,
    mean_signed_error=math.nan,
    k3=math.nan,
    ratio_mean=math.nan,
    token_mult_prob_error=math.nan,
    frac_out=math.nan,
    clip_rate=math.nan,
    argmax_flips=None,
)


def statistics(
    evidence: Evidence, algo: AlgoConfig, mask: BoolArray | None = None, temperature: float | None = None
) -> Statistics:
    """Statistics of the tokens in `mask` [N] (all by default), the trainer scoring at `temperature` (the configured).

    The clip rate is that of whole sequences: tokens outside the mask still count in a sequence-level ratio.
    """
    from pipelinerl.parity.clipping import clipped  # brings torch, which costs a driver without a probe seconds

    keep = np.ones(len(evidence.engine), np.bool_) if mask is None else mask
    count = int(keep.sum())
    if not count:
        return _NOTHING
    delta = differences(evidence, temperature)[keep]
    finite = np.isfinite(delta)
    delta = np.where(finite, delta, math.inf)
    size = np.abs(delta)
    with np.errstate(over="ignore"):  # exp of a difference beyond 709 nats is inf, as it should be
        ratio = np.exp(delta)
        # rho - 1 - Delta without its cancellation near rho = 1
        k3 = np.where(finite, np.expm1(delta) - np.where(finite, delta, 0.0), math.inf)
        mult_error = np.exp(size)
    return Statistics(
        tokens=count,
        mean_abs=float(size.mean()),
        max_abs=float(size.max()),
        mean_signed=float(delta.mean()),
        mean_signed_error=standard_error(delta, evidence.sequence[keep]),
        k3=float(k3.mean()),
        ratio_mean=float(ratio.mean()),
        token_mult_prob_error=float(mult_error.mean()),
        frac_out=float((size > math.log(2)).mean()),
        clip_rate=float(clipped(evidence, algo, temperature)[keep].mean()),
        argmax_flips=None if evidence.flips is None else float(evidence.flips[keep].mean()),
    )


@dataclass(frozen=True, slots=True)
class Measurement:
    """Statistics of a case: of all its tokens, and of each phase that has tokens, in the order of `PHASES`."""

    whole: Statistics
    phases: Mapping[str, Statistics]


def measure(evidence: Evidence, algo: AlgoConfig) -> Measurement:
    """All statistics of a case under the objective that the run is configured with."""
    masks = {name: evidence.phase == index for index, name in enumerate(PHASES)}
    phases = {name: statistics(evidence, algo, mask) for name, mask in masks.items() if mask.any()}
    return Measurement(statistics(evidence, algo), phases)


def differences(evidence: Evidence, temperature: float | None = None) -> Doubles:
    """Delta [N], the trainer scoring at `temperature` (by default the configured one); not finite as it comes."""
    trainer = evidence.trainer[evidence.temperature if temperature is None else temperature]
    with np.errstate(invalid="ignore"):  # -inf minus -inf
        return trainer.astype(np.float64) - evidence.engine.astype(np.float64)


def standard_error(values: Doubles, sequence: IntArray) -> float:
    """Of the mean of `values` [N], from the spread over sequences [N]: tokens of one sequence are not independent.

    The linearised (cluster) estimate, sqrt(S / (S - 1) * sum_s (sum of deviations in s)^2) / N. inf when it cannot be
    known: fewer than two sequences, or values that are not finite.
    """
    _, index = np.unique(sequence, return_inverse=True)
    sequences = int(index.max()) + 1 if len(index) else 0
    if sequences < 2 or not np.isfinite(values).all():
        return math.inf
    sums = np.bincount(index, weights=values - values.mean(), minlength=sequences)
    return math.sqrt(sequences / (sequences - 1) * float((sums**2).sum())) / len(values)
