"""A rollout worker as a plain class: engine, episodes and graders, from start to close.

The model has the default dtypes, a bf16 body under an fp32 head, and the head is untied.

The tests share one worker and run in the order of this file: a failed update comes near the end, closing last.
"""

import multiprocessing.resource_tracker
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import pytest_asyncio

from pipelinerl.errors import WeightSyncError
from pipelinerl.types import GroupMeta, Outcome, Problem, RolloutGroup
from tests.integration.models import run_config

if TYPE_CHECKING:
    from pipelinerl.engine.worker import RolloutWorker
    from tests.integration.serving import Link

pytestmark = pytest.mark.asyncio(loop_scope="session")

PROBLEM = Problem("train/7", {"digits": "4021", "answer": "0124", "scratchpad": False})


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


@pytest.fixture(scope="module")
def others() -> set[int]:
    """Processes that are there without the worker."""
    multiprocessing.resource_tracker.ensure_running()  # stays once it is there; vLLM would start it
    return children()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def worker(untied_model: Path, others: set[int]) -> "AsyncIterator[RolloutWorker]":
    from pipelinerl.engine.worker import RolloutWorker

    sampling = {"max_tokens": 60, "temperature": 0.7}
    config = run_config(untied_model, "bfloat16", batch={"group_size": 4}, sampling=sampling)
    assert config.model.head_dtype == "float32"
    made = RolloutWorker(config, 3, "gloo")
    settings = await made.start()
    assert settings["seed"] == config.seed + 3
    yield made
    await made.close()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def link(worker: "RolloutWorker", untied_model: Path) -> "Link":
    from pipelinerl.trainer.model import load_policy
    from tests.integration.serving import Link

    policy = load_policy(run_config(untied_model, "bfloat16").model, 0.7, 1000, gradient_checkpointing=False)
    return await Link.make(policy, worker, bucket_bytes=2**20)


def mismatch(link: "Link", group: RolloutGroup, temperature: float) -> float:
    """Mean |engine - trainer| logprob of a group."""
    from tests.integration.serving import differences

    turns = [rollout.turns[0] for rollout in group.rollouts]
    prompts, completions = [turn.context.tolist() for turn in turns], [turn.completion for turn in turns]
    return differences(link.policy, prompts, completions, temperature).mean().item()


def assert_consistent(meta: GroupMeta, group: RolloutGroup, version: int) -> None:
    assert (meta.id, meta.problem_id, meta.worker) == (group.id, group.problem_id, 3)
    assert meta.seconds > 0 and meta.scored == len(meta.rollouts)
    for one, rollout in zip(meta.rollouts, group.rollouts, strict=True):
        (turn,) = rollout.turns
        sampled = len(turn.completion.tokens)
        assert (one.prompt_len, one.completion_len) == (len(turn.context), sampled)
        assert one.total_len == len(turn.context) + sampled
        assert one.tokens_by_version == {version: sampled}
        assert (one.reward, one.outcome) == (rollout.reward, rollout.outcome)
        assert one.outcome == (Outcome.OK if turn.completion.finish_reason == "stop" else Outcome.TRUNCATED)
        assert sampled <= 60 and rollout.prompt_text == "<|user|>sort 4021<|im_end|><|assistant|>"


async def test_a_rollout_is_a_group_of_samples_and_what_the_driver_needs_of_it(
    worker: "RolloutWorker", link: "Link"
) -> None:
    meta, group = await worker.rollout(11, PROBLEM)
    assert (group.id, group.problem_id, len(group.rollouts)) == (11, "train/7", 4)
    assert_consistent(meta, group, version=0)
    assert {rollout.reward for rollout in group.rollouts} == {0.0}  # a random model does not sort
    assert len({tuple(rollout.turns[0].completion.tokens.tolist()) for rollout in group.rollouts}) > 1
    assert mismatch(link, group, 0.7) < 2e-2
    assert await worker.heartbeat() == 0


async def test_evaluation_is_greedy(worker: "RolloutWorker") -> None:
    tokens = []
    for index in range(2):
        meta, group = await worker.evaluate(index, PROBLEM)
        assert_consistent(meta, group, version=0)
        (rollout,) = group.rollouts
        tokens.append(rollout.turns[0].completion.tokens.tolist())
    assert tokens[0] == tokens[1]


async def test_an_update_reaches_the_rollouts(worker: "RolloutWorker", link: "Link") -> None:
    from tests.integration.serving import disturb

    disturb(link.policy, 0.03, seed=4)
    _, group = await worker.rollout(12, PROBLEM)
    assert mismatch(link, group, 0.7) > 0.1  # the engine is a version behind the policy
    await link.send()
    meta, group = await worker.rollout(13, PROBLEM)
    assert_consistent(meta, group, version=1)
    assert mismatch(link, group, 0.7) < 2e-2
    assert await worker.heartbeat() == 1


async def test_an_update_that_does_not_arrive_changes_nothing(worker: "RolloutWorker", link: "Link") -> None:
    from tests.integration.serving import Link, disturb

    silent = await Link.make(link.policy, worker, bucket_bytes=2**20, timeout_s=1.0)
    said = r"engine 3 worker 0: the update to version 2 failed and the engine goes on .*: worker 0: parameter"
    with pytest.raises(WeightSyncError, match=said):
        await worker.update_weights(silent.manifest.to_dict() | {"transmission": 0}, 2)  # and nobody sends
    meta, group = await worker.rollout(14, PROBLEM)
    assert_consistent(meta, group, version=1)
    assert mismatch(link, group, 0.7) < 2e-2

    disturb(link.policy, 0.03, seed=5)
    again = await Link.make(link.policy, worker, bucket_bytes=2**20, version=1)
    await again.send()
    meta, group = await worker.rollout(15, PROBLEM)
    assert_consistent(meta, group, version=2)
    assert mismatch(again, group, 0.7) < 2e-2


async def test_close_leaves_no_process(worker: "RolloutWorker", others: set[int]) -> None:
    assert len(children() - others) >= 2  # the engine's core and a grader
    await worker.close()
    assert children() <= others
