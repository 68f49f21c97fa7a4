"""The same call to all engines of a weight update, and what to make of those that fail."""

import asyncio
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any, Generic, TypeVar

from pipelinerl.concurrency import patience
from pipelinerl.errors import WeightSyncError, WorkerDied
from pipelinerl.weights.membership import Conduct, ReceivingEngine

T = TypeVar("T")
CAUSE_GRACE_S = 3.0  # how long the other members have to report after one has failed


class Broken(Exception):
    """An attempt that failed, by whosoever's fault. The trainer is well."""

    def __init__(self, cause: Exception):
        super().__init__(str(cause))
        self.cause = cause


class Calls(Generic[T]):
    """A call to each engine, running from the start on. Use it as a context: at its end none is running any more."""

    def __init__(self, engines: Sequence[ReceivingEngine], calls: Sequence[Coroutine[Any, Any, T]], conduct: Conduct):
        self._tasks = [asyncio.ensure_future(call) for call in calls]
        self._engines = engines
        self._conduct = conduct

    def __enter__(self) -> "Calls[T]":
        return self

    def __exit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()

    async def results(self, timeout_s: float, coupled: bool) -> list[T]:
        """All results, in order. Raises Broken, after the engines at fault have been reported.

        With `coupled` calls one that fails takes the others with it: they get a little time to say who died. Others
        are waited for.
        """
        with suppress(TimeoutError):
            async with patience(timeout_s):
                while pending := self._pending():
                    await asyncio.wait(pending, return_when=asyncio.FIRST_EXCEPTION)
                    if coupled and self._errors():
                        await asyncio.wait(self._tasks, timeout=CAUSE_GRACE_S)
                        break
        self.blame()
        if pending := self._pending():
            error = WeightSyncError(f"the weight update took more than weights.timeout_s={timeout_s:g} s")
            for task, engine in zip(self._tasks, self._engines, strict=True):
                if task in pending:
                    self._conduct.failed(engine, error)
            raise Broken(error)
        return [task.result() for task in self._tasks]

    async def grace(self) -> None:
        """The trainer failed in what it does with the engines: let them say why. Raises Broken when one did."""
        if pending := self._pending():
            await asyncio.wait(pending, timeout=CAUSE_GRACE_S)
        self.blame()

    def blame(self) -> None:
        """Report who is at fault, and raise Broken, when a call has failed.

        A dead process breaks the connection of its peers: where there are dead ones, the others are innocent.
        """
        errors = self._errors()
        dead = [pair for pair in errors if isinstance(pair[1], WorkerDied)]
        for engine, error in dead or errors:
            self._conduct.failed(engine, error)
        if errors:
            raise Broken((dead or errors)[0][1])

    def _pending(self) -> set[asyncio.Task[T]]:
        return {task for task in self._tasks if not task.done()}

    def _errors(self) -> list[tuple[ReceivingEngine, Exception]]:
        found: list[tuple[ReceivingEngine, Exception]] = []
        for engine, task in zip(self._engines, self._tasks, strict=True):
            if task.done() and not task.cancelled() and (error := task.exception()):
                if not isinstance(error, WeightSyncError | WorkerDied):
                    raise error  # a fault of ours
                found.append((engine, error))
        return found
