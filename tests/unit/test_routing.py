"""Routing agrees with the plain minimum over the enabled engines, and waits while there is none."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.cluster.routing import STALE_SHARE, LeastLoaded
from tests.unit.fakes import settle, until

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["acquire", "acquire", "acquire", "release", "enable", "disable", "add", "remove"]),
        st.integers(0, 7),
    ),
    max_size=200,
)


@given(engines=st.integers(0, 5), calls=CALLS)
async def test_it_is_the_plain_minimum(engines: int, calls: list[tuple[str, int]]) -> None:
    routing = LeastLoaded(engines)
    loads, enabled = dict.fromkeys(range(engines), 0), set(range(engines))
    for call, engine in calls:
        if call == "acquire" and enabled:
            expected = min(enabled, key=lambda candidate: (loads[candidate], candidate))
            assert await routing.acquire() == expected
            loads[expected] += 1
        elif call == "release" and loads.get(engine):
            routing.release(engine)
            loads[engine] -= 1
        elif call == "add" and engine not in loads:
            routing.add(engine)
            loads[engine] = 0
            enabled.add(engine)
        elif call == "remove" and loads.get(engine) == 0:
            routing.remove(engine)
            del loads[engine]
            enabled.discard(engine)
        elif call in ("enable", "disable") and engine in loads:
            getattr(routing, call)(engine)
            (enabled.add if call == "enable" else enabled.discard)(engine)
        assert routing.in_flight == sum(loads.values())
        assert routing.enabled == len(enabled)
        assert {each: routing.load(each) for each in loads} == loads
        assert len(routing._heap) <= STALE_SHARE * max(len(loads), 5 + 8) + 1  # stale entries do not pile up


async def test_equal_loads_go_in_order_of_number() -> None:
    routing = LeastLoaded(3)
    assert [await routing.acquire() for _ in range(5)] == [0, 1, 2, 0, 1]
    routing.release(1)
    assert await routing.acquire() == 1  # one in flight, as engine 2, and the lower number


async def test_a_group_waits_for_an_engine_in_the_order_of_asking() -> None:
    routing = LeastLoaded(1)
    routing.disable(0)
    order: list[int] = []

    async def ask(number: int) -> None:
        await routing.acquire()
        order.append(number)

    tasks = [asyncio.create_task(ask(number)) for number in range(4)]
    await settle()
    assert order == [] and routing.in_flight == 0
    tasks.pop(1).cancel()
    await settle()
    routing.add(5)
    await until(lambda: all(task.done() for task in tasks))
    assert order == [0, 2, 3] and routing.load(5) == 3 and routing.load(0) == 0


async def test_an_engine_that_is_gone_before_the_waiter_runs_gets_nothing() -> None:
    routing = LeastLoaded(0)
    task = asyncio.create_task(routing.acquire())
    await settle()
    routing.add(0)
    routing.disable(0)  # before the waiter has its turn
    await settle()
    assert not task.done() and routing.in_flight == 0
    routing.enable(0)
    assert await task == 0


async def test_groups_in_flight_stay_the_load_of_a_disabled_engine() -> None:
    routing = LeastLoaded(2)
    assert [await routing.acquire() for _ in range(4)] == [0, 1, 0, 1]
    routing.disable(0)
    assert [await routing.acquire() for _ in range(2)] == [1, 1]
    routing.release(0)
    routing.enable(0)  # with one in flight against four
    assert [await routing.acquire() for _ in range(4)] == [0, 0, 0, 0]


MISUSES: dict[str, Any] = {
    "a release without a group": lambda routing: routing.release(1),
    "a second engine of the same number": lambda routing: routing.add(1),
    "an unknown engine is disabled": lambda routing: routing.disable(7),
    "an engine with a group in flight is removed": lambda routing: routing.remove(0),
}


@pytest.mark.parametrize("misuse", MISUSES.values(), ids=MISUSES.keys())
async def test_misuse_is_an_assertion(misuse: Any) -> None:
    routing = LeastLoaded(2)
    await routing.acquire()  # engine 0
    with pytest.raises(AssertionError):
        misuse(routing)
