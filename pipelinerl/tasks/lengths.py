"""Completions of lengths that are drawn beforehand: the workload of benchmarks.

How well generation and training overlap depends on lengths, and those of a real task change as the policy learns. Here
every problem says how many tokens are sampled for it, whatever the policy writes; they are log-normal, with a sigma of
0.99 for a 99th percentile of ten times the median. The reward is a coin that the text tosses: nothing can be learned,
and the groups have advantages.
"""

import math
import random
from collections.abc import Sequence

from pipelinerl.config.schema import LengthsTask
from pipelinerl.tasks.base import Env, Grade, Message, SingleTurnEnv, Split
from pipelinerl.tasks.synthetic import SyntheticProblems
from pipelinerl.types import Problem

LETTERS = "abcdefghijklmnopqrstuvwxyz"


class LengthsProblems(SyntheticProblems[LengthsTask]):
    """Problems of one split; problem `i` is a function of (seed, split, i)."""

    def _make(self, name: str, rng: random.Random) -> Problem:
        length = round(rng.lognormvariate(math.log(self._config.median), self._config.sigma))
        prompt = "".join(rng.choices(LETTERS, k=self._config.prompt_chars))
        return Problem(name, {"prompt": prompt}, completion_tokens=max(1, length))


class Lengths:
    """The task."""

    name = "lengths"
    skipped_rows = 0

    def __init__(self, config: LengthsTask, seed: int) -> None:
        self._config = config
        self._seed = seed

    def problems(self, split: Split) -> Sequence[Problem]:
        return LengthsProblems(self._config, split, self._seed)

    def env(self, problem: Problem, grade: Grade) -> Env:
        messages = [Message("user", problem.data["prompt"])]
        return SingleTurnEnv(messages, "pipelinerl.tasks.scorers:toss", {}, grade)
