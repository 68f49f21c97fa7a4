"""Watches the metrics of every training step for what the preflight cannot see: parity that is lost on the way.

Two conditions, the first hiding the second:

mismatch    Engine and trainer disagree on sequences that the very weights being trained sampled (`mismatch/*`): a
            metric is beyond its limit, or far above what the preflight measured. Far is 5 times in nats, and 25 times
            in k3, which is quadratic in them: rounding noise follows the entropy and the logits of the policy by a
            factor of two or three over a run, while the faults this is for (logprobs of another temperature, a head in
            bfloat16, KV of old weights) are factors of ten and more.
objective   Engine and trainer agree, or cannot be compared, and the objective has left its limits all the same.

Single steps are noise: mismatch can rest on three tokens, and KL may spike for a step and come back. So both are judged
on means over the last steps, weighted by tokens: the mismatch on the newest steps that together have 1,000 tokens, and
on all of the last 20 if they have fewer (below 100 it is not judged); the objective on the last 20, from the fifth
step on.

A condition is reported when it begins. It is reported again only after a step at which it was judged and absent: a run
that stays bad says so once.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from pipelinerl.parity.findings import percent
from pipelinerl.parity.limits import Limits, exceeded
from pipelinerl.parity.statistics import Statistics
from pipelinerl.types import LAG_BUCKETS

WINDOW = 20  # steps
ENOUGH_TOKENS = 1000  # a mean over so many is not noise
FEWEST_TOKENS = 100  # and over fewer than this it is nothing else
FEWEST_STEPS = 5  # before the objective is judged
FACTOR = 5.0  # above the preflight's mean |Delta|
FLOOR = 50.0  # the least such threshold is the limit divided by this: a preflight that found 0 leaves room for rounding
LARGE_PART = 0.5  # share of the mean |Delta| from which on an offset is meaning, and not noise


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Means over the tokens of one step, or of several."""

    tokens: int
    mean_abs: float
    mean_signed: float
    k3: float
    token_mult_prob_error: float
    frac_out: float


@dataclass(frozen=True, slots=True)
class Objective:
    """Means over the sampled tokens of one step, and the share of each lag bucket."""

    clip_rate: float
    k3: float
    tokens_by_lag: Sequence[float]
    clip_rate_by_lag: Sequence[float]
    k3_by_lag: Sequence[float]


class Alarm:
    """Asked after every step; remembers the last steps and what it has reported.

    Args:
        limits: of the run.
        calibrated: what the preflight measured; None when there was none, and then only the limits count.
    """

    def __init__(self, limits: Limits, calibrated: Statistics | None):
        self._limits = limits
        self._calibrated = calibrated if calibrated and math.isfinite(calibrated.mean_abs) else None
        self._thresholds = _thresholds(limits, self._calibrated)
        self._mismatches: deque[Mismatch | None] = deque(maxlen=WINDOW)
        self._objectives: deque[Objective | None] = deque(maxlen=WINDOW)
        self._reported: set[str] = set()

    def check(self, metrics: Mapping[str, float]) -> list[str]:
        """Conditions that begin with this step, whose logged metrics are given: one message each, its layer first."""
        self._mismatches.append(_mismatch(metrics))
        self._objectives.append(_objective(metrics))
        mismatch = self._judge_mismatch()
        objective = None if mismatch else self._judge_objective()
        return [*self._begun("mismatch", mismatch), *self._begun("objective", objective)]

    def _begun(self, condition: str, message: str | None) -> Iterator[str]:
        """`message` is None when the condition could not be judged, and empty when it is absent."""
        if message == "":
            self._reported.discard(condition)
        elif message and condition not in self._reported:
            self._reported.add(condition)
            yield message

    def _judge_mismatch(self) -> str | None:
        steps, found = _newest(self._mismatches)
        if found is None:
            return None
        beyond = exceeded(found, self._thresholds)
        if not beyond:
            return ""
        offset = abs(found.mean_signed + found.k3)  # the signed mean of two distributions is -KL
        layer = "semantic" if offset >= LARGE_PART * found.mean_abs else "inference path"
        before = self._calibrated
        preflight = f"; the preflight had mean |Δ| {before.mean_abs:.2g}, k3 {before.k3:.2g}" if before else ""
        return (
            f"{layer}: {', '.join(beyond.values())} over {found.tokens:,} tokens of the last {steps} step(s) that the "
            f"trained weights sampled themselves{preflight}"
        )

    def _judge_objective(self) -> str | None:
        found = [step for step in self._objectives if step]
        if len(found) < FEWEST_STEPS:
            return None
        weights = [sum(step.tokens_by_lag) for step in found]
        clip_rate = _mean([step.clip_rate for step in found], weights)
        k3 = _mean([step.k3 for step in found], weights)
        reasons = []
        if not clip_rate <= self._limits.objective_clip_rate:
            stale = _stale_share(found, [step.clip_rate_by_lag for step in found])
            reasons.append(f"clip rate {percent(clip_rate)} > {percent(self._limits.objective_clip_rate)}, {stale}")
        if not k3 <= self._limits.objective_kl:
            stale = _stale_share(found, [step.k3_by_lag for step in found])
            reasons.append(f"KL {k3:.2g} > {self._limits.objective_kl:g} nats per token, {stale}")
        if not reasons:
            return ""
        measured = "engine and trainer agree" if _newest(self._mismatches)[1] else "no mismatch could be measured"
        return (
            f"objective: {'; '.join(reasons)} (mean of the last {len(found)} steps, {measured}): lower trainer.lr or "
            "async.max_lag, or widen the bounds"
        )


