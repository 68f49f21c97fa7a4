"""Episodes and groups, on an environment of two turns and a scripted policy."""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pipelinerl.errors import TokenPrefixError, WorkerDied
from pipelinerl.rollout.episode import GenerateFn, run_episode
from pipelinerl.rollout.group import run_group
from pipelinerl.rollout.tokens import ChatRenderer
from pipelinerl.tasks.base import EnvStep, Message, Score
from pipelinerl.types import Completion, Outcome, Problem, Rollout, VersionSpan

END = "|"  # ends a turn; the only special token


class CharTokenizer:
    """One token per character: its code point. A turn reads `u:text|` or `a:text|`."""

    chat_template = "as below"

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> str:
        return "".join(f"{turn['role'][0]}:{turn['content']}{END}" for turn in conversation) + "a:"

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        return [ord(char) for char in text]

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return "".join(map(chr, token_ids)).replace(END, "")


RENDERER = ChatRenderer(CharTokenizer())


def completion(text: str, finish_reason: str = "stop", version: int = 0) -> Completion:
    tokens = np.array([ord(char) for char in text], np.int32)
    spans = (VersionSpan(version, 0, len(tokens)),) if len(tokens) else ()
    return Completion(tokens, np.full(len(tokens), -0.5, np.float32), spans, finish_reason, text="")


def scripted(*completions: Completion) -> tuple[GenerateFn, list[str]]:
    """A policy that says `completions` in turn, and the contexts (as text) that it was given."""
    left, seen = list(completions), list[str]()

    async def generate(tokens: list[int]) -> Completion:
        seen.append("".join(map(chr, tokens)))
        return left.pop(0)

    return generate, seen


class GuessTwice:
    """Think of a number; a wrong first guess earns a hint and a second one, worth half."""

    def __init__(self, number: int = 7) -> None:
        self.number = number
        self.heard: list[tuple[str, bool]] = []

    async def start(self) -> tuple[Message, ...]:
        return (Message("user", "guess"),)

    async def step(self, text: str, truncated: bool) -> EnvStep:
        self.heard.append((text, truncated))
        reward = float(text == str(self.number)) / len(self.heard)
        if len(self.heard) == 2 or reward > 0:
            return EnvStep(Score(reward, {"right": reward}))
        return EnvStep(None, (Message("user", "higher"),))


async def play(env: Any, *completions: Completion, limit: int = 100) -> tuple[Rollout, list[str]]:
    generate, seen = scripted(*completions)
    return await run_episode(env, generate, RENDERER, limit), seen


def text_of(tokens: np.ndarray[Any, Any]) -> str:
    return "".join(map(chr, tokens))


async def test_a_single_turn() -> None:
    env = GuessTwice()
    rollout, seen = await play(env, completion("7|"))
    assert seen == ["u:guess|a:"]
    assert env.heard == [("7", False)]
    assert (rollout.reward, rollout.outcome, rollout.components) == (1.0, Outcome.OK, {"right": 1.0})
    assert rollout.prompt_text == "u:guess|a:"
    (turn,) = rollout.turns
    assert text_of(turn.context) == "u:guess|a:" and turn.context.dtype == np.int32
    assert text_of(turn.completion.tokens) == "7|" and turn.completion.text == "7"


async def test_two_turns_extend_the_tokens_of_the_first() -> None:
    env = GuessTwice()
    rollout, seen = await play(env, completion("3|", version=4), completion("7|", version=5))
    assert seen == ["u:guess|a:", "u:guess|a:3|u:higher|a:"]
    assert env.heard == [("3", False), ("7", False)]
    assert (rollout.reward, rollout.outcome) == (0.5, Outcome.OK)
    assert [text_of(turn.context) for turn in rollout.turns] == ["u:guess|a:", "u:higher|a:"]
    assert [turn.completion.spans[0].version for turn in rollout.turns] == [4, 5]
    assert rollout.total_len == len("u:guess|a:3|u:higher|a:7|")


