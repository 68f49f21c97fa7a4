"""All engines: every group goes to the healthy engine with the fewest in flight, and dead engines come back.

    rollout, evaluate   consume     a problem            wait for  a healthy engine, then its group
    supervise           consumes    heartbeats           waits for time; kills, restarts and retires engines
    stale               consumes    nothing              waits for an engine that was restarted and has old weights

A group whose engine dies is sampled again from the start by another one, with the weights of then: newer than those of
its admission, so the bound on the lag holds. An engine costs the run its work in flight, not more. Only progress tells
a hung engine from a busy one (its process is there and its connections are open): the heartbeat is an errand through
the loop in which the engine core also samples.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Literal

from pipelinerl.cluster.engine_handle import EngineHandle, EngineState, Launcher, Member
from pipelinerl.cluster.routing import LeastLoaded
from pipelinerl.concurrency import together
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import PipelineRLError, Stalled, WorkerDied, first_line
from pipelinerl.types import FleetEvent, GroupMeta, Outcome, Problem, RolloutMeta

MAX_BACKOFF_S = 30.0

Recovery = Literal["none", "refit", "reload"]
"""What becomes of an engine that is lost. none: the run ends with it. refit: it is started again, and an update has to
bring it the weights. reload: it is started again, and those of model.path are the ones to serve."""


class Fleet:
    """The engines of a run. `busy_s` adds up the seconds during which at least one group was in flight.

    With `eval.engine=dedicated` the last engine only evaluates: it is given no other groups, and no update but those
    that `evaluator_joins` lets it join.
    """

    def __init__(self, launcher: Launcher, config: RunConfig, count: int | None = None):
        """`count` engines, the one that only evaluates included; None: as many as training has."""
        count = config.engines if count is None else count
        self.engines = [EngineHandle(index, launcher, config) for index in range(count)]
        self.samplers = self.engines[: config.engine.count]  # those that sample for training
        self.evaluator = self.engines[-1] if count > config.engine.count else None
        self.evaluator_joins = False
        self.listener: Callable[[FleetEvent], None] = lambda event: None
        self.recovery: Recovery = "none"
        self.restarts = 0
        self.requeued = 0
        self._config = config
        self._change = asyncio.Event()  # of any engine's state; a new one each time
        self._wakes = [asyncio.Event() for _ in self.engines]
        self._routing = LeastLoaded()
        for engine in self.samplers:
            self._routing.add(engine.index)
            self._routing.disable(engine.index)
        self._busy_s = 0.0
        self._busy_since: float | None = None

    async def start(self) -> list[dict[str, Any]]:
        """Start all engines with the weights of model.path; returns the settings each resolved to.

        They serve version 0 at once: the trainer starts from the same files.
        """
        settings = await together(*(engine.start() for engine in self.engines))
        for engine in self.engines:
            self._serves(engine, 0)
        return settings

    async def replace(self, config: RunConfig) -> list[dict[str, Any]]:
        """Other processes, with the engine settings of `config`, at version 0."""
        for engine in self.engines:
            self._become(engine, EngineState.RESTARTING)
        settings = await together(*(engine.replace(config) for engine in self.engines))
        for engine in self.engines:
            self._serves(engine, 0)
        return settings

    # Groups

    async def rollout(self, group_id: int, problem: Problem) -> tuple[GroupMeta, Any]:
        """A group for training: its summary and a reference to its payload."""
        return await self._route("rollout", group_id, problem)

    async def evaluate(self, group_id: int, problem: Problem) -> GroupMeta:
        """The completions of an evaluation problem."""
        meta, _ = await self._route("evaluate", group_id, problem)
        return meta

    async def evaluate_apart(self, group_id: int, problem: Problem) -> GroupMeta:
        """The same by the engine that only evaluates. Raises WorkerDied when it is gone."""
        engine = self.evaluator
        assert engine is not None, "a fleet with eval.engine=shared"
        life = engine.life
        try:
            meta, _ = await engine.group("evaluate", group_id, problem)
        except WorkerDied as error:
            self._lost(engine, error, life)
            raise
        return meta

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, Any]:
        """A group for a parity probe: like `rollout`, with the engine's most likely tokens."""
        return await self._route("probe", group_id, problem, max_tokens)

    def busy_s(self) -> float:
        """Seconds with work in flight, so far."""
        running = 0.0 if self._busy_since is None else time.perf_counter() - self._busy_since
        return self._busy_s + running

    def metrics(self) -> dict[str, float]:
        """`fleet/*`: engines that serve now, and what was restarted and sampled again in the whole run."""
        return {
            "fleet/engines": float(self._routing.enabled),
            "fleet/restarts": float(self.restarts),
            "fleet/requeued": float(self.requeued),
        }

    def describe(self) -> list[dict[str, Any]]:
        """How every engine stands, for a hang report."""
        return [
            {
                "engine": engine.index,
                "state": engine.state.value,
                "groups_in_flight": self._routing.load(engine.index),
                "restarts": engine.restarts,
            }
            for engine in self.engines
        ]

    async def _route(self, method: str, group_id: int, problem: Problem, *args: Any) -> tuple[GroupMeta, Any]:
        for _ in range(self._config.engine.max_requeues + 1):
            engine = await self._acquire()
            life = engine.life
            try:
                return await engine.group(method, group_id, problem, *args)
            except WorkerDied as error:
                self._lost(engine, error, life)
                self.requeued += 1
                ticket = group_id if method == "rollout" else None  # evaluations and probes count for themselves
                self._tell("requeued", engine, f"group {group_id} goes to another engine", ticket)
                last = engine
            finally:
                self._release(engine)
        return self._given_up(group_id, problem, last), None

    async def _acquire(self) -> EngineHandle:
        engine = self.engines[await self._routing.acquire()]
        if self._busy_since is None:
            self._busy_since = time.perf_counter()
        return engine

    def _release(self, engine: EngineHandle) -> None:
        self._routing.release(engine.index)
        if not self._routing.in_flight and self._busy_since is not None:
            self._busy_s += time.perf_counter() - self._busy_since
            self._busy_since = None

    def _given_up(self, group_id: int, problem: Problem, engine: EngineHandle) -> GroupMeta:
        """A group that every engine died of: it is counted as errored, and takes no more engines along."""
        limit = self._config.engine.max_requeues
        detail = f"{limit + 1} engines died while they worked on {problem.id} (engine.max_requeues={limit})"
        lost = RolloutMeta(0.0, Outcome.INFRA_ABORT, {}, 0, 0, 0, {}, detail)
        return GroupMeta(group_id, problem.id, engine.index, (lost,) * self._config.batch.group_size, 0.0)

    # Weight updates: what the publisher asks and tells

    def members(self) -> list[Member]:
        """The engines that are to get the next update. One that does not answer is left out and becomes STALE."""
        for engine in self.engines:
            engine.missed_update |= engine.state is EngineState.SUSPECT
        joining = (engine for engine in self.engines if engine is not self.evaluator or self.evaluator_joins)
        return [engine.member for engine in joining if engine.ready]

    def lost(self, member: Member, error: Exception) -> None:
        """It did not complete its part of an update: kill it and start another one in its place."""
        self._lost(member.engine, error, member.life)

    def refitted(self, member: Member, version: int) -> None:
        """A whole update has reached it: it serves `version`."""
        if member.life == member.engine.life:
            self._serves(member.engine, version)

    def _serves(self, engine: EngineHandle, version: int) -> None:
        engine.version = version
        if engine.state is EngineState.STALE:
            self._become(engine, EngineState.HEALTHY)
            if engine.restarts:
                self._tell("healthy", engine, f"serves version {version}")

    async def stale(self) -> None:
        """Wait until an engine needs the current weights."""
        while not any(engine.state is EngineState.STALE for engine in self.samplers):
            await self._change.wait()

    async def abandon(self) -> None:
        """Give up all groups in flight, and serve nothing until the next update: the weights of now are void."""
        living = [engine for engine in self.engines if engine.lives]
        for engine in living:
            if engine.state is not EngineState.STALE:
                self._become(engine, EngineState.STALE)
        for engine, result in zip(living, await asyncio.gather(*map(_abandon, living)), strict=True):
            if result is not None:
                self._lost(engine, result, engine.life)

    # Supervision

    async def supervise(self) -> None:
        """Watch all engines for ever. Raises WorkerDied when fewer than `engine.min_count` can be had."""
        await together(*(self._supervise(engine) for engine in self.engines))

    async def _supervise(self, engine: EngineHandle) -> None:
        wake = self._wakes[engine.index]
        while engine.state is not EngineState.RETIRED:
            if engine.state is EngineState.DEAD:
                await self._restart(engine)
            elif engine.lives:
                await self._heartbeat(engine)
            if engine.state is EngineState.DEAD:
                continue
            wake.clear()
            try:
                await asyncio.wait_for(wake.wait(), self._config.engine.heartbeat_s)
            except TimeoutError:
                continue

    async def _heartbeat(self, engine: EngineHandle) -> None:
        """Half of `engine.hang_timeout_s` without an answer makes an engine suspect, all of it dead."""
        life = engine.life
        try:
            await engine.heartbeat(self._config.engine.hang_timeout_s / 2)
        except Stalled:
            if engine.life != life or not engine.lives:
                return
            if engine.state is EngineState.HEALTHY:
                self._become(engine, EngineState.SUSPECT)
                self._tell("suspect", engine, "does not answer")
                await self._heartbeat(engine)
            else:
                limit = self._config.engine.hang_timeout_s
                hung = WorkerDied(f"{engine.name} has not answered for engine.hang_timeout_s={limit:g} s")
                self._lost(engine, hung, life)
        except PipelineRLError as error:
            self._lost(engine, error, life)
        else:
            if engine.state is EngineState.SUSPECT and engine.life == life:
                self._become(engine, EngineState.STALE if engine.missed_update else EngineState.HEALTHY)
                engine.missed_update = False

    def _lost(self, engine: EngineHandle, error: BaseException, life: int) -> None:
        """The engine's process of that life is gone, or is to be."""
        if engine.life != life or not engine.lives:
            return
        self._become(engine, EngineState.DEAD)
        engine.cause = first_line(error)
        engine.kill()
        self._wakes[engine.index].set()
        self._tell("lost", engine, first_line(error))

    async def _restart(self, engine: EngineHandle) -> None:
        if self.recovery == "none":
            raise WorkerDied(engine.cause)
        if engine.restarts >= self._config.engine.max_restarts:
            self._retire(engine)
            return
        self._become(engine, EngineState.RESTARTING)
        await asyncio.sleep(min(MAX_BACKOFF_S, 2.0**engine.restarts - 1))  # at once the first time
        engine.restarts += 1
        self.restarts += 1
        try:
            await engine.start()
        except PipelineRLError as error:
            engine.kill()
            engine.cause = first_line(error)
            self._become(engine, EngineState.DEAD)
            self._tell("lost", engine, f"restart {engine.restarts} failed: {first_line(error)}")
            return
        self._tell("restarted", engine, f"started again, {engine.restarts} of {self._config.engine.max_restarts}")
        self._notify()
        if self.recovery == "reload":
            self._serves(engine, 0)

    def _retire(self, engine: EngineHandle) -> None:
        self._become(engine, EngineState.RETIRED)
        limit = self._config.engine
        self._tell("retired", engine, f"engine.max_restarts={limit.max_restarts} are spent")
        left = sum(other.state is not EngineState.RETIRED for other in self.samplers)
        if left < limit.min_count:
            raise WorkerDied(
                f"{left} of {limit.count} engines are left and engine.min_count={limit.min_count} are needed: "
                f"{engine.name} died {engine.restarts + 1} times (engine.max_restarts={limit.max_restarts}), at last "
                f"because: {engine.cause}"
            )

    def _become(self, engine: EngineHandle, state: EngineState) -> None:
        engine.become(state)
        if engine is not self.evaluator:
            (self._routing.enable if engine.serves else self._routing.disable)(engine.index)
        self._notify()

    def _notify(self) -> None:
        """Wake whoever waits for an engine's state."""
        self._change.set()
        self._change = asyncio.Event()

    def _tell(self, kind: str, engine: EngineHandle, text: str, group_id: int | None = None) -> None:
        named = text if text.startswith(engine.name) else f"{engine.name}: {text}"
        self.listener(FleetEvent(kind, engine.index, named, group_id))


async def _abandon(engine: EngineHandle) -> PipelineRLError | None:
    try:
        await engine.abandon()
    except PipelineRLError as error:
        return error
    return None
