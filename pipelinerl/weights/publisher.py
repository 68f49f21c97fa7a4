"""A weight update, seen from the driver: the trainer sends and every engine receives, at the same time.

begin     consumes     the trainer's weights after an optimizer step
          waits for    the update before, and until the trainer may change its weights
          unblocked by timeouts of the transport, and one above them all
its task  waits for    every engine to receive, verify and serve the version

A group of the transport has an epoch. It is built again, under the next one, when other engines are to get an update
than those in it, and when an update failed in it: what then still arrives of the old one reaches nobody. An update
that failed for some engines is tried again with them. An engine that dies, or fails twice in a row, is reported lost,
and the update goes on without it; engines that have got it serve meanwhile.
"""

import asyncio
import logging
import time
from dataclasses import dataclass, field
from typing import Any

from pipelinerl.config.schema import WeightsConfig
from pipelinerl.errors import VerificationFailed, WeightSyncError
from pipelinerl.weights.calls import Broken, Calls
from pipelinerl.weights.group import Group, Groups, SendingTrainer
from pipelinerl.weights.membership import Conduct, Members, ReceivingEngine

LOG = logging.getLogger(__name__)
NAMED = 3  # parameters that an error names; the others are counted
OVERLAPS = ("gloo",)  # transports that send a copy of the weights
SECONDS = ("pause_s", "transfer_s", "load_s", "drain_s", "exchange_s", "resume_s", "canary_s")  # of the slowest engine


@dataclass
class Progress:
    """One update, over its attempts."""

    version: int
    changed: bool | None
    started: float = field(default_factory=time.perf_counter)
    trainer_free: asyncio.Event = field(default_factory=asyncio.Event)
    sent: dict[str, Any] | None = None  # what the trainer said of what it sent
    served: dict[ReceivingEngine, dict[str, float]] = field(default_factory=dict)  # times
    attempts: int = 0
    refused: int = 0  # by a canary
    judged: bool = False  # what was sent was compared with what was sent before it
    differing: list[str] | None = None  # from that; None: not known
    error: Exception | None = None  # of the last attempt that failed


