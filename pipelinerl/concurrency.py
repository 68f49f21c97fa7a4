"""Structured concurrency whose errors arrive as they were raised, not wrapped in an ExceptionGroup."""

import asyncio
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from pipelinerl.errors import first_error


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
async def _task_group() -> AsyncIterator[asyncio.TaskGroup]:
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except BaseExceptionGroup as errors:
        error = first_error(errors)
        raise error from error.__cause__
