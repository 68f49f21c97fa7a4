"""Structured concurrency whose errors arrive as they were raised, not wrapped in an ExceptionGroup."""

import asyncio
import math
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipelinerl.errors import first_error

LOOK_S = 1.0  # between two looks at the clock, at most
STOOD_STILL_S = 1.0  # a look that is so late is that of a process that was stopped, not of a busy one


@dataclass
class Ending:
    """A wish that the work end at its next good moment, and the seconds it has for that before it is cancelled."""

    patience_s: float = 0.0  # 0: there is no good moment to wait for
    wished: bool = False
    exit_code: int | None = None  # of the signal that came, if one did


@asynccontextmanager
async def background(*loops: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run `loops` beside the body. An error of one ends the body, the end of the body ends them all."""
    async with _task_group() as group:
        tasks = [group.create_task(loop) for loop in loops]
        yield
        for task in tasks:
            task.cancel()


async def together(*parts: Coroutine[Any, Any, Any]) -> list[Any]:
    """The results of all parts, in order. Unlike `gather`, leaves no part running when one fails."""
    async with _task_group() as group:
        tasks = [group.create_task(part) for part in parts]
    return [task.result() for task in tasks]


def raised(tasks: Iterable[asyncio.Task[Any]]) -> list[BaseException]:
    """What the finished ones among the tasks raised, in the order of the tasks."""
    return [error for task in tasks if task.done() and not task.cancelled() and (error := task.exception())]


@asynccontextmanager
async def patience(seconds: float | None) -> AsyncIterator[None]:
    """As `asyncio.timeout`, of the time in which this process ran: when it was stopped meanwhile, it was not the others
    who were silent, and their answers may lie here unread."""
    looks = 0 if seconds is None else max(1, math.ceil(seconds / LOOK_S))

    async def count() -> None:
        left = looks
        while left:
            left -= 0 if await nap((seconds or 0.0) / looks) else 1
        limit.reschedule(asyncio.get_running_loop().time())

    async with asyncio.timeout(None) as limit:
        counting = asyncio.create_task(count()) if looks else None
        try:
            yield
        finally:
            if counting is not None:
                counting.cancel()


async def nap(seconds: float) -> float:
    """Sleep. Returns for how much longer than that this process stood still; 0 when it was only busy."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds
    await asyncio.sleep(seconds)
    late = loop.time() - due
    return late if late >= STOOD_STILL_S else 0.0


@asynccontextmanager
async def _task_group() -> AsyncIterator[asyncio.TaskGroup]:
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
