"""The training loop, and the two loops that run beside it. Everything heavy is behind the parts of a `Run`.

    fill ──groups──> buffer ──groups of a step──> train ──weights──> engines
      ^                 ^                            |
      └── admission ────┴────── published(version) ──┘

    train   consumes the groups of a step      waits for  buffer.take         unblocked by  fill
    fill    consumes problems and places       waits for  buffer.admit        unblocked by  train (published)
    land    consumes updates under way         waits for  engines to serve    unblocked by  the publisher
    refit   consumes restarted engines         waits for  the trainer         unblocked by  train (between two steps)
    watch   consumes nothing                   waits for  time                ends the run when nothing is finished
    finish  consumes snapshots                 waits for  the ranks' writers  unblocked by  the disk

A step s (from 1) trains with weights of version s - 1 and makes version s. A resumed run begins after step `start`.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from pipelinerl.checkpoint.driver_state import DriverState
from pipelinerl.checkpoint.saver import Saver
from pipelinerl.concurrency import Ending, background, together
from pipelinerl.config.plan import eval_versions
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import BudgetSpent, ParityError, Stalled
from pipelinerl.metrics.history import History
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.metrics.provenance import kv_metrics
from pipelinerl.metrics.records import group_metrics
from pipelinerl.metrics.rollouts import RolloutWriter
from pipelinerl.parity.alarm import Alarm
from pipelinerl.rollout.buffer import GroupBuffer
from pipelinerl.rollout.dedicated import DedicatedEvaluations
from pipelinerl.rollout.evaluate import Evaluator
from pipelinerl.streamed import StreamedStep
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.types import FleetEvent, FloatArray, GroupMeta, Problem, RankBatch, SampleKL, StepResult
from pipelinerl.updates import StepBatches, make_batches, why_unusable

WATCH_INTERVAL_S = 2.0


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


async def train(run: Run) -> None:
    """prompt -> rollouts -> group -> advantages -> packed batch -> loss -> step -> broadcast -> engines."""
    dedicated = [run.dedicated.finish()] if run.dedicated else []
    async with background(watch(run), run.saver.finish(), land(run), *dedicated):
        await publish(run, first=True)
        if run.start == 0:
            await evaluate(run, version=0)
        async with background(fill(run), refit(run)):
            for step in range(run.start + 1, run.config.steps + 1):
                meter = Meter.start(run)
                trained = await (stream if run.config.batch.stream else whole)(run, step)
                if update_is_due(run, step):
                    await publish_after(run)
                selection, parted = run.history.audit.step(run.buffer.version)
                metrics = meter.stop(run, trained) | news_of_updates(run) | selection
                run.log.log("train", step, metrics)
                check_skipped(run, trained.result)
                check_parity(run, step, trained.result)
                check_selection(run, step, parted)
                await save(run, step, metrics | await evaluate(run, version=step))
                if run.ending.wished:
                    break
        await landed(run)
        await run.saver.all_done()
        if run.dedicated is not None:
            await run.dedicated.all_done()


async def fill(run: Run) -> None:
    """Keep as many groups in flight as the lag bound admits."""
    async with asyncio.TaskGroup() as groups:
        while True:
            ticket = await run.buffer.admit()
            problem = run.stream.at(ticket)
            run.history.admitted(ticket, problem, run.buffer.version)
            groups.create_task(roll_out(run, ticket, problem))


async def roll_out(run: Run, ticket: int, problem: Problem) -> None:
    """One group, from prompt to rewards, into the buffer. One that is unusable gives its place to another."""
    meta, payload = await run.fleet.rollout(ticket, problem)
    run.last_progress = time.monotonic()
    run.generated_tokens += sum(rollout.completion_len for rollout in meta.rollouts)
    run.history.generated(meta, run.buffer.version)
    reason = why_unusable(meta, run.config)
    if reason is None:
        run.dropped_in_a_row.clear()
        await run.buffer.put(ticket, Finished(meta, payload))
    else:
        run.history.dropped(meta, reason)
        await run.buffer.drop(ticket, reason)
        check_dropped(run, meta, reason)


def settle(run: Run, step: int, groups: Sequence[Finished], result: StepResult) -> None:
    """Note what became of the groups of a step, and of the step."""
    run.last_progress = time.monotonic()
    run.version = result.version
    run.unpublished.append(result)
    run.history.trained(step, [group.meta for group in groups], result)
    tickets = [group.meta.id for group in groups]
    if result.applied:
        run.buffer.ledger.trained(tickets, step)
    else:
        run.buffer.ledger.drop(tickets, "not_finite")


async def save(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Checkpoint and export when it is due. Groups that are open now are sampled again by a run that is resumed."""
    seconds = await run.saver.after_step(step, run.state, metrics, last=run.ending.wished)
    if seconds:
        run.log.log("run", step, seconds)
    run.last_progress = time.monotonic()


