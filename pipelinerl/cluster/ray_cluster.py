"""Ray: start or join a cluster, reserve resources, start the workers, and leave nothing behind."""

import asyncio
import logging
import os
import signal
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group

from pipelinerl.cluster.placement import Bundle, bundles
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem, first_line

PLACEMENT_TIMEOUT_S = 60.0
CLOSE_TIMEOUT_S = 40.0


class RayCluster:
    """The processes of one run."""

    def __init__(self, config: RunConfig, run_dir: Path, device: str):
        self._config = config
        self._logs = (run_dir / "logs").resolve()
        self._device = device
        self._workers: list[RemoteWorker] = []
        self._engine_bundles: list[Bundle] = []
        self._engine_group: Any = None
        self._started: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start a local cluster, or join the one at `cluster.address`."""
        # In a thread, so that signals are handled meanwhile. `close` waits for it: half a start cannot be undone.
        self._started = asyncio.create_task(asyncio.to_thread(_init_ray, self._config))
        await asyncio.shield(self._started)
        # Ray puts a handler of its own before Python's, which prints a C++ stack for every SIGTERM: put ours back.
        for which in (signal.SIGINT, signal.SIGTERM):
            signal.signal(which, signal.getsignal(which))

    async def place_workers(self, backend: str) -> tuple[list[RemoteWorker], list[RemoteWorker]]:
        """Reserve what all processes need, then start them. Returns (trainer ranks, rollout workers).

        Raises EnvironmentProblem that says what the cluster lacks.
        """
        config = self._config
        trainer_bundles, engine_bundles = bundles(config, self._device, ray.cluster_resources().get("CPU", 1.0))
        trainer_group = await _reserve(trainer_bundles, "PACK")
        engine_group = await _reserve(engine_bundles, "SPREAD")
        trainers = self._start_trainers(trainer_bundles, trainer_group)
        self._engine_bundles, self._engine_group = engine_bundles, engine_group
        engines = self._start_engines(config, backend)
        return trainers, engines

    async def place_trainer(self) -> list[RemoteWorker]:
        """The same for the trainer ranks alone."""
        trainer_bundles, _ = bundles(self._config, self._device, ray.cluster_resources().get("CPU", 1.0))
        return self._start_trainers(trainer_bundles, await _reserve(trainer_bundles, "PACK"))

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

    def _start_trainers(self, trainer_bundles: list[Bundle], group: Any) -> list[RemoteWorker]:
        target = "pipelinerl.trainer.worker:TrainerWorker"
        return [
            self._start(bundle, i, group, target, (self._config, i, self._device))
            for i, bundle in enumerate(trainer_bundles)
        ]

    def _start_engines(self, config: RunConfig, backend: str) -> list[RemoteWorker]:
        target = "pipelinerl.engine.worker:RolloutWorker"
        return [
            self._start(bundle, i, self._engine_group, target, (config, i, backend), is_async=True)
            for i, bundle in enumerate(self._engine_bundles)
        ]

    def _start(
        self, bundle: Bundle, index: int, group: Any, target: str, args: tuple[Any, ...], is_async: bool = False
    ) -> RemoteWorker:
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
    try:
        common.pop("include_dashboard")
        ray.init(address=cluster.address, **common)
    except ConnectionError as error:
        raise EnvironmentProblem(f"cluster.address={cluster.address}: no Ray cluster there ({error})") from error


async def _reserve(wanted: list[Bundle], strategy: str) -> Any:
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
