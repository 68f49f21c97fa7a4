"""Corrections of what the engine's policy differs in: a constant factor for the loss of every token, 0 where masked.

All tensors are flat, [N] tokens of one packed micro-batch, and carry no gradient. Sums, products and means over a
sequence are over its sampled tokens.

Notation:  x = proximal/engine where there is a proximal policy of its own ("decoupled"), else current/engine. Both are
probabilities of the sampled token.

To add one, write `(CorrectionInputs, parameter) -> weight [N]` and name it with `@correction("name")`; add the setting
`name` to `CorrectionConfig` (config/schema.py), its usual value to `DEFAULTS`, and a preset to conf/algo/correction.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipelinerl.algo.ratios import MAX_LOG_RATIO, bounded_exp, dense, sequence_mean, sequence_sum
from pipelinerl.config.schema import CorrectionConfig

# What each correction is usually run with: the values of the presets, for the counterfactual panel.
DEFAULTS = CorrectionConfig(
    tis_token=2.0,
    tis_sequence=5.0,
    icepop=(0.5, 5.0),
    sequence_mis=(0.33, 3.0),
    geometric=(0.99, 1.01),
    k3=0.01,
    veto=1e-4,
    opsm=0.5,
    version_mask=4,
)


@dataclass(frozen=True, slots=True, eq=False)
class CorrectionInputs:
    """What a correction may look at. All [N]; index t is the position that predicted the token in question."""

    log_x: Tensor  # nats
    log_ratio: Tensor  # log(current/engine), nats
    advantages: Tensor
    mask: Tensor  # bool, True where the policy sampled the token
    sequence: Tensor  # int64, names the token's sequence
    lag: Tensor  # integer, the version that trains on the token minus the one that sampled it

    def __post_init__(self) -> None:
        shape = self.log_x.shape
        assert len(shape) == 1, shape
        for name in ("log_ratio", "advantages", "mask", "sequence", "lag"):
            assert getattr(self, name).shape == shape, (name, getattr(self, name).shape, shape)
        assert self.mask.dtype == torch.bool, self.mask.dtype
        assert self.sequence.dtype == torch.int64, self.sequence.dtype
        assert not self.lag.is_floating_point(), self.lag.dtype


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """What `correct` makes of a micro-batch."""

    weight: Tensor  # [N] float32, 0 outside the mask
    masked: Mapping[str, Tensor]  # each mask that is on -> [N] bool, the sampled tokens that it alone would mask


CorrectionFn = Callable[[CorrectionInputs, Any], Tensor]
CORRECTIONS: dict[str, CorrectionFn] = {}
CAPS = ("tis_token", "tis_sequence")  # weigh and never mask


def correction(name: str) -> Callable[[CorrectionFn], CorrectionFn]:
    """Makes a function the correction that `algo.correction.name` sets the parameter of.

    Its inputs are float32 and 0 outside the mask; sequences are numbered from 0 without gaps.
    """

    def register(function: CorrectionFn) -> CorrectionFn:
        assert name not in CORRECTIONS, name
        CORRECTIONS[name] = function
        return function

    return register


@torch.no_grad()
def correct(inputs: CorrectionInputs, config: CorrectionConfig, decoupled: bool) -> Correction:
    """The product of all corrections that are on.

    Args:
        decoupled: whether the objective's ratio is to a proximal policy of its own. If not, the objective holds x
            itself: only masks are left of the corrections, of icepop too.

    Whatever stands outside the mask does not matter. A non-finite ratio inside it makes the weight NaN, so that the
    step is skipped and not trained on with a token whose ratio nobody knows.
    """
    given = _masked(inputs)
    weight, masked = given.mask.float(), {}
    for name, function in CORRECTIONS.items():
        parameter = getattr(config, name)
        if parameter is None:
            continue
        assert decoupled or name not in CAPS, f"{name} on top of a ratio to the engine counts it twice"
        factor = function(given, parameter)
        if name not in CAPS:
            masked[name] = given.mask & ~(factor > 0)
        weight = weight * (factor if decoupled else factor.sign())
    known = given.log_x.isfinite() & given.log_ratio.isfinite()
    return Correction(torch.where(known, weight, math.nan), masked)


def affected(name: str, inputs: CorrectionInputs, parameter: Any) -> Tensor:
    """[N] bool: the sampled tokens that correction `name` with this parameter would mask, or cap the weight of."""
    return affected_by({name: parameter}, inputs)[name]


@torch.no_grad()
def affected_by(parameters: Mapping[str, Any], inputs: CorrectionInputs) -> dict[str, Tensor]:
    """`affected` for several corrections, each by itself."""
    given = _masked(inputs)
    found = {}
    for name, parameter in parameters.items():
        function = CORRECTIONS[name]
        spared: Tensor = function(given, math.inf) <= parameter if name in CAPS else function(given, parameter) > 0
        found[name] = given.mask & ~spared
    return found


@correction("tis_token")
def tis_token(inputs: CorrectionInputs, cap: float) -> Tensor:
    """Truncated importance sampling: min(x, cap) of each token."""
    return bounded_exp(inputs.log_x).clamp(max=cap)


@correction("tis_sequence")
def tis_sequence(inputs: CorrectionInputs, cap: float) -> Tensor:
    """min(product of x over the sequence, cap)."""
    return bounded_exp(sequence_sum(inputs.log_x, inputs.sequence)).clamp(max=cap)


@correction("icepop")
def icepop(inputs: CorrectionInputs, band: tuple[float, float]) -> Tensor:
    """x where it is in the band, else 0   (2510.18855)."""
    return torch.where(_within(inputs.log_x, band), bounded_exp(inputs.log_x), 0.0)


@correction("sequence_mis")
def sequence_mis(inputs: CorrectionInputs, band: tuple[float, float]) -> Tensor:
    """1 where the product of x over the sequence is in the band."""
    return _within(sequence_sum(inputs.log_x, inputs.sequence), band).float()


@correction("geometric")
def geometric(inputs: CorrectionInputs, band: tuple[float, float]) -> Tensor:
    """1 where the geometric mean of x over the sequence is in the band."""
    return _within(sequence_mean(inputs.log_x, inputs.mask, inputs.sequence), band).float()


@correction("k3")
def k3(inputs: CorrectionInputs, limit: float) -> Tensor:
    """1 where the sequence's mean of x - 1 - log x, an estimate of KL(engine || the other) in nats, is in the limit."""
    bounded = inputs.log_x.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    estimate = bounded.expm1() - inputs.log_x  # without the cancellation near x = 1
    return (sequence_mean(estimate, inputs.mask, inputs.sequence) <= limit).float()


