"""The order in which training problems are drawn."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from pipelinerl.errors import DataError
from pipelinerl.types import Problem


class ProblemStream:
    """An endless sequence of problems: every epoch holds each problem once, in an order shuffled from (seed, epoch).

    It has no state: `at(ticket)` is the same problem whenever it is asked for, also in another process.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        if not problems:
            raise DataError("the training split has no problems")
        self._problems = problems
        self._seed = seed
        self._orders: dict[int, NDArray[np.int64]] = {}  # epoch -> indexes; of the two that were asked for last

    def at(self, ticket: int) -> Problem:
        """The problem of the prompt that is number `ticket`, from 0, in the order of drawing."""
        epoch, position = divmod(ticket, len(self._problems))
        return self._problems[int(self._order(epoch)[position])]

    def _order(self, epoch: int) -> NDArray[np.int64]:
        if epoch not in self._orders:
            if len(self._orders) > 1:
                del self._orders[next(iter(self._orders))]
            self._orders[epoch] = np.random.default_rng((self._seed, epoch)).permutation(len(self._problems))
        return self._orders[epoch]
