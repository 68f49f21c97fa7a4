"""One engine of the fleet: its process and its state.

                  heartbeat late          no heartbeat, process gone, or two failed updates
    HEALTHY ────────────────────> SUSPECT ──────────> DEAD ──────> RETIRED  restart budget spent
       ^  ^ heartbeat, no update missed │               │ killed
       │  └─────────────────────────────┤               v
       │ an update has reached it       v           RESTARTING
       └───────────────────────────── STALE <───────────┘ started, with the weights of model.path

Only a HEALTHY engine is given groups. There is no way from DEAD to HEALTHY but through STALE, that is, through a whole
weight update.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, Protocol

from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import RunConfig
from pipelinerl.types import GroupMeta, Problem


class EngineState(StrEnum):
    """Where an engine stands; see the module."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    STALE = "stale"
    RETIRED = "retired"


_H, _S, _D, _R, _T, _X = (
    EngineState.HEALTHY,
    EngineState.SUSPECT,
    EngineState.DEAD,
    EngineState.RESTARTING,
    EngineState.STALE,
    EngineState.RETIRED,
)
TRANSITIONS: Mapping[EngineState, frozenset[EngineState]] = {
    _H: frozenset({_S, _D, _T, _R}),
    _S: frozenset({_H, _D, _T, _R}),
    _D: frozenset({_R, _X}),
    _R: frozenset({_T, _D}),
    _T: frozenset({_H, _D, _R}),
    _X: frozenset(),
}


class Launcher(Protocol):
    """What starts and ends the processes of engines."""

    async def start_engine(self, index: int, config: RunConfig) -> RemoteWorker:
        """Start the process; its `start` is for the caller to call."""

    async def stop_engine(self, worker: RemoteWorker) -> None:
        """Let it close what it has, then end it."""


class Member:
    """One life of an engine, as weight updates see it: a process that was started again is another member."""

    def __init__(self, engine: "EngineHandle", worker: RemoteWorker, life: int):
        self.engine = engine
        self.life = life
        self._worker = worker

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


class EngineHandle:
    """The driver's handle on one engine. A restart gives it another process and the next `life`."""

    def __init__(self, index: int, launcher: Launcher, config: RunConfig):
        self.index = index
        self.state = EngineState.RESTARTING
        self.restarts = 0
        self.life = 0
        self.cause = ""  # of its last death
        self.version: int | None = None  # that it was brought to last, in this life
        self.missed_update = False  # one has gone by while it was SUSPECT
        self._launcher = launcher
        self._config = config
        self._worker: RemoteWorker | None = None
        self._member: Member | None = None
        self._processes: Any = None  # of the last life: what may outlive its actor

    @property
    def name(self) -> str:
        return f"engine {self.index}"

    @property
    def serves(self) -> bool:
        """Whether it may be given groups."""
        return self.state is EngineState.HEALTHY

    @property
    def lives(self) -> bool:
        """Whether its process is up, as far as is known."""
        return self.state in (EngineState.HEALTHY, EngineState.SUSPECT, EngineState.STALE)

    @property
    def ready(self) -> bool:
        """Whether it can take a weight update."""
        return self.state in (EngineState.HEALTHY, EngineState.STALE)

    available = ready  # as evaluations call it

    def become(self, state: EngineState) -> None:
        """Change the state."""
        assert state in TRANSITIONS[self.state], f"{self.name}: {self.state} -> {state}"
        self.state = state

    async def start(self) -> dict[str, Any]:
        """Start a process and load the model; RESTARTING becomes STALE. Returns the settings that vLLM resolved to."""
        self.life += 1
        self.missed_update, self.version = False, None
        worker = self._worker = await self._launcher.start_engine(self.index, self._config)
        self._member = Member(self, worker, self.life)
        if self._processes is not None:
            await worker.sweep(self._processes, self._config.engine.start_timeout_s)
        settings = dict(await worker.call("start", timeout_s=self._config.engine.start_timeout_s))
        self._processes = await worker.processes(self._config.engine.start_timeout_s)
        self.become(EngineState.STALE)
        return settings

    async def replace(self, config: RunConfig) -> dict[str, Any]:
        """Another process, with the engine settings of `config`; RESTARTING becomes STALE."""
        await self._launcher.stop_engine(self.worker)
        self._config = config
        return await self.start()

    def kill(self) -> None:
        """End its processes at once; the calls that wait for it raise WorkerDied."""
        if self._worker is not None:
            self._worker.kill()

    @property
    def worker(self) -> RemoteWorker:
        assert self._worker is not None, f"{self.name} was never started"
        return self._worker

    @property
    def member(self) -> Member:
        """Of its present life."""
        assert self._member is not None, f"{self.name} was never started"
        return self._member

    async def heartbeat(self, timeout_s: float) -> None:
        """Return when the engine has been around its loop. Raises Stalled or WorkerDied."""
        await self.worker.call("heartbeat", timeout_s=timeout_s)

    async def abandon(self) -> None:
        """Give up all groups it works on."""
        await self.worker.call("abandon", timeout_s=self._config.engine.hang_timeout_s)

    async def group(self, method: str, group_id: int, problem: Problem, *args: Any) -> tuple[GroupMeta, Any]:
        """A group and a reference to its payload."""
        return await self.worker.call_pair(method, group_id, problem, *args)

    async def hidden_states(self, tokens: list[int]) -> Any:
        """Hidden states of the engine, place by place; see RolloutWorker.hidden_states."""
        return await self.worker.call("hidden_states", tokens, timeout_s=self._config.engine.start_timeout_s)
