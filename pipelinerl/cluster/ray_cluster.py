"""Ray: start or join a cluster, reserve resources, start the workers, and leave nothing behind."""

import asyncio
import logging
import os
import signal
import socket
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from pipelinerl.cluster.placement import Placement
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.cluster.reservation import Seat, check_nodes, cluster_inventory, reserve
from pipelinerl.config.device import Device, resolve_device
from pipelinerl.config.preflight import local_inputs
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem, first_line

CLOSE_TIMEOUT_S = 40.0
# What workers on other nodes take over from the driver's environment, but for secrets: it is visible in the cluster.
FORWARDED = ("HF_", "TRANSFORMERS_", "NCCL_", "GLOO_", "VLLM_", "TORCH_", "PYTORCH_", "PYTHONPATH")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")


class RayCluster:
    """The processes of one run. Its life: `start`, `reserve`, `start_workers`, `close`."""

    def __init__(self, config: RunConfig, run_dir: Path):
        self._config = config
        self._logs = (run_dir / "logs").resolve()
        self._workers: list[RemoteWorker] = []
        self._seats: list[Seat] = []  # trainer ranks first, as in the placement
        self._started: asyncio.Task[None] | None = None
        self.device: Device = "cpu"  # decided by `reserve`

    async def start(self) -> None:
        """Start a local cluster, or join the one at `cluster.address`."""
        # In a thread, so that signals are handled meanwhile. `close` waits for it: half a start cannot be undone.
        self._started = asyncio.create_task(asyncio.to_thread(_init_ray, self._config))
        await asyncio.shield(self._started)
        # Ray puts a handler of its own before Python's, which prints a C++ stack for every SIGTERM: put ours back.
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.getsignal(which))

    async def reserve(self) -> Placement:
        """Decide who sits where and reserve what all processes need.

        Raises EnvironmentProblem that says what the cluster or one of its nodes lacks.
        """
        config = self._config
        local = config.cluster.address == "local"
        gpus = None if local else (await asyncio.to_thread(cluster_inventory, free=False)).gpus
        self.device = resolve_device(config, gpus)
        placement, self._seats = await reserve(config, self.device)
        if not local:
            self._logs.mkdir(parents=True, exist_ok=True)
            timeout_s = config.cluster.placement_timeout_s
            await asyncio.to_thread(check_nodes, placement, self._logs, local_inputs(config), _forwarded(), timeout_s)
        return placement

    def start_workers(self, backend: str) -> tuple[list[RemoteWorker], list[RemoteWorker]]:
        """Start every process in its place. Returns (trainer ranks, rollout workers)."""
        target = "pipelinerl.trainer.worker:TrainerWorker"
        trainers = [
            self._start(seat, target, (self._config, seat.process.index, self.device))
            for seat in self._seats
            if seat.process.role == "trainer rank"
        ]
        return trainers, self._start_engines(self._config, backend)

    async def replace_engines(self, config: RunConfig, backend: str) -> list[RemoteWorker]:
        """Stop all rollout workers and start new ones in their places, with the engine settings of `config`."""
        engines = [worker for worker in self._workers if worker.is_async]
        await asyncio.gather(*(_stop(worker) for worker in engines))
        self._workers = [worker for worker in self._workers if not worker.is_async]
        return self._start_engines(config, backend)

    async def close(self) -> None:
        """Ask every worker to stop, kill what is left, and end the local cluster. Never raises."""
        if self._started is None:
            return
        await asyncio.wait([self._started])
        if self._started.exception() is None:
            await asyncio.gather(*(_stop(worker) for worker in self._workers))
            await asyncio.to_thread(ray.shutdown)

    def _start_engines(self, config: RunConfig, backend: str) -> list[RemoteWorker]:
        target = "pipelinerl.engine.worker:RolloutWorker"
        return [
            self._start(seat, target, (config, seat.process.index, backend), is_async=True)
            for seat in self._seats
            if seat.process.role == "engine"
        ]

    def _start(self, seat: Seat, target: str, args: tuple[Any, ...], is_async: bool = False) -> RemoteWorker:
        process = seat.process
        env = _worker_env(self.device, args[0], is_trainer=not is_async)
        if self._config.cluster.address != "local":
            env = _forwarded() | env
        worker = RemoteWorker.start(
            process.name,
            target,
            args,
            log_path=self._logs / f"{process.name.replace(' ', '_')}.log",
            bundle=seat.bundle,
            group=seat.group,
            resources=process.resources(),
            env=env,
            is_async=is_async,
        )
        self._workers.append(worker)
        return worker


async def _stop(worker: RemoteWorker) -> None:
    """Engines have processes of their own to stop; a trainer rank has nothing to say and may be busy for long."""
    if worker.is_async:
        try:
            await worker.call("close", timeout_s=CLOSE_TIMEOUT_S)
        except Exception as error:  # it is on its way out anyway; killing it ends its processes too
            logging.getLogger(__name__).debug("closing %s: %s", worker.name, error)
    worker.kill()


def _init_ray(config: RunConfig) -> None:
    cluster = config.cluster
    # A failed call has two results, of which the driver awaits one; Ray would print the traceback of the other.
    os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    common: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": f"pipelinerl-{os.getpid()}",
    }
    if cluster.address == "local":
        memory = None if cluster.object_store_mb is None else cluster.object_store_mb * 2**20
        # "local" in so many words: a plain init would join any cluster that a stale file in the temp folder names.
        try:
            ray.init(address="local", num_cpus=cluster.num_cpus, object_store_memory=memory, **common)
        except Exception as error:  # Ray raises a bare one when its processes do not come up in time
            raise EnvironmentProblem(f"Ray did not start on this machine: {first_line(error)}") from error
        return
    common.pop("include_dashboard")
    try:
        ray.init(address=cluster.address, **common)
    except AuthenticationError as error:
        raise EnvironmentProblem(f"cluster.address={cluster.address}: {_TOKEN_HINT} ({first_line(error)})") from error
    except ConnectionError as error:  # what a wrong token ends in too, after 20 seconds
        why = _TOKEN_HINT if _listens(cluster.address) else "no Ray cluster there"
        raise EnvironmentProblem(f"cluster.address={cluster.address}: {why} ({first_line(error)})") from error


_TOKEN_HINT = (
    "the cluster there did not take our token, or we have none: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or "
    "RAY_AUTH_TOKEN_PATH to the token of the cluster"
)


def _listens(address: str) -> bool:
    """Whether something takes connections at `host:port`; not known, and so false, of other addresses."""
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()):
        return False
    try:
        socket.create_connection((host, int(port)), timeout=3).close()
    except OSError:
        return False
    return True


def _forwarded() -> dict[str, str]:
    """The part of the driver's environment that workers on other nodes need too."""
    return {
        name: value
        for name, value in os.environ.items()
        if name.startswith(FORWARDED) and not any(part in name for part in SECRET)
    }


def _worker_env(device: str, config: RunConfig, is_trainer: bool) -> dict[str, str]:
    """Environment of a worker process; it must be set before torch, DeepSpeed or vLLM is imported."""
    engine = config.engine
    env = {"TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if device == "cpu":
        # Two processes share the cores: more threads would spin against each other. Without dynamo the engine is up
        # in half the time; the one helper it would compile costs seconds.
        env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        if not (is_trainer and config.trainer.compile):
            env["TORCHDYNAMO_DISABLE"] = "1"
        if engine.workers == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker runs inside the engine core's process
        else:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every worker wants a NUMA node of its own
    elif engine.v2_model_runner is not None:
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(engine.v2_model_runner))
    return env