async def watch(run: Run) -> None:
    """End the run when nothing has been finished for too long."""
    limit = run.config.cluster.stall_timeout_s
    while True:
        await asyncio.sleep(min(WATCH_INTERVAL_S, limit / 4))
        if time.monotonic() - run.last_progress > limit:
            raise Stalled(
                f"no group and no step was finished for cluster.stall_timeout_s={limit:g} s "
                f"({run.buffer.running} groups running, {run.buffer.ready} ready)"
            )


def update_is_due(run: Run, step: int) -> bool:
    return step % run.config.weights.every == 0 or step == run.config.steps


async def publish_after(run: Run) -> None:
    """Publish what a step made; in the modes in which a completion is of one version, once all of them are complete.

    The trainer is free while it waits for them, so that an engine that is restarted meanwhile can be brought up.
    """
    if run.config.async_.drains:
        await landed(run)  # the update before this one admits the groups to wait for
        await run.buffer.drained()
    async with run.trainer_is_free:
        await publish(run)


async def publish(run: Run, first: bool = False) -> None:
    """Begin to bring the trainer's weights to the engines. The trainer is free to change them when this returns."""
    await landed(run)
    run.fleet.evaluator_joins = run.dedicated is not None and run.dedicated.joins(run.version)
    update = await run.publisher.begin(run.version, None if first else weights_changed(run.unpublished))
    run.unpublished.clear()
    run.landing.put_nowait((run.version, update))
    if run.config.weights.sync_mode == "blocking":
        await landed(run)


async def land(run: Run) -> None:
    """Let the groups start that an update admits, once it has reached the engines."""
    while True:
        version, update = await run.landing.get()
        start = time.perf_counter()
        run.sync = await update
        run.history.journal.updated(version, int(run.sync.get("sync/epoch", 0)), time.perf_counter() - start)
        await run.buffer.published(version)
        run.last_progress = time.monotonic()
        run.last_update = (version, run.last_progress)
        run.landing.task_done()


async def landed(run: Run) -> None:
    """Wait until the engines serve what was published."""
    await run.landing.join()


def news_of_updates(run: Run) -> dict[str, float]:
    """`sync/*` of the newest update that has landed and was not reported: `sync/version` says which one it is."""
    news, run.sync = run.sync, {}
    return news


async def refit(run: Run) -> None:
    """Bring the current weights to engines that were restarted, also while the trainer waits for groups.

    Those that have them already get them once more: one group of processes is one update.
    """
    while True:
        await run.fleet.stale()
        async with run.trainer_is_free:
            await publish(run)
        await landed(run)


def weights_changed(steps: Sequence[StepResult]) -> bool | None:
    """Whether the steps must have changed the trainer's weights (True), cannot have (False), or may have (None)."""
    moves = [step.metrics for step in steps if step.applied and step.metrics["optim/lr"] > 0]
    if not moves:
        return False
    return True if any(metrics["optim/grad_norm"] > 0 for metrics in moves) else None


async def evaluate(run: Run, version: int) -> dict[str, float]:
    """Measure the held-out problems when it is due. No update happens meanwhile, so it is that of one version.

    With an engine of its own it only begins here, but for the last version: then all other engines are free.
    """
    assert (run.dedicated is None) == (run.config.eval.engine == "shared"), run.config.eval.engine
    if version not in eval_versions(run.config):
        return {}
    await landed(run)
    if run.dedicated is not None and version < run.config.steps:
        run.dedicated.begin(version)
        run.history.journal.evaluated(version)
        return {}
    metrics = await Evaluator(run.config.eval, run.task, partial(solve, run), run.log).evaluate(version)
    run.history.journal.evaluated(version)
    return metrics


