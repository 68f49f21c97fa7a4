"""The training loop and the loops beside it, on fakes: order, overlap, endings and what is written."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest
from pydantic import ValidationError

from pipelinerl import loop
from pipelinerl.concurrency import background
from pipelinerl.errors import BudgetSpent, EnvironmentProblem, PipelineRLError, Stalled, WorkerDied
from pipelinerl.loop import train
from pipelinerl.metrics.log import read_metrics
from pipelinerl.metrics.rollouts import read_rollouts
from pipelinerl.rollout.ledger import Ledger
from pipelinerl.tasks.stream import ProblemStream
from pipelinerl.training import publishing, steps
from pipelinerl.training.state import Trained
from pipelinerl.types import Outcome, Problem, SampleKL
from tests.unit.fakes import (
    COMPLETION_TOKENS,
    PROMPT_TOKENS,
    SECONDS,
    FakeRun,
    Gate,
    fake_run,
    references,
    settle,
    small_config,
    until,
)

TOO_LONG = Outcome.PROMPT_TOO_LONG
OK, ERROR, ABORT, TIMEOUT = Outcome.OK, Outcome.ENV_ERROR, Outcome.INFRA_ABORT, Outcome.VERIFIER_TIMEOUT
BAD = Outcome.BAD_LOGPROB

# The watchdog must be the last to lose patience, or the configuration is refused.
STALL_SOON = (
    "trainer.step_timeout_s=0.2",
    "trainer.hang_timeout_s=0.2",
    "weights.timeout_s=0.2",
    "engine.hang_timeout_s=0.2",
    "engine.start_timeout_s=0.2",
    "trainer.start_timeout_s=0.2",
    "grading.timeout_s=0.2",
)


@asynccontextmanager
async def training(run: FakeRun) -> AsyncIterator["asyncio.Task[None]"]:
    """`train` as a task, ended when the test ends."""
    task = asyncio.create_task(train(run))
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait([task])


async def finish(run: FakeRun) -> None:
    async with asyncio.timeout(SECONDS):
        await train(run)


async def error_of(run: FakeRun) -> BaseException:
    """The error that training ends with; nothing of the run may be left behind."""
    before = asyncio.all_tasks()
    with pytest.raises(PipelineRLError) as caught:
        await finish(run)
    assert asyncio.all_tasks() == before
    return caught.value


def lines(run: FakeRun, kind: str) -> list[dict[str, Any]]:
    return [record for record in read_metrics(run.log.path) if record["kind"] == kind]


def trained_ids(run: FakeRun) -> list[list[int]]:
    return [[group.id for group in groups] for groups in run.trainer.groups]


# What a run does, in order


async def test_steps_train_on_groups_in_order_of_admission_and_each_is_published(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "weights.sync_mode=blocking")
    await finish(run)
    assert trained_ids(run) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert run.publisher.published == [0, 1, 2, 3, 4]
    assert [(line["step"], line["optim/loss"], line["sync/version"]) for line in lines(run, "train")] == [
        (1, 1.0, 1.0),
        (2, 2.0, 2.0),
        (3, 3.0, 3.0),
        (4, 4.0, 4.0),
    ]


async def test_nothing_is_sampled_before_the_engines_have_the_weights_of_the_run(tmp_path: Path) -> None:
    """A probe before it left versions of its own in them, and so did what a lost trainer published last."""
    run = fake_run(tmp_path, "eval.at_start=false")
    on_its_way = run.publisher.gates[0] = Gate()
    on_its_way.close()
    async with training(run) as task:
        await until(lambda: on_its_way.arrived > 0)
        await settle()
        assert run.fleet.started == []
        on_its_way.open()
        await task


@pytest.mark.parametrize("mode", ["overlap", "blocking"])
async def test_the_next_step_does_not_wait_for_the_engines_unless_told_to(tmp_path: Path, mode: str) -> None:
    run = fake_run(tmp_path, f"weights.sync_mode={mode}")
    on_its_way = run.publisher.gates[1] = Gate()
    on_its_way.close()
    async with training(run) as task:
        await until(lambda: on_its_way.arrived > 0)
        await settle()
        assert run.trainer.done == (2 if mode == "overlap" else 1), (
            "one update at a time: step 2 waits to publish its own"
        )
        assert run.publisher.published == [0]
        assert max(run.fleet.started) == 5, "version 1 admits nothing before it is served: 3 steps of 2 groups at lag 2"
        on_its_way.open()
        await task
    assert run.publisher.published == [0, 1, 2, 3, 4]
    reported = [int(line["sync/version"]) for line in lines(run, "train") if "sync/version" in line]
    assert reported == sorted(set(reported)), "each at most once, in order"


@pytest.mark.parametrize(("every", "published"), [(2, [0, 2, 4, 5]), (3, [0, 3, 5]), (9, [0, 5])])
async def test_weights_are_published_every_k_steps_and_after_the_last(
    tmp_path: Path, every: int, published: list[int]
) -> None:
    run = fake_run(
        tmp_path, "steps=5", f"weights.every={every}", f"async.max_lag={every}", "weights.sync_mode=blocking"
    )
    await finish(run)
    assert run.publisher.published == published
    with_update = [(line["step"], line["sync/version"]) for line in lines(run, "train") if "sync/version" in line]
    assert with_update[0] == (1, 0) and with_update[1:] == [(step, step) for step in published[1:]]


LR_0, NO_GRADIENT = {"optim/lr": 0.0}, {"optim/grad_norm": 0.0}


@pytest.mark.parametrize(
    ("metrics", "skips", "changed"),
    [
        ({}, set(), [True, True]),
        ({1: LR_0, 2: LR_0}, set(), [False, True]),  # a warm-up
        ({1: LR_0}, set(), [True, True]),  # one step of two is enough
        ({}, {1, 2}, [False, True]),
        ({4: LR_0}, {3}, [True, False]),
        ({1: NO_GRADIENT, 2: NO_GRADIENT}, set(), [None, True]),  # momentum and weight decay may have moved them
        ({3: NO_GRADIENT, 4: LR_0}, set(), [True, None]),
        ({3: {"optim/grad_norm": float("nan")}, 4: LR_0}, {3}, [True, False]),
    ],
)
async def test_an_update_knows_whether_the_steps_since_the_last_one_moved_the_weights(
    tmp_path: Path, metrics: dict[int, dict[str, float]], skips: set[int], changed: list[bool | None]
) -> None:
    run = fake_run(tmp_path, "weights.every=2")
    run.trainer.metrics, run.trainer.skips = metrics, skips
    await finish(run)
    assert run.publisher.published == [0, 2, 4]
    assert run.publisher.changed == [None, *changed]  # version 0 is what the engines have already


@pytest.mark.parametrize("lag", [0, 1, 3])
async def test_no_token_is_older_than_the_bound_and_the_bound_is_used(tmp_path: Path, lag: int) -> None:
    run = fake_run(tmp_path, f"async.max_lag={lag}", "steps=8")
    await finish(run)
    oldest = [line["staleness/max"] for line in lines(run, "train")]
    # At step s (trained by version s - 1) a group can be s - 1 versions old, from the start of the run, or `lag`.
    # These engines answer at once, so that the oldest groups are as old as that.
    assert oldest == [min(step, lag) for step in range(8)]


async def test_evaluations_are_of_one_version_each_while_training_groups_go_on(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "eval.every=2", "steps=5")
    await finish(run)
    assert run.fleet.evaluated == [(version, f"eval/{i}") for version in (0, 2, 4, 5) for i in range(3)]
    for line, version in zip(lines(run, "eval"), (0, 2, 4, 5), strict=True):
        assert line["step"] == version
        assert line["eval/fake/accuracy"] == pytest.approx(1 / 3)  # the fake solves the first of three
        assert (line["eval/fake/problems"], line["eval/fake/errored"]) == (3, 0)
        assert line["eval/fake/tokens_mean"] == COMPLETION_TOKENS


async def test_with_rarer_updates_only_versions_that_engines_get_can_be_evaluated(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "weights.every=2", "eval.every=4", "steps=9")
    await finish(run)
    assert sorted({version for version, _ in run.fleet.evaluated}) == [0, 4, 8, 9]
    with pytest.raises(ValidationError, match=r"eval\.every=3 with weights\.every=2: version 3 never reaches"):
        small_config("weights.every=2", "eval.every=3")


async def test_version_0_is_evaluated_before_anything_is_generated(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.fleet.eval_gate.close()
    async with training(run) as task:
        await until(lambda: run.fleet.eval_gate.arrived == 3)
        await settle()
        assert run.fleet.started == [] and run.publisher.published == [0]
        run.fleet.eval_gate.open()
        await task


async def test_no_update_happens_during_an_evaluation(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "eval.every=1", "eval.at_start=false")
    run.fleet.eval_gate.close()
    async with training(run) as task:
        await until(lambda: run.fleet.eval_gate.arrived == 3)
        await settle()
        assert run.publisher.published == [0, 1]
        assert len(run.fleet.finished) > 2  # generation goes on
        run.fleet.eval_gate.open()
        await task


@pytest.mark.parametrize(("overrides", "held_out"), [(["eval.at_start=false", "eval.at_end=false"], 3), ([], 0)])
async def test_nothing_to_evaluate_is_no_line_at_all(tmp_path: Path, overrides: list[str], held_out: int) -> None:
    run = fake_run(tmp_path, *overrides, held_out=held_out)
    await finish(run)
    assert lines(run, "eval") == []


# Overlap


async def test_async_generation_goes_on_while_a_step_is_held_up(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.max_lag=1", "steps=6")
    held = run.trainer.gates[2] = Gate()
    held.close()
    async with training(run) as task:
        await until(lambda: held.arrived == 1)
        await settle()
        # Engines serve version 1, so places up to (1 + 1 + 1) * 2 are out, and all of them finish under step 2.
        assert run.fleet.finished == list(range(6))
        assert trained_ids(run) == [[0, 1], [2, 3]]
        held.open()
        await task
    assert run.fleet.started == list(range(12))


async def test_groups_finish_during_a_step_and_across_an_update(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.max_lag=1", "steps=3")
    held = run.trainer.gates[1] = Gate()
    held.close()
    async with training(run) as task:
        await until(lambda: held.arrived == 1)
        await settle()
        assert (run.fleet.started, run.fleet.finished) == ([0, 1, 2, 3], [0, 1, 2, 3])
        run.fleet.gate.close()  # from here on groups take long
        held.open()
        await until(lambda: run.fleet.gate.arrived == 6)  # 4 and 5 started under version 1
        await until(lambda: run.publisher.published[-1] == 2)
        run.fleet.gate.open()
        await task
    # Groups 4 and 5: one token of 3 by version 1 and two by version 2, which trains them: 1/3 of the tokens has lag 1.
    last = lines(run, "train")[-1]
    assert (last["step"], last["staleness/max"], last["staleness/multi_version_frac"]) == (3, 1, 1)
    assert last["staleness/mean"] == pytest.approx(1 / 3)


async def test_sync_generation_stands_still_during_step_and_update(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.mode=sync")
    step, update = run.trainer.gates[2], run.publisher.gates[2] = Gate(), Gate()
    step.close()
    update.close()
    async with training(run) as task:
        await until(lambda: step.arrived == 1)
        await settle()
        assert run.fleet.started == [0, 1, 2, 3]
        step.open()
        await until(lambda: update.arrived == 1)
        await settle()
        assert run.fleet.started == [0, 1, 2, 3]
        update.open()
        await task
    assert run.fleet.started == list(range(8))
    assert all(line["staleness/max"] == 0 for line in lines(run, "train"))


def in_random_order(run: FakeRun, seed: int) -> None:
    """Groups finish after a random number of turns of the event loop, steps and updates too."""
    random = Random(seed)

    async def pass_through() -> None:
        for _ in range(random.randrange(30)):
            await asyncio.sleep(0)

    run.fleet.gate.pass_through = pass_through  # type: ignore[method-assign]
    for gates in (run.trainer.gates, run.publisher.gates):
        for step in range(run.config.steps + 1):
            gates[step] = Gate()
            gates[step].pass_through = pass_through  # type: ignore[method-assign]


MODES = ["async.mode=sync", "async.mode=one_step_off", "async.max_lag=1", "async.max_lag=3"]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("mode", "every"), [*((mode, 1) for mode in MODES), *((mode, 2) for mode in MODES[2:])])
async def test_the_bound_holds_and_nothing_locks_up_whatever_finishes_first(
    tmp_path: Path, mode: str, every: int, seed: int
) -> None:
    """With errored and zero-variance groups that are replaced, and with fewer prompts than a batch."""
    run = fake_run(tmp_path, mode, f"weights.every={every}", "batch.zero_variance=refill", "steps=8")
    run.stream = ProblemStream(run.task.problems("train")[:1], seed)
    random = Random(seed)
    ends = {ticket: random.choice(["ok", "ok", "ok", "errored", "half", "equal"]) for ticket in range(200)}
    run.fleet.outcomes = lambda t: {"errored": [ERROR, ABORT], "half": [OK, BAD]}.get(ends[t], [OK, OK])
    run.fleet.rewards = lambda t: [1.0, 1.0] if ends[t] == "equal" else [0.0, 1.0]
    in_random_order(run, seed)
    await finish(run)
    assert [t for ids in trained_ids(run) for t in ids] == [t for t, end in ends.items() if end == "ok"][:16]
    oldest = [line["staleness/max"] for line in lines(run, "train")]
    assert all(lag <= min(step, run.config.async_.lag_bound) for step, lag in enumerate(oldest))
    if mode == "async.mode=one_step_off":
        for step, line in enumerate(lines(run, "train")):  # every token of it, and no completion has two versions
            assert line["staleness/mean"] == line["staleness/max"] == min(step, 1)
            assert line["staleness/multi_version_frac"] == 0


async def test_one_step_off_generates_a_batch_while_the_one_before_it_trains(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.mode=one_step_off")
    held = run.trainer.gates[2] = Gate()
    held.close()
    async with training(run) as task:
        await until(lambda: held.arrived == 1)
        await settle()
        assert trained_ids(run) == [[0, 1], [2, 3]] and run.fleet.finished == [0, 1, 2, 3, 4, 5]
        held.open()
        await task


async def test_one_step_off_updates_weights_only_between_batches(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.mode=one_step_off", "steps=3")
    held = run.trainer.gates[1] = Gate()
    held.close()
    async with training(run) as task:
        await until(lambda: held.arrived == 1)
        run.fleet.gate.close()
        held.open()
        await until(lambda: run.fleet.gate.arrived == 6)  # the batch of step 3 starts when version 1 is there
        await until(lambda: run.trainer.done == 2)
        await settle()
        assert run.publisher.published == [0, 1]
        run.fleet.gate.open()
        await task
    assert run.publisher.published == [0, 1, 2, 3]
    assert [line["staleness/multi_version_frac"] for line in lines(run, "train")] == [0, 0, 0]


# A step that trains on its groups as they become ready

STREAMED = ("batch.stream=true", "engine.max_model_len=10", "sampling.max_tokens=8", "trainer.micro_batch_tokens=10")


async def train_streamed(run: FakeRun) -> list[Trained]:
    """The middle of `train`, step by step."""
    done = []
    async with asyncio.timeout(SECONDS), background(loop.fill(run), publishing.land(run)):
        await publishing.publish(run, first=True)
        for step in range(1, run.config.steps + 1):
            done.append(await steps.stream(run, step))
            await publishing.publish_after(run)
    return done


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(3))
async def test_a_streamed_run_trains_on_what_a_whole_one_trains_on(tmp_path: Path, mode: str, seed: int) -> None:
    settings = (*STREAMED, mode, "batch.groups_per_step=3", "steps=5")
    streamed = fake_run(tmp_path / "streamed", *settings)
    whole = fake_run(tmp_path / "whole", *settings, "batch.stream=false")
    for run in (streamed, whole):
        run.fleet.outcomes = lambda ticket: [ERROR if ticket % 5 == 1 else OK, OK]
        in_random_order(run, seed)
    done = await train_streamed(streamed)
    await finish(whole)
    assert [[group.meta.id for group in step.groups] for step in done] == trained_ids(whole)
    assert streamed.buffer.ledger.to_dict() == whole.buffer.ledger.to_dict()
    assert any(len(step.chunks or ()) > 1 for step in done)
    for step, updates, scale, groups in zip(
        done, streamed.trainer.updates, streamed.trainer.scales, streamed.trainer.groups, strict=True
    ):
        assert [ticket for chunk in step.chunks or () for ticket in chunk] == [group.id for group in groups]
        assert [len(references([part])) for part in updates] == [2 * len(chunk) for chunk in step.chunks]
        weights = [ref.weight * scale for ref in references(updates)]
        assert weights == pytest.approx([1 / (6 * COMPLETION_TOKENS)] * 6)
        assert [values.tolist() for values in step.batches.advantages] == [[-1.0, 1.0]] * 3
        assert step.batches.metrics == {"adv/abs_mean": 1.0}


async def test_training_begins_with_the_groups_that_are_there_and_then_takes_all_that_came(tmp_path: Path) -> None:
    run = fake_run(tmp_path, *STREAMED, "batch.groups_per_step=4", "async.mode=sync", "steps=1")
    gates = {ticket: Gate() for ticket in range(4)}
    rollout = run.fleet.rollout

    async def held(group_id: int, problem: Problem) -> Any:
        await gates[group_id].pass_through()
        return await rollout(group_id, problem)

    run.fleet.rollout = held  # type: ignore[method-assign]
    for gate in gates.values():
        gate.close()
    run.trainer.part_gate.close()
    task = asyncio.create_task(train_streamed(run))
    gates[2].open()
    await until(lambda: run.trainer.part_gate.arrived == 1)
    assert [[group.id for group in groups] for _, groups, _ in run.trainer.parts] == [[2]]
    gates[3].open()
    gates[1].open()
    await settle()
    run.trainer.part_gate.open()
    await until(lambda: run.trainer.part_gate.arrived == 2)
    gates[0].open()
    (step,) = await task
    assert step.chunks == [[2], [1, 3], [0]]
    assert [group.meta.id for group in step.groups] == [0, 1, 2, 3]


async def test_a_kl_in_the_reward_is_measured_chunk_by_chunk(tmp_path: Path) -> None:
    settings = ["algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.coef=0.5", "steps=2"]
    run = fake_run(tmp_path, *STREAMED, *settings)
    run.trainer.kl = lambda ref: SampleKL(ref.group, ref.rollout, 0.4 * ref.rollout, 1.0, 1.0)
    done = await train_streamed(run)
    assert [len(measured) for measured in run.trainer.measured] == [2 * len(c) for step in done for c in step.chunks]
    for step, updates in zip(done, run.trainer.updates, strict=True):
        trained = sorted(ref.advantage for ref in references(updates))
        assert trained == pytest.approx([-0.8, -0.8, 0.8, 0.8])
        assert step.batches.metrics["reward/kl_mean"] == pytest.approx(0.1)


# Groups that are not whole


@pytest.mark.parametrize("outcome", [ERROR, BAD])
async def test_completions_that_were_not_scored_are_in_no_batch_and_no_denominator(
    tmp_path: Path, outcome: Outcome
) -> None:
    run = fake_run(tmp_path, "batch.group_size=4", "steps=1")
    run.fleet.outcomes = lambda group: [OK, outcome, OK, OK] if group == 1 else [OK] * 4
    run.fleet.rewards = lambda group: [1.0, float("nan") if group == 1 else 1.0, 0.0, 0.0]
    await finish(run)
    [updates] = run.trainer.updates
    refs = {(ref.group, ref.rollout): ref for ref in references(updates)}
    assert all(ref.length == PROMPT_TOKENS + COMPLETION_TOKENS for ref in refs.values())
    # Leave-one-out. Group 0, rewards 1 1 0 0: 1 - 1/3 twice, then 0 - 2/3 twice.
    # Group 1, rewards 1 - 0 0: 1 - 0, then 0 - 1/2 twice; rollout 1 is nowhere.
    two_thirds = {(0, 0): 2 / 3, (0, 1): 2 / 3, (0, 2): -2 / 3, (0, 3): -2 / 3}
    expected = two_thirds | {(1, 0): 1.0, (1, 2): -0.5, (1, 3): -0.5}
    assert {place: ref.advantage for place, ref in refs.items()} == pytest.approx(expected)
    assert all(ref.weight == 1 / (7 * COMPLETION_TOKENS) for ref in refs.values())
    [line] = lines(run, "train")
    assert (line["groups/errored"], line[f"outcome/{outcome}"], line["reward/mean"]) == (1, 1, pytest.approx(3 / 7))


@pytest.mark.parametrize("ends", [[ABORT, ABORT], [ERROR, TIMEOUT], [OK, ERROR]])
async def test_a_group_with_fewer_than_two_scored_is_replaced_and_counted(tmp_path: Path, ends: list[Outcome]) -> None:
    run = fake_run(tmp_path)
    run.fleet.outcomes = lambda group: ends if group in (1, 2, 5) else [OK, OK]
    await finish(run)
    assert trained_ids(run) == [[0, 3], [4, 6], [7, 8], [9, 10]]
    assert run.buffer.dropped == {"errored": 3}
    assert sum(line["groups/errored"] for line in lines(run, "train")) == 3  # each is reported once


async def test_a_drop_is_reported_by_the_next_step_only(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "async.mode=sync", "steps=3")
    run.fleet.outcomes = lambda group: [ERROR, ERROR] if group == 2 else [OK, OK]
    await finish(run)
    assert [line["groups/errored"] for line in lines(run, "train")] == [0, 1, 0]


async def test_too_many_unusable_groups_in_a_row_end_the_run(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "batch.max_dropped_groups_in_a_row=3", "async.max_lag=0")
    run.fleet.outcomes = lambda group: [ERROR, ERROR] if group in (1, 4, 5, 6, 7) else [OK, OK]
    error = await error_of(run)
    assert isinstance(error, BudgetSpent) and error.exit_code == 5
    assert "3 groups in a row" in str(error) and "batch.max_dropped_groups_in_a_row" in str(error)
    assert "3 errored" in str(error)
    assert "no reward" in str(error)  # what the last one said
    assert run.buffer.dropped == {"errored": 4}  # group 1 counts too, but groups 2 and 3 were in between


async def test_prompts_without_room_are_counted_and_end_the_run_when_there_are_no_others(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "batch.max_dropped_groups_in_a_row=3", "async.max_lag=0")
    run.fleet.outcomes = lambda group: [TOO_LONG, TOO_LONG] if group in (1, 4, 5, 6) else [OK, OK]
    error = await error_of(run)
    assert isinstance(error, BudgetSpent) and error.exit_code == 5
    assert "by reason: 3 prompt_too_long" in str(error) and "no reward" in str(error)  # what the last one said
    assert [line["groups/prompt_too_long"] for line in lines(run, "train")] == [1]
    Ledger.resumed(run.buffer.ledger.to_dict())  # every prompt is in one state


async def test_groups_of_equal_rewards_are_refilled_from_the_stream_and_counted(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "batch.zero_variance=refill")
    run.fleet.rewards = lambda group: [0.5, 0.5] if group in (1, 2, 5) else [0.0, 1.0]
    await finish(run)
    assert trained_ids(run) == [[0, 3], [4, 6], [7, 8], [9, 10]]
    assert run.buffer.dropped == {"zero_variance": 3}
    train_lines = lines(run, "train")
    assert sum(line["groups/zero_variance"] for line in train_lines) == 3  # each is reported once
    assert all(line["groups/zero_var_frac"] == 0 and line["groups/errored"] == 0 for line in train_lines)


async def test_without_refill_groups_of_equal_rewards_are_trained_on(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.fleet.rewards = lambda group: [0.5, 0.5] if group in (1, 2, 5) else [0.0, 1.0]
    await finish(run)
    assert trained_ids(run) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert [line["groups/zero_var_frac"] for line in lines(run, "train")] == [0.5, 0.5, 0.5, 0]
    assert [line["adv/abs_mean"] for line in lines(run, "train")] == [0.5, 0.5, 0.5, 1]


async def test_when_no_group_has_different_rewards_the_run_ends_with_the_reasons(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "batch.zero_variance=refill", "batch.max_dropped_groups_in_a_row=4", "async.max_lag=0")
    run.fleet.rewards = lambda group: [0.5, 0.5]
    run.fleet.outcomes = lambda group: [ERROR, ERROR] if group == 2 else [OK, OK]
    error = await error_of(run)
    assert isinstance(error, BudgetSpent)
    assert "4 groups in a row" in str(error) and "3 zero_variance, 1 errored" in str(error)
    assert "its rewards are all equal; batch.zero_variance=keep" in str(error)


async def test_a_kl_in_the_reward_is_measured_on_the_very_batches_that_are_trained_on(tmp_path: Path) -> None:
    settings = ["algo.kl.place=reward", "algo.kl.estimator=k1", "algo.kl.coef=0.5", "steps=2", "batch.updates=2"]
    run = fake_run(tmp_path, *settings)
    run.trainer.kl = lambda ref: SampleKL(ref.group, ref.rollout, 0.4 * ref.rollout, 1.0, 1.0)
    await finish(run)
    for measured, updates in zip(run.trainer.measured, run.trainer.updates, strict=True):
        trained = references(updates)
        assert [(ref.group, ref.rollout) for ref in measured] == [(ref.group, ref.rollout) for ref in trained]
        # rewards 0 and 1; leave-one-out of 0 and 1 - .5 * .4
        assert [ref.advantage for ref in trained] == pytest.approx([-0.8, 0.8] * 2)
    assert [line["reward/kl_mean"] for line in lines(run, "train")] == pytest.approx([0.1, 0.1])


async def test_without_a_kl_in_the_reward_nothing_is_measured(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "algo.kl.coef=0.5", "steps=2")
    await finish(run)
    assert run.trainer.measured == [] and len(run.trainer.updates) == 2


async def test_too_many_skipped_steps_in_a_row_end_the_run_after_they_are_logged(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "trainer.max_skipped_steps=1", "steps=9")
    run.trainer.skips = {1, 3, 5, 6}
    error = await error_of(run)
    assert isinstance(error, BudgetSpent) and "trainer.max_skipped_steps=1" in str(error)
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3, 4, 5, 6]


# What is written


async def test_the_groups_of_a_step_are_written_with_their_advantages(tmp_path: Path) -> None:
    run = fake_run(tmp_path, "metrics.rollout_groups_per_step=1", "steps=2")
    await finish(run)
    written = read_rollouts(tmp_path)
    # Of groups 0, 1 | 2, 3 the first of each step; rewards 0 and 1 have leave-one-out advantages -1 and 1.
    assert [(r["step"], r["group_id"], r["rollout"], r["reward"], r["advantage"]) for r in written] == [
        (1, 0, 0, 0.0, -1.0),
        (1, 0, 1, 1.0, 1.0),
        (2, 2, 0, 0.0, -1.0),
        (2, 2, 1, 1.0, 1.0),
    ]
    assert written[0]["weight_versions"] == [[0, 0, COMPLETION_TOKENS]]


async def test_every_step_has_its_speed_and_its_groups_in_the_log(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    await finish(run)
    for line in lines(run, "train"):
        assert line["reward/mean"] == 0.5 and line["completion/tokens_mean"] == COMPLETION_TOKENS
        assert line["perf/step_s"] > 0
        assert line["perf/samples_per_s"] == pytest.approx(4 / line["perf/step_s"])
        # 4 rollouts of prompt and completion in the 1e-6 s that the fake trainer claims
        assert line["perf/trainer_tokens_per_s"] == pytest.approx(4 * (PROMPT_TOKENS + COMPLETION_TOKENS) / 1e-6)
        assert line["perf/rollout_idle_frac"] == 1 and 0 < line["perf/trainer_idle_frac"] < 1
    assert lines(run, "train")[-1]["buffer/running"] == 0


# Endings


def engine_dies_in_a_group(run: FakeRun, error: Exception) -> None:
    run.fleet.fails_at[3] = error


def engine_dies_in_an_evaluation(run: FakeRun, error: Exception) -> None:
    run.fleet.eval_fails_at[1] = error


def trainer_dies(run: FakeRun, error: Exception) -> None:
    run.trainer.fails_at[2] = error


def rollouts_cannot_be_written(run: FakeRun, error: Exception) -> None:
    def write(*_: object) -> None:
        raise error

    run.trainer.gates[1] = Gate()
    run.trainer.gates[1].close()  # a step that would take for ever
    run.rollouts.write = write  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    "arrange",
    [
        engine_dies_in_a_group,
        engine_dies_in_an_evaluation,
        trainer_dies,
        rollouts_cannot_be_written,
    ],
)
@pytest.mark.parametrize("error", [WorkerDied("engine 0: gone"), EnvironmentProblem("disk full")])
async def test_an_error_of_any_part_surfaces_as_it_is_and_ends_the_others(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arrange: Callable[[FakeRun, Exception], None],
    error: PipelineRLError,
) -> None:
    monkeypatch.setattr(loop, "WATCH_INTERVAL_S", 0.01)
    run = fake_run(tmp_path)
    arrange(run, error)
    assert await error_of(run) is error


async def test_a_restarted_engine_gets_the_current_weights_while_the_trainer_waits_for_groups(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.fleet.gate.close()
    async with training(run) as task:
        await until(lambda: run.fleet.gate.arrived > 0)
        assert run.publisher.published == [0]
        run.fleet.restarted.set()
        await until(lambda: len(run.publisher.published) == 2)
        assert run.publisher.published == [0, 0] and run.publisher.changed[1] is False, "what the others have already"
        run.fleet.gate.open()
        await task
    assert run.trainer.done == 4


@pytest.mark.parametrize("where", ["generation", "evaluation", "step", "update"])
async def test_cancelled_anywhere_it_leaves_nothing_running(tmp_path: Path, where: str) -> None:
    run = fake_run(tmp_path)
    held = Gate()
    if where == "generation":
        held = run.fleet.gate
    elif where == "evaluation":
        held = run.fleet.eval_gate
    elif where == "step":
        run.trainer.gates[2] = held
    else:
        run.publisher.gates[1] = held
    held.close()
    before = asyncio.all_tasks()
    task = asyncio.create_task(train(run))
    await until(lambda: held.arrived > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert asyncio.all_tasks() == before


@pytest.mark.parametrize("held_up", ["groups", "step", "evaluation"])
async def test_a_run_in_which_nothing_happens_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_up: str
) -> None:
    monkeypatch.setattr(loop, "WATCH_INTERVAL_S", 0.01)
    run = fake_run(tmp_path, *STALL_SOON, "cluster.stall_timeout_s=0.3")
    gate = run.trainer.gates.setdefault(2, Gate())
    {"groups": run.fleet.gate, "step": gate, "evaluation": run.fleet.eval_gate}[held_up].close()
    error = await error_of(run)
    assert isinstance(error, Stalled) and "cluster.stall_timeout_s=0.3 s" in str(error)
    if held_up == "groups":
        assert "(6 groups running, 0 ready)" in str(error)  # max_lag=2: 3 steps of 2 groups


async def test_any_step_group_or_evaluated_problem_is_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pause is shorter than the limit, and what comes between them is of a kind of its own."""
    monkeypatch.setattr(loop, "WATCH_INTERVAL_S", 0.01)
    overrides = ["cluster.stall_timeout_s=0.75", "weights.every=4", "async.max_lag=3", "eval.at_end=false"]
    run = fake_run(tmp_path, *STALL_SOON, *overrides)
    evaluations = asyncio.Semaphore(0)
    run.fleet.eval_gate.pass_through = evaluations.acquire  # type: ignore[method-assign, assignment]
    gates = {step: Gate() for step in (1, 2, 3)}
    run.trainer.gates |= gates
    for gate in gates.values():
        gate.close()
    async with training(run) as task:
        for _ in range(3):  # a problem of the evaluation every 0.3 s
            await asyncio.sleep(0.3)
            evaluations.release()
        for gate in gates.values():  # a step every 0.3 s; all groups are done, and no update is due
            await asyncio.sleep(0.3)
            gate.open()
        await task
    assert run.publisher.published == [0, 4]


