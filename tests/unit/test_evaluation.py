"""Evaluations: pass@k and avg@k by hand, what is written, one version only, and an engine of its own."""

import asyncio
import itertools
import json
import math
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelinerl.concurrency import background
from pipelinerl.config.schema import EvalConfig
from pipelinerl.errors import DataError, EvaluationError, PipelineRLError, WorkerDied
from pipelinerl.loop import evaluate
from pipelinerl.metrics.evals import evaluation_path, read_evaluation, read_mean_rewards, write_evaluation
from pipelinerl.metrics.evaluation import evaluation_metrics, figures, pass_at_k, pass_ks
from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.rollout.dedicated import DedicatedEvaluations
from pipelinerl.rollout.evaluate import ATTEMPTS, Evaluator, sample_problems
from pipelinerl.types import GroupMeta, Outcome, Problem, RolloutMeta
from tests.unit.fakes import SECONDS, FakeTask, Gate, fake_run, settle, small_config, until

OK, CUT, ERROR, ABORT = Outcome.OK, Outcome.TRUNCATED, Outcome.ENV_ERROR, Outcome.INFRA_ABORT
FOUR = EvalConfig(samples=4, temperature=1.0)


def group(index: int, rewards: Sequence[float], outcomes: Sequence[Outcome] = (), version: int = 0) -> GroupMeta:
    """Completions of 2, 3, 4, ... tokens."""
    ends = zip(rewards, outcomes or [OK] * len(rewards), strict=True)
    metas = tuple(
        RolloutMeta(reward, outcome, {}, 5 + i, 3, 2 + i, {} if outcome is ABORT else {version: 2 + i})
        for i, (reward, outcome) in enumerate(ends)
    )
    return GroupMeta(index, f"eval/{index}", 0, metas, 0.5)


# pass@k and avg@k


@pytest.mark.parametrize(
    ("scored", "passed", "k", "expected"),
    [
        (4, 0, 1, 0.0), (4, 4, 4, 1.0), (4, 1, 1, 0.25), (4, 1, 2, 0.5), (4, 1, 4, 1.0),
        (4, 2, 2, 5 / 6),  # one of the six pairs has none that passed
        (5, 2, 3, 0.9),  # 1 - C(3,3) / C(5,3)
        (200, 10, 100, 1 - math.prod((100 - i) / (200 - i) for i in range(10))),
    ],
)  # fmt: skip
def test_pass_at_k_by_hand(scored: int, passed: int, k: int, expected: float) -> None:
    assert pass_at_k(scored, passed, k) == pytest.approx(expected)


@settings(deadline=None)  # a busy machine
@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_share_of_all_draws_that_hold_one_that_passed(scored: int, data: st.DataObject) -> None:
    passed, k = data.draw(st.integers(0, scored)), data.draw(st.integers(1, scored))
    draws = list(itertools.combinations([True] * passed + [False] * (scored - passed), k))
    assert pass_at_k(scored, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@pytest.mark.parametrize(
    ("samples", "ks"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8]), (9, [1, 2, 4, 8, 9])]
)
def test_k_doubles_up_to_the_samples(samples: int, ks: list[int]) -> None:
    assert pass_ks(samples) == ks