async def solve(run: Run, index: int, problem: Problem) -> GroupMeta:
    """The completions of one held-out problem."""
    meta = await run.fleet.evaluate(index, problem)
    run.last_progress = time.monotonic()
    return meta


async def prepare(run: Run, step: int, groups: Sequence[Finished]) -> StepBatches:
    """The work of the trainer. A KL in the reward is measured first, on the same completions, by the trainer."""
    metas, kl = [group.meta for group in groups], run.config.algo.kl
    batches = make_batches(metas, run.config, step)
    if not kl.on or kl.place != "reward":
        return batches
    measured = await run.trainer.reference_kl(batches.updates, [group.payload for group in groups])
    run.last_progress = time.monotonic()
    return make_batches(metas, run.config, step, measured)


@dataclass(frozen=True, slots=True)
class Trained:
    """A step that was trained on."""

    groups: list[Finished]  # in order of admission
    batches: StepBatches
    result: StepResult
    chunks: list[list[int]] | None = None  # streamed: ids of the groups that went into training together


async def whole(run: Run, step: int) -> Trained:
    """Take all groups of a step, then train on them."""
    groups = await run.buffer.take()
    async with run.trainer_is_free:
        batches = await prepare(run, step, groups)
        run.history.batch(step, [group.meta for group in groups], batches.updates)
        result, _ = await together(
            run.trainer.step(batches.updates, [group.payload for group in groups]),
            write_rollouts(run, step, groups, batches.advantages),
        )
        settle(run, step, groups, result)
    return Trained(groups, batches, result)


async def stream(run: Run, step: int) -> Trained:
    """Take and train on the groups of a step as they become ready (`batch.stream`)."""
    streamed, groups, parts = StreamedStep(run.config, step), list[Finished](), list[list[RankBatch]]()
    await run.trainer.begin_step()
    while not streamed.complete:
        chunk = await next_chunk(run, streamed)
        async with run.trainer_is_free:
            parts.append(await train_on(run, streamed, chunk))
        groups = sorted([*groups, *chunk], key=lambda group: group.meta.id)
        run.last_progress = time.monotonic()
    run.history.batch(step, [group.meta for group in groups], parts)
    async with run.trainer_is_free:
        result = await run.trainer.finish_step(streamed.scale)
        settle(run, step, groups, result)
    trained = Trained(groups, streamed.values(), result, streamed.chunks)
    await write_rollouts(run, step, groups, trained.batches.advantages)
    return trained


async def train_on(run: Run, streamed: StreamedStep, chunk: Sequence[Finished]) -> list[RankBatch]:
    """Add the gradient of some groups of a step; returns the work of every rank."""
    metas, payloads = [group.meta for group in chunk], [group.payload for group in chunk]
    batches, measured = streamed.batches(metas), None
    if run.config.algo.kl.on and run.config.algo.kl.place == "reward":
        measured = await run.trainer.reference_kl([batches], payloads)
        batches = streamed.batches(metas, measured)
    streamed.add(metas, measured)
    await run.trainer.accumulate(batches, payloads, last=streamed.complete)
    return batches


async def next_chunk(run: Run, streamed: StreamedStep) -> list[Finished]:
    """All groups that became ready meanwhile, in order of admission; more are awaited until it is worth starting."""
    chunk: list[Finished] = []
    while not streamed.worth_starting([group.meta for group in chunk]):
        chunk += await run.buffer.take_ready()
    return sorted(chunk, key=lambda group: group.meta.id)


async def write_rollouts(run: Run, step: int, groups: Sequence[Finished], advantages: Sequence[FloatArray]) -> None:
    """Write the first few groups of the step to `rollouts/`; the only token arrays the driver ever sees."""
    chosen = list(zip(groups, advantages, strict=True))[: run.config.metrics.rollout_groups_per_step]
    payloads = await together(*(_value(group.payload) for group, _ in chosen))
    records = [
        (group.meta, payload, list(map(float, weights)))
        for (group, weights), payload in zip(chosen, payloads, strict=True)
    ]
    await asyncio.to_thread(run.rollouts.write, step, records)