class Publisher:
    """Brings versions to engines. One update at a time."""

    def __init__(
        self, trainer: SendingTrainer, members: Members, config: WeightsConfig, backend: str, workers_per_engine: int
    ):
        self._trainer = trainer
        self._members = members
        self._config = config
        self._overlaps = backend in OVERLAPS
        self._conduct = Conduct(members)
        self._groups = Groups(trainer, self._conduct, config, backend, workers_per_engine)
        self._running: asyncio.Task[dict[str, float]] | None = None
        self._digests: list[int] | None = None  # of what was sent last
        self._unsent: bool | None = False  # whether the calls since then had weights that must differ from it

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]:
        """Bring the trainer's current weights, which are `version`, to all engines. Returns `sync/*` metrics.

        `changed` says whether they must differ from those of the call before, whether or not an engine was there to get
        them; None: not known. With the canary on that is judged too. Raises WeightSyncError when it does not hold,
        before any engine has taken them, and what the trainer raises when a rank of it failed. When no engine is left
        the update is over: who starts engines again brings them the weights of then.
        """
        return await (await self.begin(version, changed))

    async def begin(self, version: int, changed: bool | None = None) -> asyncio.Task[dict[str, float]]:
        """As `publish`, but returns as soon as the trainer may change its weights: the task brings the rest.

        Transports that send no copy of the weights are done by then.
        """
        if self._running is not None:
            await asyncio.wait([self._running])
        progress = Progress(version, _either(self._unsent, changed))
        self._unsent = progress.changed
        task = self._running = asyncio.create_task(self._update(progress), name=f"weights of version {version}")
        free = asyncio.create_task(progress.trainer_free.wait())
        try:
            await asyncio.wait([task, free], return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            task.cancel()
            raise
        finally:
            free.cancel()
        if task.done():
            await task  # raises what it raised
        return task

    async def _update(self, progress: Progress) -> dict[str, float]:
        """Attempts, until every engine that is left serves the version."""
        while waiting := self._waiting(progress):
            if progress.attempts == self._config.attempts:
                for engine in waiting:
                    assert progress.error is not None
                    self._conduct.give_up(engine, progress.error)
                continue
            progress.attempts += 1
            try:
                await self._attempt(progress, waiting)
            except Broken as broken:
                progress.error = broken.cause
                LOG.warning("weights of version %d, attempt %d: %s", progress.version, progress.attempts, broken)
                self._groups.spoil()
                await self._groups.leave()
            except BaseException:
                self._groups.spoil()
                raise
        if not progress.served:  # all are being started again: they get the weights of then
            return {"sync/version": float(progress.version), "sync/attempts": float(progress.attempts)}
        return self._metrics(progress)

    def _waiting(self, progress: Progress) -> list[ReceivingEngine]:
        return [engine for engine in self._members.members() if engine not in progress.served]

    async def _attempt(self, progress: Progress, engines: list[ReceivingEngine]) -> None:
        """Bring the version to `engines`. Raises Broken when some did not get it."""
        group = await self._groups.of(engines)
        number, info = group.next_update()
        sent: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        bringing = [self._bring(engine, group, info, progress, sent) for engine in engines]
        with Calls(engines, bringing, self._conduct) as calls:
            await self._send(group, number, progress, calls)
            sent.set_result(None)
            await calls.results(self._config.timeout_s, group.coupled)

    async def _bring(
        self,
        engine: ReceivingEngine,
        group: Group,
        info: dict[str, Any],
        progress: Progress,
        sent: "asyncio.Future[None]",
    ) -> None:
        """One engine, from the first byte until it serves the version."""
        times = await engine.update_weights(info, progress.version)
        await asyncio.shield(sent)
        assert progress.sent is not None
        digests = progress.sent.get("digests")
        try:
            times |= await engine.commit(progress.version, group.names if digests else [], digests or [])
        except VerificationFailed:
            progress.refused += 1
            raise
        progress.served[engine] = times
        self._conduct.succeeded(engine, progress.version)

    async def _send(self, group: Group, transmission: int, progress: Progress, calls: Calls[None]) -> None:
        """The trainer's part. When the transport breaks, it is an engine that broke it, if one says so in time."""
        try:
            if self._overlaps and progress.sent is not None:  # the trainer's own weights may be others by now
                await self._trainer.resend_weights(transmission)
            else:
                progress.sent = await self._trainer.send_weights(transmission)
        except WeightSyncError as error:
            await calls.grace()
            raise Broken(error) from error
        progress.sent["bytes"] = group.nbytes
        progress.sent["epoch"] = group.epoch
        if "digests" in progress.sent:
            if not progress.judged:
                self._compare(progress, group.names)
            progress.sent["parameters"] = len(group.names)
        if self._overlaps:
            progress.trainer_free.set()

    def _compare(self, progress: Progress, names: list[str]) -> None:
        """With what was sent last, whether or not an engine was left to serve that."""
        assert progress.sent is not None
        before, self._digests = self._digests, progress.sent["digests"]
        progress.judged, self._unsent = True, False
        if before is not None:
            pairs = zip(names, before, progress.sent["digests"], strict=True)
            progress.differing = [name for name, then, now in pairs if then != now]
            _judge(progress.version, progress.differing, progress.changed)

    def _metrics(self, progress: Progress) -> dict[str, float]:
        sent, received = progress.sent, list(progress.served.values())
        assert sent is not None
        metrics = {
            f"sync/{name}": max(times[name] for times in received if name in times)
            for name in SECONDS
            if any(name in times for times in received)
        }
        metrics |= {
            "sync/stage_s": sent["seconds"],
            "sync/total_s": time.perf_counter() - progress.started,
            "sync/bytes": float(sent["bytes"]),
            "sync/version": float(progress.version),
            "sync/epoch": float(sent["epoch"]),
            "sync/attempts": float(progress.attempts),
        }
        if "digests" in sent:
            metrics["sync/canary_err"] = float(progress.refused)  # times that an engine refused what it had got
            metrics["sync/params_read_back"] = min(times["params_read_back"] for times in received)
            if progress.differing is not None:
                metrics["sync/params_changed"] = len(progress.differing) / sent["parameters"]
        return metrics


def _either(before: bool | None, now: bool | None) -> bool | None:
    """Whether weights that changed so, and then so, must have changed."""
    return True if before or now else (None if None in (before, now) else False)


def _judge(version: int, differing: list[str], changed: bool | None) -> None:
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
