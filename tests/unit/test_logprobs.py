"""Logprobs and entropies of selected tokens, block by block: values and gradients of whole logits, and their memory."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipelinerl.trainer import logprobs as module
from pipelinerl.trainer.logprobs import Projection, most_likely_tokens, token_logprobs

M, V, H = 7, 23, 5
F64 = torch.float64


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three tiles of the vocabulary, the last one narrower."""
    monkeypatch.setattr(module, "TILE", 9)


def inputs(
    dtype: torch.dtype, seed: int = 0, m: int = M, v: int = V, h: int = H
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and targets; logits spread over about +-6."""
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, generator=generator, dtype=F64) * 1.2 for s in ((m, h), (v, h), (v,)))
    targets = torch.randint(v, (m,), generator=generator)
    hidden, weight, bias = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return hidden, weight, bias, targets


def whole(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """The same in float64 from whole logits, by log_softmax and autograd."""
    logits = hidden.to(F64) @ weight.to(F64).T + (0.0 if bias is None else bias.to(F64))
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)


def gradients(values: tuple[Tensor, Tensor], of: list[Tensor], through_entropy: bool) -> tuple[Tensor, ...]:
    """Of a sum in which every token has weights of its own."""
    logprobs, entropies = values
    loss = (logprobs * torch.linspace(-1, 2, len(logprobs))).sum()
    if through_entropy:
        loss = loss + (entropies * torch.linspace(0.5, -1.5, len(logprobs))).sum()
    return torch.autograd.grad(loss, of)


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(1, M),
    chunk=st.integers(1, M + 1),
    with_bias=st.booleans(),
    through_entropy=st.booleans(),
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    dtype=st.sampled_from([torch.float32, F64]),
    seed=st.integers(0, 99),
)
def test_values_and_gradients_are_those_of_whole_logits(
    tokens: int,
    chunk: int,
    with_bias: bool,
    through_entropy: bool,
    temperature: float,
    dtype: torch.dtype,
    seed: int,
) -> None:
    hidden, weight, bias, targets = inputs(dtype, seed, m=tokens)
    used = bias if with_bias else None
    of = [hidden, weight, bias] if with_bias else [hidden, weight]
    ours = token_logprobs(hidden, weight, used, targets, Projection(temperature, dtype, chunk), through_entropy)
    expected = whole(hidden, weight, used, targets, temperature)
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    for actual, value in zip(ours, expected, strict=True):
        torch.testing.assert_close(actual, value, check_dtype=False, **tolerance)
    pairs = zip(gradients(ours, of, through_entropy), gradients(expected, of, through_entropy), strict=True)
    for actual, value in pairs:
        torch.testing.assert_close(actual, value, check_dtype=False, **tolerance)


@pytest.mark.parametrize("chunk", [2, M])
def test_gradients_pass_gradcheck_also_through_the_entropy(chunk: int) -> None:
    hidden, weight, bias, targets = inputs(F64)
    projection = Projection(0.7, F64, chunk)
    assert torch.autograd.gradcheck(
        lambda h, w, b: token_logprobs(h, w, b, targets, projection, entropy_grad=True), (hidden, weight, bias)
    )


def test_uniform_and_certain_distributions_have_the_logprobs_and_entropies_worked_out_by_hand() -> None:
    weight = torch.eye(4)
    hidden = torch.tensor([[0.0, 0.0, 0.0, 0.0], [math.log(4), math.log(2), 0.0, 0.0], [400.0, 0.0, 0.0, 0.0]])
    targets = torch.tensor([3, 1, 2])
    logprobs, entropies = token_logprobs(hidden, weight, None, targets, Projection(1.0, torch.float32, 2))
    # The second is 1/2, 1/4, 1/8, 1/8: 1/2 log 2 + 1/4 log 4 + 2/8 log 8 = 1.75 log 2.
    torch.testing.assert_close(logprobs, torch.tensor([-math.log(4), -math.log(4), -400.0]))
    torch.testing.assert_close(entropies, torch.tensor([math.log(4), 1.75 * math.log(2), 0.0]))


def test_entropies_have_no_gradient_unless_asked() -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    projection = Projection(1.0, torch.float32, 3)
    logprobs, entropies = token_logprobs(hidden, weight, None, targets, projection)
    assert logprobs.requires_grad and not entropies.requires_grad
    assert token_logprobs(hidden, weight, None, targets, projection, entropy_grad=True)[1].requires_grad


def test_a_bf16_weight_is_multiplied_in_fp32_and_its_gradient_rounded_once() -> None:
    """Exactly the fp32 gradient, rounded at the end: bf16 sums over tokens and chunks would be off by far more."""
    hidden, weight, bias, targets = inputs(torch.bfloat16, m=64)
    up = [x.detach().float().requires_grad_() for x in (hidden, weight, bias)]
    projection = Projection(0.8, torch.float32, 3)
    ours = token_logprobs(hidden, weight, bias, targets, projection)
    exact = token_logprobs(up[0], up[1], up[2], targets, projection)
    assert ours[0].dtype == ours[1].dtype == torch.float32
    assert torch.equal(ours[0], exact[0]) and torch.equal(ours[1], exact[1])
    for rounded, gradient in zip(
        gradients(ours, [hidden, weight, bias], False), gradients(exact, up, False), strict=True
    ):
        assert torch.equal(rounded, gradient.bfloat16())


def test_a_bf16_product_differs_from_an_fp32_one_by_its_rounding_only() -> None:
    hidden, weight, _, targets = inputs(torch.bfloat16, m=64)
    coarse = token_logprobs(hidden, weight, None, targets, Projection(1.0, torch.bfloat16, 10))
    fine = token_logprobs(hidden, weight, None, targets, Projection(1.0, torch.float32, 10))
    assert coarse[0].dtype == torch.float32
    assert 1e-4 < (coarse[0] - fine[0]).abs().mean() < 0.05
    pairs = zip(gradients(coarse, [hidden, weight], False), gradients(fine, [hidden, weight], False), strict=True)
    for actual, expected in pairs:
        assert actual.dtype == torch.bfloat16
        torch.testing.assert_close(actual, expected, atol=0.15, rtol=0.05)


@pytest.mark.parametrize("frozen", [("hidden",), ("weight", "bias"), ("bias",), ("hidden", "weight")])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen: tuple[str, ...]) -> None:
    names = ("hidden", "weight", "bias")
    *leaves, targets = inputs(F64)
    projection = Projection(0.8, F64, 3)
    expected = gradients(token_logprobs(*leaves, targets, projection), leaves, False)
    for name, leaf in zip(names, leaves, strict=True):
        leaf.requires_grad_(name not in frozen)
    logprobs, _ = token_logprobs(*leaves, targets, projection)
    (logprobs * torch.linspace(-1, 2, M)).sum().backward()
    for name, leaf, gradient in zip(names, leaves, expected, strict=True):
        assert (leaf.grad is None) == (name in frozen)
        assert leaf.grad is None or torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_hidden_state_that_is_not_finite_spoils_its_own_token_and_the_weight(bad: float) -> None:
    hidden, weight, _, targets = inputs(torch.float32)
    spoilt = hidden.detach().clone()
    spoilt[2, 1] = bad
    spoilt.requires_grad_()
    logprobs, entropies = token_logprobs(spoilt, weight, None, targets, Projection(1.0, torch.float32, 3))
    assert [math.isfinite(x) for x in logprobs.tolist()] == [i != 2 for i in range(M)]
    assert not math.isfinite(entropies[2])
    of_hidden, of_weight = torch.autograd.grad(logprobs.sum(), [spoilt, weight])
    assert not of_hidden[2].isfinite().any() and of_hidden[[0, 1, 3, 4, 5, 6]].isfinite().all()
    assert not of_weight.isfinite().all(dim=1).any()


def test_words_that_a_bias_of_minus_infinity_rules_out_count_for_nothing() -> None:
    """A whole tile of them, the first: the others have the logprobs of the smaller vocabulary."""
    hidden, weight, bias, _ = inputs(torch.float32)
    targets = torch.arange(M) + 9
    with torch.no_grad():
        bias[:9] = -torch.inf
    projection = Projection(1.0, torch.float32, 3)
    logprobs, _ = token_logprobs(hidden, weight, bias, targets, projection)
    smaller, _ = token_logprobs(hidden, weight[9:], bias[9:], targets - 9, projection)
    torch.testing.assert_close(logprobs, smaller)


def test_the_most_likely_token_is_the_first_of_the_largest_logits() -> None:
    hidden, weight, bias, _ = inputs(torch.float32, m=40)
    with torch.no_grad():
        weight[[3, 12, 20]], bias[[3, 12, 20]] = 0.0, 30.0  # exactly the same in every tile, and the largest
    projection = Projection(1.0, torch.float32, 6)
    assert most_likely_tokens(hidden, weight, bias, projection).tolist() == [3] * 40
    expected = (hidden @ weight.T).argmax(-1)
    assert torch.equal(most_likely_tokens(hidden, weight, None, projection), expected)
    assert len(set(expected.tolist())) > 3


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


@pytest.mark.parametrize("entropy_grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_is_larger_than_a_block_or_a_gradient(
    dtype: torch.dtype, entropy_grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "TILE", 100)
    tokens, vocabulary, chunk, size = 300, 1000, 50, 8
    hidden, weight, bias, targets = inputs(dtype, m=tokens, v=vocabulary, h=size)
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        projection = Projection(0.8, torch.float32, chunk)
        logprobs, entropies = token_logprobs(hidden, weight, bias, targets, projection, entropy_grad)
        (logprobs + entropies).sum().backward()
    assert largest.elements == max(chunk * 100, vocabulary * size)
    assert weight.grad is not None and weight.grad.dtype == dtype
    assert sum(kept) <= (tokens + vocabulary) * size + vocabulary + 3 * tokens  # the inputs and numbers per token
