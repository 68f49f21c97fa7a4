"""The order of training problems."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.errors import DataError
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.types import Problem

SIZES = st.integers(1, 30)
SEEDS = st.integers(0, 2**32)


def problems(size: int) -> list[Problem]:
    return [Problem(f"train/{i}", {}) for i in range(size)]


def draw(stream: ProblemStream, count: int) -> list[str]:
    return [stream.next().id for _ in range(count)]


@given(SIZES, SEEDS)
def test_every_epoch_visits_each_problem_once(size: int, seed: int) -> None:
    stream = ProblemStream(problems(size), seed)
    everything = sorted(problem.id for problem in problems(size))
    for _ in range(3):
        assert sorted(draw(stream, size)) == everything


@given(SIZES, SEEDS, st.integers(0, 100))
def test_a_stream_resumed_from_a_cursor_continues_identically(size: int, seed: int, drawn: int) -> None:
    first = ProblemStream(problems(size), seed)
    draw(first, drawn)
    assert first.cursor == drawn
    resumed = ProblemStream(problems(size), seed)
    resumed.cursor = drawn
    assert draw(resumed, 40) == draw(first, 40)


def test_a_cursor_can_go_back() -> None:
    stream = ProblemStream(problems(7), seed=3)
    first = draw(stream, 20)
    stream.cursor = 0
    assert draw(stream, 20) == first


def test_epochs_and_seeds_have_different_orders() -> None:
    stream = ProblemStream(problems(50), seed=0)
    first, second = draw(stream, 50), draw(stream, 50)
    assert first != second
    assert draw(ProblemStream(problems(50), seed=1), 50) not in (first, second)


def test_an_empty_split_and_a_negative_cursor_are_refused() -> None:
    with pytest.raises(DataError, match="no problems"):
        ProblemStream([], seed=0)
    with pytest.raises(ValueError, match="cursor=-1"):
        ProblemStream(problems(1), seed=0).cursor = -1
