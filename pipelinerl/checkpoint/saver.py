"""Checkpoints and exports while training goes on.

    after_step   copies the state out of the trainer    waits for  the copy, and the checkpoint before this one
    finish       completes checkpoints on disk          waits for  a copy, then the ranks' writing threads

Only the copy holds training up. Each rank writes its share from a thread of its own; when all have, the driver adds its
part and the manifest. A rank answers between steps only, so a checkpoint is complete one step after its own at the
latest. A write that fails ends the run: a run that believes in checkpoints it does not have is worse.
"""

import asyncio
import math
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import yaml

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.manifest import FileRecord, secured
from pipelinerl.checkpoint.store import CheckpointStore, step_name
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem

CONFIG = "config.yaml"
POLL_S = 0.1


class SavingTrainer(Protocol):
    """The trainer ranks, as checkpoints need them."""

    async def snapshot(self, folder: str) -> None:
        """Copy the state of the trainer and begin to write it into `folder`."""

    async def checkpoint_poll(self) -> Mapping[str, FileRecord] | None:
        """What all ranks wrote, on the disk; None while one is writing. Raises EnvironmentProblem when one failed."""

    async def export(self, target: str) -> None:
        """Write a model directory."""


@dataclass
class Saver:
    """Saves when it is due. `finish` runs beside training and completes what `after_step` began."""

    config: RunConfig
    store: CheckpointStore
    trainer: SavingTrainer
    exports: Path  # folder
    tell: Callable[[str], None] = print
    wandb_id: str = ""
    _begun: asyncio.Queue[tuple[Path, DriverState, float | None]] = field(default_factory=asyncio.Queue)

    async def after_step(
        self, step: int, state_at: Callable[[int], DriverState], metrics: Mapping[str, float], last: bool = False
    ) -> dict[str, float]:
        """Begin a checkpoint and export the model, if either is due. `metrics` are those of the step.

        `state_at`: asked for the driver's state only if a checkpoint is due, for it lists every prompt of the run.
        `last`: the run ends here, so a checkpoint is due.

        Returns what there is to log: the seconds that training was held up.
        """
        start, every, done = time.perf_counter(), self.config.checkpoint.export_every, {}
        if self._due(step, last):
            state = state_at(step)
            await self.all_done()
            staged = await asyncio.to_thread(self._stage, step)
            await self.trainer.snapshot(str(staged.resolve()))
            self._begun.put_nowait((staged, state, self._metric(metrics)))
            done["checkpoint/held_s"] = time.perf_counter() - start
        if every and step % every == 0:
            start = time.perf_counter()
            target = self.exports / step_name(step)
            shutil.rmtree(target, ignore_errors=True)  # of a run that went this far before it was resumed
            self.exports.mkdir(parents=True, exist_ok=True)
            await self.trainer.export(str(target.resolve()))
            done["checkpoint/export_s"] = time.perf_counter() - start
        return done

    def _due(self, step: int, last: bool) -> bool:
        """Every `checkpoint.every` steps, and at the end: more steps can be added later."""
        every = self.config.checkpoint.every
        return every > 0 and (last or step % every == 0 or step == self.config.steps)

    def _stage(self, step: int) -> Path:
        try:
            return self.store.stage(step)
        except OSError as error:
            raise _not_written(step, error) from error

    async def finish(self) -> None:
        """Complete whatever `save` begins, one after the other, for ever."""
        while True:
            staged, state, metric = await self._begun.get()
            while (files := await self.trainer.checkpoint_poll()) is None:
                await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self._complete, staged, state, files, metric)
            self._begun.task_done()

    async def all_done(self) -> None:
        """Wait until every checkpoint that was begun is complete."""
        await self._begun.join()

    def _complete(
        self, staged: Path, state: DriverState, files: Mapping[str, FileRecord], metric: float | None
    ) -> None:
        try:
            config = staged / CONFIG
            config.write_text(yaml.safe_dump(self.config.dump(), sort_keys=False))
            own = {path.name: secured(path) for path in (state.write(staged), config)}
            self.store.commit(staged, state.step, {**files, **own}, metric)
        except OSError as error:
            raise _not_written(state.step, error) from error

    def _metric(self, metrics: Mapping[str, float]) -> float | None:
        if not self.config.checkpoint.keep_best:
            return None
        name = self.config.checkpoint.best_metric
        value = metrics.get(name)
        if value is None or not math.isfinite(value):
            self.tell(f"checkpoint.best_metric={name} has no value at this step, so this checkpoint cannot be the best")
            return None
        return value


def _not_written(step: int, error: OSError) -> EnvironmentProblem:
    return EnvironmentProblem(
        f"the checkpoint of step {step} could not be written: {error}; make room, or set checkpoint.every=0"
    )
