"""One episode: environment and policy take turns until the environment has no more to say.

env.start() -> prompt -> generate -> env.step() -> (extension -> generate -> env.step()) ... -> Rollout
"""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import ParamSpec, TypeVar

import numpy as np

from pipelinerl.errors import PipelineRLError
from pipelinerl.rollout.tokens import ChatRenderer
from pipelinerl.tasks.base import Env, Message, Score
from pipelinerl.types import Completion, Outcome, Rollout, Turn

GenerateFn = Callable[[list[int]], Awaitable[Completion]]
"""Samples a completion that follows all the tokens of the episode so far."""

P = ParamSpec("P")
T = TypeVar("T")


class _EnvFailed(Exception):
    """The environment broke; the text says how."""


@dataclass
class _Transcript:
    """What happened so far, kept also when the environment breaks."""

    prompt_text: str = ""
    turns: list[Turn] = field(default_factory=list)


async def run_episode(env: Env, generate: GenerateFn, renderer: ChatRenderer, max_total_tokens: int) -> Rollout:
    """Play one episode of at most `max_total_tokens` tokens, prompt and all turns together.

    An exception of the environment becomes an `env_error` rollout, and so does a reward that is not finite, or a
    component that is infinite. A completion with a logprob that is not finite ends the episode as `bad_logprob`. A
    PipelineRLError from anywhere, and whatever `generate` raises, goes through: it ends the run.
    """
    transcript = _Transcript()
    try:
        score = await _play(env, generate, renderer, max_total_tokens, transcript)
        if not math.isfinite(score.reward):
            raise _EnvFailed(f"the environment's reward is {score.reward}, not a finite number")
        for name, value in score.components.items():
            if math.isinf(value):  # NaN says that the rollout does not have the component
                raise _EnvFailed(f"the environment's reward component {name} is {value}, not a finite number")
    except _EnvFailed as failure:
        score = Score(0.0, outcome=Outcome.ENV_ERROR, detail=str(failure))
    return Rollout(
        turns=tuple(transcript.turns),
        reward=score.reward,
        outcome=score.outcome,
        components=dict(score.components),
        prompt_text=transcript.prompt_text,
        detail=score.detail,
    )


def failed_rollout(error: Exception) -> Rollout:
    """The rollout of an episode whose environment could not even be made."""
    return Rollout((), 0.0, Outcome.ENV_ERROR, detail=_describe(error))


async def _play(
    env: Env, generate: GenerateFn, renderer: ChatRenderer, max_total_tokens: int, transcript: _Transcript
) -> Score:
    history = list(await _guarded(env.start))
    transcript.prompt_text = renderer.prompt_text(history)
    context = renderer.prompt(history)
    if len(context) >= max_total_tokens:
        detail = _too_long(len(context), max_total_tokens, transcript.prompt_text)
        return Score(0.0, outcome=Outcome.PROMPT_TOO_LONG, detail=detail)
    tokens: list[int] = []
    while True:
        tokens += context
        completion = await generate(list(tokens))
        text = renderer.decode(completion.tokens)
        tokens += completion.tokens.tolist()
        transcript.turns.append(Turn(np.array(context, np.int32), replace(completion, text=text)))
        if completion.finish_reason == "abort":
            return Score(0.0, outcome=Outcome.INFRA_ABORT, detail="the engine aborted the request")
        broken = int(np.count_nonzero(~np.isfinite(completion.logprobs)))
        if broken:
            detail = f"the engine returned {broken} of {len(completion.logprobs)} logprobs that are not finite"
            return Score(0.0, outcome=Outcome.BAD_LOGPROB, detail=detail)
        truncated = completion.finish_reason == "length"
        step = await _guarded(env.step, text, truncated)
        if truncated:
            return _truncated(step.score, "the completion hit the token limit")
        if not step.messages:
            return _final(step.score)
        context = renderer.extension(history, completion.tokens, step.messages)
        history += [Message("assistant", text), *step.messages]
        if len(tokens) + len(context) >= max_total_tokens:
            return _truncated(step.score, f"no room for another turn in {max_total_tokens} tokens")


async def _guarded(call: Callable[P, Awaitable[T]], *args: P.args, **kwargs: P.kwargs) -> T:
    """Tell the environment's own exceptions from those that end the run."""
    try:
        return await call(*args, **kwargs)
    except PipelineRLError:
        raise
    except Exception as error:
        raise _EnvFailed(_describe(error)) from error


def _final(score: Score | None) -> Score:
    if score is None:
        raise _EnvFailed("the environment ended the episode without a score")
    return score


def _truncated(score: Score | None, why: str) -> Score:
    """What the episode is worth where the limit ends it; an error of the grader stays an error."""
    if score is None:
        return Score(0.0, outcome=Outcome.TRUNCATED, detail=why)
    return replace(score, outcome=Outcome.TRUNCATED, detail=why) if score.outcome.scored else score


def _too_long(length: int, limit: int, text: str) -> str:
    start = text if len(text) <= 80 else f"{text[:77]}..."
    return (
        f"the prompt has {length} tokens, and engine.max_model_len={limit} must hold it and at least one more; "
        f"shorten it or raise the limit: {start!r}"
    )


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
