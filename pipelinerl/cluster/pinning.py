"""Cores of their own for the processes of a run on one machine, so that engines and trainer cannot slow each other."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EnvironmentProblem

Cores = tuple[int, ...]


def share_out(config: RunConfig, cores: Sequence[int]) -> tuple[list[Cores], list[Cores]]:
    """The cores of each trainer rank and of each engine: equal numbers, an engine's times its tensor parallelism.

    Cores that are left over go to nobody: the driver and Ray run anywhere.

    Raises: EnvironmentProblem when there are more processes than cores.
    """
    ranks, engines, width = config.trainer.ranks, config.engine.count, config.engine.tensor_parallel
    needed = ranks + engines * width
    each = len(cores) // needed
    if not each:
        raise EnvironmentProblem(
            f"cluster.pin_cores=true needs a core for each trainer rank and engine worker, {needed} in all, and this "
            f"machine has {len(cores)}; lower trainer.ranks or engine.count, or use pin_cores=false"
        )
    free = iter(sorted(cores))

    def take(count: int) -> Cores:
        return tuple(next(free) for _ in range(count))

    return [take(each) for _ in range(ranks)], [take(each * width) for _ in range(engines)]


def pin_this_process(cores: Iterable[int]) -> None:
    """Keep all threads of this process, and what they will start, on `cores`."""
    for thread in Path("/proc/self/task").iterdir():
        try:
            os.sched_setaffinity(int(thread.name), cores)
        except ProcessLookupError:  # it has just ended
            continue
