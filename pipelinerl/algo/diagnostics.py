"""Trust metrics of a step: how far the trained policy is from the one that sampled.

`token_sums` turns one micro-batch into `Sums`; Sums of micro-batches add up; their two tensors are all-reduced over
the ranks (SUM and MAX); `finish` divides. So the result does not depend on how the step was cut.

With Delta = logprob_new - logprob_rollout and rho = exp(Delta), nothing clamped, over the sampled tokens of the step:

    policy/ratio_mean        mean rho (expectation 1)
    policy/clip_rate         fraction of tokens at which the loss's bound was active
    policy/kl_old_new        mean rho - 1 - Delta: the k3 estimate of KL(rollout || new)
    policy/entropy           mean entropy of the current policy, nats
    policy/logprob_{new,rollout}   mean logprob of the sampled token, nats
    policy/ess               (sum rho)^2 / (n sum rho^2), effective sample size, in (0, 1]

and over the lag-0 sequences only, all of whose tokens the very weights that are being trained sampled. If engine and
trainer computed the same, Delta would be 0 there; what is left is mismatch, and staleness plays no part in it. (A lag-0
token that an update separates from the start of its sequence attends to keys and values of older weights, which the
trainer does not recompute as the engine had them: in a sequence that straddles an update even exact engines differ.)

    mismatch/tokens                  how many there are
    mismatch/abs_logprob_{mean,max}  of |Delta|, nats
    mismatch/signed_logprob_mean     mean Delta; -KL where both sides are distributions
    mismatch/k3                      mean rho - 1 - Delta
    mismatch/token_mult_prob_error   mean exp|Delta|
    mismatch/frac_out_0.5_2          fraction with rho outside [0.5, 2]

and over all sampled tokens again, in buckets of their own lag k, that is, `version` minus the version that sampled the
token, whatever the rest of its sequence has; bucket 8 holds every lag from 8 on. Growth with k is staleness. What is
in bucket 0 has other causes: mismatch, and the old keys and values that a lag-0 token of a straddling sequence attends
to (such tokens are in this bucket, and not in mismatch/*).

    staleness/tokens_lag_k           how many there are; a bucket without tokens is left out
    staleness/abs_log_ratio_lag_k    mean |Delta|, nats
    staleness/k3_lag_k               mean rho - 1 - Delta
    staleness/clip_rate_lag_k        fraction at which the loss's bound was active
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

LAG_BUCKETS = 9  # lag 0 to 7, and 8 or more
LAG_MEANS = ("abs_log_ratio", "k3", "clip_rate")
SUM_NAMES = (
    "tokens",
    "clipped",
    "ratio",
    "ratio_squared",
    "k3",
    "entropy",
    "logprob_new",
    "logprob_rollout",
    "lag0_tokens",
    "lag0_abs",
    "lag0_signed",
    "lag0_k3",
    "lag0_mult_error",
    "lag0_out",
    *(f"{name}_lag_{lag}" for name in ("tokens", *LAG_MEANS) for lag in range(LAG_BUCKETS)),
)
MAX_NAMES = ("lag0_abs",)


@dataclass(frozen=True, slots=True, eq=False)
class Sums:
    """Additive state of all metrics. Both tensors are float64 and flat, as all_reduce wants them.

    Across ranks: `all_reduce(sums.totals, SUM); all_reduce(sums.maxima, MAX)` in place, then `sums.finish()`.
    """

    totals: Tensor  # [len(SUM_NAMES)]
    maxima: Tensor  # [len(MAX_NAMES)], each >= 0

    def __post_init__(self) -> None:
        assert self.totals.shape == (len(SUM_NAMES),) and self.maxima.shape == (len(MAX_NAMES),)
        assert self.totals.dtype == self.maxima.dtype == torch.float64

    @classmethod
    def zero(cls, device: torch.device | str = "cpu") -> "Sums":
        """The Sums of no token."""
        return cls(
            torch.zeros(len(SUM_NAMES), dtype=torch.float64, device=device),
            torch.zeros(len(MAX_NAMES), dtype=torch.float64, device=device),
        )

    def __add__(self, other: "Sums") -> "Sums":
        return Sums(self.totals + other.totals, torch.maximum(self.maxima, other.maxima))

    def finish(self) -> dict[str, float]:
        """The metrics. Without tokens (or lag-0 tokens) the values that would be 0/0 are left out."""
        total = dict(zip(SUM_NAMES, self.totals.cpu().unbind(), strict=True))
        peak = dict(zip(MAX_NAMES, self.maxima.cpu().unbind(), strict=True))
        metrics = {"mismatch/tokens": total["lag0_tokens"]}
        if (count := total["tokens"]) > 0:
            metrics |= {
                "policy/ratio_mean": total["ratio"] / count,
                "policy/clip_rate": total["clipped"] / count,
                "policy/kl_old_new": total["k3"] / count,
                "policy/entropy": total["entropy"] / count,
                "policy/logprob_new": total["logprob_new"] / count,
                "policy/logprob_rollout": total["logprob_rollout"] / count,
                "policy/ess": (total["ratio"] / count) * (total["ratio"] / total["ratio_squared"]),
            }
        if (count := total["lag0_tokens"]) > 0:
            metrics |= {
                "mismatch/abs_logprob_mean": total["lag0_abs"] / count,
                "mismatch/abs_logprob_max": peak["lag0_abs"],
                "mismatch/signed_logprob_mean": total["lag0_signed"] / count,
                "mismatch/k3": total["lag0_k3"] / count,
                "mismatch/token_mult_prob_error": total["lag0_mult_error"] / count,
                "mismatch/frac_out_0.5_2": total["lag0_out"] / count,
            }
        for lag in range(LAG_BUCKETS):
            if (count := total[f"tokens_lag_{lag}"]) > 0:
                metrics[f"staleness/tokens_lag_{lag}"] = count
                metrics |= {f"staleness/{name}_lag_{lag}": total[f"{name}_lag_{lag}"] / count for name in LAG_MEANS}
        return {name: float(value) for name, value in metrics.items()}


@torch.no_grad()
def token_sums(
    *,
    logprobs_new: Tensor,
    logprobs_rollout: Tensor,
    mask: Tensor,
    entropy: Tensor,
    clipped: Tensor,
    versions: Tensor,
    sequence: Tensor,
    version: int,
) -> Sums:
    """The Sums of one micro-batch, in float64. All tensors [N]; `mask` and `clipped` are bool.

    `versions` holds the version that sampled each token, `sequence` the index of its sequence; `version` is that of the
    weights in this forward pass, so before the optimizer step. Values outside the mask do not matter. A non-finite
    logprob inside it makes the metrics of the ratio non-finite instead of hiding behind an exp(-inf) = 0.
    """
    for values in (logprobs_rollout, mask, entropy, clipped, versions, sequence):
        assert values.shape == logprobs_new.shape, (values.shape, logprobs_new.shape)
    assert mask.dtype == clipped.dtype == torch.bool, (mask.dtype, clipped.dtype)
    new, rollout = logprobs_new[mask].double(), logprobs_rollout[mask].double()
    delta = new - rollout
    delta = torch.where(delta.isfinite(), delta, math.nan)
    ratio = delta.exp()
    k3 = delta.expm1() - delta  # rho - 1 - Delta without its cancellation near rho = 1
    lag0 = _oldest(versions[mask], sequence[mask]) == version
    size = delta[lag0].abs()
    outside = torch.where(size.isnan(), size, (size > math.log(2)).double())
    ones, bound = torch.ones_like(delta), clipped[mask].double()
    totals = (
        ones,
        bound,
        ratio,
        ratio * ratio,
        k3,
        entropy[mask].double(),
        new,
        rollout,
        lag0.double(),
        size,
        delta[lag0],
        k3[lag0],
        size.exp(),
        outside,
    )
    by_lag = _by_lag(version - versions[mask], torch.stack([ones, delta.abs(), k3, bound]))
    return Sums(torch.cat([torch.stack([values.sum() for values in totals]), by_lag.flatten()]), _maximum(size)[None])


def _by_lag(lag: Tensor, values: Tensor) -> Tensor:
    """Sums of `values` [rows, N] over the tokens of each bucket of `lag` [N]: [rows, LAG_BUCKETS]."""
    bucket = lag.long().clamp(max=LAG_BUCKETS - 1)
    return values.new_zeros(len(values), LAG_BUCKETS).index_add(1, bucket, values)


def _oldest(versions: Tensor, sequence: Tensor) -> Tensor:
    """For each token [N] the oldest version in its sequence."""
    oldest = versions.new_full((int(sequence.max()) + 1 if len(sequence) else 0,), torch.iinfo(versions.dtype).max)
    return oldest.scatter_reduce(0, sequence, versions, "amin")[sequence]


def _maximum(size: Tensor) -> Tensor:
    """Largest entry, 0 without entries. NaN counts as infinity: MAX reductions over ranks may drop a NaN."""
    return torch.cat([size.nan_to_num(nan=math.inf, posinf=math.inf), size.new_zeros(1)]).max()
