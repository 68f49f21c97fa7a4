"""Layer 1: do the engine's logprobs mean what the trainer takes them for? Hypotheses, each tested on the tokens.

Three readings are tried, in this order:

temperature  The trainer's logprobs at another temperature fit at least 3 times better. Noise of size n and an error of
             meaning of size e give about max(n, e) before and n after, so 3 times says that the error was the larger
             part by far; and a temperature that merely lies between the true one and the configured one does not get
             there unless it is nearer to the true one by the same factor.
truncation   The engine renormalised over a kept subset S of the vocabulary: log mu = log pi - log pi(S), so that
             Delta = log pi(S) <= 0 at every token. Nearly all differences have this sign, no engine logprob is above 0,
             and the kept mass is not absurdly small.
offset       Neither of them, and yet one of the two is not the distribution that was sampled from. Between two
             distributions the mean of rho over samples of mu is 1, whatever their distance, and the signed mean is
             -KL. What is left of the signed mean without it, mean Delta + k3 = mean rho - 1, is an offset when it lies
             beyond 5 standard errors and is a large part of mean |Delta|. Not judged where Delta spreads so widely that
             a few rare tokens would make up that mean (log-normal rho: its relative variance is exp(var Delta)), and
             counted only where a limit is exceeded.

Decided on the fresh phase alone where there is one: no update can have touched it.
"""

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.findings import Finding, Gain
from pipelinerl.parity.limits import Limits, exceeded
from pipelinerl.parity.results import PHASES, Evidence
from pipelinerl.parity.statistics import Doubles, Statistics, differences, standard_error, statistics
from pipelinerl.types import BoolArray

BETTER = 3.0  # times that a temperature must fit better to be the meaning
AS_GOOD = 1.5  # times the smallest mean: still the same fit
RESOLUTION = 1e-4  # nats; a smaller effect on the mean is precision and not meaning, in float32 too
STANDARD_ERRORS = 5.0  # beyond noise
ONE_SIDED = 0.9  # share of the mean |Delta| that its signed mean must be: at most 5% of all |Delta| on the other side
LARGE_PART = 0.25  # share of the mean |Delta| that an offset must be
LEAST_KEPT = 0.1  # mass that a truncation keeps at 99% of the tokens, or it is none


def meaning(
    evidence: Evidence, whole: Statistics, reference: Statistics | None, config: RunConfig, limits: Limits
) -> Finding | None:
    """The reading of the engine's logprobs that explains the differences; None when they mean what they should.

    `whole` are the statistics of all tokens of the case, `reference` those of the same with all fixes in force where it
    was measured: an expected gain leads from the one to what the reading makes of it, or to the other.
    """
    mask = _decisive(evidence)
    if not mask.any():
        return None
    return (
        _temperature(evidence, mask, whole, config)
        or _truncation(evidence, mask, whole, reference, config)
        or _offset(evidence, mask, whole, config, limits)
    )


def _decisive(evidence: Evidence) -> BoolArray:
    """[N] the tokens that decide: of the fresh phase if it has any, with finite logprobs at all temperatures."""
    finite = np.isfinite(evidence.engine)
    for trainer in evidence.trainer.values():
        finite &= np.isfinite(trainer)
    fresh = evidence.phase == PHASES.index("fresh")
    return finite & fresh if fresh.any() else finite


