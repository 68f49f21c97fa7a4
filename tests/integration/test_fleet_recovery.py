"""Engines and trainer ranks that die, hang and come back: the fleet's part of it, on fake processes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.cluster.engine_handle import TRANSITIONS, EngineState
from pipelinerl.cluster.fleet import Fleet
from pipelinerl.cluster.trainer_group import TrainerGroup
from pipelinerl.concurrency import background
from pipelinerl.config.schema import TrainerConfig
from pipelinerl.errors import EnvironmentProblem, PipelineRLError, Stalled, TrainerLost, WorkerDied, WorkerFailed
from pipelinerl.types import FleetEvent, Outcome, RankBatch, StepResult
from tests.integration.test_fleet import PROBLEM, FakeWorker, fleet_with
from tests.unit.fakes import settle, until

HANGS_SOON = "engine.hang_timeout_s=0.1"


def open_worker(answer: Any = None) -> FakeWorker:
    """A process whose groups finish at once."""
    worker = FakeWorker(answer or (lambda _: {}))
    worker.held.set()
    return worker


@asynccontextmanager
async def supervised(fleet: Fleet) -> AsyncIterator[list[FleetEvent]]:
    """Its events, while it is watched."""
    events: list[FleetEvent] = []
    fleet.listener = events.append
    async with background(fleet.supervise()):
        yield events


def kinds(events: list[FleetEvent]) -> list[tuple[str, int]]:
    return [(event.kind, event.engine) for event in events]


async def test_the_groups_of_a_dead_engine_go_to_another_and_it_comes_back_through_an_update() -> None:
    first, second, other = FakeWorker(), open_worker(), open_worker()
    fleet = await fleet_with([[first, second], [other]])
    async with supervised(fleet) as events:
        tasks = [asyncio.create_task(fleet.rollout(i, PROBLEM)) for i in range(2)]
        await settle()
        assert first.groups == [0]
        first.kill()
        assert [payload for _, payload in await asyncio.gather(*tasks)] == ["payload 0", "payload 1"]
        assert other.groups == [1, 0]
        await until(lambda: fleet.engines[0].state is EngineState.STALE)
        assert second.calls[0] == ("sweep", ("its children",)), "what the dead process left is ended first"
        for group_id in range(2, 6):
            await fleet.rollout(group_id, PROBLEM)
        assert second.groups == [], "it has the weights of model.path"
        await fleet.stale()
        assert [member.engine for member in fleet.members()] == fleet.engines
        fleet.refitted(fleet.engines[0].member, 7)
        await fleet.rollout(6, PROBLEM)
        assert second.groups == [6]
    assert kinds(events) == [("lost", 0), ("requeued", 0), ("restarted", 0), ("healthy", 0)]
    assert events[1].group_id == 0
    assert fleet.metrics() == {"fleet/engines": 2.0, "fleet/restarts": 1.0, "fleet/requeued": 1.0}


async def test_an_engine_that_stops_answering_is_suspect_then_dead_though_its_process_lives() -> None:
    stopped = asyncio.Event()
    hung = FakeWorker(lambda method: stopped if method == "heartbeat" else {})
    fleet = await fleet_with([[hung, open_worker()], [open_worker()]], HANGS_SOON)
    task = asyncio.create_task(fleet.rollout(0, PROBLEM))
    await settle()
    async with supervised(fleet) as events:
        await until(lambda: fleet.engines[0].state is EngineState.SUSPECT)
        await fleet.rollout(1, PROBLEM)
        assert hung.groups == [0], "no new work for a suspect"
        await task  # by the other engine
        assert hung.killed
        await until(lambda: fleet.engines[0].state is EngineState.STALE)
    assert kinds(events) == [("suspect", 0), ("lost", 0), ("requeued", 0), ("restarted", 0)]
    assert "engine.hang_timeout_s=0.1 s" in events[1].text


@pytest.mark.parametrize("update_meanwhile", [False, True])
async def test_a_suspect_that_answers_again_serves_again_unless_it_missed_an_update(update_meanwhile: bool) -> None:
    busy = asyncio.Event()
    worker = open_worker(lambda method: busy if method == "heartbeat" else {})
    fleet = await fleet_with([[worker], [open_worker()]], "engine.hang_timeout_s=2")
    fleet.engines[0].become(EngineState.SUSPECT)
    if update_meanwhile:
        assert [member.engine for member in fleet.members()] == [fleet.engines[1]]
    async with supervised(fleet):
        await settle()
        busy.set()
        await until(lambda: fleet.engines[0].state is not EngineState.SUSPECT)
    assert fleet.engines[0].state is (EngineState.STALE if update_meanwhile else EngineState.HEALTHY)
    assert not worker.killed


async def test_an_engine_that_keeps_dying_is_retired_and_the_run_goes_on_with_the_rest() -> None:
    def broken() -> FakeWorker:
        return FakeWorker(lambda method: WorkerFailed("no model") if method == "start" else {})

    dying = open_worker()
    fleet = await fleet_with([[dying, broken(), broken()], [open_worker()]], "engine.max_restarts=2")
    fleet_backoff(fleet)
    async with supervised(fleet) as events:
        dying.kill()
        await until(lambda: fleet.engines[0].state is EngineState.RETIRED)
        await fleet.rollout(0, PROBLEM)
        assert [member.engine for member in fleet.members()] == [fleet.engines[1]]
    assert [kind for kind, _ in kinds(events)] == ["lost", "lost", "lost", "retired"]


async def test_with_too_few_engines_left_the_run_ends() -> None:
    dying = open_worker()
    fleet = await fleet_with([[dying]], "engine.max_restarts=0")
    waiting = asyncio.create_task(fleet.rollout(0, PROBLEM))
    with pytest.raises(WorkerDied, match=r"0 of 1 engines are left and engine\.min_count=1 are needed"):
        async with supervised(fleet):
            dying.kill()
            await asyncio.sleep(5)
    waiting.cancel()


async def test_a_group_that_every_engine_dies_of_is_counted_as_errored() -> None:
    fleet = await fleet_with([[FakeWorker() for _ in range(3)]], "engine.max_requeues=1")
    deadly = 13

    async def die() -> None:  # whichever process gets the group is killed by it
        while True:
            await asyncio.sleep(0.001)
            worker: Any = fleet.engines[0].worker
            if deadly in worker.groups and not worker.killed:
                worker.kill()
            if fleet.engines[0].state is EngineState.STALE:
                fleet.refitted(fleet.engines[0].member, 1)

    async with supervised(fleet), background(die()):
        meta, _ = await fleet.rollout(deadly, PROBLEM)
    assert [rollout.outcome for rollout in meta.rollouts] == [Outcome.INFRA_ABORT] * 2
    assert meta.scored == 0 and "2 engines died while they worked on train/0" in meta.rollouts[0].detail


async def test_after_abandoning_no_engine_serves_before_the_next_update() -> None:
    worker = open_worker()
    fleet = await fleet_with([[worker]])
    await fleet.abandon()
    assert worker.calls[-1] == ("abandon", ())
    waiting = asyncio.create_task(fleet.rollout(0, PROBLEM))
    await settle()
    assert worker.groups == []
    fleet.refitted(fleet.engines[0].member, 3)
    await waiting
    assert worker.groups == [0]


@given(st.lists(st.sampled_from(list(EngineState)), max_size=40))
def test_from_dead_to_healthy_there_is_no_way_but_through_stale(wishes: list[EngineState]) -> None:
    """Over every walk that the transitions allow."""
    state, stale_since_death = EngineState.RESTARTING, False
    for wish in wishes:
        if wish not in TRANSITIONS[state]:
            continue
        state = wish
        if state in (EngineState.DEAD, EngineState.RESTARTING):
            stale_since_death = False
        stale_since_death |= state is EngineState.STALE
        assert stale_since_death or state is not EngineState.HEALTHY


def fleet_backoff(fleet: Fleet) -> None:
    """No waiting between restarts."""
    import pipelinerl.cluster.fleet as module

    module.MAX_BACKOFF_S = 0.0


# The trainer's ranks


def group_of(*lives: list[FakeWorker] | PipelineRLError, **settings: Any) -> TrainerGroup:
    """Ranks that are started in turns: `lives[i]` are the ranks of the i-th start, or what it raises."""
    starts = iter(lives)

    async def launch() -> list[Any]:
        life = next(starts)
        if isinstance(life, PipelineRLError):
            raise life
        return life

    ranks = max(len(life) for life in lives if isinstance(life, list))
    return TrainerGroup(launch, TrainerConfig(ranks=ranks, pulse_s=0.01, **settings))


NOTHING = [[RankBatch(((),)), RankBatch(((),))]]


async def test_when_a_rank_dies_its_peers_complaint_is_not_taken_for_the_cause() -> None:
    complaining = FakeWorker(lambda method: WorkerFailed("rank 0: connection closed") if method == "step" else {})
    dead = FakeWorker(lambda method: WorkerDied("rank 1: its process died") if method == "step" else {})
    group = group_of([complaining, dead])
    await group.setup()
    with pytest.raises(TrainerLost, match="rank 1: its process died"):
        await group.step(NOTHING, [])
    assert complaining.killed and dead.killed, "half a group is of no use"
    with pytest.raises(TrainerLost, match="rank 1: its process died"):
        await group.step(NOTHING, [])


async def test_a_fault_of_the_code_is_no_loss_for_a_restart_would_repeat_it() -> None:
    group = group_of([FakeWorker(lambda method: WorkerFailed("a bug") if method == "step" else {}), FakeWorker()])
    await group.setup()
    with pytest.raises(WorkerFailed, match="a bug"):
        await group.step(NOTHING, [])


async def test_a_rank_without_a_pulse_ends_the_step_that_waits_for_it() -> None:
    never = asyncio.Event()
    hung = FakeWorker(lambda method: never if method in ("pulse", "step") else {})
    again = [FakeWorker(lambda _: StepResult(1, {}, True)) for _ in range(2)]
    group = group_of([FakeWorker(lambda _: {}), hung], again, hang_timeout_s=0.05, step_timeout_s=0.3)
    await group.setup()
    async with background(group.supervise()):
        with pytest.raises(TrainerLost):
            await group.step(NOTHING, [])
        assert hung.killed
        for worker in again:
            worker.answer = lambda method: {} if method != "step" else StepResult(1, {}, True)
        await group.restart()
        assert (await group.step(NOTHING, [])).version == 1
        await asyncio.sleep(0.05)
        assert not again[0].killed
    assert group.restarts == 1


async def test_a_restart_that_finds_no_room_is_a_loss_and_so_is_tried_again() -> None:
    lost, again = FakeWorker(lambda method: WorkerDied("rank 0 died") if method == "step" else {}), FakeWorker()
    group = group_of([lost], EnvironmentProblem("no room"), Stalled("took too long"), [again])
    await group.setup()
    for why in ("no room", "took too long"):
        with pytest.raises(TrainerLost, match=why):
            await group.restart()
    await group.restart()
    assert group.restarts == 3 and [method for method, _ in again.calls] == ["setup"]
    first = group_of(EnvironmentProblem("no room"), [again])
    with pytest.raises(EnvironmentProblem, match="no room"):
        await first.setup()


async def test_a_stall_of_a_step_is_a_loss() -> None:
    group = group_of(
        [FakeWorker(lambda method: Stalled("rank 0: step took more than 1 s") if method == "step" else {})]
    )
    await group.setup()
    with pytest.raises(TrainerLost, match="step took more than 1 s"):
        await group.step([[RankBatch(((),))]], [])
