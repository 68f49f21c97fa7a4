"""Problems that are made up, not read: problem `i` of a split is a function of (seed, split, i)."""

import random
from abc import abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar, overload

from pipelinerl.config.schema import LengthsTask, SortTask
from pipelinerl.tasks.base import Split
from pipelinerl.types import Problem

Config = TypeVar("Config", bound=SortTask | LengthsTask)


class SyntheticProblems(Sequence[Problem], Generic[Config]):
    """Problems of one split, drawn with replacement."""

    def __init__(self, config: Config, split: Split, seed: int) -> None:
        self._config: Config = config
        self._split = split
        self._seed = seed

    def __len__(self) -> int:
        return self._config.train_problems if self._split == "train" else self._config.eval_problems

    @overload
    def __getitem__(self, index: int) -> Problem: ...
    @overload
    def __getitem__(self, index: slice) -> list[Problem]: ...
    def __getitem__(self, index: int | slice) -> Problem | list[Problem]:
        positions = range(len(self))[index]  # resolves negative indexes and raises IndexError
        return [self._at(i) for i in positions] if isinstance(positions, range) else self._at(positions)

    def _at(self, index: int) -> Problem:
        return self._make(f"{self._split}/{index}", random.Random(f"{self._seed}/{self._split}/{index}"))

    @abstractmethod
    def _make(self, name: str, rng: random.Random) -> Problem:
        """The problem that is called `name`, drawn from a generator of its own."""
