"""Ray: start or join a cluster, reserve resources, start the workers, and leave nothing behind."""

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group

from pipelinerl.cluster.pinning import Cores, share_out
from pipelinerl.cluster.placement import Bundle, bundles
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem, first_line

PLACEMENT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 40.0
START_ATTEMPTS = 2


class RayCluster:
    """The processes of one run."""

    def __init__(self, config: RunConfig, run_dir: Path, device: str):
        self._config = config
        self._logs = (run_dir / "logs").resolve()
        self._device = device
        self._backend = ""
        self._workers: dict[str, RemoteWorker] = {}  # by name: the newest of that name
        self._trainer_bundles: list[Bundle] = []
        self._engine_bundles: list[Bundle] = []
        self._trainer_group: Any = None
        self._engine_group: Any = None
        self._trainer_cores: list[Cores] = []
        self._engine_cores: list[Cores] = []
        self._started: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start a local cluster, or join the one at `cluster.address`."""
        # In a thread, so that signals are handled meanwhile. `close` waits for it: half a start cannot be undone.
        self._started = asyncio.create_task(asyncio.to_thread(_init_ray, self._config))
        await asyncio.shield(self._started)
        # Ray puts a handler of its own before Python's, which prints a C++ stack for every SIGTERM: put ours back.
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.getsignal(which))

    async def reserve(self, backend: str, engines: bool = True, trainer: bool = True) -> None:
        """Reserve what all processes need. Raises EnvironmentProblem that says what the cluster lacks.

        `backend` is that of the weight transport, which engines are told when they start. Without `engines`, or without
        `trainer`, there are none of those.
        """
        self._pin()
        self._backend = backend
        cpus = ray.cluster_resources().get("CPU", 1.0)
        trainer_bundles, engine_bundles = bundles(self._config, self._device, cpus)
        self._trainer_bundles, self._engine_bundles = trainer_bundles * trainer, engine_bundles * engines
        self._trainer_group = await _reserve(self._trainer_bundles, "PACK")
        self._engine_group = await _reserve(self._engine_bundles, "SPREAD")

    def _pin(self) -> None:
        """With `cluster.pin_cores`, settle which process gets which cores of this machine."""
        if not self._config.cluster.pin_cores:
            return
        if self._device != "cpu":
            raise EnvironmentProblem("cluster.pin_cores=true is for CPU runs, and this one is on GPUs: set it to false")
        self._trainer_cores, self._engine_cores = share_out(self._config, sorted(os.sched_getaffinity(0)))

    def start_ranks(self) -> list[RemoteWorker]:
        """Start the processes of all trainer ranks in their places."""
        target = "pipelinerl.trainer.worker:TrainerWorker"
        return [
            self._start(bundle, rank, self._trainer_group, target, (self._config, rank, self._device))
            for rank, bundle in enumerate(self._trainer_bundles)
        ]

    def start_engine(self, index: int, config: RunConfig) -> RemoteWorker:
        """Start the process of an engine in its place, with the engine settings of `config`."""
        bundle, target = self._engine_bundles[index], "pipelinerl.engine.worker:RolloutWorker"
        return self._start(bundle, index, self._engine_group, target, (config, index, self._backend), is_async=True)

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

    def _start(
        self, bundle: Bundle, index: int, group: Any, target: str, args: tuple[Any, ...], is_async: bool = False
    ) -> RemoteWorker:
        cores = self._engine_cores if is_async else self._trainer_cores
        worker = RemoteWorker.start(
            bundle.name,
            target,
            args,
            log_path=self._logs / f"{bundle.name.replace(' ', '_')}.log",
            bundle=index,
            group=group,
            resources=bundle.resources(),
            env=_worker_env(self._device, args[0], is_trainer=not is_async),
            is_async=is_async,
            cores=cores[index] if cores else None,
        )
        self._workers[bundle.name] = worker
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
    try:
        common.pop("include_dashboard")
        ray.init(address=cluster.address, **common)
    except ConnectionError as error:
        raise EnvironmentProblem(f"cluster.address={cluster.address}: no Ray cluster there ({error})") from error


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


async def _reserve(wanted: list[Bundle], strategy: str) -> Any:
    if not wanted:
        return None
    group = placement_group([bundle.resources() for bundle in wanted], strategy=strategy)
    try:
        async with asyncio.timeout(PLACEMENT_TIMEOUT_S):
            await group.ready()
    except TimeoutError:
        need = {key: sum(b.resources().get(key, 0.0) for b in wanted) for key in ("CPU", "GPU")}
        free = {key: ray.available_resources().get(key, 0.0) for key in ("CPU", "GPU")}
        raise EnvironmentProblem(
            f"no room for {', '.join(b.name for b in wanted)} within {PLACEMENT_TIMEOUT_S:.0f} s: "
            f"needs {need}, the cluster has {free} free"
        ) from None
    return group


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
        if engine.tensor_parallel == 1:
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the worker runs inside the engine core's process
        else:
            env["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else every worker wants a NUMA node of its own
    elif engine.v2_model_runner is not None:
        env["VLLM_USE_V2_MODEL_RUNNER"] = str(int(engine.v2_model_runner))
    return env
