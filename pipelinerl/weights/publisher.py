"""A weight update, seen from the driver: the trainer sends and every engine receives, at the same time.

publish   consumes     the trainer's weights after an optimizer step
          waits for    the trainer's send and every engine's pause, load and resume
          unblocked by timeouts of the transport, and one above them all
"""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import WeightSyncError, WorkerDied

CAUSE_GRACE_S = 3.0  # how long the other members have to report after one has failed


class SendingTrainer(Protocol):
    """The trainer, as far as weight updates go."""

    async def listen(self, backend: str) -> dict[str, Any]: ...

    async def connect_weights(self, world_size: int) -> dict[str, Any]: ...

    async def send_weights(self) -> dict[str, float]: ...


class ReceivingEngine(Protocol):
    """A rollout worker, as far as weight updates go."""

    async def connect(self, init_info: dict[str, Any]) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]: ...


class Publisher:
    """Brings versions to engines. One update at a time."""

    def __init__(
        self,
        trainer: SendingTrainer,
        engines: Sequence[ReceivingEngine],
        config: WeightsConfig,
        backend: str,
        workers_per_engine: int,
    ):
        self._trainer = trainer
        self._engines = engines
        self._config = config
        self._backend = backend
        self._workers_per_engine = workers_per_engine
        self._update_info: dict[str, Any] = {}
        self._bytes = 0

    async def connect(self) -> None:
        """Build the group of trainer rank 0 (rank 0 there too) and every worker of every engine."""
        world_size = 1 + self._workers_per_engine * len(self._engines)
        rendezvous = await self._trainer.listen(self._backend)
        manifest, *_ = await asyncio.gather(
            self._trainer.connect_weights(world_size),
            *(
                engine.connect(
                    rendezvous | {"rank_offset": 1 + index * self._workers_per_engine, "world_size": world_size}
                )
                for index, engine in enumerate(self._engines)
            ),
        )
        self._bytes = sum(manifest["sizes"])
        keys = ("names", "dtype_names", "shapes") if self._backend == "nccl" else manifest.keys()
        self._update_info = {key: manifest[key] for key in keys}

    async def publish(self, version: int) -> dict[str, float]:
        """Bring the trainer's current weights, which are `version`, to all engines. Returns `sync/*` metrics.

        Raises WeightSyncError when it does not complete within `weights.timeout_s`; engines that did not get every
        byte stay paused.
        """
        sent, *received = await self._all_or_cause(
            [
                self._trainer.send_weights(),
                *(engine.update_weights(self._update_info, version) for engine in self._engines),
            ],
            version,
        )
        return {
            "sync/pause_s": max(times["pause_s"] for times in received),
            "sync/drain_s": max(times["drain_s"] for times in received),
            "sync/transfer_s": max(times["transfer_s"] for times in received),
            "sync/send_s": sent["seconds"],
            "sync/bytes": float(self._bytes),
            "sync/version": float(version),
        }

    async def _all_or_cause(
        self, calls: Sequence[Coroutine[Any, Any, dict[str, float]]], version: int
    ) -> list[dict[str, float]]:
        """The results of all calls. When one fails, the others fail with it: raise the error that came first in fact.

        A dead process breaks the connection of its peers, and their complaint may arrive before the news of its death.
        """
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, timeout=self._config.timeout_s, return_when=asyncio.FIRST_EXCEPTION)
            if _errors(tasks):
                await asyncio.wait(tasks, timeout=CAUSE_GRACE_S)
                raise min(_errors(tasks), key=lambda error: not isinstance(error, WorkerDied))
            if not all(task.done() for task in tasks):
                raise WeightSyncError(
                    f"the update to version {version} took more than weights.timeout_s={self._config.timeout_s:g} s"
                )
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    """What the finished ones among the tasks raised."""
    return [error for task in tasks if task.done() and (error := task.exception())]