async def test_a_truncated_completion_is_scored_and_ends_the_episode() -> None:
    env = GuessTwice()
    rollout, _ = await play(env, completion("7", "length"))
    assert env.heard == [("7", True)]
    assert (rollout.reward, rollout.outcome) == (1.0, Outcome.TRUNCATED)
    rollout, seen = await play(GuessTwice(), completion("3", "length"))
    assert len(seen) == 1
    assert (rollout.reward, rollout.outcome) == (0.0, Outcome.TRUNCATED)
    assert "token limit" in rollout.detail


async def test_an_error_of_the_grader_is_not_covered_by_truncation() -> None:
    class Slow(GuessTwice):
        async def step(self, text: str, truncated: bool) -> EnvStep:
            return EnvStep(Score(0.0, outcome=Outcome.VERIFIER_TIMEOUT, detail="too slow"))

    rollout, _ = await play(Slow(), completion("7", "length"))
    assert (rollout.outcome, rollout.detail) == (Outcome.VERIFIER_TIMEOUT, "too slow")


async def test_an_aborted_request_is_not_graded() -> None:
    env = GuessTwice()
    rollout, _ = await play(env, completion("7", "abort"))
    assert env.heard == []
    assert (rollout.reward, rollout.outcome, len(rollout.turns)) == (0.0, Outcome.INFRA_ABORT, 1)


@pytest.mark.parametrize("value", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("finish_reason", ["stop", "length"])
async def test_a_completion_with_a_logprob_that_is_not_finite_is_neither_graded_nor_scored(
    value: float, finish_reason: str
) -> None:
    good, bad = completion("3|"), completion("75", finish_reason)
    bad.logprobs[1] = value
    env = GuessTwice()
    rollout, seen = await play(env, good, bad)
    assert env.heard == [("3", False)] and len(seen) == 2
    assert (rollout.reward, rollout.outcome, len(rollout.turns)) == (0.0, Outcome.BAD_LOGPROB, 2)
    assert not rollout.outcome.scored
    assert rollout.detail == "the engine returned 1 of 2 logprobs that are not finite"


@pytest.mark.parametrize(("room", "outcome"), [(0, Outcome.TRUNCATED), (1, Outcome.OK)])
async def test_a_further_turn_needs_room_for_a_token(room: int, outcome: Outcome) -> None:
    limit = len("u:guess|a:3|u:higher|a:") + room
    rollout, seen = await play(GuessTwice(), completion("3|"), completion("7"), limit=limit)
    assert rollout.outcome is outcome
    assert len(seen) == len(rollout.turns) == 1 + room


async def test_out_of_room_the_score_so_far_counts() -> None:
    class Halfway(GuessTwice):
        async def step(self, text: str, truncated: bool) -> EnvStep:
            return EnvStep(Score(0.25), (Message("user", "go on"),))

    rollout, _ = await play(Halfway(), completion("3|"), limit=15)
    assert (rollout.reward, rollout.outcome) == (0.25, Outcome.TRUNCATED)


@pytest.mark.parametrize(("limit", "fits"), [(10, False), (11, True)])
async def test_a_prompt_needs_room_for_a_token(limit: int, fits: bool) -> None:
    """`u:guess|a:` has 10 tokens."""
    rollout, seen = await play(GuessTwice(), completion("7"), limit=limit)
    assert (rollout.outcome is Outcome.OK, len(seen)) == (fits, int(fits))
    if not fits:
        assert rollout.outcome is Outcome.PROMPT_TOO_LONG and rollout.turns == ()
        assert "the prompt has 10 tokens" in rollout.detail and "max_model_len=10" in rollout.detail
        assert "u:guess" in rollout.detail


def breaking(where: str, error: Exception) -> GuessTwice:
    class Breaks(GuessTwice):
        async def start(self) -> tuple[Message, ...]:
            if where == "start":
                raise error
            return await super().start()

        async def step(self, text: str, truncated: bool) -> EnvStep:
            raise error

    return Breaks()


@pytest.mark.parametrize(("where", "turns"), [("start", 0), ("step", 1)])
async def test_an_exception_of_the_environment_is_an_env_error(where: str, turns: int) -> None:
    rollout, _ = await play(breaking(where, KeyError("answer")), completion("7|"))
    assert (rollout.reward, rollout.outcome) == (0.0, Outcome.ENV_ERROR)
    assert rollout.detail == "KeyError: 'answer'"
    assert len(rollout.turns) == turns


@pytest.mark.parametrize("where", ["start", "step"])
async def test_errors_that_end_the_run_go_through(where: str) -> None:
    with pytest.raises(WorkerDied, match="grader"):
        await play(breaking(where, WorkerDied("grader died")), completion("7|"))


async def test_errors_of_the_engine_go_through() -> None:
    async def generate(tokens: list[int]) -> Completion:
        raise ZeroDivisionError("engine bug")

    with pytest.raises(ZeroDivisionError):
        await run_episode(GuessTwice(), generate, RENDERER, 100)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (EnvStep(None), "without a score"),
        (EnvStep(Score(float("nan"))), "reward is nan"),
        (EnvStep(Score(1.0, {"length": float("-inf")})), "component length is -inf"),
    ],
)
async def test_an_environment_that_breaks_its_contract_is_an_env_error(step: EnvStep, words: str) -> None:
    class Bad(GuessTwice):
        async def step(self, text: str, truncated: bool) -> EnvStep:
            return step

    rollout, _ = await play(Bad(), completion("7|"))
    assert rollout.outcome is Outcome.ENV_ERROR and words in rollout.detail
    assert rollout.reward == 0.0


