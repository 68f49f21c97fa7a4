"""What a training run consists of: its parts, as the loops use them, and the little state that the loops share."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.saver import Saver
from pipelinerl.concurrency import Ending
from pipelinerl.config.schema import RunConfig
from pipelinerl.metrics.history import History
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.parity.alarm import Alarm
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.rollout.dedicated import DedicatedEvaluations
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.types import GroupMeta, Problem, RankBatch, SampleKL, StepResult
from pipelinerl.updates import StepBatches


class Rollouts(Protocol):
    """The engines, as the loop uses them. A payload is a reference to a RolloutGroup."""

    async def rollout(self, group_id: int, problem: Problem) -> tuple[GroupMeta, Any]: ...

    async def evaluate(self, group_id: int, problem: Problem) -> GroupMeta: ...

    async def stale(self) -> None:
        """Wait until an engine needs the current weights."""

    evaluator_joins: bool  # whether the engine that only evaluates, if there is one, is in the next update

    def busy_s(self) -> float: ...

    def metrics(self) -> dict[str, float]: ...


class Trainer(Protocol):
    """The trainer ranks, as the loop uses them."""

    async def step(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> StepResult: ...

    async def begin_step(self) -> None: ...

    async def accumulate(self, batches: Sequence[RankBatch], payloads: Sequence[Any], last: bool) -> None: ...

    async def finish_step(self, scale: float) -> StepResult: ...

    async def reference_kl(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> list[SampleKL]: ...


class WeightPublisher(Protocol):
    """Weight updates, as the loop uses them."""

    async def begin(self, version: int, changed: bool | None = None) -> asyncio.Task[dict[str, float]]:
        """Return when the trainer may change its weights again. The task ends when the engines serve `version`."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A group that waits to be trained on."""

    meta: GroupMeta
    payload: Any


@dataclass(frozen=True, slots=True)
class Trained:
    """A step that was trained on."""

    groups: list[Finished]  # in order of admission
    batches: StepBatches
    result: StepResult
    chunks: list[list[int]] | None = None  # streamed: ids of the groups that went into training together


@dataclass
class Run:
    """The parts of a run, and the little state that the loops share."""

    config: RunConfig
    task: Task
    stream: ProblemStream
    buffer: GroupBuffer[Finished]
    fleet: Rollouts
    trainer: Trainer
    publisher: WeightPublisher
    log: MetricsLog
    rollouts: RolloutWriter
    saver: Saver
    history: History
    start: int = 0  # steps that were done before
    alarm: Alarm | None = None
    dedicated: DedicatedEvaluations | None = None  # with eval.engine=dedicated
    tell: Callable[[str], None] = print  # a line for the person who watches
    ending: Ending = field(default_factory=Ending)
    generated_tokens: int = 0
    reported_drops: Counter[str] = field(default_factory=Counter)  # those that are in the log already
    dropped_in_a_row: Counter[str] = field(default_factory=Counter)  # by reason
    skipped_in_a_row: int = 0
    version: int = 0  # of the trainer's weights
    trainer_is_free: asyncio.Lock = field(default_factory=asyncio.Lock)  # between its steps, and what belongs to them
    unpublished: list[StepResult] = field(default_factory=list)  # of the steps since the last weight update
    landing: asyncio.Queue[tuple[int, asyncio.Task[dict[str, float]]]] = field(default_factory=asyncio.Queue)
    sync: dict[str, float] = field(default_factory=dict)  # metrics of the last update that is not logged yet
    last_progress: float = field(default_factory=time.monotonic)
    last_update: tuple[int, float] = field(default_factory=lambda: (0, time.monotonic()))  # version, when it was done

    def resume(self, state: DriverState) -> None:
        """Go on where the run was whose state this is. The buffer has got its part of it."""
        self.start = self.version = state.step
        self.generated_tokens = state.generated_tokens
        self.reported_drops = Counter(state.reported_drops)
        self.dropped_in_a_row = Counter(state.dropped_in_a_row)
        self.skipped_in_a_row = state.skipped_in_a_row

    def state(self, step: int) -> DriverState:
        """What `resume` needs, at the end of optimizer step `step`."""
        return DriverState(
            step=step,
            ledger=self.buffer.ledger.to_dict(),
            elapsed_s=self.log.elapsed_s,
            generated_tokens=self.generated_tokens,
            dropped_in_a_row=dict(self.dropped_in_a_row),
            skipped_in_a_row=self.skipped_in_a_row,
            reported_drops=dict(self.reported_drops),
            wandb_id=self.saver.wandb_id,
        )
