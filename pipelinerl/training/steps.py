"""One optimizer step of the loop: from the groups that are ready to a step that was trained on.

whole    takes all groups of a step, then trains on them
stream   trains on groups as they become ready (`batch.stream`); the gradient is the same
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from pipelinerl.concurrency import together
from pipelinerl.streamed import StreamedStep
from pipelinerl.training.state import Finished, Run, Trained
from pipelinerl.types import FloatArray, RankBatch, StepResult
from pipelinerl.updates import StepBatches, make_batches


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


async def prepare(run: Run, step: int, groups: Sequence[Finished]) -> StepBatches:
    """The work of the trainer. A KL in the reward is measured first, on the same completions, by the trainer."""
    metas, kl = [group.meta for group in groups], run.config.algo.kl
    batches = make_batches(metas, run.config, step)
    if not kl.on or kl.place != "reward":
        return batches
    measured = await run.trainer.reference_kl(batches.updates, [group.payload for group in groups])
    run.last_progress = time.monotonic()
    return make_batches(metas, run.config, step, measured)


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


async def write_rollouts(run: Run, step: int, groups: Sequence[Finished], advantages: Sequence[FloatArray]) -> None:
    """Write the first few groups of the step to `rollouts/`; the only token arrays the driver ever sees."""
    chosen = list(zip(groups, advantages, strict=True))[: run.config.metrics.rollout_groups_per_step]
    payloads = await together(*(_value(group.payload) for group, _ in chosen))
    records = [
        (group.meta, payload, list(map(float, weights)))
        for (group, weights), payload in zip(chosen, payloads, strict=True)
    ]
    await asyncio.to_thread(run.rollouts.write, step, records)


async def _value(payload: Any) -> Any:
    return await payload
