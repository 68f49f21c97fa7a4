"""A worker class in a process of its own, behind one awaitable call.

`RemoteWorker.start` makes a Ray actor that imports and builds the named class there, so that the driver never imports
torch or vLLM. What the class prints goes to a log file. What it raises of our own arrives here as it was raised,
anything else as WorkerFailed; a process that is gone arrives as WorkerDied, a call that takes too long as Stalled.
"""

import gc
import os
import pickle
import socket
import sys
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelinerl.cluster.lifeline import agents_of_raylet, end_with_parent
from pipelinerl.cluster.pinning import Cores, pin_this_process
from pipelinerl.cluster.waiting import noted
from pipelinerl.concurrency import patience
from pipelinerl.errors import PipelineRLError, Stalled, TrainerLost, WorkerDied, WorkerFailed, first_line
from pipelinerl.stacks import FOLDER as STACKS
from pipelinerl.stacks import answer_stack_requests

MAX_CONCURRENT_CALLS = 100_000
SAID = 500  # characters of an error that cannot travel
GROUP_LOST = "a finished group is lost with the node that held it"


@dataclass(frozen=True, slots=True)
class Processes:
    """Processes below a worker: (pid, time of creation), on one node."""

    node: str
    started: tuple[tuple[int, float], ...]


class _Host:
    """Lives in the actor's process and holds the worker."""

    def __init__(self, target: str, log_path: str, args: tuple[Any, ...], cores: Cores | None):
        _log_to(Path(log_path))
        end_with_parent(also=agents_of_raylet())
        answer_stack_requests(Path(log_path).parent / STACKS, Path(log_path).stem)
        _talk_over_the_nodes_interface()
        if cores is not None:  # before the threads of torch and vLLM
            pin_this_process(cores)
        module, _, name = target.partition(":")
        gc.disable()  # collections, which find nothing, are a fifth of what the imports take
        kind = getattr(import_module(module), name)
        gc.enable()
        self._worker = kind(*args)

    def call(self, method: str, *args: Any) -> Any:
        with _as_it_can_travel():
            return getattr(self._worker, method)(*args)

    def endpoint(self) -> tuple[str, int]:
        """This node's address, and a port that is free on it now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def processes(self) -> Processes:
        """What this process has started, and what that has started."""
        children = psutil.Process().children(recursive=True)
        return Processes(ray.get_runtime_context().get_node_id(), tuple((p.pid, p.create_time()) for p in children))

    def sweep(self, left: Processes) -> None:
        """Kill what a killed process before this one left on this node: what is stopped ends with nobody."""
        if left.node == ray.get_runtime_context().get_node_id():
            for pid, created in left.started:
                with suppress(psutil.NoSuchProcess):
                    process = psutil.Process(pid)
                    if process.create_time() == created:
                        process.kill()


@ray.remote(concurrency_groups={"pulse": 1})
class _SyncHost(_Host):
    """Works on one call at a time. Its pulse has a thread of its own: it answers in the middle of a call."""

    @ray.method(concurrency_group="pulse")  # type: ignore[untyped-decorator]
    def pulse(self) -> None:
        pass


@ray.remote
class _AsyncHost(_Host):
    """The same with an event loop, in which many calls run at a time."""

    async def call(self, method: str, *args: Any) -> Any:
        with _as_it_can_travel():
            return await getattr(self._worker, method)(*args)


class Payload:
    """A reference to what a worker made, which stays in its node's memory until someone needs it."""

    def __init__(self, ref: Any):
        self.ref = ref

    def __await__(self) -> Generator[Any, None, Any]:
        """The value, here. Raises TrainerLost when its node is gone: a step that needs it cannot be made whole."""
        try:
            return (yield from self.ref.__await__())
        except (ObjectLostError, RayActorError) as error:
            raise TrainerLost(f"{GROUP_LOST} ({type(error).__name__})") from error


