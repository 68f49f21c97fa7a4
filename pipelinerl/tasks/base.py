"""What a task is: problems, and a single-use environment per episode.

The environment speaks first (`start`), then policy and environment take turns (`step`) until a step brings no new
messages. One turn or many, with tools or without: the rollout code sees no difference.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pipelinerl.types import Outcome, Problem

Split = Literal["train", "eval"]

Grade = Callable[[str, Mapping[str, Any]], Awaitable["Score"]]
"""`await grade("package.module:function", kwargs)` runs `function(**kwargs)` in a grader process that is killed when
it takes too long. `kwargs` must be JSON. What a scorer may return is said in `scorers.py`."""


@dataclass(frozen=True, slots=True)
class Message:
    """One entry of a conversation; `role` is what the chat template knows: system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Score:
    """What an episode is worth: `reward` is trained on, `components` are its named parts for the metrics."""

    reward: float
    components: Mapping[str, float] = field(default_factory=dict)
    outcome: Outcome = Outcome.OK
    detail: str = ""  # why, when the outcome is not ok


@dataclass(frozen=True, slots=True)
class EnvStep:
    """The environment's answer to a completion.

    Without `messages` the episode is over and `score` must be set. With them the policy speaks again; `score` is then
    what the episode is worth if the token limit ends it here (None: 0).
    """

    score: Score | None
    messages: tuple[Message, ...] = ()


class Env(Protocol):
    """One episode. Made for it, used once, never reset.

    An exception raised here makes the rollout an `env_error` (masked out of the loss and counted), except for a
    `PipelineRLError`, which ends the run.
    """

    async def start(self) -> tuple[Message, ...]:
        """The conversation up to the policy's first turn."""
        ...

    async def step(self, text: str, truncated: bool) -> EnvStep:
        """Answer the policy's `text` (special tokens removed). `truncated`: it hit the token limit, so the episode
        ends with this step whatever it returns."""
        ...


class Task(Protocol):
    """A set of problems and the environment to solve one in. `registry.py` says how to add one."""

    @property
    def name(self) -> str: ...

    @property
    def skipped_rows(self) -> int:
        """Rows of the user's data that were left out; 0 for generated problems."""
        ...

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in a fixed order; may be computed on access. No problem is in both splits."""
        ...

    def env(self, problem: Problem, grade: Grade) -> Env:
        """A fresh environment for one episode on `problem`."""
        ...


class SingleTurnEnv:
    """Prompt, one completion, one score: `scorer(text=completion, **kwargs)` in a grader process."""

    def __init__(self, messages: Sequence[Message], scorer: str, kwargs: Mapping[str, Any], grade: Grade) -> None:
        self._messages = tuple(messages)
        self._scorer = scorer
        self._kwargs = kwargs
        self._grade = grade

    async def start(self) -> tuple[Message, ...]:
        return self._messages

    async def step(self, text: str, truncated: bool) -> EnvStep:
        """Truncated text is scored as it stands: a correct answer within the limit is a correct answer."""
        return EnvStep(await self._grade(self._scorer, {"text": text, **self._kwargs}))