def test_an_evaluation_by_hand() -> None:
    groups = [
        group(0, [1, 1, 0, 0], [OK, OK, OK, CUT]),
        group(1, [0, 0, 0, 0]),
        group(2, [1, 9, 1, 9], [OK, ERROR, OK, ABORT]),  # what has no reward has a number in its place
        group(3, [9, 9, 9, 9], [ERROR] * 4),
    ]
    metrics = evaluation_metrics("sort", 7, groups, FOUR)
    assert metrics["eval/sort/version"] == 7 and metrics["eval/sort/problems"] == 4
    assert metrics["eval/sort/errored"] == 6 and metrics["eval/sort/truncated_frac"] == 1 / 10
    assert metrics["eval/sort/tokens_mean"] == 3.5
    # problem means .5, 0, 1; problem 3 has none
    assert metrics["eval/sort/avg@4"] == metrics["eval/sort/accuracy"] == 0.5
    assert metrics["eval/sort/avg@4/problems"] == 3
    assert metrics["eval/sort/pass@1"] == 0.5
    assert metrics["eval/sort/pass@2"] == pytest.approx((5 / 6 + 0 + 1) / 3)
    assert metrics["eval/sort/pass@2/problems"] == 3
    assert metrics["eval/sort/pass@4"] == 0.5 and metrics["eval/sort/pass@4/problems"] == 2  # problems 0 and 1
    for name in ("avg@4", "pass@1", "pass@2", "pass@4"):
        low, value, high = (metrics[f"eval/sort/{name}{part}"] for part in ("/ci_low", "", "/ci_high"))
        assert 0 <= low < value < high <= 1
    for part in ("/ci_low", "/ci_high", "/problems"):
        assert metrics[f"eval/sort/accuracy{part}"] == metrics[f"eval/sort/avg@4{part}"]
    assert not any("gain" in name for name in metrics)


def test_without_any_reward_there_are_counts_only() -> None:
    metrics = evaluation_metrics("sort", 0, [group(0, [9] * 4, [ERROR] * 4)], FOUR)
    assert set(metrics) == {
        f"eval/sort/{name}" for name in ("version", "problems", "errored", "tokens_mean", "truncated_frac")
    }


def test_what_passes_is_a_setting() -> None:
    groups = [group(0, [0.2, 0.5, 0.8, 0.7]), group(1, [0.1, 0.4, 0.3, 0.0])]
    for pass_reward, passed in ((1.0, 0.0), (0.7, 0.25), (0.05, 0.875)):
        found = figures(groups, EvalConfig(samples=4, temperature=1.0, pass_reward=pass_reward))
        assert found["pass@1"].value == passed and found["avg@4"].value == pytest.approx(0.375)


def test_the_gain_is_over_the_same_problems() -> None:
    before = {"eval/0": 0.0, "eval/1": 0.5, "eval/9": 1.0}  # problem 9 was scored then, problem 2 was not
    found = figures([group(0, [1, 1]), group(1, [1, 0]), group(2, [1, 1])], FOUR, before)["gain"]
    assert (found.value, found.problems) == (0.5, 2)


# Files


def test_the_file_of_a_version_holds_every_problem_and_is_replaced(tmp_path: Path) -> None:
    write_evaluation(tmp_path, 50, [group(0, [1, 1])])
    path = write_evaluation(
        tmp_path, 50, [group(0, [1, math.inf], version=50), group(1, [0.25, 9], [CUT, ERROR], version=50)]
    )
    assert path == tmp_path / "evals" / "version_000050.jsonl" and list(path.parent.iterdir()) == [path]
    first, second = read_evaluation(tmp_path, 50)
    assert first["rewards"] == [1.0, math.inf] and json.loads(path.read_text().splitlines()[0])["rewards"][1] == "inf"
    assert second == {
        "version": 50, "problem_id": "eval/1", "rewards": [0.25, None], "outcomes": ["truncated", "env_error"],
        "completion_tokens": [2, 3], "details": ["", ""], "worker": 0, "seconds": 0.5,
    }  # fmt: skip
    assert read_mean_rewards(tmp_path, 50) == {"eval/0": math.inf, "eval/1": 0.25}
    assert read_mean_rewards(tmp_path, 51) is None
    with pytest.raises(DataError, match="version_000051"):
        read_evaluation(tmp_path, 51)


async def test_a_run_measures_its_gain_over_version_0_and_goes_on_measuring_it_when_resumed(tmp_path: Path) -> None:
    run = fake_run(tmp_path)
    await evaluate(run, 0)
    run.fleet.version = run.config.steps
    resumed = fake_run(tmp_path)
    resumed.fleet.version = resumed.config.steps
    metrics = await evaluate(resumed, resumed.config.steps)
    assert metrics["eval/fake/gain"] == 0 and metrics["eval/fake/gain/problems"] == 3
    assert [record["version"] for record in read_evaluation(tmp_path, 4)] == [4, 4, 4]
    assert [record["problem_id"] for record in read_evaluation(tmp_path, 4)] == ["eval/0", "eval/1", "eval/2"]