def _temperature(evidence: Evidence, mask: BoolArray, whole: Statistics, config: RunConfig) -> Finding | None:
    sizes = {t: np.abs(differences(evidence, t)[mask]) for t in evidence.trainer}
    configured = evidence.temperature
    best = _simplest(sizes, configured)
    before, after, won = sizes[configured].mean(), sizes[best].mean(), sizes[configured] - sizes[best]
    if before < BETTER * after or won.mean() < max(RESOLUTION, _noise(won, evidence, mask)):
        return None
    mode, gain = config.engine.logprobs_mode, Gain(whole, statistics(evidence, config.algo, temperature=best))
    fit = f"the engine's logprobs fit temperature {best:g}, the trainer scores at {configured:g}"
    if math.isclose(best, 1.0) and mode == "raw_logprobs":
        advice = "engine.logprobs_mode=processed_logprobs"
    elif math.isclose(best, 1.0):
        advice = (
            f"temperature {configured:g} is not applied on one of the sides although {mode} has it: apply it on both"
        )
    elif math.isclose(best, configured**2, rel_tol=1e-3):
        advice = f"{fit}, its square: apply sampling.temperature once in the engine"
    else:
        advice = f"{fit}: give both the same sampling.temperature"
    return Finding(
        "semantic", f"{fit}: mean |Δ| is {before:.2g} nats at {configured:g} and {after:.2g} at {best:g}", advice, gain
    )


def _simplest(sizes: Mapping[float, Doubles], configured: float) -> float:
    """The temperature with the smallest mean; 1, or the square of the configured one, where it is as good.

    Neighbours on the grid fit almost as well as each other, and these two are the ones that have a cause.
    """
    means = {t: float(size.mean()) for t, size in sizes.items()}
    best = min(means, key=means.__getitem__)
    causes = [t for cause in (1.0, configured**2) for t in means if math.isclose(t, cause, rel_tol=1e-3)]
    return next((t for t in causes if means[t] <= AS_GOOD * means[best]), best)


def _truncation(
    evidence: Evidence, mask: BoolArray, whole: Statistics, reference: Statistics | None, config: RunConfig
) -> Finding | None:
    delta = differences(evidence)[mask]
    size, missing = float(np.abs(delta).mean()), -np.expm1(delta)
    if (
        -delta.mean() < ONE_SIDED * size
        or missing.mean() < max(RESOLUTION, _noise(missing, evidence, mask))
        or np.quantile(delta, 0.01) < math.log(LEAST_KEPT)
        or evidence.engine[mask].max() > RESOLUTION
    ):
        return None
    return Finding(
        "semantic",
        f"{(delta < 0).mean():.0%} of the trainer's logprobs lie below the engine's, by {size:.2g} nats in the mean: "
        "the engine renormalised over a subset of the vocabulary (top_p, top_k or min_p) with "
        f"{1 - missing.mean():.1%} of the mass",
        "engine.generation_config=vllm (the model's own file may set top_p or top_k)"
        if config.engine.generation_config != "vllm"
        else "let the engine sample by temperature only, without top_p, top_k and min_p",
        Gain(whole, reference) if reference else None,
    )


def _offset(
    evidence: Evidence, mask: BoolArray, whole: Statistics, config: RunConfig, limits: Limits
) -> Finding | None:
    delta = differences(evidence)[mask]
    if delta.var() > math.log(len(delta) / STANDARD_ERRORS**2) or not exceeded(
        statistics(evidence, config.algo, mask), limits
    ):
        return None
    excess = np.expm1(delta)
    offset = float(excess.mean())
    if abs(offset) < max(LARGE_PART * float(np.abs(delta).mean()), _noise(excess, evidence, mask)):
        return None
    shift = math.log1p(offset)
    mode = config.engine.logprobs_mode
    without = replace(evidence, engine=evidence.engine + np.float32(shift))
    return Finding(
        "semantic",
        f"a systematic offset that neither temperature nor truncation explains: the mean ratio is {1 + offset:.3g}, "
        "and between two distributions it would be 1 whatever their distance; trainer minus engine is "
        f"{delta.mean():+.2g} nats in the mean",
        "engine.logprobs_mode=processed_logprobs"
        if mode != "processed_logprobs"
        else f"find what shifts the engine's logprobs by {-shift:+.2g} nats (a penalty, a bias, a padded vocabulary)",
        Gain(whole, statistics(without, config.algo)),
    )


def _noise(values: Doubles, evidence: Evidence, mask: BoolArray) -> float:
    """What a mean of `values` (of the tokens in `mask`) must exceed to be no noise."""
    return STANDARD_ERRORS * standard_error(values, evidence.sequence[mask])
