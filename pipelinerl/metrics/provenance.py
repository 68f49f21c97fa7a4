"""Which weights made what a token attends to. Pure functions of the driver's metadata.

A token is sampled in the step that processes the token before it, which makes the KV of that position. So of a turn
whose completion follows L tokens of context, token c (from 0) attends to L + c positions, the last of which its own
weights made. The prefill makes the first L, in the step that samples token 0: every turn prefills all of its context,
earlier turns included (prefix caching is off, or shares KV within a version). Where an update had the KV made anew, the
weights that sampled the next token made all of it.

So at the start s of a span the KV is either all new, or all of it but the last position, L + s - 1 positions, is older
than the span's weights; and that count stays while the span lasts.

    example: L = 4, two tokens by version 7, three by version 8:  fractions 0, 0, 5/6, 5/7, 5/8

    kv/old_context_fraction       mean over trained tokens of the fraction of their context whose KV older weights made
    kv/old_context_fraction_max   of any trained token
    kv/age_max                    how many versions old the oldest KV was that any trained token attended to

Not seen: an update between the chunks of one chunked prefill, and a sequence that vLLM preempts for want of memory,
whose KV is then newer than it is counted here.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from pipelinerl.config.schema import EngineConfig
from pipelinerl.types import GroupMeta, TurnMeta


@dataclass(frozen=True, slots=True)
class OldContext:
    """Over the sampled tokens of a rollout."""

    tokens: int = 0
    total: float = 0.0  # sum of the fractions
    largest: float = 0.0  # fraction
    age_max: int = 0  # versions


def old_context(turns: Sequence[TurnMeta]) -> OldContext:
    """How much of what the sampled tokens of a rollout attended to was made by older weights than sampled them."""
    tokens, total, largest, age_max, before = 0, 0.0, 0.0, 0, 0
    for turn in turns:
        before += turn.context
        start, made = 0, turn.runs[0][0] if turn.runs else 0
        for version, count in turn.runs:
            if start in turn.kv_from:
                made = version
            if made < version:
                old, first = before + start - 1, before + start
                total += old * _sum_of_reciprocals(first, first + count)
                largest = max(largest, old / first)
                age_max = max(age_max, version - made)
            start += count
        tokens += start
        before += start
    return OldContext(tokens, total, largest, age_max)


def _sum_of_reciprocals(begin: int, end: int) -> float:
    """1/begin + ... + 1/(end - 1)."""
    harmonic = _harmonic_numbers(1 << (end - 1).bit_length())
    return float(harmonic[end - 1] - harmonic[begin - 1])


@cache
def _harmonic_numbers(count: int) -> NDArray[np.float64]:
    """[count] from the 0th."""
    return np.concatenate([np.zeros(1), np.cumsum(1 / np.arange(1, count, dtype=np.float64))])


def kv_metrics(groups: Sequence[GroupMeta], engine: EngineConfig) -> dict[str, float]:
    """`kv/*` of the scored rollouts of a step.

    Empty without a sampled token, and with prefix caching that shares KV between versions: then nobody knows.
    """
    if engine.prefix_caching and engine.cache_salt == "none":
        return {}
    scored = [rollout for group in groups for rollout in group.rollouts if rollout.outcome.scored]
    found = [old_context(rollout.turns) for rollout in scored]
    tokens = sum(one.tokens for one in found)
    if not tokens:
        return {}
    return {
        "kv/old_context_fraction": sum(one.total for one in found) / tokens,
        "kv/old_context_fraction_max": max(one.largest for one in found),
        "kv/age_max": float(max(one.age_max for one in found)),
    }
