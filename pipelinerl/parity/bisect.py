"""Where engine and trainer part: their residual streams compared place by place.

A difference that is there from some block on, and not before it, is that block's. So the block to look at is the first
whose relative difference is large and far above that of the place before it. Rounding grows slowly from block to block
and does neither.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipelinerl.types import FloatArray

FACTOR = 5.0  # a jump: this many times the difference at the place before
# and above what rounding alone makes of it
FLOORS: Mapping[str, float] = {"float32": 1e-5, "bfloat16": 3e-2}


@dataclass(frozen=True, slots=True)
class LayerCurve:
    """Relative difference ||engine - trainer|| / ||trainer|| of the residual stream at each place, in forward order."""

    places: tuple[str, ...]  # "embedding", "block 0", ..., "final norm"
    differences: tuple[float, ...]  # inf where either stream is not finite
    jump: int | None  # index of the first place whose difference jumps

    @property
    def where(self) -> str | None:
        """Name of the place that differs first; None when none does."""
        return None if self.jump is None else self.places[self.jump]

    def describe(self) -> str:
        """One line for a report."""
        if self.jump is None:
            worst = int(np.argmax(self.differences))
            return (
                f"no place stands out: the difference is at most {self.differences[worst]:.1e} ({self.places[worst]})"
            )
        line = f"{self.places[self.jump]}: the difference is {self.differences[self.jump]:.1e}"
        if self.jump == 0:
            return line + ", from the start"
        return line + f", and {self.differences[self.jump - 1]:.1e} before it ({self.places[self.jump - 1]})"


def locate(
    engine: Sequence[FloatArray], trainer: Sequence[FloatArray], dtype: str, factor: float = FACTOR
) -> LayerCurve:
    """Compare the streams, each [tokens, hidden] per place; `dtype` is that of the model, "float32" or "bfloat16"."""
    assert len(engine) == len(trainer) >= 3, (len(engine), len(trainer))
    places = ("embedding", *(f"block {index}" for index in range(len(engine) - 2)), "final norm")
    differences = tuple(_difference(e, t) for e, t in zip(engine, trainer, strict=True))
    before = (0.0, *differences[:-1])
    jumps = [d > FLOORS[dtype] and d > factor * b for d, b in zip(differences, before, strict=True)]
    return LayerCurve(places, differences, jumps.index(True) if any(jumps) else None)


def _difference(engine: FloatArray, trainer: FloatArray) -> float:
    assert engine.shape == trainer.shape, (engine.shape, trainer.shape)
    e, t = engine.astype(np.float64), trainer.astype(np.float64)
    with np.errstate(invalid="ignore", over="ignore"):
        distance, size = float(np.linalg.norm(e - t)), float(np.linalg.norm(t))
    if distance == 0:
        return 0.0
    return distance / size if size > 0 and math.isfinite(distance) and math.isfinite(size) else math.inf