def tell_about_fleet(run: Run, event: FleetEvent) -> None:
    """Pass on what happens to engines."""
    run.history.engine(event)
    if event.kind != "requeued":
        run.tell(event.text)
    run.last_progress = time.monotonic()


def check_dropped(run: Run, group: GroupMeta, reason: str) -> None:
    """Give up after too many unusable groups in a row."""
    run.dropped_in_a_row[reason] += 1
    if run.dropped_in_a_row.total() >= run.config.batch.max_dropped_groups_in_a_row:
        reasons = ", ".join(f"{count} {name}" for name, count in run.dropped_in_a_row.items())
        detail = next((rollout.detail for rollout in group.rollouts if rollout.detail), "no detail")
        if reason == "zero_variance":
            detail = "its rewards are all equal; batch.zero_variance=keep trains on such groups"
        raise BudgetSpent(
            f"{run.dropped_in_a_row.total()} groups in a row were unusable (batch.max_dropped_groups_in_a_row), by "
            f"reason: {reasons}; the last one, {group.problem_id}: {detail}"
        )


def check_skipped(run: Run, result: StepResult) -> None:
    """Give up after too many non-finite steps in a row."""
    run.skipped_in_a_row = 0 if result.applied else run.skipped_in_a_row + 1
    if run.skipped_in_a_row > run.config.trainer.max_skipped_steps:
        raise BudgetSpent(
            f"{run.skipped_in_a_row} optimizer steps in a row had a non-finite loss or gradient "
            f"(trainer.max_skipped_steps={run.config.trainer.max_skipped_steps}); the weights are those before them"
        )


def check_parity(run: Run, step: int, result: StepResult) -> None:
    """Say, or with `parity.alarm=stop` end the run, when engine and trainer part, or the objective breaks down."""
    for message in run.alarm.check(result.metrics) if run.alarm else []:
        run.log.log("run", step, {"parity/alarm": 1.0})
        run.tell(f"step {step}: parity alarm, {message}")
        if run.config.parity.alarm == "stop":
            raise ParityError(f"step {step}: {message} (parity.alarm=warn goes on)")


def check_selection(run: Run, step: int, messages: Sequence[str]) -> None:
    """Say, or with `journal.selection=stop` end the run, when trained samples part from generated ones."""
    for message in messages if run.config.journal.selection != "off" else ():
        run.log.log("run", step, {"selection/alarm": 1.0})
        run.tell(f"step {step}: {message}")
        if run.config.journal.selection == "stop":
            raise BudgetSpent(f"step {step}: {message} (journal.selection=warn goes on)")


@dataclass(frozen=True, slots=True)
class Meter:
    """What a step's clock and counters stood at when it began."""

    started: float
    busy_s: float
    generated_tokens: int

    @classmethod
    def start(cls, run: Run) -> "Meter":
        return cls(time.perf_counter(), run.fleet.busy_s(), run.generated_tokens)

    def stop(self, run: Run, trained: "Trained") -> dict[str, float]:
        """All metrics of the step but those of the weight update."""
        metas, result = [group.meta for group in trained.groups], trained.result
        seconds = time.perf_counter() - self.started
        train_s = result.metrics["perf/train_s"]
        trained_tokens = sum(rollout.total_len for meta in metas for rollout in meta.rollouts)
        samples = sum(meta.scored for meta in metas)
        drops = run.buffer.dropped - run.reported_drops
        run.reported_drops = run.buffer.dropped.copy()
        return {
            **group_metrics(metas, result.version - 1, drops),
            **kv_metrics(metas, run.config.engine),
            **result.metrics,
            **trained.batches.metrics,
            "perf/step_s": seconds,
            "perf/samples_per_s": samples / seconds,
            "perf/trainer_tokens_per_s": trained_tokens / train_s,
            "perf/rollout_tokens_per_s": (run.generated_tokens - self.generated_tokens) / seconds,
            "perf/trainer_idle_frac": max(0.0, 1 - train_s / seconds),
            "perf/rollout_idle_frac": max(0.0, 1 - (run.fleet.busy_s() - self.busy_s) / seconds),
            "buffer/ready": float(run.buffer.ready),
            "buffer/running": float(run.buffer.running),
            **run.fleet.metrics(),
        }


async def _value(payload: Any) -> Any:
    return await payload
