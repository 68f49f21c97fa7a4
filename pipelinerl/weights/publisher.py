"""A weight update, seen from the driver: the trainer sends and every engine receives, at the same time.

publish   consumes     the trainer's weights after an optimizer step
          waits for    the trainer's send and every engine's pause and load, then every engine's verification
          unblocked by timeouts of the transport, and one above them all

An engine resumes only when all engines have loaded everything and its own canary found every parameter to be what the
trainer sent. With the canary off nothing is verified, and the trainer sends no digests.
"""

import asyncio
import time
from collections.abc import Coroutine, Sequence
from typing import Any, Protocol

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import WeightSyncError, WorkerDied

CAUSE_GRACE_S = 3.0  # how long the other members have to report after one has failed
NAMED = 3  # parameters that an error names; the others are counted


class SendingTrainer(Protocol):
    """The trainer, as far as weight updates go."""

    async def listen(self, backend: str) -> dict[str, Any]: ...

    async def connect_weights(self, world_size: int) -> dict[str, Any]: ...

    async def send_weights(self) -> dict[str, Any]: ...


class ReceivingEngine(Protocol):
    """A rollout worker, as far as weight updates go."""

    async def connect(self, init_info: dict[str, Any]) -> None: ...

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]: ...

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]: ...


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
        self._names: list[str] = []
        self._bytes = 0
        self._digests: list[int] | None = None  # of what was published last

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
        self._names = list(manifest["names"])
        keys = ("names", "dtype_names", "shapes") if self._backend == "nccl" else manifest.keys()
        self._update_info = {key: manifest[key] for key in keys}

    async def begin(self, version: int, changed: bool | None = None) -> asyncio.Task[dict[str, float]]:
        task = asyncio.create_task(self.publish(version, changed))
        await asyncio.wait([task])
        return task

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]:
        """Bring the trainer's current weights, which are `version`, to all engines. Returns `sync/*` metrics.

        `changed` says whether they must differ from those published last; None: not known. With the canary on that is
        judged too. Raises WeightSyncError when it does not hold, when a parameter is not what was sent, or when the
        update does not complete within `weights.timeout_s`; the engines that are not resumed by then stay paused.
        """
        deadline = time.monotonic() + self._config.timeout_s
        sent, *_ = await self._all_or_cause(
            [
                self._trainer.send_weights(),
                *(engine.update_weights(self._update_info, version) for engine in self._engines),
            ],
            version,
            deadline,
        )
        canary = "digests" in sent
        digests: list[int] = sent.get("digests", [])
        differing = self._differing(digests) if canary else None
        if differing is not None:
            _judge(version, differing, changed)
        names = self._names if canary else []
        received = await self._all_or_cause(
            [engine.commit(version, names, digests) for engine in self._engines], version, deadline
        )
        metrics = {
            "sync/pause_s": max(times["pause_s"] for times in received),
            "sync/drain_s": max(times["drain_s"] for times in received),
            "sync/transfer_s": max(times["transfer_s"] for times in received),
            "sync/send_s": sent["seconds"],
            "sync/bytes": float(self._bytes),
            "sync/version": float(version),
        }
        if canary:
            self._digests = digests
            metrics["sync/canary_s"] = max(times["canary_s"] for times in received)
            metrics["sync/canary_err"] = 0.0  # parameters found wrong; an update with any does not get here
            metrics["sync/params_read_back"] = min(times["params_read_back"] for times in received)
        if differing is not None:
            metrics["sync/params_changed"] = len(differing) / len(self._names)
        return metrics

    def _differing(self, digests: list[int]) -> list[str] | None:
        """Parameters that are not what was published last; None when nothing was."""
        if self._digests is None:
            return None
        pairs = zip(self._names, self._digests, digests, strict=True)
        return [name for name, before, now in pairs if before != now]

    async def _all_or_cause(
        self, calls: Sequence[Coroutine[Any, Any, dict[str, Any]]], version: int, deadline: float
    ) -> list[dict[str, Any]]:
        """The results of all calls. When one fails, the others fail with it: raise the error that came first in fact.

        A dead process breaks the connection of its peers, and their complaint may arrive before the news of its death.
        """
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            timeout_s = max(0.0, deadline - time.monotonic())
            await asyncio.wait(tasks, timeout=timeout_s, return_when=asyncio.FIRST_EXCEPTION)
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


def _judge(version: int, differing: Sequence[str], changed: bool | None) -> None:
    """Raise WeightSyncError when the trainer's weights changed although they must not have, or the other way round."""
    if changed is True and not differing:
        raise WeightSyncError(
            f"version {version}: lr > 0 and the step was applied, yet no parameter of the trainer changed; "
            "in bfloat16 a step that is tiny against the weights rounds away: raise trainer.lr"
        )
    if changed is False and differing:
        more = f" and {len(differing) - NAMED} more" if len(differing) > NAMED else ""
        raise WeightSyncError(
            f"version {version}: no step was applied with a learning rate above 0, yet parameters of the trainer "
            f"changed: {', '.join(differing[:NAMED])}{more}"
        )


def _errors(tasks: Sequence[asyncio.Task[Any]]) -> list[BaseException]:
    """What the finished ones among the tasks raised."""
    return [error for task in tasks if task.done() and (error := task.exception())]
