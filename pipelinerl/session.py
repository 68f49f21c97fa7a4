"""The running processes of a run: Ray, engines, trainer ranks and the weight transport between them.

`open_session` starts them and leaves none behind, whatever happens meanwhile. `until_done_or_signal` is the frame
around everything that uses a session.
"""

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelinerl.cluster.fleet import Fleet
from pipelinerl.cluster.placement import Process
from pipelinerl.cluster.ray_cluster import RayCluster
from pipelinerl.cluster.trainer_group import TrainerGroup
from pipelinerl.concurrency import Ending, background, together
from pipelinerl.config.device import Device, resolve_backend
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_SIGINT, EXIT_SIGTERM, PipelineRLError
from pipelinerl.weights.publisher import Publisher

SIGNAL_EXITS = {signal.SIGINT: EXIT_SIGINT, signal.SIGTERM: EXIT_SIGTERM}


def until_done_or_signal(work: Coroutine[Any, Any, int], ending: Ending | None = None) -> int:
    """Run `work` in an event loop of its own and return its exit code; SIGINT and SIGTERM cancel it (130, 143).

    With `ending`, SIGTERM wishes for the end and gives the work its patience. A second signal cancels at once.
    Raises what `work` raises.
    """
    return asyncio.run(_watched(work, ending or Ending()))


async def _watched(work: Coroutine[Any, Any, int], ending: Ending) -> int:
    received: list[signal.Signals] = []
    cancelled: list[bool] = []
    task = asyncio.create_task(work)

    def stop(which: signal.Signals) -> None:
        received.append(which)
        ending.exit_code = SIGNAL_EXITS[received[0]]
        if len(received) == 1 and which is signal.SIGTERM and ending.patience_s:
            print(f"\n{which.name}: a last checkpoint, within {ending.patience_s:g} s", file=sys.stderr, flush=True)
            ending.wished = True
            asyncio.get_running_loop().call_later(ending.patience_s, cancel)
        else:
            cancel()

    def cancel() -> None:
        if not cancelled and not task.done():
            print(f"\n{received[0].name}: stopping the workers", file=sys.stderr, flush=True)
            cancelled.append(True)
            task.cancel()

    for which in SIGNAL_EXITS:
        asyncio.get_running_loop().add_signal_handler(which, stop, which)
    try:
        code = await task
        return SIGNAL_EXITS[received[0]] if ending.wished else code
    except (asyncio.CancelledError, PipelineRLError) as error:
        if not received:
            raise
        if str(error):  # of a worker that the signal reached first, or of the end that it came into
            print(f"pipelinerl: {error}", file=sys.stderr, flush=True)
        return SIGNAL_EXITS[received[0]]


@dataclass
class Session:
    """Engines that serve version 0 and a trainer that holds it, connected. `settings` is what is really in force.

    What the session was opened without is there, and empty.
    """

    config: RunConfig
    device: Device
    backend: str
    cluster: RayCluster
    trainer: TrainerGroup
    fleet: Fleet
    publisher: Publisher
    settings: dict[str, Any]

    async def replace_engines(self, config: RunConfig) -> None:
        """New engines with the engine settings of `config`, at version 0; the trainer stays as it is."""
        self.settings["engines"] = await self.fleet.replace(config)
        self.publisher = _publisher(self.trainer, self.fleet, config, self.backend)

    async def replace_trainer(self) -> None:
        """New trainer ranks, with the weights of model.path. No engine serves before the next update reaches it."""
        await self.fleet.abandon()
        await self.trainer.restart()
        self.publisher = _publisher(self.trainer, self.fleet, self.config, self.backend)

    def write_settings(self, run_dir: Path, tell: Callable[[str], None]) -> None:
        """Write `settings` to settings.json, and again when a process moves to another node, which `tell` is told."""
        path = run_dir / "settings.json"

        def write() -> None:
            path.write_text(json.dumps(self.settings, indent=2) + "\n")

        def moved(process: Process) -> None:
            tell(f"{process.name} moved to {process.node.name}")
            self.settings["placement"] = self.cluster.places()
            try:
                write()
            except OSError as error:
                tell(f"{path} could not be written: {error}")

        self.cluster.listener = moved
        write()


@asynccontextmanager
async def open_session(
    config: RunConfig, run_dir: Path, status: Callable[[str], None], engines: bool = True, trainer: bool = True
) -> AsyncIterator[Session]:
    """Start everything, with logs below `run_dir`; `status` is told what is being waited for.

    Without `engines` or without `trainer` the other is alone, and no weights travel.
    """
    cluster = RayCluster(config, run_dir)
    try:
        status(f"run directory {run_dir}; starting Ray")
        await cluster.start()
        placement = await cluster.reserve(engines, trainer)
        device = cluster.device
        backend = resolve_backend(config, device, placement.shares_gpu)
        cluster.use_transport(backend)
        status(f"starting {' and '.join(['engines'] * engines + ['trainer'] * trainer)}")
        fleet = Fleet(cluster, config, config.engines if engines else 0)
        group = TrainerGroup(cluster.start_ranks, config.trainer)
        engine_settings, trainer_settings = await together(fleet.start(), group.setup() if trainer else _nothing())
        settings = {
            "device": device,
            "weights_backend": backend,
            "placement": cluster.places(),
            "engines": engine_settings,
            "trainer": trainer_settings,
        }
        publisher = _publisher(group, fleet, config, backend)
        async with background(fleet.supervise(), group.supervise()):
            yield Session(config, device, backend, cluster, group, fleet, publisher, settings)
        status("stopping the workers")
    finally:
        await _to_the_end(cluster.close)


def _publisher(trainer: TrainerGroup, fleet: Fleet, config: RunConfig, backend: str) -> Publisher:
    """It connects trainer and engines at its first update, so it does no harm where one of them is not there."""
    return Publisher(trainer, fleet, config.weights, backend, config.engine.workers)


async def _nothing() -> dict[str, Any]:
    return {}


async def _to_the_end(close: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Close, whatever signal arrives meanwhile: a clean-up that is cut short would leave processes behind."""
    closing = asyncio.create_task(close())
    while not closing.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([closing])
    closing.result()
