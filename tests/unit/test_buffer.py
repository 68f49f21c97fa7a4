"""The lag contract, under schedules chosen by hypothesis and worked out by hand."""

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.rollout.ledger import Ledger
from tests.unit.fakes import SECONDS, settle


@dataclass
class Case:
    groups_per_step: int
    max_lag: int
    every: int  # optimizer steps between updates
    steps: int
    drains: bool = False  # an update waits for what is being sampled
    streams: bool = False  # a step takes its groups as they become ready


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """In all three modes: sync is a lag of 0, one_step_off a lag of 1 that drains."""
    groups_per_step, steps, streams = draw(st.integers(1, 4)), draw(st.integers(1, 8)), draw(st.booleans())
    if draw(st.booleans()):
        return Case(groups_per_step, 1, 1, steps, drains=True, streams=streams)
    max_lag = draw(st.integers(0, 4))
    return Case(groups_per_step, max_lag, draw(st.integers(1, max_lag + 1)), steps, streams=streams)


@dataclass
class Simulation:
    """Engines, trainer and weight updates as three sources of events, of which the schedule picks one at a time."""

    case: Case
    buffer: GroupBuffer[int]
    version: int = 0  # that the engines serve
    admitted_at: dict[int, int] = field(default_factory=dict)  # ticket -> version then
    finished_at: dict[int, int] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_tickets: list[int] = field(default_factory=list)
    taken: list[list[int]] = field(default_factory=list)  # [step][group]
    stepping: bool = False
    may_finish_step: asyncio.Event = field(default_factory=asyncio.Event)

    async def admit(self) -> None:
        while True:
            ticket = await self.buffer.admit()
            self.admitted_at[ticket] = self.version
            self.running.add(ticket)

    async def train(self) -> None:
        for step in range(1, self.case.steps + 1):
            self.taken.append([] if self.case.streams else await self.buffer.take())
            while len(self.taken[-1]) < self.case.groups_per_step:
                ready = await self.buffer.take_ready()
                assert ready == sorted(ready)
                self.taken[-1] += ready
            self.taken[-1].sort()
            self.stepping = True
            await self.may_finish_step.wait()
            self.may_finish_step.clear()
            self.stepping = False
            if step % self.case.every == 0 or step == self.case.steps:
                if self.case.drains:
                    await self.buffer.drained()
                    assert not self.running
                self.version = step
                await self.buffer.published(step)

    async def play(self, random: Random) -> None:
        """One random event after the other until all steps are done. Any state in which nothing can happen fails."""
        drops_left = 20
        async with asyncio.timeout(SECONDS), asyncio.TaskGroup() as group:
            admitting, training = group.create_task(self.admit()), group.create_task(self.train())
            while True:
                await settle(8)
                self.check_admission()
                if training.done():
                    break
                events = ["finish"] * bool(self.running) + ["step"] * self.stepping
                assert events, f"deadlock after {len(self.taken)} steps"
                if random.choice(events) == "step":
                    self.may_finish_step.set()
                    continue
                ticket = random.choice(sorted(self.running))
                self.running.remove(ticket)
                self.finished_at[ticket] = self.version
                if drops_left and random.random() < 0.25:
                    drops_left -= 1
                    reason = random.choice(["errored", "filtered"])
                    self.dropped[reason] += 1
                    self.dropped_tickets.append(ticket)
                    await self.buffer.drop(ticket, reason)
                else:
                    await self.buffer.put(ticket, ticket)
            admitting.cancel()

    def check_admission(self) -> None:
        """As many groups as the bound allows and the run needs: not one more, and not one less."""
        case = self.case
        kept = len(self.admitted_at) - len(self.dropped_tickets)
        last_step = min(self.version + case.max_lag + 1, case.steps)
        assert kept == last_step * case.groups_per_step


