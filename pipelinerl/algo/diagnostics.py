"""Trust metrics of a step: how far the trained policy is from the one that sampled.

`token_sums` turns one micro-batch into `Sums`; Sums of micro-batches add up; their two tensors are all-reduced over
the ranks (SUM and MAX); `finish` divides. So the result does not depend on how the step was cut.

With Delta = logprob_new - logprob_rollout and rho = exp(Delta), nothing clamped, over the sampled tokens of the step:

    policy/ratio_mean        mean rho (expectation 1)
    policy/ratio_p{01,05,50,95,99}   quantiles of rho, to the resolution of algo/ratio_histogram.py
    policy/chi2              mean (rho - 1)^2: the chi-squared divergence of new from rollout
    policy/kl_old_new        mean rho - 1 - Delta: the k3 estimate of KL(rollout || new)
    policy/kl_k1, kl_k2      mean -Delta and mean Delta^2 / 2: its k1 and k2 estimates
    policy/ess               (sum rho)^2 / (n sum rho^2), effective sample size, in (0, 1]
    policy/ess_sequence      the same with one rho per sequence, the product of its tokens'
    policy/clip_rate         fraction of tokens at which a bound of the loss was active
    policy/clip_{low,high}_{pos,neg}   that at the lower or upper bound, and advantage above or below 0; they add up to
                             the clip rate but for the tokens of advantage 0
    policy/entropy           mean entropy of the current policy, nats
    policy/logprob_{new,rollout}   mean logprob of the sampled token, nats

with a reference policy, d = logprob_new - logprob_reference, unclamped and without importance weights:

    policy/kl_ref            mean exp(-d) - 1 + d: the k3 estimate of KL(new || reference)
    policy/kl_ref_k1         mean d

with a correction (and correction/<name>_frac and counterfactual/*, of which algo/counterfactual.py tells):

    correction/weight_mean   mean factor of the policy loss, 0 where masked

and over the lag-0 sequences only, all of whose tokens the very weights that are being trained sampled. If engine and
trainer computed the same, Delta would be 0 there; what is left is mismatch, and staleness plays no part in it. (A lag-0
token that an update separates from the start of its sequence attends to keys and values of older weights, which the
trainer does not recompute as the engine had them: in a sequence that straddles an update even exact engines differ.)
After the first of several updates in a step the weights have moved away from any that sampled: only the first counts.

    mismatch/tokens                  how many there are
    mismatch/abs_logprob_{mean,max}  of |Delta|, nats
    mismatch/signed_logprob_mean     mean Delta; -KL where both sides are distributions
    mismatch/k3                      mean rho - 1 - Delta
    mismatch/token_mult_prob_error   mean exp|Delta|
    mismatch/frac_out_0.5_2          fraction with rho outside [0.5, 2]

and over all sampled tokens again, in buckets of their own lag k, that is, `version` minus the version that sampled the
token, whatever the rest of its sequence has; bucket 8 holds every lag from 8 on. Growth with k is staleness. What is
in bucket 0 has other causes: mismatch, the old keys and values that a lag-0 token of a straddling sequence attends to
(such tokens are in this bucket, and not in mismatch/*), and the earlier ones of several updates in a step.

    staleness/tokens_lag_k           how many there are; a bucket without tokens is left out
    staleness/abs_log_ratio_lag_k    mean |Delta|, nats
    staleness/k3_lag_k               mean rho - 1 - Delta
    staleness/clip_rate_lag_k        fraction at which a bound of the loss was active
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelinerl.algo import counterfactual, ratio_histogram
from pipelinerl.algo.kl import ESTIMATORS
from pipelinerl.algo.objective import Objective, Tokens
from pipelinerl.config.schema import CorrectionConfig
from pipelinerl.types import LAG_BUCKETS

LAG_MEANS = ("abs_log_ratio", "k3", "clip_rate")
QUANTILES = {"01": 0.01, "05": 0.05, "50": 0.5, "95": 0.95, "99": 0.99}

# What is summed, and the metric that its mean over the tokens (sequences, tokens with a reference, ...) is.
TOKEN_MEANS = {
    "ratio": "policy/ratio_mean",
    "chi2": "policy/chi2",
    "k1": "policy/kl_k1",
    "k2": "policy/kl_k2",
    "k3": "policy/kl_old_new",
    "clipped": "policy/clip_rate",
    **{f"clip_{side}_{sign}": f"policy/clip_{side}_{sign}" for side in ("low", "high") for sign in ("pos", "neg")},
    "entropy": "policy/entropy",
    "logprob_new": "policy/logprob_new",
    "logprob_rollout": "policy/logprob_rollout",
}
REFERENCE_MEANS = {"reference_k3": "policy/kl_ref", "reference_k1": "policy/kl_ref_k1"}
CORRECTED_MEANS = {"weight": "correction/weight_mean"}
LAG0_MEANS = {
    "lag0_abs": "mismatch/abs_logprob_mean",
    "lag0_signed": "mismatch/signed_logprob_mean",
    "lag0_k3": "mismatch/k3",
    "lag0_mult_error": "mismatch/token_mult_prob_error",
    "lag0_out": "mismatch/frac_out_0.5_2",
}
MEANS = {  # by what they are a mean over
    "tokens": TOKEN_MEANS,
    "reference_tokens": REFERENCE_MEANS,
    "corrected_tokens": CORRECTED_MEANS,
    "lag0_tokens": LAG0_MEANS,
}
SUM_NAMES = (
    *(name for over, means in MEANS.items() for name in (over, *means)),
    "ratio_squared",
    "sequences",
    "sequence_ratio",
    "sequence_ratio_squared",
)
LAG_NAMES = tuple(f"{name}_lag_{lag}" for name in ("tokens", *LAG_MEANS) for lag in range(LAG_BUCKETS))
SIZES = (len(SUM_NAMES), len(LAG_NAMES), len(counterfactual.SUM_NAMES), ratio_histogram.SIZE)
MAX_NAMES = ("lag0_abs",)


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Additive state of all metrics. Both tensors are float64 and flat, as all_reduce wants them.

    Across ranks: `all_reduce(sums.totals, SUM); all_reduce(sums.maxima, MAX)` in place, then `sums.finish()`.
    """

    totals: Tensor  # [sum(SIZES)]: SUM_NAMES, LAG_NAMES, the sums of the corrections, the histogram of log rho
    maxima: Tensor  # [len(MAX_NAMES)], each >= 0

    def __post_init__(self) -> None:
        assert self.totals.shape == (sum(SIZES),) and self.maxima.shape == (len(MAX_NAMES),)
        assert self.totals.dtype == self.maxima.dtype == torch.float64

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> "Sums":
        """The Sums of no token."""
        return cls(
            torch.zeros(sum(SIZES), dtype=torch.float64, device=device),
            torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.totals + other.totals, torch.maximum(self.maxima, other.maxima))

    def finish(self) -> dict[str, float]:
        """The metrics. Without tokens (or lag-0 tokens, or a reference) the values that would be 0/0 are left out."""
        sums, by_lag, rules, histogram = self.totals.cpu().split(SIZES)
        total = dict(zip(SUM_NAMES, sums.tolist(), strict=True))
        metrics = {"mismatch/tokens": total["lag0_tokens"]}
        for over, means in MEANS.items():
            if total[over] > 0:
                metrics |= {metric: total[name] / total[over] for name, metric in means.items()}
        if total["tokens"] > 0:
            metrics["policy/ess"] = _ess(total["tokens"], total["ratio"], total["ratio_squared"])
            metrics["policy/ess_sequence"] = _ess(
                total["sequences"], total["sequence_ratio"], total["sequence_ratio_squared"]
            )
            metrics |= _ratio_quantiles(histogram, total["tokens"])
        if total["lag0_tokens"] > 0:
            metrics["mismatch/abs_logprob_max"] = self.maxima.tolist()[MAX_NAMES.index("lag0_abs")]
        return metrics | counterfactual.rule_metrics(rules.tolist()) | _staleness(by_lag.tolist())


