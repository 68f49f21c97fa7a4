"""Ray: start or join a cluster, reserve resources, start the workers, and leave nothing behind."""

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError

from pipelinerl.cluster.pinning import Cores, share_out
from pipelinerl.cluster.placement import Demand, Placement, Process, Role
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.cluster.reservation import Seat, check_nodes, cluster_inventory, lost, release, reserve, watch
from pipelinerl.concurrency import background, together
from pipelinerl.config.device import Device, resolve_device
from pipelinerl.config.preflight import local_inputs
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem, WorkerDied, first_line

CLOSE_TIMEOUT_S = 40.0
# What workers on other nodes take over from the driver's environment, but for secrets: it is visible in the cluster.
FORWARDED = ("HF_", "TRANSFORMERS_", "NCCL_", "GLOO_", "VLLM_", "TORCH_", "PYTORCH_", "PYTHONPATH")
SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD")
START_ATTEMPTS = 2


class RayCluster:
    """The processes of one run. Its life: `start`, `reserve`, `start_ranks` and `start_engine`, `close`.

    A process is started again in its place. Where the node is gone from the cluster, it first gets a place on another
    one, for good, of which `listener` is told.
    """

    def __init__(self, config: RunConfig, run_dir: Path):
        self._config = config
        self._logs = (run_dir / "logs").resolve()
        self._backend = ""
        self._workers: dict[str, RemoteWorker] = {}  # by name: the newest of that name
        self._seats: dict[Role, list[Seat]] = {}  # in order; kept, so that a process can be started again
        self._checking = asyncio.Lock()  # of nodes: one check at a time, they use one file
        self._cores: dict[str, list[Cores]] = {}
        self._started: asyncio.Task[None] | None = None
        self.device: Device = "cpu"  # decided by `reserve`
        self.listener: Callable[[Process], None] = lambda process: None

    async def start(self) -> None:
        """Start a local cluster, or join the one at `cluster.address`."""
        # In a thread, so that signals are handled meanwhile. `close` waits for it: half a start cannot be undone.
        self._started = asyncio.create_task(asyncio.to_thread(_init_ray, self._config))
        await asyncio.shield(self._started)
        # Ray puts a handler of its own before Python's, which prints a C++ stack for every SIGTERM: put ours back.
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.getsignal(which))

    async def reserve(self, engines: bool = True, trainer: bool = True) -> Placement:
        """Decide who sits where and reserve what all processes need. Without `engines`, or without `trainer`, there are
        none of those.

        Raises EnvironmentProblem that says what the cluster or one of its nodes lacks.
        """
        config = self._config
        local = config.cluster.address == "local"
        gpus = None if local else (await asyncio.to_thread(cluster_inventory, free=False)).gpus
        self.device = resolve_device(config, gpus)
        self._pin()
        placement, seats = await reserve(config, self.device, Demand.of(config, engines, trainer))
        for seat in seats:
            self._seats.setdefault(seat.process.role, []).append(seat)
        await self._check(placement)
        return placement

    def places(self) -> dict[str, str]:
        """The name of every process, and of the node it has its place on now."""
        processes = (seat.process for seats in self._seats.values() for seat in seats)
        return {process.name: process.node.name for process in processes}

    async def _check(self, placement: Placement) -> None:
        """Have the nodes of a cluster that was joined show that a process of this run can work there."""
        config = self._config
        if config.cluster.address == "local":
            return
        self._logs.mkdir(parents=True, exist_ok=True)
        timeout_s = config.cluster.placement_timeout_s
        async with self._checking:
            await asyncio.to_thread(check_nodes, placement, self._logs, local_inputs(config), _forwarded(), timeout_s)

    def use_transport(self, backend: str) -> None:
        """What engines that are started from now on are told of the weight transport."""
        self._backend = backend

    def _pin(self) -> None:
        """With `cluster.pin_cores`, settle which process gets which cores of this machine."""
        if not self._config.cluster.pin_cores:
            return
        if self.device != "cpu":
            raise EnvironmentProblem("cluster.pin_cores=true is for CPU runs, and this one is on GPUs: set it to false")
        ranks, engines = share_out(self._config, sorted(os.sched_getaffinity(0)))
        self._cores = {"trainer rank": ranks, "engine": engines}

    async def start_ranks(self) -> list[RemoteWorker]:
        """Start the processes of all trainer ranks in their places. Those that have lost theirs move together.

        Raises: EnvironmentProblem when there is no room to move to, or the node is not fit for it.
        """

        def start(seat: Seat) -> RemoteWorker:
            target, index = "pipelinerl.trainer.worker:TrainerWorker", seat.process.index
            return self._start(seat, target, (self._config, index, self.device))

        ranks = range(self._config.trainer.ranks)
        return await self._up("trainer rank", ranks, start, self._config.trainer.start_timeout_s)

    async def start_engine(self, index: int, config: RunConfig) -> RemoteWorker:
        """Start the process of an engine in its place, with the settings of `config`. Raises as `start_ranks` does."""

        def start(seat: Seat) -> RemoteWorker:
            target = "pipelinerl.engine.worker:RolloutWorker"
            return self._start(seat, target, (config, index, self._backend), is_async=True)

        (worker,) = await self._up("engine", [index], start, config.engine.start_timeout_s)
        return worker

    async def _up(
        self, role: Role, indices: Sequence[int], start: Callable[[Seat], RemoteWorker], timeout_s: float
    ) -> list[RemoteWorker]:
        """Processes that have been started in their seats. When a node is lost meanwhile, they start anew elsewhere."""
        while True:
            seats = await self._seated(role, indices)
            workers = [start(seat) for seat in seats]
            try:
                async with background(watch(seats)):
                    await together(*(worker.endpoint(timeout_s) for worker in workers))
                return workers
            except BaseException as error:
                for worker in workers:
                    worker.kill()
                if not isinstance(error, WorkerDied) or not await lost(seats):
                    raise

    async def _seated(self, role: Role, indices: Iterable[int]) -> list[Seat]:
        """The seats of these processes. Those that are on a node that is gone are exchanged for others first."""
        seats = self._seats[role]
        if gone := await lost([seats[index] for index in indices]):
            others = await self._others(gone)
            for seat in others:
                seats[seat.process.index] = seat
            release(gone, kept=[seat for kept in self._seats.values() for seat in kept])
            for seat in others:
                self.listener(seat.process)
        return [seats[index] for index in indices]

    async def _others(self, gone: Sequence[Seat]) -> list[Seat]:
        """Seats for the processes of these, on nodes that were looked at."""
        processes = [seat.process for seat in gone]
        if any(0 < process.gpus < 1 for process in processes):
            names = " and ".join(process.name for process in processes)
            raise EnvironmentProblem(
                f"{names}: the node is gone with the GPU that trainer and engine shared; start the run again on another"
            )
        placement, seats = await reserve(self._config, self.device, Demand.again(self._config, processes))
        try:
            await self._check(placement)
        except BaseException:
            release(seats, kept=[])
            raise
        return seats

    async def stop_engine(self, worker: RemoteWorker) -> None:
        """Let an engine close what it has, then end its process."""
        await _stop(worker)

    async def close(self) -> None:
        """Ask every worker to stop, kill what is left, and end the local cluster. Never raises."""
        if self._started is None:
            return
        await asyncio.wait([self._started])
        if self._started.exception() is None:
            await asyncio.gather(*(_stop(worker) for worker in self._workers.values()))
            await asyncio.to_thread(ray.shutdown)

    def _start(self, seat: Seat, target: str, args: tuple[Any, ...], is_async: bool = False) -> RemoteWorker:
        process = seat.process
        env = _worker_env(self.device, args[0], is_trainer=not is_async)
        if self._config.cluster.address != "local":
            env = _forwarded() | env
        cores = self._cores.get(process.role)
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
            cores=cores[process.index] if cores else None,
        )
        self._workers[process.name] = worker
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
    # Ray would start a worker per core at once; ours have an environment of their own and cannot use those.
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    common: dict[str, Any] = {
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "namespace": f"pipelinerl-{os.getpid()}",
    }
    if cluster.address == "local":
        memory = None if cluster.object_store_mb is None else cluster.object_store_mb * 2**20
        # "local" in so many words: a plain init would join any cluster that a stale file in the temp folder names.
        _start_local(num_cpus=cluster.num_cpus, object_store_memory=memory, **common)
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


def _start_local(**options: Any) -> None:
    """Start a cluster on this machine. Ray gives its processes 30 s, too few on a very busy one: the second attempt
    finds what they load in memory."""
    for attempt in range(1, START_ATTEMPTS + 1):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:  # Ray raises a bare one when its processes do not come up in time
            ray.shutdown()
            if attempt == START_ATTEMPTS:
                raise EnvironmentProblem(f"Ray did not start on this machine: {first_line(error)}") from error
            logging.getLogger(__name__).warning("Ray did not start, trying again: %s", first_line(error))


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
        return env
    env["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # for top-k and top-p, which are not used here, and has no logprobs
    if engine.v2_model_runner is not None:
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(engine.v2_model_runner))
    return env
