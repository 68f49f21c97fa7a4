"""A digest of a tensor's bytes, to tell whether what arrived is what was sent.

The bytes are 64-bit words w_i, the last one filled up with zeros. The digest is

    sum_i  odd_i * v_i   mod 2^64,   v_i = w_i + 3 (w_i >> 32)

with odd pseudo-random multipliers (a product of one for the place in a row of words and one for the row). They are
units modulo 2^64: a change of one bit, or any change within one half of a word, always changes the digest. Two words
that change, or are swapped, cancel with a chance of 2^-63 times the power of 2 that divides the change of v. That is
why v is not w: two signs flipped in words of floats would be changes by 2^63, which cancel whatever the multipliers.
With v they are changes by 2^31 to 2^33 times an odd number, be it the sign of one half or of both.

It guards against faults, not against an adversary. The same on every device; int64 arithmetic wraps on all of them.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

ROW = 2**14  # words
CPU_ROWS = 4  # per pass: half a megabyte of scratch stays in the cache
DEVICE_ROWS = 256  # per pass: few kernel launches


def digest(tensor: Tensor) -> int:
    """The digest of the tensor's bytes in row-major order, a signed 64-bit number."""
    return int(device_digest(tensor))


def device_digest(tensor: Tensor) -> Tensor:
    """The digest as an int64 scalar on the tensor's device, without waiting for the device."""
    content = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if content.storage_offset() % 8:
        content = content.clone()  # a view as words has to start at one
    rows, rest = divmod(len(content), 8 * ROW)
    last = torch.zeros(-(-rest // 8), dtype=torch.int64, device=content.device)
    last.view(torch.uint8)[:rest] = content[len(content) - rest :]
    whole = content[: len(content) - rest].view(torch.int64).view(rows, ROW)
    sums = torch.cat([*_row_sums(whole), *_row_sums(last[None])])
    return (sums * _multipliers(2**32, rows + 1, content.device)).sum()


def _row_sums(words: Tensor) -> Iterator[Tensor]:
    """Of words [rows, at most ROW], a few rows at a time."""
    columns = _multipliers(0, ROW, words.device)[: words.shape[1]]
    step = CPU_ROWS if words.device.type == "cpu" else DEVICE_ROWS
    for start in range(0, len(words), step):
        part = words[start : start + step]
        upper = part >> 32
        yield torch.add(part, upper, alpha=3, out=upper).mul_(columns).sum(dim=1)


@cache
def _multipliers(start: int, count: int, device: torch.device) -> Tensor:
    """Odd numbers [count]: splitmix64 (Steele, Lea, Flood 2014) of the places from `start` on."""
    mixed = torch.arange(start + 1, start + count + 1, dtype=torch.int64) * _signed(0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ _shifted(mixed, shift)) * _signed(factor)
    return ((mixed ^ _shifted(mixed, 31)) | 1).to(device)


def _shifted(words: Tensor, by: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return (words >> by) & (2 ** (64 - by) - 1)


def _signed(number: int) -> int:
    return number - 2**64 if number >= 2**63 else number