@correction("veto")
def veto(inputs: CorrectionInputs, lowest: float) -> Tensor:
    """1 where no x of the sequence is below `lowest`."""
    below = (inputs.log_x < math.log(lowest)).float()
    return (sequence_sum(below, inputs.sequence) == 0).float()


@correction("opsm")
def opsm(inputs: CorrectionInputs, limit: float) -> Tensor:
    """0 where A < 0 and the sequence's mean log(engine/current) is above the limit, nats   (2512.02556).

    It asks how far the current policy is from the engine's, whatever the proximal policy.
    """
    gone = sequence_mean(-inputs.log_ratio, inputs.mask, inputs.sequence) > limit
    return 1 - ((inputs.advantages < 0) & gone).float()


@correction("version_mask")
def version_mask(inputs: CorrectionInputs, most: int) -> Tensor:
    """1 where the token's lag is at most `most` optimizer steps."""
    return (inputs.lag <= most).float()


def _within(log_values: Tensor, band: tuple[float, float]) -> Tensor:
    """[N] whether exp(log_values) is in the band, bounds included; False for NaN."""
    return (log_values >= math.log(band[0])) & (log_values <= math.log(band[1]))


def _masked(inputs: CorrectionInputs) -> CorrectionInputs:
    """Inputs as `correction` promises them."""

    def keep(values: Tensor) -> Tensor:
        return torch.where(inputs.mask, values.detach().float(), 0.0)

    return CorrectionInputs(
        log_x=keep(inputs.log_x),
        log_ratio=keep(inputs.log_ratio),
        advantages=keep(inputs.advantages),
        mask=inputs.mask,
        sequence=dense(inputs.sequence),
        lag=torch.where(inputs.mask, inputs.lag, 0),
    )
