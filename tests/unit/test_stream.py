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


def drawn(stream: ProblemStream, tickets: range) -> list[str]:
    return [stream.at(ticket).id for ticket in tickets]


@given(SIZES, SEEDS)
def test_every_epoch_visits_each_problem_once(size: int, seed: int) -> None:
    stream = ProblemStream(problems(size), seed)
    everything = sorted(problem.id for problem in problems(size))
    for epoch in range(3):
        assert sorted(drawn(stream, range(epoch * size, (epoch + 1) * size))) == everything


@given(SIZES, SEEDS, st.permutations(range(60)))
def test_a_ticket_has_its_problem_whenever_and_wherever_it_is_asked_for(size: int, seed: int, order: list[int]) -> None:
    expected = drawn(ProblemStream(problems(size), seed), range(60))
    stream = ProblemStream(problems(size), seed)
    assert [stream.at(ticket).id for ticket in order] == [expected[ticket] for ticket in order]


def test_epochs_and_seeds_have_different_orders() -> None:
    stream = ProblemStream(problems(50), seed=0)
    first, second = drawn(stream, range(50)), drawn(stream, range(50, 100))
    assert first != second
    assert drawn(ProblemStream(problems(50), seed=1), range(50)) not in (first, second)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="no problems"):
        ProblemStream([], seed=0)
