"""Weight updates, as the loop begins them and as they land.

publish   begins    an update           waits for  the one before it, and the transport's copy of the weights
land      consumes  updates under way   waits for  engines to serve          lets the groups start that it admits
refit     consumes  restarted engines   waits for  the trainer to be free    unblocked between two steps
"""

import time
from collections.abc import Sequence

from pipelinerl.training.state import Run
from pipelinerl.types import StepResult


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