async def group(make_env: Callable[[Problem], Any], generate: GenerateFn, size: int = 3) -> Any:
    problem = Problem("train/17", {"number": 7})
    return await run_group(5, problem, size, make_env, lambda _: generate, RENDERER, 100)


async def test_a_group_plays_at_the_same_time_in_environments_of_their_own() -> None:
    envs: list[GuessTwice] = []
    waiting, all_there = 0, asyncio.Event()

    def make_env(problem: Problem) -> GuessTwice:
        envs.append(GuessTwice(problem.data["number"]))
        return envs[-1]

    async def generate(tokens: list[int]) -> Completion:
        nonlocal waiting
        waiting += 1
        mine = waiting
        if waiting == 3:
            all_there.set()
        await asyncio.wait_for(all_there.wait(), 5)  # passes only when all three are generating
        return completion("7|" if mine != 2 else "6", "stop" if mine != 2 else "length")

    result = await group(make_env, generate)
    assert (result.id, result.problem_id) == (5, "train/17")
    assert len(envs) == 3 and all(len(env.heard) == 1 for env in envs)
    assert [rollout.reward for rollout in result.rollouts] == [1.0, 0.0, 1.0]
    assert result.rollouts[1].outcome is Outcome.TRUNCATED


async def test_an_environment_that_cannot_be_made_is_an_env_error() -> None:
    def make_env(problem: Problem) -> GuessTwice:
        raise LookupError("no such room")

    result = await group(make_env, scripted()[0])
    assert [(r.outcome, r.detail) for r in result.rollouts] == [(Outcome.ENV_ERROR, "LookupError: no such room")] * 3


async def test_a_fatal_error_cancels_the_group_and_comes_out_bare() -> None:
    cancelled = 0
    calls = 0

    async def generate(tokens: list[int]) -> Completion:
        nonlocal cancelled, calls
        calls += 1
        if calls == 3:
            raise TokenPrefixError("bad template") from KeyError("cause")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled += 1
            raise
        raise AssertionError("not reached")

    with pytest.raises(TokenPrefixError, match="bad template") as caught:
        await asyncio.wait_for(group(lambda problem: GuessTwice(), generate), 5)
    assert cancelled == 2
    assert isinstance(caught.value.__cause__, KeyError)


async def test_cancelling_a_group_cancels_its_episodes() -> None:
    started = asyncio.Event()

    async def generate(tokens: list[int]) -> Completion:
        started.set()
        await asyncio.sleep(60)
        raise AssertionError("not reached")

    running = asyncio.create_task(group(lambda problem: GuessTwice(), generate))
    await started.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
