"""Grader processes, with real processes: whatever a scorer does, the pool answers and nothing is left behind."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any

import psutil
import pytest
import uvloop

from pipelinerl.errors import ConfigError, WorkerDied
from pipelinerl.tasks.grading import GraderPool
from pipelinerl.types import Outcome

SCORERS = """
import os, sys, time

not_a_function = 7

def right(text, answer):
    return text == answer

def parts(text):
    return {"format": 0.25, "answer": 0.5}

def slow(text, seconds):
    time.sleep(seconds)
    return 1.0

def busy(text):
    while True:
        pass

def raises(text):
    raise ValueError("no verdict on " + text)

def returns_nan(text):
    return float("nan")

def returns_infinite_part(text):
    return {"fine": 1.0, "broken": float("inf")}

def returns_text(text):
    return "1.0"

def leaves(text):
    sys.exit(3)

def vanishes(text):
    os._exit(7)

def hungry(text):
    return len(bytearray(8 << 30))

def takes(text, mb):
    return len(bytearray(mb << 20)) >> 20

def prints(text):
    print('{"reward": 1.0, "parts": {}}')
    os.write(1, b'{"reward": 1.0, "parts": {}}\\n')
    os.system("echo from a child")
    sys.stderr.write("noise\\n")
    try:
        return float(len(input()))
    except EOFError:
        return 0.5

def writes_everywhere(text):
    for fd in range(3, 64):
        try:
            os.write(fd, b"junk\\n")
        except OSError:
            pass
    return 1.0

def floods(text):
    for fd in range(3, 64):
        try:
            os.write(fd, b"x" * (3 << 20))
        except OSError:
            pass
    return 1.0

def environment(text):
    return {name: 0.0 for name in os.environ}

def process_ids(text):
    return {"group": os.getpgrp(), "session": os.getsid(0), "process": os.getpid()}
