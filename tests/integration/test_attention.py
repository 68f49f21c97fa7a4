"""Packed attention: equal to every sequence alone, and blind to its neighbours."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM, MistralConfig, PreTrainedModel, Qwen2Config

from pipelinerl.errors import EnvironmentProblem
from pipelinerl.trainer.attention import (
    ATTENTION,
    BLOCK,
    runs_of_equal_length,
    segment_attention,
    varlen_attention,
)

lengths_of_rows = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def qkv(length: int, heads: int, kv_heads: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, count, length, 8) for count in (heads, kv_heads, kv_heads)]
    query, key, value = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return query, key, value


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], window: int | None = None) -> Tensor:
    module = torch.nn.Identity()
    out, weights = segment_attention(
        module, q, k, v, None, scaling=0.3, segments=runs_of_equal_length(lengths), sliding_window=window
    )
    assert weights is None
    return out


def by_hand(q: Tensor, k: Tensor, v: Tensor, window: int | None = None) -> Tensor:
    """softmax(q k^T) v of one sequence with an explicit mask, in float64, [1, N, H, D]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    n = q.shape[2]
    position = torch.arange(n, device=q.device)
    age = position[:, None] - position[None]
    seen = (age >= 0) & (age < (window or n))
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen, float("-inf"))
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2)


def test_runs_of_equal_length_join_neighbours_only() -> None:
    assert runs_of_equal_length([5, 5, 3, 5]) == [(2, 5), (1, 3), (1, 5)]
    assert runs_of_equal_length([]) == []


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.sampled_from([(2, 2), (4, 2), (4, 1)]), st.sampled_from([None, 1, 3]))
def test_packed_attention_is_the_attention_of_each_sequence(
    lengths: list[int], heads: tuple[int, int], window: int | None
) -> None:
    q, k, v = qkv(sum(lengths), *heads, torch.float32, seed=0)
    packed = attend(q, k, v, lengths, window)
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    expected = torch.cat([by_hand(*part, window=window) for part in parts], dim=1)
    torch.testing.assert_close(packed.double(), expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=40, deadline=None)
@given(lengths_of_rows, st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from([None, 3]))
def test_packing_changes_no_bit(lengths: list[int], dtype: torch.dtype, window: int | None) -> None:
    q, k, v = qkv(sum(lengths), 4, 2, dtype, seed=1)
    parts = zip(q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2), strict=True)
    alone = torch.cat([attend(*part, lengths=[part[0].shape[2]], window=window) for part in parts], dim=1)
    assert torch.equal(attend(q, k, v, lengths, window), alone)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.sampled_from([(2, 2), (4, 2), (4, 1)]),
    st.sampled_from([None, 1, 3]),
)
def test_queries_after_cached_keys_are_the_end_of_the_whole_sequence(
    past: int, count: int, heads: tuple[int, int], window: int | None
) -> None:
    q, k, v = qkv(past + count, *heads, torch.float32, seed=2)
    out = attend(q[:, :, past:], k, v, [count], window)
    expected = by_hand(q, k, v, window)[:, past:]
    torch.testing.assert_close(out.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 600])
def test_many_queries_after_cached_keys_are_cut_into_blocks(window: int | None) -> None:
    past, count = 70, 2 * BLOCK + 5
    q, k, v = qkv(past + count, 2, 1, torch.float32, seed=3)
    out = attend(q[:, :, past:], k, v, [count], window)
    torch.testing.assert_close(out.double(), by_hand(q, k, v, window)[:, past:], atol=1e-6, rtol=1e-5)


def test_cached_keys_of_a_packed_row_are_refused() -> None:
    q, k, v = qkv(9, 2, 2, torch.float32, seed=4)
    with pytest.raises(AssertionError, match="cached keys belong to one sequence"):
        attend(q[:, :, 3:], k, v, [4, 2])


def test_attention_that_caps_its_logits_is_refused() -> None:
    q, k, v = qkv(3, 2, 2, torch.float32, seed=0)
    with pytest.raises(EnvironmentProblem, match="softcap"):
        segment_attention(torch.nn.Identity(), q, k, v, None, scaling=1.0, segments=[(1, 3)], softcap=30.0)


def models(dtype: torch.dtype, window: int | None) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same random model twice: with the project's attention, and with transformers' own (sdpa)."""
    size = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
    }

    def build(attention: str) -> PreTrainedModel:
        config = Qwen2Config(**size) if window is None else MistralConfig(**size, sliding_window=window)
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention)
        return model.eval()

    return build(ATTENTION), build("sdpa")


def packed_logits(model: PreTrainedModel, rows: list[Tensor]) -> list[Tensor]:
    lengths = [len(row) for row in rows]
    with torch.no_grad():
        logits = model(
            input_ids=torch.cat(rows)[None],
            position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
            attention_mask=None,
            use_cache=False,
            segments=runs_of_equal_length(lengths),
        ).logits[0]
    return list(logits.split(lengths))


ROWS = [torch.arange(n) * 7 % 50 for n in (11, 11, 6, 1, 1, 9)]


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 0.1)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("window", [None, 4], ids=["causal", "window"])
def test_a_packed_model_gives_the_logits_of_transformers(
    dtype: torch.dtype, tolerance: float, window: int | None
) -> None:
    ours, plain = models(dtype, window)
    for row, logits in zip(ROWS, packed_logits(ours, ROWS), strict=True):
        with torch.no_grad():
            expected = plain(row[None]).logits[0]
        torch.testing.assert_close(logits, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("changed", range(len(ROWS)))
def test_a_changed_token_changes_its_own_sequence_only(dtype: torch.dtype, changed: int) -> None:
    ours, _ = models(dtype, None)
    rows = [row.clone() for row in ROWS]
    rows[changed][0] += 1
    before, after = packed_logits(ours, ROWS), packed_logits(ours, rows)
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != changed for i in range(len(ROWS))]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="varlen attention needs a CUDA GPU")
@pytest.mark.parametrize("window", [None, 4], ids=["causal", "window"])
def test_packed_varlen_attention_is_the_attention_of_each_sequence(window: int | None) -> None:
    """Output and gradients against each sequence alone in float64, and to the bit against itself unpacked."""
    lengths = [11, 11, 6, 1, 9]
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(1, heads, sum(lengths), 64, generator=generator) for heads in (4, 2, 2))
    row = [x.bfloat16().cuda().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in row]

    def varlen(parts: list[Tensor], lengths: list[int]) -> Tensor:
        segments = runs_of_equal_length(lengths)
        module = torch.nn.Identity()
        return varlen_attention(module, *parts, None, scaling=0.3, segments=segments, sliding_window=window)[0]

    def split(tensors: list[Tensor]) -> list[list[Tensor]]:
        return [list(part) for part in zip(*(x.split(lengths, 2) for x in tensors), strict=True)]

    packed = varlen(row, lengths)
    alone = torch.cat([varlen(part, [part[0].shape[2]]) for part in split(row)], dim=1)
    expected = torch.cat([by_hand(*part, window=window) for part in split(exact)], dim=1)
    assert torch.equal(packed, alone)
    torch.testing.assert_close(packed.double(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn(packed.shape, generator=generator).cuda()
    found = torch.autograd.grad((packed * weights).sum(), row)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    for actual, value in zip(found, wanted, strict=True):
        torch.testing.assert_close(actual.double(), value, atol=5e-2, rtol=5e-2)
