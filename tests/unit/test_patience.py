"""A driver that was stopped for a while holds nobody else responsible for the time."""

import asyncio
import time
from pathlib import Path
from typing import Any

import pytest

from pipelinerl import concurrency, loop
from pipelinerl.concurrency import nap, patience
from pipelinerl.weights.calls import Calls
from pipelinerl.weights.membership import Conduct, FixedMembers
from tests.unit.fakes import fake_run, settle, until
from tests.unit.test_loop import STALL_SOON, training

STOPPED_S = 0.8  # longer than any limit here


@pytest.fixture(autouse=True)
def notices_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concurrency, "STOOD_STILL_S", 0.3)


def stop_driver() -> None:
    """As SIGSTOP and SIGCONT: nothing runs here meanwhile, and all timers are late."""
    time.sleep(STOPPED_S)


async def answered_meanwhile() -> str:
    """An answer that comes while the driver is stopped, and is read a little later, as Ray's thread would."""
    await asyncio.sleep(0.01)
    stop_driver()
    await asyncio.sleep(0.05)
    return "answer"


async def test_an_answer_that_came_while_the_driver_was_stopped_is_not_late() -> None:
    async with patience(0.2):
        assert await answered_meanwhile() == "answer"


async def test_who_is_silent_while_the_driver_runs_is_late_whether_it_was_stopped_before_or_not() -> None:
    for before in (lambda: None, stop_driver):
        begin = time.monotonic()
        with pytest.raises(TimeoutError):
            async with patience(0.2):
                await asyncio.sleep(0.01)
                before()
                begin = time.monotonic()
                await asyncio.Event().wait()
        assert 0.15 < time.monotonic() - begin < 5


async def test_a_busy_driver_has_its_limits_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks that are a little late count all the same; else a loop that is always late would wait for ever."""
    monkeypatch.setattr(concurrency, "LOOK_S", 0.01)

    async def busy() -> None:
        while True:
            time.sleep(0.02)
            await asyncio.sleep(0)

    with pytest.raises(TimeoutError):
        async with patience(0.1):
            await busy()


async def test_no_limit_is_no_limit_and_what_ends_in_time_leaves_nothing_running() -> None:
    before = asyncio.all_tasks()
    for limit in (None, 60.0):
        async with patience(limit):
            await asyncio.sleep(0.01)
    await settle()
    assert asyncio.all_tasks() == before


async def test_a_nap_tells_for_how_long_the_driver_stood_still() -> None:
    assert await nap(0.01) == 0
    asyncio.get_running_loop().call_soon(stop_driver)
    assert STOPPED_S - 0.1 < await nap(0.05) < STOPPED_S + 5


async def test_the_watchdog_of_a_run_does_not_count_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "WATCH_INTERVAL_S", 0.01)
    run = fake_run(tmp_path, *STALL_SOON, "cluster.stall_timeout_s=0.5")
    run.fleet.gate.close()
    async with training(run) as task:
        await until(lambda: run.fleet.gate.arrived > 0)
        stop_driver()
        await asyncio.sleep(0.1)  # the watchdog looks, and then the groups finish
        run.fleet.gate.open()
        await task


async def test_a_weight_update_does_not_count_it() -> None:
    engine: Any = "engine 0"
    members = FixedMembers([engine])
    with Calls([engine], [answered_meanwhile()], Conduct(members)) as running:
        assert await running.results(0.2, coupled=False) == ["answer"]
    assert members.errors == []
