"""The nudge: a second set of weights by one bit, and back by the same bit."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pipelinerl.trainer.nudge import Weights, flip_bit, nudge

DTYPES = [torch.bfloat16, torch.float32]
INTEGERS = {torch.bfloat16: torch.int16, torch.float32: torch.int32}
SMALLEST_NORMAL = 2.0**-126  # in both dtypes


def bits(values: Tensor) -> Tensor:
    return values.detach().view(INTEGERS[values.dtype]).clone()


def flipped(values: Tensor) -> Tensor:
    changed = values.clone()
    flip_bit(changed)
    return changed


@pytest.mark.parametrize("dtype", DTYPES)
def test_values_worked_out_by_hand(dtype: torch.dtype) -> None:
    """1 = 1.00000b gains 2^-5; 1 + 2^-5 loses it again; -3 = -2 * 1.10000b and 2^20 gain 2^-5 of 2 and of 2^20."""
    values = torch.tensor([1.0, 1 + 2**-5, -3.0, 2.0**20, 0.0], dtype=dtype)
    expected = torch.tensor([1 + 2**-5, 1.0, -3 - 2**-4, 2.0**20 + 2**15, 2.0**-131], dtype=dtype)
    assert torch.equal(bits(flipped(values)), bits(expected))


patterns = st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50)


@given(patterns, st.sampled_from(DTYPES))
def test_any_bits_come_back_and_finite_stays_finite_and_close(raw: list[int], dtype: torch.dtype) -> None:
    """Every bit pattern there is, NaN, infinities and denormals among them."""
    words = np.array(raw, np.uint32)
    integers = torch.from_numpy(
        words.view(np.int32) if dtype == torch.float32 else words.astype(np.uint16).view(np.int16)
    )
    values = integers.view(dtype)
    once = flipped(values)
    assert torch.equal(bits(flipped(once)), integers)
    assert (bits(once) != integers).all()
    for before, after in zip(values.double().tolist(), once.double().tolist(), strict=True):
        if math.isfinite(before):
            assert math.isfinite(after) and math.copysign(1, after) == math.copysign(1, before)
            if abs(before) >= SMALLEST_NORMAL:
                assert 2**-6 < abs(after / before - 1) <= 2**-5
            else:
                assert abs(after - before) == 2.0**-131


def test_bfloat16_and_the_same_value_in_float32_change_alike() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(flipped(values).float(), flipped(values.float()))


class Tied(nn.Module):
    """An embedding that is its own head, a bias, a buffer and a parameter that is a strided view."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight
        self.strided = nn.Parameter(torch.randn(6, 4).t()[::2])
        self.register_buffer("table", torch.ones(3))


def test_a_model_is_changed_in_place_each_parameter_once_and_restored() -> None:
    model = Tied()
    assert not model.strided.is_contiguous()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    nudge(model)
    after = model.state_dict()
    assert {name: tensor.data_ptr() for name, tensor in after.items()} == places
    for name in ("embedding.weight", "head.weight", "head.bias", "strided"):
        assert torch.equal(after[name], flipped(before[name])), name  # a tied one flipped twice would be as before
    assert torch.equal(after["table"], before["table"])
    nudge(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_nudge_leaves_gradients_possible() -> None:
    model = Tied()
    nudge(model)
    model.head(model.embedding(torch.tensor([1, 2]))).sum().backward()
    assert model.embedding.weight.grad is not None and model.embedding.weight.requires_grad


def test_weights_know_what_the_model_holds() -> None:
    model = Tied()
    own = model.strided.clone()
    weights = Weights(model)
    held = []
    for nudged in (False, True, True, False, False):
        weights.use(nudged)
        assert weights.nudged == nudged
        held.append(torch.equal(model.strided, own))
    assert held == [True, False, False, True, True]
