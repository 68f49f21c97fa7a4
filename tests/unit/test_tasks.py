"""The sort task, the registry, and the single-turn environment."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import pipelinerl.tasks
from pipelinerl.config.schema import JsonlTask, LengthsTask, SortTask, TaskConfig
from pipelinerl.tasks import scorers
from pipelinerl.tasks.base import Message, Score, SingleTurnEnv
from pipelinerl.tasks.registry import build_task
from pipelinerl.tasks.sort import DigitSort, target
from pipelinerl.types import Outcome, Problem


async def grade_here(scorer: str, kwargs: Mapping[str, Any]) -> Score:
    """Runs a scorer of pipelinerl.tasks.scorers in this process."""
    module, _, name = scorer.partition(":")
    assert module == "pipelinerl.tasks.scorers"
    return Score(getattr(scorers, name)(**kwargs))


def problem(digits: str, scratchpad: bool) -> Problem:
    return Problem("train/0", {"digits": digits, "answer": "".join(sorted(digits)), "scratchpad": scratchpad})


def test_sort_targets() -> None:
    assert target(problem("483015", scratchpad=False)) == "013458"
    # inserting 4, then 8, then 3
    assert target(problem("483", scratchpad=True)) == "4 48 348"
    # equal digits stay side by side
    assert target(problem("2020", scratchpad=True)) == "2 02 022 0022"


@pytest.mark.parametrize("scratchpad", [False, True])
@pytest.mark.parametrize(
    ("text", "plain", "last"), [("348", 1.0, 1.0), (" 348 \n", 1.0, 1.0), ("4 48 348", 0.0, 1.0), ("384", 0.0, 0.0)]
)
async def test_sort_rewards_the_answer(scratchpad: bool, text: str, plain: float, last: float) -> None:
    task = build_task(SortTask(digits=3, scratchpad=scratchpad), seed=0)
    env = task.env(problem("483", scratchpad), grade_here)
    assert await env.start() == (Message("user", "sort 483"),)
    step = await env.step(text, truncated=False)
    assert step.messages == ()
    assert step.score is not None and step.score.reward == (last if scratchpad else plain)


async def test_a_system_prompt_comes_before_the_problem() -> None:
    task = build_task(SortTask(digits=3, system_prompt="Be brief."), seed=0)
    messages = await task.env(problem("483", scratchpad=False), grade_here).start()
    assert messages == (Message("system", "Be brief."), Message("user", "sort 483"))


@given(st.integers(2, 16), st.booleans(), st.integers(0, 1000), st.integers(0, 99_999))
def test_a_perfect_completion_gets_the_reward(digits: int, scratchpad: bool, seed: int, index: int) -> None:
    drawn = DigitSort(SortTask(digits=digits, scratchpad=scratchpad), seed).problems("train")[index]
    assert len(drawn.data["digits"]) == digits
    scorer = scorers.last_word if scratchpad else scorers.exact_match
    assert scorer(target(drawn), drawn.data["answer"]) == 1.0


@pytest.mark.parametrize("digits", [2, 3, 6])
def test_sort_splits_are_disjoint(digits: int) -> None:
    task = DigitSort(SortTask(digits=digits, train_problems=2000, eval_problems=200), seed=1)
    train = {p.data["digits"] for p in task.problems("train")}
    held_out = {p.data["digits"] for p in task.problems("eval")}
    assert train and held_out and not train & held_out


def test_sort_problems_depend_on_seed_and_index_alone() -> None:
    def numbers(seed: int, size: int) -> list[str]:
        return [p.data["digits"] for p in DigitSort(SortTask(train_problems=size), seed).problems("train")]

    assert numbers(0, 50) == numbers(0, 80)[:50]
    assert numbers(0, 50) != numbers(1, 50)
    assert len(set(numbers(0, 50))) > 45


def test_sort_problems_are_a_sequence() -> None:
    problems = DigitSort(SortTask(train_problems=10, eval_problems=3), seed=0).problems("eval")
    assert len(problems) == 3
    assert [p.id for p in problems] == ["eval/0", "eval/1", "eval/2"]
    assert problems[-1] == problems[2] and problems[1:] == [problems[1], problems[2]]
    with pytest.raises(IndexError):
        problems[3]


def test_every_configured_kind_has_a_builder() -> None:
    word_problems = Path(pipelinerl.tasks.__path__[0]) / "data" / "word_problems.jsonl"
    configs: dict[str, TaskConfig] = {
        "sort": SortTask(),
        "jsonl": JsonlTask(path=str(word_problems)),
        "lengths": LengthsTask(),
    }
    kinds = {get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(get_args(TaskConfig)[0])}
    assert {kind: build_task(config, seed=0).name for kind, config in configs.items()} == {k: k for k in kinds}


async def test_a_single_turn_env_hands_text_and_arguments_to_the_scorer() -> None:
    calls = []
    verdict = Score(0.0, outcome=Outcome.VERIFIER_TIMEOUT, detail="slow")

    async def grade(scorer: str, kwargs: Mapping[str, Any]) -> Score:
        calls.append((scorer, dict(kwargs)))
        return verdict

    env = SingleTurnEnv([Message("user", "2+2")], "mine:score", {"answer": "4"}, grade)
    assert await env.start() == (Message("user", "2+2"),)
    step = await env.step("it is 4", truncated=True)
    assert calls == [("mine:score", {"text": "it is 4", "answer": "4"})]
    assert step.score is verdict and step.messages == ()


def lengths(sigma: float, count: int = 4000) -> list[int]:
    problems = build_task(LengthsTask(median=100, sigma=sigma, train_problems=count), seed=3).problems("train")
    assert problems[7] == problems[7] and problems[-1] == problems[count - 1]
    return [problem.completion_tokens or 0 for problem in problems]


def test_lengths_are_equal_or_log_normal_as_configured() -> None:
    assert set(lengths(sigma=0.0)) == {100}
    p50, p99 = np.percentile(lengths(sigma=0.99), [50, 99])
    assert p50 == pytest.approx(100, rel=0.05)
    assert p99 / p50 == pytest.approx(10, rel=0.1)
    assert min(lengths(sigma=4.0)) == 1  # never none


async def test_the_reward_of_a_given_length_is_a_coin_that_the_text_tosses() -> None:
    calls = []

    async def grade(scorer: str, kwargs: Mapping[str, Any]) -> Score:
        calls.append((scorer, dict(kwargs)))
        return Score(1.0)

    task = build_task(LengthsTask(prompt_chars=40), seed=0)
    problem = task.problems("train")[5]
    env = task.env(problem, grade)
    (message,) = await env.start()
    assert message.role == "user" and len(message.content) == 40
    assert (await env.step("abc", truncated=True)).score == Score(1.0)
    assert calls == [("pipelinerl.tasks.scorers:toss", {"text": "abc"})]
    tosses = [scorers.toss(f"text {number}") for number in range(1000)]
    assert tosses == [scorers.toss(f"text {number}") for number in range(1000)]
    assert set(tosses) == {0.0, 1.0} and 400 < sum(tosses) < 600