# Selection and KV


def drop_the_short_ones(tmp_path: Path, selection: str) -> tuple[FakeRun, list[str]]:
    """Every second group is given up, and only those have no tokens."""
    run = fake_run(tmp_path, f"journal.selection='{selection}'", "steps=12")
    run.fleet.outcomes = lambda group: [OK, OK] if group % 2 else [ABORT, ABORT]
    told: list[str] = []
    run.tell = told.append
    return run, told


@pytest.mark.parametrize("selection", ["warn", "off"])
async def test_trained_lengths_that_are_not_those_generated_are_told_once(tmp_path: Path, selection: str) -> None:
    run, told = drop_the_short_ones(tmp_path, selection)
    await finish(run)
    steps = lines(run, "train")
    assert len(steps) == 12 and steps[-1]["selection/length_distance"] == pytest.approx(0.5, abs=0.05)
    assert (steps[-1]["selection/length_trained_mean"], steps[-1]["selection/reward_distance"]) == (3, 0)
    alarms = [line["step"] for line in lines(run, "run") if "selection/alarm" in line]
    assert len(alarms) == len(told) == (selection == "warn")
    if told:
        assert told[0].startswith(f"step {alarms[0]}: selection: the lengths of trained samples")


async def test_a_run_can_be_ended_by_its_selection(tmp_path: Path) -> None:
    run, _ = drop_the_short_ones(tmp_path, "stop")
    error = await error_of(run)
    assert isinstance(error, BudgetSpent) and "(journal.selection=warn goes on)" in str(error)
    assert 1 < len(lines(run, "train")) < 12


async def test_the_old_context_of_trained_tokens_is_measured(tmp_path: Path) -> None:
    """The groups of step 2 start at version 0, and end at version 1: the fleet's gate holds them up in between."""
    run = fake_run(tmp_path, "steps=2", "async.max_lag=1")
    started = run.trainer.gates[1] = Gate()
    started.close()
    run.fleet.gate.pass_through = lambda: hold(run)  # type: ignore[method-assign, assignment]

    async def hold(run: FakeRun) -> None:
        if len(run.fleet.started) > 2:
            started.open()
            await until(lambda: run.fleet.version == 1)

    await finish(run)
    first, second = lines(run, "train")
    assert (first["kv/old_context_fraction"], first["kv/age_max"]) == (0, 0)
    # 2 tokens of prompt, one by version 0, two by version 1, which attend to 3 and 4 tokens, 2 of them old
    assert second["kv/old_context_fraction"] == pytest.approx((0 + 2 / 3 + 2 / 4) / 3)
    assert (second["kv/old_context_fraction_max"], second["kv/age_max"]) == (2 / 3, 1)
