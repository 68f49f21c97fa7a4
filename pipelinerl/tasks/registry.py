"""From a task's configuration to the task.

How to add a task:

1. `config/schema.py`: a `Section` with a new `kind` and the task's settings; add it to the `TaskConfig` union.
2. `tasks/<kind>.py`: a class with what `base.Task` names: `name`, `skipped_rows`, `problems(split)` and
   `env(problem, grade)`. For one prompt and one answer, `env` returns a `base.SingleTurnEnv`; for several turns or
   tools, write an `Env` of your own.
3. Its scorer, a function of plain arguments (`tasks/scorers.py` says what it may return), is named as
   "package.module:function" and runs in a grader process.
4. A line in `BUILDERS` below, and `conf/task/<kind>.yaml`.
"""

from collections.abc import Callable
from typing import Any

from pipelinerl.config.schema import TaskConfig
from pipelinerl.tasks.base import Task
from pipelinerl.tasks.jsonl import JsonlProblems
from pipelinerl.tasks.lengths import Lengths
from pipelinerl.tasks.sort import DigitSort

BUILDERS: dict[str, Callable[[Any, int], Task]] = {
    "sort": DigitSort,
    "lengths": Lengths,
    "jsonl": lambda config, seed: JsonlProblems(config),  # the rows are what they are: nothing to seed
}


def build_task(config: TaskConfig, seed: int) -> Task:
    """The task that `config` describes. Equal arguments give equal problems in every process.

    Raises DataError when the user's data file is unusable.
    """
    return BUILDERS[config.kind](config, seed)