@settings(deadline=None, max_examples=150)
@given(cases(), st.randoms(use_true_random=False))
def test_the_contract_holds_under_every_schedule(case: Case, random: Random) -> None:
    async def simulate() -> Simulation:
        simulation = Simulation(case, GroupBuffer(case.groups_per_step, case.max_lag, case.steps))
        await simulation.play(random)
        return simulation

    done = asyncio.run(simulate())
    assert [len(groups) for groups in done.taken] == [case.groups_per_step] * case.steps
    for trained_by, groups in enumerate(done.taken):  # the step that makes version v + 1 trains with version v
        oldest = min(done.admitted_at[ticket] for ticket in groups)
        assert 0 <= trained_by - oldest <= case.max_lag
        if case.drains:  # every completion is of one version, which is one step old from the second step on
            assert {done.admitted_at[ticket] for ticket in groups} == {max(0, trained_by - 1)}
            assert {done.finished_at[ticket] for ticket in groups} == {max(0, trained_by - 1)}
    in_order = [ticket for groups in done.taken for ticket in groups]
    assert in_order == sorted(in_order)
    assert sorted(in_order + done.dropped_tickets) == sorted(done.admitted_at)  # each taken once or dropped once
    assert done.buffer.dropped == done.dropped
    assert (done.buffer.running, done.buffer.ready) == (0, 0)


class Admissions:
    """Admits whatever the buffer allows, into `tickets`."""

    def __init__(self, buffer: GroupBuffer[str]) -> None:
        self.tickets: list[int] = []
        self._buffer = buffer
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            self.tickets.append(await self._buffer.admit())

    async def __aenter__(self) -> "Admissions":
        await settle()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()


async def test_without_lag_generation_and_training_alternate() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_lag=0, steps=3)
    async with Admissions(buffer) as admitted:
        for version in range(3):
            first = 2 * version
            assert admitted.tickets[first:] == [first, first + 1]
            await buffer.put(first, "a")
            await buffer.put(first + 1, "b")
            await settle()
            assert len(admitted.tickets) == first + 2  # finished, not yet trained on: nothing may start
            assert await buffer.take() == ["a", "b"]
            await settle()
            assert len(admitted.tickets) == first + 2  # trained on, not yet published
            await buffer.published(version + 1)
            await settle()
        assert len(admitted.tickets) == 6  # of 3 steps; the last update admits nothing


async def test_a_step_waits_for_its_oldest_group_however_many_younger_ones_are_ready() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_lag=1, steps=9)
    async with Admissions(buffer) as admitted:
        assert admitted.tickets == [0, 1, 2, 3]
        for ticket in (3, 1, 2):
            await buffer.put(ticket, f"group {ticket}")
        taking = asyncio.create_task(buffer.take())
        await settle()
        assert not taking.done()
        assert (buffer.running, buffer.ready) == (1, 3)
        await buffer.put(0, "group 0")
        assert await taking == ["group 0", "group 1"]
        assert (buffer.running, buffer.ready) == (0, 2)


async def test_a_dropped_group_is_counted_and_its_place_given_to_the_next() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_lag=0, steps=1)
    async with Admissions(buffer) as admitted:
        await buffer.put(1, "group 1")
        taking = asyncio.create_task(buffer.take())
        await buffer.drop(0, "errored")
        await settle()
        assert admitted.tickets == [0, 1, 2]
        await buffer.drop(2, "errored")
        await settle()
        await buffer.put(3, "group 3")
        assert await taking == ["group 1", "group 3"]
        assert buffer.dropped == {"errored": 2}


async def test_groups_that_a_step_is_certain_to_have_are_there_before_it_is_complete() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=3, max_lag=1, steps=9)
    async with Admissions(buffer) as admitted:
        assert admitted.tickets == [0, 1, 2, 3, 4, 5]
        taking = asyncio.create_task(buffer.take_ready())
        for ticket in (3, 4):  # of the step after it, so far
            await buffer.put(ticket, f"group {ticket}")
        await settle()
        assert not taking.done()
        await buffer.put(2, "group 2")  # whatever becomes of 0 and 1, it is among the first three
        assert await taking == ["group 2"]
        await buffer.drop(1, "errored")  # which moves 3 into the step
        await settle()
        assert admitted.tickets[-1] == 6  # one place was freed, and only one: what was taken still counts
        assert await buffer.take_ready() == ["group 3"]
        await buffer.put(0, "group 0")
        assert await buffer.take_ready() == ["group 0"]
        assert await buffer.take_ready() == ["group 4"]  # the step after it
        assert (buffer.running, buffer.ready) == (2, 0)
        with pytest.raises(AssertionError, match="take_ready has begun"):
            await buffer.take()