def _thresholds(limits: Limits, calibrated: Statistics | None) -> Limits:
    """The limits, tightened to what is far above the preflight. k3 is quadratic in the differences, its factors too."""
    if calibrated is None:
        return limits
    return replace(
        limits,
        mean_abs=min(limits.mean_abs, max(FACTOR * calibrated.mean_abs, limits.mean_abs / FLOOR)),
        k3=min(limits.k3, max(FACTOR**2 * calibrated.k3, limits.k3 / FLOOR**2)),
    )


def _mismatch(metrics: Mapping[str, float]) -> Mismatch | None:
    """The step's part of `mismatch/*`; None when no token of it can be compared."""
    tokens = int(metrics.get("mismatch/tokens", 0))
    if not tokens:
        return None
    return Mismatch(
        tokens,
        metrics["mismatch/abs_logprob_mean"],
        metrics["mismatch/signed_logprob_mean"],
        metrics["mismatch/k3"],
        metrics["mismatch/token_mult_prob_error"],
        metrics["mismatch/frac_out_0.5_2"],
    )


def _objective(metrics: Mapping[str, float]) -> Objective | None:
    """The step's part of `policy/*` and the lag buckets; None when it trained on nothing."""
    if "policy/clip_rate" not in metrics:
        return None

    def buckets(name: str) -> list[float]:
        return [metrics.get(f"staleness/{name}_lag_{lag}", 0.0) for lag in range(LAG_BUCKETS)]

    return Objective(
        metrics["policy/clip_rate"],
        metrics["policy/kl_old_new"],
        buckets("tokens"),
        buckets("clip_rate"),
        buckets("k3"),
    )


def _newest(steps: Sequence[Mismatch | None]) -> tuple[int, Mismatch | None]:
    """The newest steps that together have enough tokens: how many steps, and their mean; None when they have too few.

    A value that is not finite is no noise, however few tokens it comes from.
    """
    taken: list[Mismatch] = []
    reached = 0
    while reached < len(steps) and sum(one.tokens for one in taken) < ENOUGH_TOKENS:
        reached += 1
        if step := steps[-reached]:
            taken.append(step)
    tokens = [one.tokens for one in taken]
    means = [
        _mean([getattr(one, name) for one in taken], tokens)
        for name in ("mean_abs", "mean_signed", "k3", "token_mult_prob_error", "frac_out")
    ]
    if sum(tokens) < FEWEST_TOKENS and all(map(math.isfinite, means)):
        return reached, None
    return reached, Mismatch(sum(tokens), *means)


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(v * w for v, w in zip(values, weights, strict=True)) / total if total else 0.0


def _stale_share(steps: Sequence[Objective], values_by_lag: Sequence[Sequence[float]]) -> str:
    """How much of a sum over the tokens comes from tokens of lag 1 and more."""
    by_lag = [
        sum(step.tokens_by_lag[lag] * values[lag] for step, values in zip(steps, values_by_lag, strict=True))
        for lag in range(LAG_BUCKETS)
    ]
    total = sum(by_lag)
    share = percent(sum(by_lag[1:]) / total) if total and math.isfinite(total) else "an unknown part"
    return f"{share} of it from tokens of lag >= 1"