"""


@pytest.fixture(autouse=True)
def scorer_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scorers.py").write_text(SCORERS)
    (tmp_path / "broken_scorers.py").write_text("import a_package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture
async def pool() -> AsyncIterator[GraderPool]:
    pool = GraderPool(processes=1, timeout_s=1.0)
    await pool.start()
    yield pool
    pids = pool.pids
    await pool.close()
    assert pool.pids == () and not alive(pids)


def alive(pids: Iterable[int]) -> list[int]:
    def runs(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    return [pid for pid in pids if runs(pid)]


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


async def still_works(pool: GraderPool) -> bool:
    return (await pool.grade("my_scorers:right", {"text": "7", "answer": "7"})).reward == 1.0


async def test_rewards_and_parts(pool: GraderPool) -> None:
    right = await pool.grade("my_scorers:right", {"text": "7", "answer": "7"})
    wrong = await pool.grade("my_scorers:right", {"text": "8", "answer": "7"})
    assert (right.reward, wrong.reward, right.outcome) == (1.0, 0.0, Outcome.OK)
    parts = await pool.grade("my_scorers:parts", {"text": ""})
    assert parts.reward == 0.75  # 0.25 + 0.5
    assert parts.components == {"format": 0.25, "answer": 0.5}


async def test_the_projects_own_scorers_run_in_graders_on_any_text(pool: GraderPool) -> None:
    scorer = "pipelinerl.tasks.scorers:last_number"
    long = "filler " * 100_000 + "\n{'not': JSON}\x00 \ud800 \u2028 42"
    assert (await pool.grade(scorer, {"text": long, "answer": "42"})).reward == 1.0
    assert (await pool.grade(scorer, {"text": "", "answer": "42"})).reward == 0.0


@pytest.mark.parametrize("scorer", ["slow", "busy"])
async def test_a_scorer_that_hangs_is_killed_and_replaced(pool: GraderPool, scorer: str) -> None:
    (before,) = pool.pids
    kwargs = {"text": ""} | ({"seconds": 60} if scorer == "slow" else {})
    begin = time.monotonic()
    score = await pool.grade(f"my_scorers:{scorer}", kwargs)
    assert 0.9 < time.monotonic() - begin < 8
    assert (score.reward, score.outcome) == (0.0, Outcome.VERIFIER_TIMEOUT)
    assert "more than 1 s" in score.detail
    assert not psutil.pid_exists(before)  # reaped, too
    assert await still_works(pool)
    assert len(pool.pids) == 1 and pool.pids != (before,)


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("raises", "ValueError: no verdict on 7"),
        ("returns_nan", "reward=nan"),
        ("returns_infinite_part", "broken=inf"),
        ("returns_text", "returned a str where a number was expected"),
        ("leaves", "SystemExit: 3"),
        ("hungry", "MemoryError"),
        ("slow", "TypeError"),  # an argument is missing
    ],
)
async def test_a_scorer_without_a_verdict_is_an_env_error(pool: GraderPool, scorer: str, words: str) -> None:
    pids = pool.pids
    score = await pool.grade(f"my_scorers:{scorer}", {"text": "7"})
    assert (score.reward, score.outcome) == (0.0, Outcome.ENV_ERROR)
    assert f"my_scorers:{scorer}" in score.detail and words in score.detail
    assert await still_works(pool) and pool.pids == pids


async def test_arguments_that_are_not_json_are_an_env_error(pool: GraderPool) -> None:
    score = await pool.grade("my_scorers:right", {"text": "7", "answer": {7}})
    assert score.outcome is Outcome.ENV_ERROR and "not JSON" in score.detail


@pytest.mark.parametrize(
    ("scorer", "words"),
    [
        ("broken_scorers:right", "a_package_that_is_not_installed"),
        ("no_such_module:right", "no_such_module"),
        ("my_scorers:missing", "missing"),
        ("my_scorers:not_a_function", "not_a_function is a int, not a function"),
        ("my_scorers", "write package.module:function"),
    ],
)
async def test_a_scorer_that_cannot_be_loaded_is_a_config_error(pool: GraderPool, scorer: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        await pool.grade(scorer, {"text": ""})
    assert repr(scorer) in str(caught.value) and words in str(caught.value)
    assert await still_works(pool)


async def test_printing_and_reading_do_not_touch_the_protocol(pool: GraderPool) -> None:
    assert (await pool.grade("my_scorers:prints", {"text": ""})).reward == 0.5
    assert await still_works(pool)


@pytest.mark.parametrize("scorer", ["writes_everywhere", "floods"])
async def test_a_forged_reply_is_an_env_error(pool: GraderPool, scorer: str) -> None:
    score = await pool.grade(f"my_scorers:{scorer}", {"text": ""})
    assert (score.reward, score.outcome) == (0.0, Outcome.ENV_ERROR)
    assert "broke the grader's output" in score.detail
    assert await still_works(pool)


async def test_a_grader_that_exits_costs_its_verdict_and_is_replaced(pool: GraderPool) -> None:
    (pid,) = pool.pids
    score = await pool.grade("my_scorers:vanishes", {"text": ""})
    assert (score.reward, score.outcome) == (0.0, Outcome.ENV_ERROR)
    assert f"my_scorers:vanishes: grader process {pid} exited with code 7" in score.detail
    assert await still_works(pool) and pool.pids != (pid,)


async def test_a_grader_killed_from_outside_costs_its_verdict_and_is_replaced(pool: GraderPool) -> None:
    assert await still_works(pool)
    (pid,) = pool.pids
    grading = asyncio.create_task(pool.grade("my_scorers:slow", {"text": "", "seconds": 0.8}))
    await asyncio.sleep(0.3)
    begin = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    score = await grading
    assert time.monotonic() - begin < 5
    assert score.outcome is Outcome.ENV_ERROR and f"grader process {pid} was killed by SIGKILL" in score.detail
    assert await still_works(pool) and pool.pids != (pid,)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_a_grader_killed_while_idle_costs_nothing(run: Callable[[Coroutine[Any, Any, None]], None]) -> None:
    """Ray runs async actors on uvloop, whose closed pipes raise other errors than asyncio's."""

    async def scenario() -> None:
        pool = GraderPool(processes=1, timeout_s=10)
        await pool.start()
        try:
            assert await still_works(pool)
            (pid,) = pool.pids
            os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.3)  # the loop sees the pipe close before the next request
            assert await still_works(pool) and pool.pids != (pid,)
        finally:
            await pool.close()

    run(scenario())


async def test_memory_is_bounded_by_the_setting() -> None:
    pool = GraderPool(processes=1, timeout_s=10, memory_mb=256)
    await pool.start()
    try:
        score = await pool.grade("my_scorers:takes", {"text": "", "mb": 300})
        assert score.outcome is Outcome.ENV_ERROR and "MemoryError" in score.detail
        assert (await pool.grade("my_scorers:takes", {"text": "", "mb": 100})).reward == 100
        assert await still_works(pool)
    finally:
        await pool.close()


