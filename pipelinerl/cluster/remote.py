"""A worker class in a process of its own, behind one awaitable call.

`RemoteWorker.start` makes a Ray actor that imports and builds the named class there, so that the driver never imports
torch or vLLM. What the class prints goes to a log file. What it raises arrives here as it was raised; a process that
is gone arrives as WorkerDied, a call that takes too long as Stalled.
"""

import asyncio
import os
import socket
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil
import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from pipelinerl.errors import PipelineRLError, Stalled, WorkerDied, first_line

MAX_CONCURRENT_CALLS = 100_000


class _Host:
    """Lives in the actor's process and holds the worker."""

    def __init__(self, target: str, log_path: str, args: tuple[Any, ...]):
        _log_to(Path(log_path))
        _talk_over_the_nodes_interface()
        module, _, name = target.partition(":")
        self._worker = getattr(import_module(module), name)(*args)

    def call(self, method: str, *args: Any) -> Any:
        return getattr(self._worker, method)(*args)

    def endpoint(self) -> tuple[str, int]:
        """This node's address, and a port that is free on it now."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]


class _AsyncHost(_Host):
    """The same with an event loop, in which many calls run at a time."""

    async def call(self, method: str, *args: Any) -> Any:
        return await getattr(self._worker, method)(*args)


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
    ) -> "RemoteWorker":
        """Start `target` ("module:Class") with `args` in bundle number `bundle` of a placement group."""
        host = ray.remote(_AsyncHost if is_async else _Host)
        actor = host.options(
            name=None,
            num_cpus=resources.get("CPU", 0),
            num_gpus=resources.get("GPU", 0),
            max_restarts=0,
            max_concurrency=MAX_CONCURRENT_CALLS if is_async else None,
            runtime_env={"env_vars": dict(env)},
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=bundle),
        ).remote(target, str(log_path), args)
        return cls(name, actor, log_path, is_async)

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        """Run a method of the worker and return its result. ObjectRefs among `args` arrive as their values."""
        return await self._wait(self._actor.call.remote(method, *args), method, timeout_s)

    async def call_pair(self, method: str, *args: Any) -> tuple[Any, Any]:
        """For a method that returns (summary, payload): the summary, and a reference to the payload."""
        summary, payload = self._actor.call.options(num_returns=2).remote(method, *args)
        return await self._wait(summary, method, None), payload

    async def endpoint(self, timeout_s: float) -> tuple[str, int]:
        """Address of the worker's node and a free port there."""
        address, port = await self._wait(self._actor.endpoint.remote(), "endpoint", timeout_s)
        return address, port

    def kill(self) -> None:
        """End the process at once."""
        ray.kill(self._actor)

    async def _wait(self, ref: Any, method: str, timeout_s: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                return await ref
        except RayTaskError as error:  # first: Ray's copy of a worker's own TimeoutError is both
            cause = error.cause
            if isinstance(cause, PipelineRLError):
                raise cause from None
            raise WorkerDied(
                f"{self.name}: {method} raised {type(cause).__name__}: {first_line(cause)}; see {self._log_path}"
            ) from error
        except RayActorError as error:
            raise WorkerDied(f"{self.name}: its process died during {method}; see {self._log_path}") from error
        except TimeoutError:
            raise Stalled(f"{self.name}: {method} took more than {timeout_s:g} s; see {self._log_path}") from None


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