async def test_an_update_that_waits_for_generation_waits_for_refills_too() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=1, max_lag=1, steps=9)
    for ticket in (0, 1):
        assert await buffer.admit() == ticket
    await buffer.put(0, "group 0")
    await buffer.take()
    waiting = asyncio.create_task(buffer.drained())
    await settle()
    assert not waiting.done()
    await buffer.drop(1, "errored")  # nothing runs now, but its place is free
    await settle()
    assert not waiting.done()
    assert await buffer.admit() == 2
    await buffer.put(2, "group 2")
    await asyncio.wait_for(waiting, SECONDS)


async def test_an_operation_costs_the_same_with_many_groups_in_flight() -> None:
    async def seconds_each(in_flight: int) -> float:
        """Of one admission, one finished group and its share of a step, the least of a few."""
        buffer: GroupBuffer[int] = GroupBuffer(in_flight // 2, 1, 10**6)
        for _ in range(in_flight):
            await buffer.admit()
        times, done = [], 0
        for version in range(1, 1 + max(5, 500 // in_flight)):
            start = time.perf_counter()
            for _ in range(in_flight // 2):
                await buffer.put(done, done)
                done += 1
            buffer.ledger.trained(await buffer.take(), version)
            await buffer.published(version)
            for _ in range(in_flight // 2):
                await buffer.admit()
            times.append((time.perf_counter() - start) / (in_flight // 2))
        return min(times)

    few, many = await seconds_each(10), await seconds_each(10_000)
    assert many < 5 * few, (few, many)


async def test_a_resumed_buffer_admits_what_was_open_first_and_keeps_to_the_bound() -> None:
    before: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_lag=1, steps=4)
    async with Admissions(before) as admitted:
        assert admitted.tickets == [0, 1, 2, 3]
        for ticket in (0, 2, 3):
            await before.put(ticket, f"group {ticket}")
        await before.drop(1, "errored")
        assert await before.take() == ["group 0", "group 2"]
        before.ledger.trained([0, 2], 1)
        await before.published(1)
        await settle()
        assert admitted.tickets == [0, 1, 2, 3, 4, 5, 6]
        await before.put(5, "group 5")
    # Ticket 3 is generated, 4 and 6 run, 5 is generated: all are sampled again, and fill the places of steps 2 and 3.
    after: GroupBuffer[str] = GroupBuffer(2, 1, 4, version=1, ledger=Ledger.resumed(before.ledger.to_dict()))
    async with Admissions(after) as admitted:
        assert admitted.tickets == [3, 4, 5, 6]
        for ticket in (6, 5, 4, 3):
            await after.put(ticket, f"group {ticket}")
        assert await after.take() == ["group 3", "group 4"]
        await after.published(2)
        await settle()
        assert admitted.tickets == [3, 4, 5, 6, 7, 8]
        assert after.dropped == {"errored": 1}


async def test_a_waiter_that_is_cancelled_takes_nothing_with_it() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=1, max_lag=0, steps=2)
    assert await buffer.admit() == 0
    for waiting in (buffer.admit(), buffer.take()):
        task = asyncio.create_task(waiting)
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    await buffer.put(0, "group 0")
    assert await buffer.take() == ["group 0"]
    await buffer.published(1)
    assert await buffer.admit() == 1


async def test_what_may_not_happen_is_refused() -> None:
    buffer: GroupBuffer[str] = GroupBuffer(groups_per_step=2, max_lag=0, steps=2)
    await buffer.admit()
    await buffer.put(0, "group 0")
    with pytest.raises(AssertionError, match="put twice"):
        await buffer.put(0, "group 0")
    with pytest.raises(AssertionError, match="cannot be dropped"):
        await buffer.drop(0, "errored")
    await buffer.published(1)
    with pytest.raises(AssertionError, match="version 0 follows 1"):
        await buffer.published(0)
