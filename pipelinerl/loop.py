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
from dataclasses import dataclass
from functools import partial

from pipelinerl.concurrency import background, nap
from pipelinerl.config.plan import eval_versions
from pipelinerl.errors import Stalled
from pipelinerl.metrics.provenance import kv_metrics
from pipelinerl.metrics.records import group_metrics
from pipelinerl.rollout.evaluate import Evaluator
from pipelinerl.training.checks import check_dropped, check_parity, check_selection, check_skipped
from pipelinerl.training.publishing import (
    land,
    landed,
    news_of_updates,
    publish,
    publish_after,
    refit,
    update_is_due,
)
from pipelinerl.training.state import Finished, Run, Trained
from pipelinerl.training.steps import stream, whole
from pipelinerl.types import GroupMeta, Problem
from pipelinerl.updates import why_unusable

WATCH_INTERVAL_S = 2.0


async def train(run: Run) -> None:
    """prompt -> rollouts -> group -> advantages -> packed batch -> loss -> step -> broadcast -> engines."""
    dedicated = [run.dedicated.finish()] if run.dedicated else []
    async with background(watch(run), run.saver.finish(), land(run), *dedicated):
        await publish(run, first=True)
        await landed(run)  # what engines served before, in a probe or before a restart, is not of this run
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


async def watch(run: Run) -> None:
    """End the run when nothing has been finished for too long, while this process was not itself stopped."""
    limit = run.config.cluster.stall_timeout_s
    while True:
        stood_still = await nap(min(WATCH_INTERVAL_S, limit / 4))
        run.last_progress += stood_still
        if time.monotonic() - run.last_progress > limit:
            raise Stalled(
                f"no group and no step was finished for cluster.stall_timeout_s={limit:g} s "
                f"({run.buffer.running} groups running, {run.buffer.ready} ready)"
            )


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


async def save(run: Run, step: int, metrics: dict[str, float]) -> None:
    """Checkpoint and export when it is due. Groups that are open now are sampled again by a run that is resumed."""
    seconds = await run.saver.after_step(step, run.state, metrics, last=run.ending.wished)
    if seconds:
        run.log.log("run", step, seconds)
    run.last_progress = time.monotonic()


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
