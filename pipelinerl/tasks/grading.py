"""Grader processes: rewards are computed where a hang, a crash or a memory hog cannot hurt the run.

    grade() --- free graders (FIFO) ---> Grader (grader.py) --- JSON lines ---> grader_child.py

A scorer that takes too long is killed with its process and costs one `verifier_timeout`; one that raises or takes more
than `memory_mb` costs one `env_error`, and so does a process that ends by itself or is killed: another takes its place.
A scorer that always fails ends the run by `batch.max_dropped_groups_in_a_row`, with what it died of.
"""

import asyncio
import json
import math
from collections.abc import Mapping
from typing import Any

from pipelinerl.errors import Stalled, WorkerDied
from pipelinerl.tasks.base import Score
from pipelinerl.tasks.grader import START_TIMEOUT_S, BadReply, Grader, GraderDied
from pipelinerl.types import Outcome


class GraderPool:
    """`processes` graders that share a queue; `timeout_s` is per completion and does not count the wait in it;
    `memory_mb` is the address space of one, in MiB.

    Must be started and used on a thread that lives as long as the pool: the kernel ends the graders with the thread
    that started them. A scorer must not start processes of its own: only the grader itself is killed.
    """

    def __init__(self, processes: int, timeout_s: float, memory_mb: int = 2048) -> None:
        self._graders = [Grader(memory_mb) for _ in range(processes)]
        self._timeout_s = timeout_s
        self._free: asyncio.Queue[Grader] = asyncio.Queue()
        self._open = False

    @property
    def pids(self) -> tuple[int, ...]:
        """Process ids of the graders that are alive."""
        return tuple(grader.pid for grader in self._graders if grader.pid is not None)

    async def start(self) -> None:
        """Start all graders; returns when each has answered. Raises WorkerDied or Stalled, with none left alive."""
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await asyncio.gather(*(grader.start() for grader in self._graders))
        except TimeoutError:
            await self.close()
            raise Stalled(f"no grader process within {START_TIMEOUT_S:.0f} s; is the machine overloaded?") from None
        except BaseException:
            await self.close()
            raise
        for grader in self._graders:
            self._free.put_nowait(grader)
        self._open = True

    async def grade(self, scorer: str, kwargs: Mapping[str, Any]) -> Score:
        """Run `scorer` ("package.module:function") on `kwargs` (JSON) in a grader.

        A timeout, an exception, a dead grader or a reward that is no finite number is told by the score's outcome.
        Raises ConfigError when the scorer cannot be imported, WorkerDied when a grader does not start or the pool was
        closed.
        """
        try:
            request = json.dumps({"scorer": scorer, "kwargs": dict(kwargs)})
        except (TypeError, ValueError, RecursionError) as error:
            return _env_error(f"the arguments of {scorer} are not JSON: {error}")
        self._check_open()
        grader = await self._free.get()
        try:
            return await self._grade_on(grader, scorer, request)
        finally:
            self._free.put_nowait(grader)  # a dead one too: it starts when it is next used

    async def _grade_on(self, grader: Grader, scorer: str, request: str) -> Score:
        self._check_open()
        if grader.pid is None:  # it died while nobody used it
            await grader.stop()
        try:
            await grader.load(scorer)
            async with asyncio.timeout(self._timeout_s):
                return _score(scorer, await grader.call(request))
        except TimeoutError:
            await grader.stop()
            return Score(0.0, {}, Outcome.VERIFIER_TIMEOUT, f"{scorer} took more than {self._timeout_s:g} s")
        except BadReply as error:
            await grader.stop()
            return _env_error(f"{scorer} broke the grader's output: {error}")
        except GraderDied as error:
            self._check_open()  # else it was ended with the pool
            await grader.stop()
            return _env_error(f"{scorer}: {error}")
        except asyncio.CancelledError:
            grader.kill()  # its late reply must not be taken for the next one's
            raise

    async def close(self) -> None:
        """Kill and reap all graders; safe to call twice. Grades in flight raise WorkerDied."""
        self._open = False
        await asyncio.gather(*(grader.close() for grader in self._graders))

    def _check_open(self) -> None:
        if not self._open:
            raise WorkerDied("the grader pool is closed or was never started")


def _score(scorer: str, reply: Mapping[str, Any]) -> Score:
    if "error" in reply:
        return _env_error(f"{scorer} raised {reply['error']}")
    try:
        reward, parts = float(reply["reward"]), {str(name): float(part) for name, part in reply["parts"].items()}
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise BadReply(f"{type(error).__name__}: {error}") from error
    bad = [f"{name}={value}" for name, value in {"reward": reward, **parts}.items() if not math.isfinite(value)]
    if bad:
        return _env_error(f"{scorer} returned {', '.join(bad)}: not a finite number")
    return Score(reward, parts)


def _env_error(detail: str) -> Score:
    return Score(0.0, {}, Outcome.ENV_ERROR, detail)