class RemoteWorker:
    """The driver's handle on a worker process."""

    def __init__(self, name: str, actor: Any, log_path: Path, is_async: bool):
        self.name = name
        self.is_async = is_async
        self._actor = actor
        self._log_path = log_path

    @classmethod
    def start(
        cls,
        name: str,
        target: str,
        args: tuple[Any, ...],
        *,
        log_path: Path,
        bundle: int,
        group: Any,
        resources: Mapping[str, float],
        env: Mapping[str, str],
        is_async: bool,
        cores: Cores | None = None,
    ) -> "RemoteWorker":
        """Start `target` ("module:Class") with `args` in bundle number `bundle` of a placement group.

        With `cores` it is kept on those cores of its machine.
        """
        host: Any = _AsyncHost if is_async else _SyncHost
        actor = host.options(
            name=None,
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_restarts=0,
            max_concurrency=MAX_CONCURRENT_CALLS if is_async else None,
            runtime_env={"env_vars": dict(env)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        ).remote(target, str(log_path), args, cores)
        return cls(name, actor, log_path, is_async)

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Run a method of the worker and return its result. Payloads among `args` arrive as their values."""
        values = (value.ref if isinstance(value, Payload) else value for value in args)
        return await self._wait(self._actor.call.remote(method, *values), method, timeout_s)

    async def call_pair(self, method: str, *args: Any) -> tuple[Any, Payload]:
        """For a method that returns (summary, payload): the summary, and a reference to the payload."""
        summary, payload = self._actor.call.options(num_returns=2).remote(method, *args)
        return await self._wait(summary, method, None), Payload(payload)

    async def endpoint(self, timeout_s: float) -> tuple[str, int]:
        """Address of the worker's node and a free port there."""
        address, port = await self._wait(self._actor.endpoint.remote(), "endpoint", timeout_s)
        return address, port

    async def processes(self, timeout_s: float) -> Processes:
        """What the worker's process has started."""
        found: Processes = await self._wait(self._actor.processes.remote(), "processes", timeout_s)
        return found

    async def sweep(self, left: Processes, timeout_s: float) -> None:
        """Kill what the worker before this one left behind on the node, if it is the same."""
        await self._wait(self._actor.sweep.remote(left), "sweep", timeout_s)

    async def pulse(self, timeout_s: float) -> None:
        """Return when the process of a worker that is not async has shown life, also in the middle of a call."""
        await self._wait(self._actor.pulse.remote(), "its pulse", timeout_s)

    def kill(self) -> None:
        """End the process at once."""
        ray.kill(self._actor)

    async def _wait(self, ref: Any, method: str, timeout_s: float | None) -> Any:
        try:
            with noted(self.name, method):
                async with patience(timeout_s):
                    return await ref
        except RayTaskError as error:  # first: Ray's copy of a worker's own TimeoutError is both
            cause = error.cause
            if isinstance(cause, PipelineRLError):
                raise cause from None
            if isinstance(cause, ObjectLostError):
                raise WorkerDied(f"{self.name}: {GROUP_LOST} ({type(cause).__name__})") from error
            raise WorkerFailed(
                f"{self.name}: {method} raised {type(cause).__name__}: {first_line(cause)}; see {self._log_path}"
            ) from error
        except ObjectLostError as error:
            raise WorkerDied(f"{self.name}: {GROUP_LOST} ({type(error).__name__})") from error
        except RayActorError as error:
            raise WorkerDied(f"{self.name}: its process died during {method}; see {self._log_path}") from error
        except TimeoutError:
            raise Stalled(f"{self.name}: {method} took more than {timeout_s:g} s; see {self._log_path}") from None


@contextmanager
def _as_it_can_travel() -> Iterator[None]:
    """An exception that cannot be pickled, as pydantic's, would arrive as Ray's words about that: send what it says."""
    try:
        yield
    except Exception as error:
        try:
            pickle.dumps(error)
        except Exception:
            said = " ".join(str(error).split())
            raise RuntimeError(f"{type(error).__name__}: {said[:SAID]}") from error
        raise


def _talk_over_the_nodes_interface() -> None:
    """Have gloo use the network interface that carries the node's address, not what the host name happens to mean."""
    address = ray.util.get_node_ip_address()
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address == address for entry in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _log_to(path: Path) -> None:
    """Send this process's stdout and stderr, and those of its children, to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    sys.stdout.flush()
    sys.stderr.flush()
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
