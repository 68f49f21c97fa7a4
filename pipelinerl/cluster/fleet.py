"""The rollout workers as one fleet: each group goes to the worker with the fewest groups in flight."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import RunConfig
from pipelinerl.types import GroupMeta, Problem


class EngineHandle:
    """One rollout worker and its load."""

    def __init__(self, worker: RemoteWorker, config: RunConfig):
        self._worker = worker
        self._config = config
        self.in_flight = 0

    async def start(self) -> dict[str, Any]:
        return dict(await self._worker.call("start", timeout_s=self._config.engine.start_timeout_s))

    async def locate(self, segment: dict[str, Any] | None) -> list[str]:
        return list(await self._worker.call("locate", segment))

    async def connect(self, init_info: dict[str, Any]) -> None:
        await self._worker.call("connect", init_info)

    async def disconnect(self) -> None:
        await self._worker.call("disconnect")

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        return dict(await self._worker.call("update_weights", update_info, version))

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]:
        return dict(await self._worker.call("commit", version, names, digests))

    async def group(self, method: str, group_id: int, problem: Problem, *args: Any) -> tuple[GroupMeta, Any]:
        return await self._worker.call_pair(method, group_id, problem, *args)

    async def hidden_states(self, tokens: list[int]) -> Any:
        """Hidden states of the engine, place by place; see RolloutWorker.hidden_states."""
        return await self._worker.call("hidden_states", tokens, timeout_s=self._config.engine.start_timeout_s)

    async def check_health(self) -> int:
        return int(await self._worker.call("check_health", timeout_s=self._config.cluster.stall_timeout_s))


class Fleet:
    """All engines. `busy_s` adds up the seconds during which at least one group was in flight."""

    def __init__(self, workers: Sequence[RemoteWorker], config: RunConfig):
        self.engines = [EngineHandle(worker, config) for worker in workers]
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def start(self) -> list[dict[str, Any]]:
        """Start all engines; returns the settings each resolved to."""
        return await asyncio.gather(*(engine.start() for engine in self.engines))

    async def rollout(self, group_id: int, problem: Problem) -> tuple[GroupMeta, Any]:
        """A group for training: its summary and a reference to its payload."""
        return await self._route("rollout", group_id, problem)

    async def evaluate(self, group_id: int, problem: Problem) -> GroupMeta:
        """The completions of an evaluation problem."""
        meta, _ = await self._route("evaluate", group_id, problem)
        return meta

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, Any]:
        """A group for a parity probe: like `rollout`, with the engine's most likely tokens."""
        return await self._route("probe", group_id, problem, max_tokens)

    async def check_health(self) -> None:
        """Raise WorkerDied when an engine, a grader or their process is gone."""
        await asyncio.gather(*(engine.check_health() for engine in self.engines))

    def busy_s(self) -> float:
        """Seconds with work in flight, so far."""
        running = 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since
        return self._busy_s + running

    async def _route(self, method: str, group_id: int, problem: Problem, *args: Any) -> tuple[GroupMeta, Any]:
        engine = min(self.engines, key=lambda candidate: candidate.in_flight)
        if self._busy_since is None:
            self._busy_since = time.perf_counter()
        engine.in_flight += 1
        try:
            return await engine.group(method, group_id, problem, *args)
        finally:
            engine.in_flight -= 1
            if not any(other.in_flight for other in self.engines):
                self._busy_s += time.perf_counter() - self._busy_since
                self._busy_since = None
