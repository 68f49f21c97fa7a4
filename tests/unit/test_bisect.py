"""Naming the block at which engine and trainer part, and finding the residual stream in the first place."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from pipelinerl.errors import EnvironmentProblem
from pipelinerl.parity.bisect import LayerCurve, locate
from pipelinerl.parity.residual_stream import ResidualStream
from pipelinerl.types import FloatArray


def streams(*differences: float) -> tuple[list[FloatArray], list[FloatArray]]:
    """An engine whose stream is off by these relative differences: the trainer's is (3, 4), of norm 5."""
    trainer = [np.array([[3.0], [4.0]], np.float32) for _ in differences]
    engine = [t + np.array([[5 * d], [0.0]], np.float32) for t, d in zip(trainer, differences, strict=True)]
    return engine, trainer


def curve(*differences: float, dtype: str = "float32", factor: float = 5.0) -> LayerCurve:
    return locate(*streams(*differences), dtype, factor)


def test_the_relative_difference_at_each_place() -> None:
    found = curve(0.0, 0.5, 1.0, 0.25)
    assert found.places == ("embedding", "block 0", "block 1", "final norm")
    assert found.differences == pytest.approx((0.0, 0.5, 1.0, 0.25))


@pytest.mark.parametrize(
    ("differences", "dtype", "where"),
    [
        ((0, 1e-6, 2e-6, 0.3, 0.4, 0.4), "float32", "block 2"),  # rounding until a block is wrong
        ((0, 1e-6, 0.3, 0.01, 0.9, 0.9), "float32", "block 1"),  # the first of two
        ((0.2, 0.2, 0.2, 0.2), "float32", "embedding"),
        ((0, 1e-7, 1e-7, 0.5), "float32", "final norm"),
        ((0, 3e-6, 9e-6, 2e-5, 4e-5, 8e-5), "float32", None),  # grows, and never at once
        ((0, 1e-7, 9e-6, 9e-6), "float32", None),  # 90 times more, and still rounding
        ((0, 4e-3, 2e-2, 2e-2), "bfloat16", None),  # the same in bfloat16
        ((0, 4e-3, 5e-2, 5e-2), "bfloat16", "block 1"),
        ((0, 4e-3, 5e-2, 5e-2), "float32", "block 0"),
        ((0, 0, 0, 0), "float32", None),
    ],
)
def test_the_first_jump_is_named(differences: tuple[float, ...], dtype: str, where: str | None) -> None:
    assert curve(*differences, dtype=dtype).where == where


def test_the_factor_is_that_of_the_place_before() -> None:
    assert curve(0, 1e-4, 4e-4, 4e-4, factor=3).where == "block 0"
    assert curve(1e-6, 1e-6, 4e-5, 4e-5, factor=50).where is None
    assert curve(1e-6, 1e-6, 4e-5, 4e-5, factor=30).where == "block 1"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_stream_that_is_not_finite_is_an_infinite_difference(value: float) -> None:
    engine, trainer = streams(0, 0, 0, 0)
    engine[2][0, 0] = value
    found = locate(engine, trainer, "float32")
    assert found.differences == (0, 0, math.inf, 0) and found.where == "block 1"


def test_a_stream_of_zeros_differs_infinitely_from_any_other() -> None:
    engine, trainer = streams(0, 0, 0)
    trainer[1][:] = 0
    assert locate(engine, trainer, "float32").where == "block 0"
    engine[1][:] = 0
    assert locate(engine, trainer, "float32").where is None


def test_one_line_says_where_and_by_how_much() -> None:
    assert curve(0, 1e-6, 0.25, 0.3).describe() == (
        "block 1: the difference is 2.5e-01, and 1.0e-06 before it (block 0)"
    )
    assert curve(0.5, 0.5, 0.5).describe() == "embedding: the difference is 5.0e-01, from the start"
    assert curve(0, 2e-6, 1e-6).describe() == "no place stands out: the difference is at most 2.0e-06 (block 0)"


class Plain(nn.Module):
    """A block as in transformers: stream in, stream out."""

    def forward(self, stream: Tensor) -> Tensor:
        return stream * 2


class Fused(nn.Module):
    """A block as in vLLM: positions first, the residual apart, and the residual that comes in overwritten."""

    def forward(self, positions: Tensor, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        assert not positions.is_floating_point()
        stream = hidden if residual is None else residual.add_(hidden)
        return stream.clone(), stream


class PlainModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Plain(), Plain()])

    def forward(self, stream: Tensor) -> tuple[Tensor, str]:
        for layer in self.layers:
            stream = layer(stream[None])[0]
        return stream + 1, "cache"


class FusedModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList([Fused(), Fused()])

    def forward(self, stream: Tensor) -> Tensor:
        residual = None
        for layer in self.inner.layers:
            stream, residual = layer(torch.arange(len(stream)), stream, residual)
        return stream + residual + 1


@pytest.mark.parametrize("model", [PlainModel(), FusedModel()], ids=["plain", "fused"])
@pytest.mark.parametrize("chunks", [1, 2])
def test_the_stream_is_recorded_in_models_of_both_kinds(model: nn.Module, chunks: int) -> None:
    """Each block doubles the stream and the norm adds 1; a prefill in two chunks is joined."""
    start = torch.tensor([[1.0, -2.0], [0.5, 3.0]])
    recorder = ResidualStream(model)
    for part in start.clone().chunk(chunks):
        model(part)
    recorded = recorder.take()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for found, expected in zip(recorded, [start, 2 * start, 4 * start, 4 * start + 1], strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_a_model_without_one_list_of_layers_is_refused() -> None:
    with pytest.raises(EnvironmentProblem, match="Linear should have one list of blocks named `layers` and has none"):
        ResidualStream(nn.Linear(2, 2))
    both = nn.ModuleDict({"text": PlainModel(), "vision": PlainModel()})
    with pytest.raises(EnvironmentProblem, match=r"has text.layers, vision.layers"):
        ResidualStream(both)
