"""Reports of a run that hangs: when a watchdog ends it, and on SIGUSR1 while it goes on.

kill -USR1 PID          of `pipelinerl train`: a report in <run_dir>/hang_report/, and the run goes on
"""

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from pipelinerl.cluster.fleet import Fleet
from pipelinerl.cluster.hang_report import write_hang_report
from pipelinerl.cluster.waiting import open_calls
from pipelinerl.errors import Stalled, first_line
from pipelinerl.stacks import FOLDER, answer_stack_requests
from pipelinerl.training.state import Run


class HangReports:
    """Writes the reports of one run directory. `run` is what trains, once something does."""

    def __init__(self, run_dir: Path, tell: Callable[[str], None]):
        self.run: Run | None = None
        self.fleet: Fleet | None = None
        self._run_dir = run_dir
        self._tell = tell
        self._tasks: set[asyncio.Task[None]] = set()

    @contextmanager
    def on_signal(self) -> Iterator[None]:
        """Write a report whenever SIGUSR1 arrives. The driver's own stacks are in it."""
        answer_stack_requests(self._run_dir / "logs" / FOLDER, "driver")
        loop = asyncio.get_running_loop()

        def begin() -> None:
            task = asyncio.create_task(self.write("asked for by SIGUSR1"))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        loop.add_signal_handler(signal.SIGUSR1, begin)
        try:
            yield
        finally:
            loop.add_signal_handler(signal.SIGUSR1, lambda: None)  # without a handler it would end the clean-up

    @asynccontextmanager
    async def on_stall(self) -> AsyncIterator[None]:
        """Write a report when the body ends with Stalled; the processes that hang must be there still."""
        try:
            yield
        except Stalled as error:
            await self.write(first_line(error))
            raise

    async def write(self, why: str) -> None:
        """Write a report. A disk that takes none must not hide why the run ends."""
        facts = {"why": why, **self._facts()}
        try:
            target = await asyncio.to_thread(write_hang_report, self._run_dir, facts)
        except OSError as error:
            self._tell(f"no hang report: {error}")
        else:
            self._tell(f"hang report ({why}): {target}")

    def _facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = {"open_calls": open_calls()}
        if self.fleet is not None:
            facts["engines"] = self.fleet.describe()
        if (run := self.run) is not None:
            version, at = run.last_update
            now = time.monotonic()
            facts |= {
                "trainer_version": run.version,
                "last_step": run.buffer.ledger.last_step,
                "seconds_without_progress": round(now - run.last_progress, 1),
                "last_weight_update": {"version": version, "seconds_ago": round(now - at, 1)},
                "groups_running": run.buffer.running,
                "groups_ready": run.buffer.ready,
                "dropped_in_a_row": dict(run.dropped_in_a_row),
            }
        return facts
