"""A second set of weights for a parity probe, made from the first in place and taken back bit for bit.

A nudge flips one bit of the mantissa of every element of every parameter, the one that is worth 2^-5 of the element's
power of two: bit 2 in bfloat16 (7 mantissa bits), bit 18 in float32 (23). So an element changes by between 2^-6 and
2^-5 of its own value, up or down as its bit happens to be, and by the same in either dtype. Flipping the same bits
again restores every bit: no copy of the weights and no optimizer step is needed.

Sign and exponent stay, so a finite weight stays finite. A zero becomes a denormal of 2^-131: a bias that is zero keeps
having no effect, and an update that loses it does not show.
"""

import math

import torch
from torch import Tensor, nn

from pipelinerl.trainer.sharding import held, release

SIZE = -5  # of the change: this power of two, relative to the element's own

_INTEGERS = {2: torch.int16, 4: torch.int32}


def flip_bit(values: Tensor) -> None:
    """Flip the bit in every element of a float tensor, in place."""
    mantissa_bits = -round(math.log2(torch.finfo(values.dtype).eps))
    values.detach().view(_INTEGERS[values.element_size()]).bitwise_xor_(1 << (mantissa_bits + SIZE))


def nudge(model: nn.Module) -> None:
    """Change every element of every parameter by 1.6% to 3.1%; the second call undoes the first.

    A tied parameter is one parameter and is flipped once; a sharded one is flipped by every rank in its shard. Buffers
    are left alone: a weight update does not carry them.
    """
    release(model)  # gathered copies would keep the old bits
    for parameter in model.parameters():
        flip_bit(held(parameter))


class Weights:
    """Knows which of the two sets of weights a model holds."""

    def __init__(self, model: nn.Module):
        self._model = model
        self.nudged = False

    def use(self, nudged: bool) -> None:
        """Make the model hold the nudged weights, or its own."""
        if nudged != self.nudged:
            nudge(self._model)
            self.nudged = nudged
