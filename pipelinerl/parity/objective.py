"""Layer 3: engine and trainer agree, and yet the objective does not work: with what noise is left, or with staleness.

At lag 0 there is noise and nothing else, and bounds that are narrower than it clip at random. At the lag bound real
optimizer steps have moved the policy on: what has grown since lag 0 is staleness.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from pipelinerl.config.schema import AlgoConfig, RunConfig
from pipelinerl.parity.findings import Finding, Gain, percent
from pipelinerl.parity.limits import Limits
from pipelinerl.parity.results import Evidence, LagEvidence
from pipelinerl.parity.statistics import Statistics, statistics

# What each setting that bounds an objective is when its distance from a ratio of 1 (or from no move) is `factor` times.
BOUNDS: Mapping[str, Callable[[float, float], float]] = {
    "clip_low": lambda value, factor: value * factor,
    "clip_high": lambda value, factor: value * factor,
    "min_ratio": lambda value, factor: max(0.0, 1 - (1 - value) * factor),
    "max_ratio": lambda value, factor: 1 + max(value - 1, 1e-4) * factor,
    "bound": lambda value, factor: 1 + (value - 1) * factor,
    "max_rise": lambda value, factor: min(1.0, value * factor),
    "max_fall": lambda value, factor: min(1.0, value * factor),
}
WIDER = tuple(1.5**power for power in range(1, 24))  # times the configured bounds: up to 11,000


def narrow_bounds(evidence: Evidence, whole: Statistics, config: RunConfig, limits: Limits) -> Finding | None:
    """The objective clips more at lag 0 than `parity.max_clip_rate`; None when it does not."""
    if whole.clip_rate <= limits.clip_rate:
        return None
    text = (
        f"algo.kind={config.algo.kind} clips {percent(whole.clip_rate)} at lag 0 (limit {percent(limits.clip_rate)}) "
        f"though engine and trainer agree within {whole.mean_abs:.2g} nats: its bounds are narrower than the noise"
    )
    for algo, setting in _wider(config.algo):
        after = statistics(evidence, algo)
        if after.clip_rate <= limits.clip_rate:
            return Finding("objective", text, setting, Gain(whole, after))
    return Finding("objective", text, "another algo.kind: no wider bounds of this one hold the noise")


def staleness(lags: Sequence[LagEvidence], whole: Statistics, config: RunConfig, limits: Limits) -> Finding | None:
    """The objective is beyond its limits at the lag bound; None when it is not, or when no such lag was measured."""
    bound = config.async_.lag_bound
    curve = {lag.lag: lag for lag in lags if lag.lag <= bound}
    last = curve[max(curve)] if curve else None
    if last is None or last.lag == 0 or _works(last, limits):
        return None
    start = curve.get(0) or LagEvidence(0, whole.mean_abs, whole.k3, whole.clip_rate)
    text = (
        f"at lag {last.lag} (bound {bound}) the objective clips {percent(last.clip_rate)} (limit "
        f"{percent(limits.objective_clip_rate)}) at a k3 of {last.k3:.2g} nats (limit {limits.objective_kl:g}); due to "
        f"staleness: {_share(last.clip_rate, start.clip_rate)} of the clip rate, {_share(last.k3, start.k3)} of k3, "
        f"{_share(last.abs_log_ratio, start.abs_log_ratio)} of mean |log ratio|"
    )
    slower = f"trainer.lr={_slower(last, config, limits):.1g}"
    best = _largest_that_works(curve, config, limits)
    if best is None:
        return Finding(
            "objective", text, f"{slower} or wider bounds, to bring k3 from {last.k3:.2g} to {limits.objective_kl:g}"
        )
    return Finding("objective", text, f"async.max_lag={best.lag}, {slower} or wider bounds", Gain(last, best))


def _wider(algo: AlgoConfig) -> Iterator[tuple[AlgoConfig, str]]:
    """The same objective with wider and wider bounds, and the overrides that say so."""
    for factor in WIDER:
        wider = {
            name: float(f"{widen(getattr(algo, name), factor):.3g}")
            for name, widen in BOUNDS.items()
            if hasattr(algo, name)
        }
        changes = {name: value for name, value in wider.items() if value != getattr(algo, name)}
        if changes and changes.get("clip_low", 0.0) < 1:
            yield algo.model_copy(update=changes), " ".join(f"algo.{name}={value:g}" for name, value in changes.items())


def _works(lag: LagEvidence, limits: Limits) -> bool:
    return lag.clip_rate <= limits.objective_clip_rate and lag.k3 <= limits.objective_kl


def _largest_that_works(curve: Mapping[int, LagEvidence], config: RunConfig, limits: Limits) -> LagEvidence | None:
    """The largest lag at which the objective works and that `weights.every` leaves possible."""
    found = [lag for lag in curve.values() if lag.lag >= config.weights.every - 1 and _works(lag, limits)]
    return max(found, key=lambda lag: lag.lag, default=None)


def _share(value: float, at_start: float) -> str:
    """Of `value`, the part that was not there at lag 0."""
    share = (value - at_start) / value if value else 0.0
    return f"{max(0.0, share):.0%}" if math.isfinite(share) else "all"


def _slower(lag: LagEvidence, config: RunConfig, limits: Limits) -> float:
    """A learning rate that should be slow enough: the distance moved is in proportion to it, and k3 to its square."""
    if not math.isfinite(lag.k3 + lag.clip_rate):
        return config.trainer.lr / 10
    by_k3 = math.sqrt(limits.objective_kl / max(lag.k3, limits.objective_kl))
    by_clip_rate = limits.objective_clip_rate / max(lag.clip_rate, limits.objective_clip_rate)
    return config.trainer.lr * min(by_k3, by_clip_rate)
