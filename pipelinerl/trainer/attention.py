"""Causal attention over a packed row, one sequence at a time.

A packed row holds several sequences end to end, shape [1, heads, N, head_dim]. Each sequence attends only to itself.
Sequences that are neighbours and of equal length go through one SDPA call, so packing sorts by length. No [N, N]
mask is ever built, and a packed forward pass equals the unpacked one exactly, which masks in bf16 do not give.

There may also be more keys than queries: one sequence whose first positions come from a KV cache. Its mask is explicit
and is built for `BLOCK` queries at a time.

Two functions do this, each registered with transformers under a name; the boundaries travel as the keyword `segments`:

    sdpa     `segment_attention`, everywhere. On a GPU its calls run torch's flash kernels.
    varlen   `varlen_attention`, GPU and bfloat16: torch.nn.attention.varlen takes the whole row in one call.

`trainer.attention=auto` is sdpa on GPUs too. varlen needs one kernel for rows of many lengths where sdpa needs one for
each. Its test has passed on an H200 under torch 2.11, whose function infers `enable_gqa`; no training run has used it.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface

from pipelinerl.errors import ConfigError, EnvironmentProblem

ATTENTION = "pipelinerl_segments"
VARLEN = "pipelinerl_varlen"
BLOCK = 512  # queries

Segments = Sequence[tuple[int, int]]  # (number of sequences, their common length), in row order


class OpaqueSegments(Sequence[tuple[int, int]]):
    """Segments that torch.compile does not look into: it would compile a layer anew for every number of them."""

    def __init__(self, segments: Segments):
        self._segments = tuple(segments)

    @overload
    def __getitem__(self, index: int) -> tuple[int, int]: ...
    @overload
    def __getitem__(self, index: slice) -> Segments: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._segments[index]

    def __len__(self) -> int:
        return len(self._segments)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._segments)


def attention_name(setting: str, device: torch.device, dtype: torch.dtype) -> str:
    """The registered name for `trainer.attention`. Raises ConfigError where that attention cannot run."""
    if setting != "varlen":
        return ATTENTION
    if device.type != "cuda" or dtype != torch.bfloat16:
        raise ConfigError(
            f"trainer.attention=varlen needs a GPU and model.dtype=bfloat16, here are {device.type} and "
            f"{str(dtype).removeprefix('torch.')}; use trainer.attention=sdpa"
        )
    return VARLEN


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
    _refuse_softcap(softcap)
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


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    segments: Segments,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Like `segment_attention`, in one call of torch's variable-length flash attention."""
    from torch.nn.attention.varlen import varlen_attn

    _refuse_softcap(softcap)
    if dropout:
        raise EnvironmentProblem("this model has attention dropout; use trainer.attention=sdpa")
    if key.shape[2] != query.shape[2]:
        return segment_attention(
            module, query, key, value, attention_mask, scaling=scaling, segments=segments, sliding_window=sliding_window
        )
    bounds, longest = _bounds(tuple(segments), query.device)
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=((sliding_window or 0) - 1, 0),  # (-1, 0) is causal without a window
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(out, Tensor)
    return out[None], None


@lru_cache(maxsize=8)  # all layers of a pass ask for the same
def _bounds(segments: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, int]:
    """Where the sequences start and the last one ends, int32 [sequences + 1], and the length of the longest."""
    lengths = [length for count, length in segments for _ in range(count)]
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return bounds.to(device), max(lengths)


def _refuse_softcap(softcap: float | None) -> None:
    if softcap is not None:
        raise EnvironmentProblem("this model caps its attention logits (softcap), which the trainer does not support")


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
AttentionInterface.register(VARLEN, varlen_attention)