# One version


def solver(*versions: int) -> Callable[[int, Problem], Any]:
    """Each attempt at a problem is sampled by the next of the versions; the last one stays."""
    attempts: dict[int, int] = {}

    async def solve(index: int, problem: Problem) -> GroupMeta:
        attempt = attempts[index] = attempts.get(index, -1) + 1
        return group(index, [1.0, 0.0], version=versions[min(attempt, len(versions) - 1)])

    return solve


async def test_a_problem_of_another_version_is_sampled_again_and_counted() -> None:
    problems = FakeTask().problems("eval")
    assert (await sample_problems(problems, 5, solver(5)))[1] == 0
    groups, again = await sample_problems(problems, 5, solver(4, 6, 5))
    assert again == 3 and all(meta.tokens_by_version.keys() == {5} for g in groups for meta in g.rollouts)


async def test_versions_are_never_mixed(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path)
    evaluator = Evaluator(FOUR, FakeTask(), solver(*[6] * ATTEMPTS, 5), log)
    with pytest.raises(EvaluationError, match=r"of version 5: eval/0 was sampled by version 6 in each of 3 attempts"):
        await evaluator.evaluate(5)
    assert read_metrics(log.path) == [] and not evaluation_path(tmp_path, 5).exists()


async def test_tokens_of_two_versions_in_one_completion_are_another_version_too() -> None:
    async def solve(index: int, problem: Problem) -> GroupMeta:
        meta = RolloutMeta(1.0, OK, {}, 9, 3, 6, {5: 3, 6: 3})
        return GroupMeta(index, problem.id, 0, (meta,), 0.5)

    with pytest.raises(EvaluationError, match="sampled by version 6"):
        await sample_problems(FakeTask().problems("eval"), 5, solve)


async def test_what_the_engine_gave_up_has_no_version_and_is_counted(tmp_path: Path) -> None:
    async def solve(index: int, problem: Problem) -> GroupMeta:
        return group(index, [1, 0], [OK, ABORT], version=5)

    metrics = await Evaluator(FOUR, FakeTask(), solve, MetricsLog(tmp_path)).evaluate(5)
    assert metrics["eval/fake/errored"] == 3 and metrics["eval/fake/accuracy"] == 1


# An engine of its own


class FakeEvalEngine:
    """Answers when the test opens `gate`, with the weights that it holds then."""

    def __init__(self) -> None:
        self.available = True
        self.version: int | None = 0
        self.gate = Gate()
        self.error: Exception | None = None

    async def solve(self, index: int, problem: Problem) -> GroupMeta:
        await self.gate.pass_through()
        if self.error:
            raise self.error
        assert self.version is not None
        return group(index, [1.0, 0.0], version=self.version)


class Bench:
    """Training that does nothing but update the weights of version after version, as the loop does."""

    def __init__(self, run_dir: Path, *overrides: str):
        config = small_config("eval.engine=dedicated", "eval.every=2", "steps=10", *overrides)
        self.engine, self.told = FakeEvalEngine(), list[str]()
        self.log = MetricsLog(run_dir)
        evaluator = Evaluator(config.eval, FakeTask(), self.engine.solve, self.log)
        self.evaluations = DedicatedEvaluations(config, evaluator, self.engine, self.told.append)

    def update(self, version: int) -> bool:
        """Whether the engine was in it."""
        joins = self.evaluations.joins(version)
        if joins:
            self.engine.version = version
        self.evaluations.begin(version)
        return joins

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        async with asyncio.timeout(SECONDS), background(self.evaluations.finish()):
            yield

    def logged(self, name: str) -> dict[int, float]:
        return {
            record["step"]: record[f"eval/fake/{name}"]
            for record in read_metrics(self.log.path)
            if f"eval/fake/{name}" in record
        }


