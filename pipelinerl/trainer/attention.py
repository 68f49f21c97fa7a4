"""Causal attention over a packed row, one sequence at a time.

A packed row holds several sequences end to end, shape [1, heads, N, head_dim]. Each sequence attends only to itself.
Sequences that are neighbours and of equal length go through one SDPA call, so packing sorts by length. No [N, N]
mask is ever built, and a packed forward pass equals the unpacked one exactly, which masks in bf16 do not give.

There may also be more keys than queries: one sequence whose first positions come from a KV cache. Its mask is explicit
and is built for `BLOCK` queries at a time.

Registered with transformers under the name `ATTENTION`; the boundaries travel as the keyword `segments`.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from pipelinerl.errors import EnvironmentProblem

ATTENTION = "pipelinerl_segments"
BLOCK = 512  # queries

Segments = Sequence[tuple[int, int]]  # (number of sequences, their common length), in row order


def runs_of_equal_length(lengths: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring equal lengths as (count, length): [5, 5, 3] -> [(2, 5), (1, 3)]."""
    runs: list[tuple[int, int]] = []
    for length in lengths:
        if runs and runs[-1][1] == length:
            runs[-1] = (runs[-1][0] + 1, length)
        else:
            runs.append((1, length))
    return runs


def segment_attention(
    module: torch.nn.Module,
    query: Tensor,  # [1, H, N, D]
    key: Tensor,  # [1, H_kv, N, D], or [1, H_kv, K, D] with K > N: the queries are the last N of K positions
    value: Tensor,  # like key
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: Segments,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention output [1, N, H, D]. Raises EnvironmentProblem for attention variants it does not know."""
    if softcap is not None:
        raise EnvironmentProblem("this model caps its attention logits (softcap), which the trainer does not support")
    if key.shape[2] != query.shape[2]:
        assert list(segments) == [(1, query.shape[2])], f"cached keys belong to one sequence, segments are {segments}"
        return _after_cached(query, key, value, scaling, dropout, sliding_window), None
    outputs, start = [], 0
    for count, length in segments:
        stop = start + count * length
        q, k, v = (_split(x[0, :, start:stop], count, length) for x in (query, key, value))
        windowed = sliding_window is not None and length > sliding_window
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_band(length, length, sliding_window, q.device) if windowed else None,
            dropout_p=dropout,
            is_causal=not windowed,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outputs.append(out.transpose(1, 2).reshape(count * length, q.shape[1], -1))
        start = stop
    assert start == query.shape[2], f"segments cover {start} of {query.shape[2]} positions"
    return torch.cat(outputs)[None], None


def _split(x: Tensor, count: int, length: int) -> Tensor:
    """[H, count * length, D] -> [count, H, length, D]."""
    return x.reshape(x.shape[0], count, length, x.shape[2]).transpose(0, 1)


def _after_cached(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, dropout: float, sliding_window: int | None
) -> Tensor:
    """Output [1, N, H, D] of the last N positions of one sequence."""
    outputs = []
    seen = key.shape[2] - query.shape[2]
    for q in query.split(BLOCK, dim=2):
        seen += q.shape[2]
        out = F.scaled_dot_product_attention(
            q,
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=_band(q.shape[2], seen, sliding_window, q.device),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=q.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2))
    return torch.cat(outputs, dim=1)


def _band(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    """Causal mask [queries, keys] of the last positions; a window lets each see itself and `window - 1` before it."""
    position = torch.arange(keys - queries, keys, device=device)
    distance = position[:, None] - torch.arange(keys, device=device)[None, :]
    return (distance >= 0) & (distance < (window or keys))


AttentionInterface.register(ATTENTION, segment_attention)
