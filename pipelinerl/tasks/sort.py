"""Sort the digits of a number: small enough for a model of 100k parameters, with a reward that is never in doubt.

Plain:       "sort 483015" -> "013458"
Scratchpad:  "sort 483"    -> "4 48 348", the sorted prefix after each inserted digit; the last word is the answer.
"""

import random
from collections.abc import Sequence
from itertools import accumulate
from zlib import crc32

from pipelinerl.config.schema import SortTask
from pipelinerl.tasks.base import Env, Grade, Message, SingleTurnEnv, Split
from pipelinerl.tasks.synthetic import SyntheticProblems
from pipelinerl.types import Problem

HELD_OUT_SHARE = 16  # one number in so many belongs to the eval split


def held_out(digits: str) -> bool:
    """True when the number belongs to the eval split: decided by its digits alone, so the splits cannot overlap."""
    return crc32(digits.encode()) % HELD_OUT_SHARE == 0


def target(problem: Problem) -> str:
    """A perfect completion of `problem`: what the supervised warm start trains on."""
    if not problem.data["scratchpad"]:
        return str(problem.data["answer"])
    return " ".join(accumulate(problem.data["digits"], lambda done, digit: "".join(sorted(done + digit))))


class SortProblems(SyntheticProblems[SortTask]):
    """Problems of one split, drawn with replacement; problem `i` is a function of (seed, split, i)."""

    def _make(self, name: str, rng: random.Random) -> Problem:
        digits = self._draw(rng)
        data = {"digits": digits, "answer": "".join(sorted(digits)), "scratchpad": self._config.scratchpad}
        return Problem(name, data)

    def _draw(self, rng: random.Random) -> str:
        while True:
            digits = "".join(rng.choices("0123456789", k=self._config.digits))
            if held_out(digits) == (self._split == "eval"):
                return digits


class DigitSort:
    """The task. Its reward is 1 for the right answer and 0 otherwise; scratchpad steps are not checked."""

    name = "sort"
    skipped_rows = 0

    def __init__(self, config: SortTask, seed: int) -> None:
        self._config = config
        self._seed = seed

    def problems(self, split: Split) -> Sequence[Problem]:
        return SortProblems(self._config, split, self._seed)

    def env(self, problem: Problem, grade: Grade) -> Env:
        scorer = "last_word" if self._config.scratchpad else "exact_match"
        messages = [Message("user", f"sort {problem.data['digits']}")]
        if self._config.system_prompt is not None:
            messages.insert(0, Message("system", self._config.system_prompt))
        kwargs = {"answer": problem.data["answer"]}
        return SingleTurnEnv(messages, f"pipelinerl.tasks.scorers:{scorer}", kwargs, grade)
