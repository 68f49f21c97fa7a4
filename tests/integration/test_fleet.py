"""Fleet, trainer group and the endings of a run, without a Ray cluster: the worker processes are fakes."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayActorError, RayTaskError

from pipelinerl import session as session_module
from pipelinerl.cluster.fleet import Fleet
from pipelinerl.cluster.remote import RemoteWorker, _Host
from pipelinerl.cluster.trainer_group import TrainerGroup
from pipelinerl.concurrency import Ending
from pipelinerl.config.schema import RunConfig, TrainerConfig
from pipelinerl.errors import (
    EXIT_DONE,
    EnvironmentProblem,
    PipelineRLError,
    Stalled,
    WeightSyncError,
    WorkerDied,
    WorkerFailed,
)
from pipelinerl.run_dir import new_run_dir
from pipelinerl.types import GroupMeta, Problem, RankBatch, SampleKL, SampleRef, StepResult
from tests.unit.fakes import SECONDS, fake_run, settle, small_config, until

PROBLEM = Problem("train/0", {})


@dataclass
class FakeWorker:
    """What fleet and trainer group see of a RemoteWorker: calls are recorded, and answered by `answer`."""

    answer: Callable[[str], Any] = lambda _: {}
    killed: bool = False
    calls: list[tuple[str, tuple[Any, ...]]] = field(default_factory=list)
    timeouts: dict[str, float | None] = field(default_factory=dict)
    held: asyncio.Event = field(default_factory=asyncio.Event)

    async def call(self, method: str, *args: Any, timeout_s: float | None = None) -> Any:
        self.calls.append((method, args))
        self.timeouts[method] = timeout_s
        if self.killed:
            raise WorkerDied("its process died")
        answer = self.answer(method)
        if isinstance(answer, asyncio.Event):  # stopped, not dead: it answers when it goes on
            try:
                await asyncio.wait_for(answer.wait(), timeout_s)
            except TimeoutError:
                raise Stalled(f"{method} took more than {timeout_s} s") from None
            return {}
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def call_pair(self, method: str, *args: Any) -> tuple[Any, Any]:
        self.calls.append((method, args))
        await self.held.wait()
        if self.killed:
            raise WorkerDied("its process died")
        answer = self.answer(method)
        if isinstance(answer, Exception):
            raise answer
        return GroupMeta(args[0], args[1].id, 0, (), 0.0), f"payload {args[0]}"

    async def endpoint(self, timeout_s: float) -> tuple[str, int]:
        return "node-0", 4711

    async def processes(self, timeout_s: float) -> str:
        return "its children"

    async def sweep(self, left: Any, timeout_s: float) -> None:
        self.calls.append(("sweep", (left,)))

    async def pulse(self, timeout_s: float) -> None:
        await self.call("pulse", timeout_s=timeout_s)

    def kill(self) -> None:
        self.killed = True
        self.held.set()

    @property
    def groups(self) -> list[int]:
        """The groups it was given, in order."""
        return [args[0] for method, args in self.calls if method in ("rollout", "evaluate", "probe")]


@dataclass
class FakeLauncher:
    """Gives every engine the processes that it is to have, one after the other."""

    lives: list[list[FakeWorker]]
    started: list[int] = field(default_factory=list)

    async def start_engine(self, index: int, config: RunConfig) -> FakeWorker:
        self.started.append(index)
        return self.lives[index].pop(0)

    async def stop_engine(self, worker: FakeWorker) -> None:
        worker.kill()


async def fleet_of(*workers: FakeWorker) -> Fleet:
    """A started fleet of engines with one life each."""
    return await fleet_with([[worker] for worker in workers])


async def fleet_with(lives: list[list[FakeWorker]], *overrides: str) -> Fleet:
    """A started fleet; `lives[i]` are the processes that engine i has one after the other."""
    config = small_config(f"engine.count={len(lives)}", "engine.heartbeat_s=0.01", *overrides)
    fleet = Fleet(FakeLauncher(lives), config)  # type: ignore[arg-type]
    await fleet.start()
    fleet.recovery = "refit"
    return fleet


# Fleet


async def test_a_group_goes_to_the_engine_with_the_fewest_in_flight() -> None:
    workers = [FakeWorker() for _ in range(3)]
    fleet = await fleet_of(*workers)
    tasks = [asyncio.create_task(fleet.rollout(i, PROBLEM)) for i in range(5)]
    await settle()
    assert [len(worker.groups) for worker in workers] == [2, 2, 1]
    workers[1].held.set()  # its two groups finish, so the next two are its own
    await until(lambda: tasks[1].done() and tasks[4].done())
    workers[1].held.clear()
    tasks += [asyncio.create_task(fleet.rollout(i, PROBLEM)) for i in (5, 6)]
    await settle()
    assert [len(worker.groups) for worker in workers] == [2, 4, 1]
    for worker in workers:
        worker.held.set()
    assert [payload for _, payload in await asyncio.gather(*tasks)] == [f"payload {i}" for i in range(7)]


async def test_groups_that_are_cancelled_no_longer_count_as_busy() -> None:
    fleet = await fleet_of(FakeWorker(), FakeWorker())
    cancelled = [asyncio.create_task(fleet.evaluate(i, PROBLEM)) for i in range(4)]
    await settle()
    for task in cancelled:
        task.cancel()
    await asyncio.wait(cancelled)
    busy = fleet.busy_s()
    await asyncio.sleep(0.01)
    assert fleet.busy_s() == busy


async def test_busy_time_is_counted_while_any_engine_has_a_group() -> None:
    workers = [FakeWorker(), FakeWorker()]
    fleet = await fleet_of(*workers)
    assert fleet.busy_s() == 0
    first, second = (asyncio.create_task(fleet.rollout(i, PROBLEM)) for i in range(2))
    await asyncio.sleep(0.02)
    workers[0].held.set()
    await first
    half = fleet.busy_s()
    assert half >= 0.02
    await asyncio.sleep(0.02)  # the other engine is busy still
    workers[1].held.set()
    await second
    total = fleet.busy_s()
    assert total >= half + 0.02
    await asyncio.sleep(0.02)
    assert fleet.busy_s() == total


async def test_an_error_that_is_no_death_ends_the_run_and_is_not_tried_again() -> None:
    broken = WorkerFailed("engine 0: rollout raised TypeError: a bug")
    worker = FakeWorker(lambda method: broken if method == "rollout" else {})
    fleet = await fleet_of(worker, FakeWorker())
    worker.held.set()
    with pytest.raises(WorkerFailed, match="a bug"):
        await fleet.rollout(0, PROBLEM)
    assert not worker.killed


# Trainer group


def trainer_group(*ranks: FakeWorker, sequence_parallel: int = 1) -> TrainerGroup:
    timeouts = {"step_timeout_s": 7.0, "start_timeout_s": 3.0}
    config = TrainerConfig(ranks=len(ranks), sequence_parallel=sequence_parallel, **timeouts)

    async def launch() -> list[Any]:
        return list(ranks)

    group = TrainerGroup(launch, config)
    group._ranks = ranks  # type: ignore[assignment]  # as after setup
    return group


async def test_a_rank_is_sent_only_the_groups_it_trains_on() -> None:
    ranks = [FakeWorker(lambda _: StepResult(1, {"rank": 0.0}, True)) for _ in range(2)]
    a, b, c, d = SampleRef(3, 1, 0.5, 10), SampleRef(1, 0, -1.0, 20), SampleRef(3, 0, 2.0, 30), SampleRef(0, 4, 0.0, 5)
    updates = [
        [RankBatch(((a, b),), kl_to_go=0.5), RankBatch(((),), kl_to_go=0.5)],
        [RankBatch(((c,),), kl_to_go=0.5), RankBatch(((d,),), kl_to_go=0.5)],
    ]
    result = await trainer_group(*ranks).step(updates, ["ref 0", "ref 1", "ref 2", "ref 3"])
    assert result.version == 1
    # Over both updates rank 0 uses groups 1 and 3, which are 0 and 1 to it; rank 1 uses group 0 and has a dummy.
    own = (
        RankBatch(((SampleRef(1, 1, 0.5, 10), SampleRef(0, 0, -1.0, 20)),), 0.5),
        RankBatch(((SampleRef(1, 0, 2.0, 30),),), 0.5),
    )
    assert ranks[0].calls == [("step", (own, "ref 1", "ref 3"))]
    assert ranks[1].calls == [("step", ((RankBatch(((),), 0.5), RankBatch(((d,),), 0.5)), "ref 0"))]
    assert ranks[0].timeouts == {"step": 7.0}


@pytest.mark.parametrize("sequence_parallel", [1, 2])
async def test_the_kl_of_every_rank_comes_back_under_the_numbers_of_the_step(sequence_parallel: int) -> None:
    def rank_with(*samples: SampleKL) -> FakeWorker:
        return FakeWorker(lambda _: list(samples))

    # Rank 0 has groups 1 and 3, rank 1 group 2; each counts its own from 0.
    first = rank_with(SampleKL(1, 1, 0.1, 0.2, 0.3), SampleKL(0, 0, 0.4, 0.5, 0.6))
    second = rank_with(SampleKL(0, 5, 0.7, 0.8, 0.9))
    batches = [
        RankBatch(((SampleRef(3, 1, 0.0, 9), SampleRef(1, 0, 0.0, 9)),)),
        RankBatch(((SampleRef(2, 5, 0.0, 9),),)),
    ]
    ranks = [
        rank for rank in (first, second) for _ in range(sequence_parallel)
    ]  # those that share sequences answer alike
    updates = [[batch for batch in batches for _ in range(sequence_parallel)]]
    measured = await trainer_group(*ranks, sequence_parallel=sequence_parallel).reference_kl(updates, list("abcd"))
    assert measured == [
        SampleKL(3, 1, 0.1, 0.2, 0.3), SampleKL(1, 0, 0.4, 0.5, 0.6), SampleKL(2, 5, 0.7, 0.8, 0.9)
    ]  # fmt: skip
    assert [rank.calls[0][1][1:] for rank in ranks] == [("b", "d")] * sequence_parallel + [("c",)] * sequence_parallel
    assert first.timeouts == {"reference_kl": 7.0}


async def test_all_ranks_meet_at_the_node_of_rank_0_which_alone_sends_weights() -> None:
    ranks = [FakeWorker() for _ in range(3)]
    group = trainer_group(*ranks)
    await group.setup()
    await group.listen("gloo")
    await group.connect_weights(3)
    await group.send_weights(5)
    await group.resend_weights(6)
    await group.export("model")
    meet = ("setup", ("node-0", 4711))
    rest = [("listen", ("gloo", "node-0")), ("connect", (3,)), ("send_weights", (5,)), ("resend_weights", (6,))]
    rest.append(("export", ("model",)))
    assert [rank.calls for rank in ranks] == [[meet, *rest], [meet], [meet]]
    assert ranks[2].timeouts == {"setup": 3.0}


# What a call of a worker process raises


class FakeActor:
    """A Ray actor whose `call` gives `outcome` when awaited."""

    def __init__(self, outcome: Callable[[], Awaitable[Any]]) -> None:
        self._outcome = outcome

    @property
    def call(self) -> "FakeActor":
        return self

    def remote(self, method: str, *args: Any) -> Awaitable[Any]:
        return self._outcome()


def worker_that(outcome: Callable[[], Awaitable[Any]]) -> RemoteWorker:
    return RemoteWorker("engine 0", FakeActor(outcome), Path("logs/engine_0.log"), is_async=True)


def raising(error: Exception) -> Callable[[], Awaitable[Any]]:
    async def outcome() -> Any:
        raise error

    return outcome


def task_error(cause: Exception) -> Exception:
    """What Ray raises here when a method raised `cause` there: an error that is of both types."""
    error: Exception = RayTaskError("call", "a traceback", cause).as_instanceof_cause()
    assert isinstance(error, type(cause)) and isinstance(error, RayTaskError)
    return error


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (task_error(WeightSyncError("broke off")), WeightSyncError, r"^broke off$"),
        (
            task_error(ValueError("bad\nmore")),
            WorkerFailed,
            r"engine 0: step raised ValueError: bad; see .*engine_0\.log",
        ),
        (task_error(TimeoutError("socket")), WorkerFailed, r"engine 0: step raised TimeoutError: socket; see"),
        (RayActorError(), WorkerDied, r"engine 0: its process died during step; see .*engine_0\.log"),
    ],
)
async def test_an_error_in_a_worker_arrives_with_its_cause(
    raised: Exception, expected: type[PipelineRLError], text: str
) -> None:
    with pytest.raises(expected, match=text):
        await worker_that(raising(raised)).call("step")


async def test_a_call_that_takes_too_long_is_a_stall() -> None:
    async def never() -> None:
        await asyncio.Event().wait()

    with pytest.raises(Stalled, match=r"engine 0: step took more than 0\.01 s; see .*engine_0\.log"):
        await worker_that(never).call("step", timeout_s=0.01)


async def test_an_answer_is_in_time_when_it_was_the_driver_that_stood_still() -> None:
    async def answer() -> str:
        await asyncio.sleep(0.01)
        time.sleep(1.2)  # SIGSTOP and SIGCONT
        await asyncio.sleep(0.02)  # until Ray's thread has read what is there
        return "pulse"

    assert await worker_that(answer).call("step", timeout_s=0.1) == "pulse"


# How a run ends


async def exit_code_of(body: Callable[[], Awaitable[None]]) -> int:
    """Of a session that consists of `body`."""

    async def work() -> int:
        await body()
        return EXIT_DONE

    return await session_module._watched(work(), Ending())


@pytest.mark.parametrize(("which", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
async def test_a_signal_cancels_the_session_and_decides_the_exit_code(which: signal.Signals, code: int) -> None:
    ended = []

    async def body() -> None:
        os.kill(os.getpid(), which)
        try:
            await asyncio.sleep(SECONDS)
        finally:
            ended.append(True)

    assert await exit_code_of(body) == code
    assert ended == [True]


async def test_an_error_that_a_signal_brought_about_does_not_hide_it(capsys: pytest.CaptureFixture[str]) -> None:
    async def body() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        try:
            await asyncio.sleep(SECONDS)
        finally:
            raise WorkerDied("engine 0: its process died")

    assert await exit_code_of(body) == 130
    assert "engine 0: its process died" in capsys.readouterr().err


async def test_without_a_signal_an_error_is_raised_and_success_is_0() -> None:
    async def fails() -> None:
        raise EnvironmentProblem("no room")

    async def succeeds() -> None:
        pass

    with pytest.raises(EnvironmentProblem):
        await exit_code_of(fails)
    assert await exit_code_of(succeeds) == 0


async def test_a_signal_does_not_cut_the_clean_up_short() -> None:
    closed = []

    async def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)
        closed.append(True)

    await exit_code_of(lambda: session_module._to_the_end(close))
    assert closed == [True]


async def test_a_run_directory_that_holds_a_run_is_left_alone(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    run.log.log("train", 1, {})
    with pytest.raises(PipelineRLError, match="holds a run already; choose another run_dir"):
        new_run_dir(small_config(f"run_dir={tmp_path}"), "", ("metrics.jsonl",))


class CannotTravel(ValueError):
    def __reduce__(self) -> str:
        raise TypeError("cannot pickle 'ArgsKwargs' object")


def test_an_error_that_cannot_travel_is_told_in_words_and_any_other_as_it_is() -> None:
    class Worker:
        def start(self, error: Exception) -> None:
            raise error

    host = _Host.__new__(_Host)
    host._worker = Worker()
    with pytest.raises(RuntimeError, match=r"^CannotTravel: 1 error: max_model_len is too large$"):
        host.call("start", CannotTravel("1 error:\n  max_model_len is too large"))
    with pytest.raises(KeyError, match="as it is"):
        host.call("start", KeyError("as it is"))
