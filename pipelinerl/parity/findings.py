"""What a verdict is made of: findings, and the gain that a change is expected to bring."""

from dataclasses import dataclass
from typing import Protocol

from pipelinerl.parity.results import Layer


class Measured(Protocol):
    """Three numbers that say how much a change is worth."""

    @property
    def mean_abs(self) -> float: ...
    @property
    def k3(self) -> float: ...
    @property
    def clip_rate(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Gain:
    """What a change is expected to bring. Both ends are measured: none is extrapolated."""

    before: Measured
    after: Measured

    def __str__(self) -> str:
        before, after = self.before, self.after
        return (
            f"mean |Δ| {before.mean_abs:.2g} -> {after.mean_abs:.2g} nats, k3 {before.k3:.2g} -> {after.k3:.2g}, "
            f"clip rate {percent(before.clip_rate)} -> {percent(after.clip_rate)}"
        )


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing the evidence says. It fails its layer; a finding without a layer is a note."""

    layer: Layer | None
    text: str
    advice: str = ""  # the setting to change
    gain: Gain | None = None

    def __str__(self) -> str:
        return f"{self.layer or 'note'}: {self.text}"


def percent(fraction: float) -> str:
    """0.1234 -> "12.3%"; two significant digits below 1%, so that little does not look like nothing."""
    value = 100 * fraction
    return f"{value:.1f}%" if value >= 1 or value == 0 else f"{value:.2g}%"