async def test_training_goes_on_and_the_result_is_logged_under_its_version(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engine.gate.close()
    async with bench.running():
        assert bench.update(0)
        await until(lambda: bench.engine.gate.arrived == 3)
        assert not bench.update(1)  # not due
        assert bench.engine.version == 0 and bench.logged("accuracy") == {}
        bench.engine.gate.open()
        await bench.evaluations.all_done()
        assert bench.update(2) and not bench.update(3)  # which does not wait for the evaluation of 2
        await bench.evaluations.all_done()
    assert bench.logged("accuracy") == {0: 0.5, 2: 0.5} and bench.logged("version") == {0: 0, 2: 2}
    assert bench.logged("gain") == {2: 0} and bench.told == []
    assert read_evaluation(tmp_path, 2)[0]["version"] == 2


async def test_a_version_that_finds_the_engine_busy_is_missed_and_the_next_is_not(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engine.gate.close()
    evaluation_path(tmp_path, 2).parent.mkdir()
    evaluation_path(tmp_path, 2).write_text("of the run before it was resumed\n")
    async with bench.running():
        bench.update(0)
        await until(lambda: bench.engine.gate.arrived == 3)
        assert not bench.update(2) and bench.engine.version == 0
        bench.engine.gate.open()
        await bench.evaluations.all_done()
        assert bench.update(4)
        await bench.evaluations.all_done()
    assert bench.logged("accuracy").keys() == {0, 4} and bench.logged("missed") == {2: 1}
    assert not evaluation_path(tmp_path, 2).exists()
    assert [line.partition(":")[0] for line in bench.told] == ["version 2 was not evaluated"]


async def test_an_evaluation_that_ends_during_the_update_does_not_take_what_the_engine_did_not_get(
    tmp_path: Path,
) -> None:
    bench = Bench(tmp_path)
    bench.engine.gate.close()
    async with bench.running():
        bench.update(0)
        await until(lambda: bench.engine.gate.arrived == 3)
        assert not bench.evaluations.joins(2)  # the update to 2 begins
        bench.engine.gate.open()
        await bench.evaluations.all_done()
        bench.evaluations.begin(2)  # and ends
        await settle()
    assert bench.logged("accuracy").keys() == {0} and bench.logged("missed") == {2: 1}


@pytest.mark.parametrize("how", ["dies", "comes back with other weights"])
async def test_a_lost_engine_costs_its_evaluation_and_not_the_run(tmp_path: Path, how: str) -> None:
    bench = Bench(tmp_path)
    bench.engine.gate.close()
    async with bench.running():
        bench.update(0)
        await until(lambda: bench.engine.gate.arrived == 3)
        bench.engine.available = False
        if how == "dies":
            bench.engine.error = WorkerDied("engine 2: killed")
        else:
            bench.engine.version = 1
        bench.engine.gate.open()
        await bench.evaluations.all_done()
        assert not bench.update(2)
        bench.engine.available, bench.engine.error = True, None
        assert bench.update(4)
        await bench.evaluations.all_done()
    assert bench.logged("accuracy").keys() == {4} and bench.logged("missed") == {0: 1, 2: 1}
    assert ("engine 2: killed" if how == "dies" else "sampled by version 1") in bench.told[0]


async def test_other_errors_of_an_evaluation_end_the_run(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.engine.error = DataError("row 3")
    with pytest.raises(PipelineRLError, match="row 3"):
        async with bench.running():
            bench.update(0)
            await bench.evaluations.all_done()


async def test_the_last_version_is_evaluated_by_the_engines_that_have_no_more_to_do(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    assert not bench.update(10)
    run = fake_run(tmp_path / "run", "eval.engine=dedicated")
    run.dedicated = bench.evaluations
    run.fleet.version = 4
    assert (await evaluate(run, 4))["eval/fake/version"] == 4
    assert await evaluate(run, 0) == {} and [version for version, _ in run.fleet.evaluated] == [4] * 3
    assert bench.logged("accuracy") == {}
