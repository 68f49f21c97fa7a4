"""Evaluations on an engine of their own, while training goes on: `eval.engine=dedicated`.

    train    ──update to a due version──> engine        the engine is in no other update, and holds the version
    finish   ──problems──> engine ──metrics──> log      until its evaluation is done

    finish   consumes versions begun     waits for  the engine's completions    unblocked by  the engine, or its end
    all_done consumes nothing            waits for  finish                      at the end of training

A version that is due while the engine is still busy with another, or is gone, is missed: it is told and counted, never
evaluated late at other weights. The last version is not for this engine: training is over then, so all others are free.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from pipelinerl.config.plan import eval_versions
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EvaluationError, WorkerDied, first_line
from pipelinerl.rollout.evaluate import Evaluator


class EvalEngine(Protocol):
    """The engine that only evaluates, as evaluations see it. The evaluator's `solve` samples on it."""

    @property
    def available(self) -> bool:
        """Alive and ready to take a weight update or work."""

    @property
    def version(self) -> int | None:
        """The version whose weights it holds; None when it is not known to hold any."""


@dataclass
class DedicatedEvaluations:
    """Decides which updates the engine takes part in, and evaluates what it was brought to."""

    config: RunConfig
    evaluator: Evaluator
    engine: EvalEngine
    tell: Callable[[str], None] = print
    _begun: asyncio.Queue[int] = field(default_factory=asyncio.Queue)
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._due = set(eval_versions(self.config)) - {self.config.steps}
        self._idle.set()

    def joins(self, version: int) -> bool:
        """Whether the engine is to be in the update to `version`: to be asked before the update."""
        return version in self._due and self._idle.is_set() and self.engine.available

    def begin(self, version: int) -> None:
        """After the update to `version`: evaluate it, if it is due. Returns at once."""
        if version not in self._due:
            return
        if not self._idle.is_set():
            self._missed(version, "the evaluation before it is not done; raise eval.every, or use eval.engine=shared")
        elif self.engine.version != version:
            self._missed(version, "its engine was not there when the weights were sent")
        else:
            self._idle.clear()
            self._begun.put_nowait(version)

    async def finish(self) -> None:
        """Evaluate whatever was begun, one version after the other, for ever.

        The death of the engine costs the evaluation, not the run. Other errors end the run.
        """
        while True:
            version = await self._begun.get()
            try:
                await self.evaluator.evaluate(version)
            except (EvaluationError, WorkerDied) as error:
                self._missed(version, first_line(error))
            self._idle.set()

    async def all_done(self) -> None:
        """Wait until the evaluation that was begun is done."""
        await self._idle.wait()

    def _missed(self, version: int, why: str) -> None:
        self.evaluator.missed(version)
        self.tell(f"version {version} was not evaluated: {why}")