@torch.no_grad()
def token_sums(
    tokens: Tokens, found: Objective, gradient: Tensor, correction: CorrectionConfig, *, first: bool = True
) -> Sums:
    """The Sums of one micro-batch, in float64.

    A non-finite logprob makes the metrics of the ratio non-finite instead of hiding behind an exp(-inf) = 0.

    Args:
        found: the objective of these tokens.
        gradient: [N] of the loss with respect to `logprobs_new`.
        first: whether this is the first optimizer update of the step.
    """
    new, rollout = tokens.logprobs_new.double(), tokens.logprobs_rollout.double()
    delta = _visible(new - rollout)
    ratio, k3, clipped = delta.exp(), ESTIMATORS["k3"](-delta), found.clipped != 0
    ones = torch.ones_like(delta)
    per_token = {
        "tokens": ones,
        "ratio": ratio,
        "ratio_squared": ratio.square(),
        "chi2": delta.expm1().square(),
        "k1": -delta,
        "k2": ESTIMATORS["k2"](delta),
        "k3": k3,
        "clipped": clipped,
        **_clips(found.clipped, tokens.advantages),
        "entropy": tokens.entropy,
        "logprob_new": new,
        "logprob_rollout": rollout,
        **_reference(new, tokens.logprobs_reference),
        **_corrected(found.correction.weight, correction),
        **_sequences(delta, tokens.sequence),
    }
    lag0 = (_of_sequence(tokens.lag, tokens.sequence) == 0) & first
    size = torch.where(lag0, delta.abs(), 0.0)
    per_token |= {
        "lag0_tokens": lag0,
        "lag0_abs": size,
        "lag0_signed": torch.where(lag0, delta, 0.0),
        "lag0_k3": torch.where(lag0, k3, 0.0),
        "lag0_mult_error": torch.where(lag0, size.exp(), 0.0),
        "lag0_out": torch.where(size.isnan(), size, (size > math.log(2)).double()),
    }
    sums = torch.stack([per_token[name].double().sum() for name in SUM_NAMES])
    by_lag = _by_lag(tokens.lag, torch.stack([ones, delta.abs(), k3, clipped.double()]))
    rules = counterfactual.rule_sums(found, correction, gradient)
    return Sums(torch.cat([sums, by_lag.flatten(), rules, ratio_histogram.histogram(delta)]), _maximum(size)[None])


