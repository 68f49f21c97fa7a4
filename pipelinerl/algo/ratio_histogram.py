"""Quantiles of the policy ratio from counts, which add up over micro-batches and ranks as the ratios themselves cannot.

The bins are those of |log ratio|, `PER_DECADE` to a decade from 1e-6 to 100 nats, for each sign, and one in the middle
for what is smaller. So |log ratio| is known to within 3.7% (half a bin), wherever it is: a ratio of 1.01 to within
0.0004, one of 1.2 to within 0.008. Larger ones are counted in the outermost bins.
"""

import torch
from torch import Tensor

SMALLEST = -6  # decades: 1e-6 nats, the rounding of float32 logprobs
LARGEST = 2
PER_DECADE = 32
SIDE = (LARGEST - SMALLEST) * PER_DECADE  # bins of one sign
SIZE = 2 * SIDE + 1


def histogram(log_ratio: Tensor) -> Tensor:
    """[SIZE] float64 counts of `log_ratio` [N], nats. Those that are not finite are not counted."""
    size = log_ratio.abs()
    level = ((size.log10() - SMALLEST) * PER_DECADE).floor().clamp(-1, SIDE - 1) + 1  # 0 = the one in the middle
    known = log_ratio.isfinite()
    index = torch.where(known, SIDE + level * log_ratio.sign(), SIDE).long()
    return torch.zeros(SIZE, dtype=torch.float64, device=log_ratio.device).index_add(0, index, known.double())


def quantiles(counts: Tensor, of: tuple[float, ...]) -> list[float]:
    """The log ratio below or at which each of these fractions of the counts lies, as the (geometric) middle of its bin.

    There must be at least one count.
    """
    total = counts.cumsum(0)
    wanted = torch.tensor(of, dtype=torch.float64, device=counts.device) * total[-1]
    # The smallest float above 0 instead of 0: the lowest bin that has a count, not the lowest bin.
    index = torch.searchsorted(total, wanted.clamp(min=torch.finfo(torch.float64).tiny))
    return [_middle(int(i)) for i in index.clamp(max=SIZE - 1)]


def _middle(index: int) -> float:
    level = abs(index - SIDE)
    if level == 0:
        return 0.0
    size: float = 10 ** (SMALLEST + (level - 0.5) / PER_DECADE)
    return size if index > SIDE else -size