async def test_a_cancelled_grade_does_not_answer_the_next_one(pool: GraderPool) -> None:
    assert await still_works(pool)
    await pool.grade("my_scorers:slow", {"text": "", "seconds": 0})  # both are loaded: the next reply is a verdict
    grading = asyncio.create_task(pool.grade("my_scorers:slow", {"text": "", "seconds": 0.3}))
    await asyncio.sleep(0.1)
    grading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await grading
    assert (await pool.grade("my_scorers:right", {"text": "8", "answer": "7"})).reward == 0.0


async def test_graders_work_side_by_side() -> None:
    pool = GraderPool(processes=3, timeout_s=10.0)
    await pool.start()
    assert len(set(pool.pids)) == 3
    await asyncio.gather(*(pool.grade("my_scorers:slow", {"text": "", "seconds": 0.1}) for _ in range(3)))
    begin = time.monotonic()
    scores = await asyncio.gather(*(pool.grade("my_scorers:slow", {"text": "", "seconds": 0.5}) for _ in range(6)))
    assert all(score.reward == 1.0 for score in scores)
    assert 1.0 <= time.monotonic() - begin < 2.9  # two rounds of three; six in a row would take 3 s
    await pool.close()


async def test_waiting_for_a_grader_is_not_counted_as_grading(pool: GraderPool) -> None:
    assert await still_works(pool)
    scores = await asyncio.gather(*(pool.grade("my_scorers:slow", {"text": "", "seconds": 0.5}) for _ in range(4)))
    assert [score.outcome for score in scores] == [Outcome.OK] * 4  # the last waited 1.5 s, the limit is 1 s


async def test_close_ends_grades_in_flight_and_leaves_no_process() -> None:
    pool = GraderPool(processes=2, timeout_s=60.0)
    await pool.start()
    pids = pool.pids
    grades = [asyncio.create_task(pool.grade("my_scorers:busy", {"text": ""})) for _ in range(4)]
    await asyncio.sleep(0.3)
    await pool.close()
    await pool.close()
    results = await asyncio.wait_for(asyncio.gather(*grades, return_exceptions=True), 5)
    assert all(isinstance(result, WorkerDied) for result in results), results
    assert not any(psutil.pid_exists(pid) for pid in pids)
    with pytest.raises(WorkerDied, match="closed"):
        await pool.grade("my_scorers:right", {"text": "7", "answer": "7"})


async def test_a_grader_sees_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    pool = GraderPool(processes=1, timeout_s=5.0)
    await pool.start()
    names = set((await pool.grade("my_scorers:environment", {"text": ""})).components)
    await pool.close()
    assert "PATH" in names
    assert "WANDB_API_KEY" not in names and "HOME" not in names


async def test_graders_stay_in_the_process_group_and_ignore_ctrl_c(pool: GraderPool) -> None:
    os.kill(pool.pids[0], signal.SIGINT)
    ids = (await pool.grade("my_scorers:process_ids", {"text": ""})).components
    assert ids == {"group": os.getpgrp(), "session": os.getsid(0), "process": pool.pids[0]}


@pytest.mark.parametrize(
    ("script", "words"),
    [("exit 4", "exited with code 4"), ("echo hello; exec sleep 60", "wrote on stdout before it was")],
)
async def test_graders_that_cannot_start_say_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, words: str
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    pool = GraderPool(processes=1, timeout_s=1.0)
    with pytest.raises(WorkerDied, match=words):
        await pool.start()
    assert pool.pids == ()
    with pytest.raises(WorkerDied, match="never started"):
        await pool.grade("my_scorers:right", {"text": "7", "answer": "7"})


PARENT = """
import asyncio
from pipelinerl.tasks.grading import GraderPool

async def main():
    pool = GraderPool(processes=2, timeout_s=60.0)
    await pool.start()
    asyncio.create_task(pool.grade("my_scorers:busy", {"text": ""}))
    await asyncio.sleep(0.2)
    print(*pool.pids, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def test_graders_die_with_a_parent_that_is_killed() -> None:
    path = os.pathsep.join(entry for entry in sys.path if entry)
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(alive(pids)) == 2
    finally:
        parent.kill()
        parent.communicate()
    assert wait_until(lambda: not alive(pids))


def test_a_grader_starts_without_numpy() -> None:
    """A pool starts, and restarts after a timeout, in the time of an interpreter."""
    code = "import sys, pipelinerl.tasks.grader_child, pipelinerl.tasks.scorers; print('numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
