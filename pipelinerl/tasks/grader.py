"""One grader process as its parent sees it: start, load a scorer, call, kill, reap."""

import asyncio
import json
import os
import signal
import sys
from typing import Any

from pipelinerl.errors import ConfigError, Stalled, WorkerDied

START_TIMEOUT_S = 60.0  # for the interpreter to start, and again for a scorer's module to be imported
MAX_REPLY = 1 << 20  # bytes
PASSED_ON = ("PATH", "LANG", "LC_ALL", "TZ", "TMPDIR", "LD_LIBRARY_PATH")


class GraderDied(WorkerDied):
    """The process ended by itself, or was killed by somebody else, while it was asked for a verdict."""


class BadReply(Exception):
    """The grader wrote something that is not a reply."""


class Grader:
    """One grader process at a time, one request at a time. A stopped one starts anew when it is next used.

    `memory_mb` bounds its address space, in MiB: what a scorer allocates beyond raises MemoryError there.
    """

    def __init__(self, memory_mb: int) -> None:
        self._memory_mb = memory_mb
        self._process: asyncio.subprocess.Process | None = None
        self._killed: asyncio.subprocess.Process | None = None  # not yet reaped
        self._loaded: set[str] = set()
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def start(self) -> None:
        """Start the process and wait until it answers."""
        await self._reap()
        self._loaded.clear()
        limits = [str(os.getpid()), str(self._memory_mb << 20)]
        command = [sys.executable, "-P", "-m", "pipelinerl.tasks.grader_child", *limits]
        pipe = asyncio.subprocess.PIPE
        self._process = await asyncio.create_subprocess_exec(
            *command, stdin=pipe, stdout=pipe, env=_environment(), limit=MAX_REPLY
        )
        if self._closed:  # while the process was being made
            await self.stop()
        try:
            await self._reply()
        except BadReply as error:
            raise WorkerDied(
                f"a grader process wrote on stdout before it was ready ({error}): something prints when Python starts, "
                "such as sitecustomize or a .pth file"
            ) from error

    async def load(self, scorer: str) -> None:
        """Import `scorer` before its first use, so that a slow import is not counted as a slow verdict."""
        if self._process is not None and scorer in self._loaded:
            return
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                if self._process is None:
                    await self.start()
                reply = await self.call(json.dumps({"load": scorer}))
        except TimeoutError:
            await self.stop()
            raise Stalled(f"scorer {scorer!r} was not imported within {START_TIMEOUT_S:.0f} s") from None
        if "unloadable" in reply:
            raise ConfigError(
                f"scorer {scorer!r} cannot be loaded: {reply['unloadable']}; "
                "write package.module:function, with the package on PYTHONPATH or installed"
            )
        self._loaded.add(scorer)

    async def call(self, request: str) -> dict[str, Any]:
        """Send one JSON line and wait for the reply."""
        pipe = self._alive().stdin
        assert pipe is not None
        try:
            pipe.write(request.encode() + b"\n")
            await pipe.drain()
        except (BrokenPipeError, ConnectionResetError, RuntimeError):  # RuntimeError: uvloop, which Ray's actors run on
            raise await self._death() from None
        return await self._reply()

    async def _reply(self) -> dict[str, Any]:
        pipe = self._alive().stdout
        assert pipe is not None
        try:
            line = await pipe.readline()
            reply = json.loads(line) if line.endswith(b"\n") else None
        except (ValueError, RecursionError) as error:  # not JSON, not UTF-8, or longer than MAX_REPLY
            raise BadReply(str(error)) from error
        if not line.endswith(b"\n"):
            raise await self._death()
        if not isinstance(reply, dict):
            raise BadReply(f"a {type(reply).__name__}")
        return reply

    def _alive(self) -> asyncio.subprocess.Process:
        if self._process is None:
            raise WorkerDied("the grader pool was closed while it graded")
        return self._process

    async def _death(self) -> GraderDied:
        """Why the pipe broke."""
        process = self._alive()
        try:
            async with asyncio.timeout(5.0):
                code = await process.wait()
        except TimeoutError:  # it lives, but closed its pipe
            process.kill()
            code = await process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return GraderDied(
            f"grader process {process.pid} {how} (a scorer may have made it exit, or the machine ran out of memory)"
        )

    def kill(self) -> None:
        """End the process without waiting."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            self._process, self._killed = None, self._process

    async def stop(self) -> None:
        """End and reap the process."""
        self.kill()
        await self._reap()

    async def close(self) -> None:
        """End and reap the process for good."""
        self._closed = True
        await self.stop()

    async def _reap(self) -> None:
        if self._killed is not None:
            await self._killed.wait()


def _environment() -> dict[str, str]:
    """What a grader sees: no secrets, the parent's import path, one thread per numeric library."""
    passed = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    return passed | {"PYTHONPATH": path, "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
