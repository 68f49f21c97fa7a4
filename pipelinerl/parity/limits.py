"""What counts as parity: the limits of a run, the same for the verdict before training and the alarm during it."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from pipelinerl.config.schema import RunConfig

MEAN_ABS = {"float32": 1e-4, "bfloat16": 5e-2}  # nats; float32 noise is about 1e-6, bfloat16 noise about 1e-2
MAX_K3 = {"float32": 1e-7, "bfloat16": 1e-3}  # nats

# Where an objective stops being what it says, whatever the noise. PPO implementations stop a batch's epochs at a KL of
# 0.01 to 0.03 nats per token; at 0.1 the log-ratios have a standard deviation of about 0.45. A clip rate above one
# half leaves most tokens without a gradient; GSPO clips 15% of its tokens when all is well (2507.18071).
OBJECTIVE_KL = 0.1
OBJECTIVE_CLIP_RATE = 0.5


@dataclass(frozen=True, slots=True)
class Limits:
    """Largest values that pass. The first five are about engine against trainer at lag 0."""

    mean_abs: float  # nats
    k3: float  # nats
    token_mult_prob_error: float
    frac_out: float
    clip_rate: float
    objective_kl: float = OBJECTIVE_KL  # at any lag, nats per token
    objective_clip_rate: float = OBJECTIVE_CLIP_RATE  # at any lag


class Spread(Protocol):
    """What parity is judged by. The signed mean and the mean ratio are not among it: noise of any size leaves them."""

    @property
    def tokens(self) -> int: ...
    @property
    def mean_abs(self) -> float: ...
    @property
    def k3(self) -> float: ...
    @property
    def token_mult_prob_error(self) -> float: ...
    @property
    def frac_out(self) -> float: ...


def limits(config: RunConfig) -> Limits:
    """The limits in force: `parity.*`, with null resolved by the precision of the body, `model.dtype`."""
    parity, dtype = config.parity, config.model.dtype
    return Limits(
        mean_abs=MEAN_ABS[dtype] if parity.max_abs_mean is None else parity.max_abs_mean,
        k3=MAX_K3[dtype] if parity.max_k3 is None else parity.max_k3,
        token_mult_prob_error=parity.max_mult_prob_error,
        frac_out=parity.max_frac_out,
        clip_rate=parity.max_clip_rate,
    )


def exceeded(found: Spread, limits: Limits) -> dict[str, str]:
    """The parity quantities beyond their limits, name -> text with value and limit; empty when parity holds.

    nan is beyond every limit. One token alone is no rate: a fraction fails from two tokens on, or a sample of fewer
    than 1 / limit tokens would fail by its first outlier.
    """

    def judged() -> Iterator[tuple[str, str, float, float]]:
        yield "mean_abs", "mean |Δ|", found.mean_abs, limits.mean_abs
        yield "k3", "k3", found.k3, limits.k3
        yield (
            "token_mult_prob_error",
            "mean exp|Δ|",
            found.token_mult_prob_error,
            limits.token_mult_prob_error,
        )
        if not found.frac_out * found.tokens < 1.5:
            yield "frac_out", "fraction outside [0.5, 2]", found.frac_out, limits.frac_out

    return {name: f"{text} {value:.3g} > {limit:.3g}" for name, text, value, limit in judged() if not value <= limit}
