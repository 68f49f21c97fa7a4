"""Which samples go into which forward pass of which rank.

Two numbers are bad for speed: tokens a rank waits for (imbalance) and forward passes that are not full (fill). The
number of micro-batches is the smallest that first-fit-decreasing finds and that divides evenly over the ranks; the
samples are then spread over exactly that many, as evenly as the bound allows, because half-full passes that are equal
cost less than one that is full beside one that is nearly empty. Load is counted in tokens.
"""

import heapq
from collections.abc import Sequence

import numpy as np

from pipelinerl.errors import ConfigError
from pipelinerl.types import RankBatch, SampleRef

Bins = list[list[int]]  # [bin][sample]


def pack(lengths: Sequence[int], ranks: int, micro_batch_tokens: int) -> list[list[list[int]]]:
    """Indexes into `lengths` as [rank][micro_batch][sample]; the same for the same arguments.

    Every sample is in exactly one micro-batch, no micro-batch has more than `micro_batch_tokens` tokens, and all
    ranks have the same number of them (empty lists fill up). In a micro-batch the longest sample comes first, so equal
    lengths are neighbours; in a rank the largest micro-batch comes first, so the n-th ones of all ranks are alike.

    Raises:
        ConfigError: a sample is longer than `micro_batch_tokens`.
    """
    assert ranks > 0, ranks
    assert all(length > 0 for length in lengths), "a sample has at least one token"
    longest = max(lengths, default=0)
    if longest > micro_batch_tokens:
        raise ConfigError(
            f"a sample of {longest} tokens does not fit trainer.micro_batch_tokens={micro_batch_tokens}; "
            f"raise it to {longest} or more"
        )
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    needed = len(_first_fit(lengths, order, micro_batch_tokens))
    per_rank = -(-needed // ranks)
    bins = _even_bins(lengths, order, ranks * per_rank, micro_batch_tokens)
    return _over_ranks(lengths, bins, ranks)


def rank_batches(
    refs: Sequence[SampleRef], ranks: int, micro_batch_tokens: int, kl_to_go: float = 0.0
) -> list[RankBatch]:
    """The work of each rank in one optimizer update, by `pack`."""
    packed = pack([ref.length for ref in refs], ranks, micro_batch_tokens)
    return [
        RankBatch(
            micro_batches=tuple(tuple(refs[index] for index in micro_batch) for micro_batch in micro_batches),
            kl_to_go=kl_to_go,
        )
        for micro_batches in packed
    ]


def _even_bins(lengths: Sequence[int], order: Sequence[int], count: int, capacity: int) -> Bins:
    """At most `count` bins of nearly equal load. First-fit-decreasing at `capacity` must need no more than `count`.

    Longest sample first into the emptiest bin is the most even. Where that overflows (bins close to full), MULTIFIT
    (Coffman, Garey and Johnson 1978): the smallest capacity at which first-fit-decreasing gets along with `count`.
    """
    bins = _emptiest_first(lengths, order, count)
    if max((_load(lengths, members) for members in bins), default=0) <= capacity:
        return bins
    low, high = max(max(lengths), -(-sum(lengths) // count)), capacity
    while low < high:
        middle = (low + high) // 2
        if len(_first_fit(lengths, order, middle)) <= count:
            high = middle
        else:
            low = middle + 1
    return _first_fit(lengths, order, high)


def _emptiest_first(lengths: Sequence[int], order: Sequence[int], count: int) -> Bins:
    """Each sample, in `order`, into the bin with the least load."""
    bins: Bins = [[] for _ in range(count)]
    heap = [(0, index) for index in range(count)]
    for sample in order:
        load, index = heap[0]
        bins[index].append(sample)
        heapq.heapreplace(heap, (load + lengths[sample], index))
    return bins


def _first_fit(lengths: Sequence[int], order: Sequence[int], capacity: int) -> Bins:
    """Each sample, in `order`, into the first bin that has room for it, or into a new one."""
    bins: Bins = []
    room = np.full(len(order), capacity, dtype=np.int64)  # of as many bins as could ever be opened
    for sample in order:
        index = int((room[: len(bins) + 1] >= lengths[sample]).argmax())
        if index == len(bins):
            bins.append([])
        bins[index].append(sample)
        room[index] -= lengths[sample]
    return bins


def _over_ranks(lengths: Sequence[int], bins: Bins, ranks: int) -> list[list[list[int]]]:
    """Deals the bins out, largest first, always to the rank with the fewest tokens among those with places left."""
    per_rank = -(-len(bins) // ranks)
    dealt: list[list[list[int]]] = [[] for _ in range(ranks)]
    tokens = [0] * ranks
    for members in sorted(bins, key=lambda members: -_load(lengths, members)):
        rank = min((r for r in range(ranks) if len(dealt[r]) < per_rank), key=lambda r: (tokens[r], r))
        dealt[rank].append(members)
        tokens[rank] += _load(lengths, members)
    return [micro_batches + [[]] * (per_rank - len(micro_batches)) for micro_batches in dealt]


def _load(lengths: Sequence[int], members: Sequence[int]) -> int:
    return sum(lengths[index] for index in members)
