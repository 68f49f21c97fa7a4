"""An evaluation: the held-out problems, sampled at one version, measured and recorded.

Whoever calls this sees to it that no weight update reaches the engines meanwhile. That it was so is read from the
tokens: a problem of which any token was sampled by another version (its engine died, and came back with other weights)
is sampled again, and an evaluation never holds two versions.
"""

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from pipelinerl.concurrency import together
from pipelinerl.config.schema import EvalConfig
from pipelinerl.errors import EvaluationError
from pipelinerl.metrics.evals import evaluation_path, read_mean_rewards, write_evaluation
from pipelinerl.metrics.evaluation import evaluation_metrics
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.tasks.base import Task
from pipelinerl.types import GroupMeta, Problem

ATTEMPTS = 3  # at a problem

Solve = Callable[[int, Problem], Awaitable[GroupMeta]]
"""Samples the completions of a held-out problem, given its number, and scores them."""


class Evaluator:
    """Evaluates versions and records each: `eval/*` in the log, its problems in `<run_dir>/evals/`."""

    def __init__(self, config: EvalConfig, task: Task, solve: Solve, log: MetricsLog):
        self._config = config
        self._task = task
        self._solve = solve
        self._log = log

    @property
    def run_dir(self) -> Path:
        return self._log.path.parent

    async def evaluate(self, version: int) -> dict[str, float]:
        """Evaluate the `version` that the engines serve; returns what was logged, {} when nothing is held out.

        Raises EvaluationError when another version sampled, and whatever `solve` raises.
        """
        problems = self._task.problems("eval")
        if not problems:
            return {}
        groups, again = await sample_problems(problems, version, self._solve)
        before = read_mean_rewards(self.run_dir, 0) if version else None
        write_evaluation(self.run_dir, version, groups)
        metrics = evaluation_metrics(self._task.name, version, groups, self._config, before)
        metrics[f"eval/{self._task.name}/sampled_again"] = float(again)
        self._log.log("eval", version, metrics)
        return metrics

    def missed(self, version: int) -> None:
        """Record that `version` was due and has no evaluation. What a run before it was resumed left is removed."""
        evaluation_path(self.run_dir, version).unlink(missing_ok=True)
        self._log.log("eval", version, {f"eval/{self._task.name}/missed": 1.0})


async def sample_problems(problems: Sequence[Problem], version: int, solve: Solve) -> tuple[list[GroupMeta], int]:
    """The completions of every problem, in order, and how many problems were sampled again.

    Raises EvaluationError when a problem was sampled by another version `ATTEMPTS` times.
    """
    again = 0

    async def at_version(index: int, problem: Problem) -> GroupMeta:
        nonlocal again
        for attempt in range(ATTEMPTS):
            group = await solve(index, problem)
            others = sampled_by(group) - {version}
            if not others:
                again += attempt > 0
                return group
        raise EvaluationError(
            f"evaluation of version {version}: {problem.id} was sampled by version "
            f"{', '.join(map(str, sorted(others)))} in each of {ATTEMPTS} attempts; the weights of its engine changed "
            "meanwhile"
        )

    return await together(*(at_version(index, problem) for index, problem in enumerate(problems))), again


def sampled_by(group: GroupMeta) -> set[int]:
    """The versions that sampled at least one token of the group."""
    return {version for meta in group.rollouts for version, tokens in meta.tokens_by_version.items() if tokens}
