"""The order in which training problems are drawn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelinerl.errors import DataError
from pipelinerl.types import Problem


class ProblemStream:
    """Draws problems for ever: every epoch visits each problem once, in an order shuffled from (seed, epoch).

    The number of problems drawn so far, `cursor`, is the whole state: a stream over the same problems with the same
    seed and cursor continues identically.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise DataError("the training split has no problems")
        self._problems = problems
        self._seed = seed
        self._cursor = 0
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, np.int64)

    @property
    def cursor(self) -> int:
        """Problems drawn so far, over all epochs."""
        return self._cursor

    @cursor.setter
    def cursor(self, drawn: int) -> None:
        if drawn < 0:
            raise ValueError(f"cursor={drawn}: a count of problems drawn cannot be negative")
        self._cursor = drawn

    def next(self) -> Problem:
        """The next problem; draws one permutation of indexes at the start of each epoch."""
        epoch, position = divmod(self._cursor, len(self._problems))
        if epoch != self._epoch:
            self._order = np.random.default_rng((self._seed, epoch)).permutation(len(self._problems))
            self._epoch = epoch
        self._cursor += 1
        return self._problems[int(self._order[position])]