def _visible(delta: Tensor) -> Tensor:
    """NaN where a difference of logprobs is not finite."""
    return torch.where(delta.isfinite(), delta, math.nan)


def _clips(clipped: Tensor, advantages: Tensor) -> dict[str, Tensor]:
    sides, signs = {"low": clipped < 0, "high": clipped > 0}, {"pos": advantages > 0, "neg": advantages < 0}
    return {f"clip_{side}_{sign}": sides[side] & signs[sign] for side in sides for sign in signs}


def _reference(new: Tensor, reference: Tensor | None) -> dict[str, Tensor]:
    if reference is None:
        return dict.fromkeys(("reference_tokens", *REFERENCE_MEANS), torch.zeros_like(new))
    delta = _visible(new - reference.double())
    k1, k3 = ESTIMATORS["k1"](delta), ESTIMATORS["k3"](delta)
    return {"reference_tokens": torch.ones_like(new), "reference_k1": k1, "reference_k3": k3}


def _corrected(weight: Tensor, config: CorrectionConfig) -> dict[str, Tensor]:
    on = any(value is not None for value in config.model_dump().values())
    return {"corrected_tokens": torch.full_like(weight, float(on)), "weight": weight}


def _sequences(delta: Tensor, sequence: Tensor) -> dict[str, Tensor]:
    """Of one ratio per sequence; [S'] with S' > the largest number of a sequence, 0 where a number is not in use."""
    count = int(sequence.max()) + 1 if len(sequence) else 0
    used = delta.new_zeros(count).index_fill(0, sequence, 1.0)
    ratio = used * delta.new_zeros(count).index_add(0, sequence, delta).exp()
    return {"sequences": used, "sequence_ratio": ratio, "sequence_ratio_squared": ratio.square()}


def _of_sequence(lag: Tensor, sequence: Tensor) -> Tensor:
    """For each token [N] the largest lag in its sequence."""
    largest = lag.new_zeros(int(sequence.max()) + 1 if len(sequence) else 0)
    return largest.scatter_reduce(0, sequence, lag, "amax")[sequence]


def _by_lag(lag: Tensor, values: Tensor) -> Tensor:
    """Sums of `values` [rows, N] over the tokens of each bucket of `lag` [N]: [rows, LAG_BUCKETS]."""
    bucket = lag.long().clamp(max=LAG_BUCKETS - 1)
    return values.new_zeros(len(values), LAG_BUCKETS).index_add(1, bucket, values)


def _maximum(size: Tensor) -> Tensor:
    """Largest entry, 0 without entries. NaN counts as infinity: MAX reductions over ranks may drop a NaN."""
    return torch.cat([size.nan_to_num(nan=math.inf, posinf=math.inf), size.new_zeros(1)]).max()


def _ess(count: float, total: float, squares: float) -> float:
    """Effective sample size of weights, as a fraction of their number."""
    return (total / count) * (total / squares) if squares else math.nan


def _ratio_quantiles(histogram: Tensor, tokens: float) -> dict[str, float]:
    """NaN when a ratio was not finite and is not in the histogram."""
    if float(histogram.sum()) < tokens:
        return {f"policy/ratio_p{name}": math.nan for name in QUANTILES}
    found = ratio_histogram.quantiles(histogram, tuple(QUANTILES.values()))
    return {f"policy/ratio_p{name}": math.exp(value) for name, value in zip(QUANTILES, found, strict=True)}


def _staleness(sums: list[float]) -> dict[str, float]:
    total = dict(zip(LAG_NAMES, sums, strict=True))
    metrics = {}
    for lag in range(LAG_BUCKETS):
        if (count := total[f"tokens_lag_{lag}"]) > 0:
            metrics[f"staleness/tokens_lag_{lag}"] = count
            metrics |= {f"staleness/{name}_lag_{lag}": total[f"{name}_lag_{lag}"] / count for name in LAG_MEANS}
    return metrics
