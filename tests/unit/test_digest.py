"""The digest that tells whether a parameter arrived as it was sent."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipelinerl.weights.digest import ROW, digest

WORDS = st.integers(-(2**63), 2**63 - 1)
# Around the sizes at which the work is divided: a word, a row, a pass of rows. In bytes.
SIZES = [1, 7, 8, 9, 8 * ROW - 1, 8 * ROW, 8 * ROW + 1, 5 * 8 * ROW + 13]


def random_bytes(size: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=200, deadline=None)
@given(data=st.binary(min_size=1, max_size=200), where=st.integers(0), bit=st.integers(0, 7))
def test_one_flipped_bit_changes_it(data: bytes, where: int, bit: int) -> None:
    content = torch.tensor(list(data), dtype=torch.uint8)
    flipped = content.clone()
    flipped[where % len(data)] ^= 1 << bit
    assert digest(flipped) != digest(content)


@pytest.mark.parametrize("size", SIZES)
def test_one_flipped_bit_changes_it_wherever_it_is(size: int) -> None:
    content = random_bytes(size)
    expected = digest(content)
    step = 8 * ROW - 3 if size > 100 else 1
    for where in {*range(0, size, step), size - 1}:
        content[where] ^= 128
        assert digest(content) != expected, where
        content[where] ^= 128
    assert digest(content) == expected


@settings(max_examples=150, deadline=None)
@given(words=st.lists(WORDS, min_size=2, max_size=20, unique=True), pair=st.tuples(st.integers(0), st.integers(0)))
def test_two_swapped_words_change_it(words: list[int], pair: tuple[int, int]) -> None:
    i, j = (place % len(words) for place in pair)
    content = torch.tensor(words)
    swapped = content.clone()
    swapped[[i, j]] = content[[j, i]]
    assert (digest(swapped) == digest(content)) == (i == j)


def test_two_swapped_rows_change_it() -> None:
    words = random_bytes(3 * 8 * ROW).view(3, 8 * ROW)
    assert digest(words[[1, 0, 2]]) != digest(words)


@settings(max_examples=100, deadline=None)
@given(places=st.sets(st.integers(0, 63), min_size=1))
def test_flipped_signs_do_not_cancel(places: set[int]) -> None:
    """The sign of the second of two float32 is the top bit of a word, whose multiples of 2^63 would cancel in pairs."""
    values = torch.arange(1.0, 129.0)
    flipped = values.clone()
    for place in places:
        flipped[2 * place + 1] *= -1
    assert digest(flipped) != digest(values)


@settings(max_examples=100, deadline=None)
@given(data=st.binary(max_size=100))
def test_it_is_of_the_bytes_whatever_they_are_called(data: bytes) -> None:
    content = torch.tensor(list(data) + [0] * (-len(data) % 16), dtype=torch.uint8)
    expected = digest(content)
    for dtype in (torch.bfloat16, torch.float32, torch.int64):
        assert digest(content.view(dtype).view(-1, 2)) == expected


@pytest.mark.parametrize("offset", [1, 2, 8, 16])
def test_where_a_tensor_lies_in_its_buffer_does_not_matter(offset: int) -> None:
    """Parameters are views of a bucket; vLLM's own transport packs them without any alignment."""
    content = random_bytes(1001)
    buffer = torch.cat([random_bytes(offset, seed=1), content, random_bytes(5, seed=2)])
    assert digest(buffer[offset : offset + 1001]) == digest(content)


def test_a_transposed_matrix_is_another_one_and_is_read_in_its_own_order() -> None:
    matrix = torch.arange(12.0).view(3, 4)
    assert digest(matrix.T) != digest(matrix)
    assert digest(matrix.T) == digest(matrix.T.contiguous())


def test_it_is_the_sum_of_its_definition() -> None:
    """Words 1 and 2^32 and a tail of one byte: (1) odd_0 + (2^32 + 1) odd_1 + (7) odd_2, worked out in integers."""
    content = torch.cat([torch.tensor([1, 2**32]).view(torch.uint8), torch.tensor([7], dtype=torch.uint8)])
    row = odd(2**32)
    expected = (odd(0) + (2**32 + 1) * odd(1) + 7 * odd(2)) * row % 2**64
    assert digest(content) % 2**64 == expected


def odd(place: int) -> int:
    """splitmix64's output number `place` + 1 of the seed 0, made odd."""
    z = (place + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return (z ^ z >> 31) | 1


def test_splitmix64_is_the_published_one() -> None:
    assert odd(0) == 0xE220A8397B1DCDAF  # the first output of the reference implementation for seed 0 (odd already)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)])
def test_scalars_and_empty_tensors_have_one(shape: tuple[int, ...]) -> None:
    assert isinstance(digest(torch.zeros(shape)), int)
