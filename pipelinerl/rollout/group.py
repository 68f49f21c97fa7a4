"""A group: several independent episodes on one problem, so that their rewards can be compared."""

from collections.abc import Callable

from pipelinerl.concurrency import together
from pipelinerl.errors import PipelineRLError
from pipelinerl.rollout.episode import GenerateFn, failed_rollout, run_episode
from pipelinerl.rollout.tokens import ChatRenderer
from pipelinerl.tasks.base import Env
from pipelinerl.types import Problem, Rollout, RolloutGroup


async def run_group(
    group_id: int,
    problem: Problem,
    size: int,
    make_env: Callable[[Problem], Env],
    generate: Callable[[int], GenerateFn],
    renderer: ChatRenderer,
    max_total_tokens: int,
) -> RolloutGroup:
    """Play `size` episodes on `problem` at the same time, each in an environment of its own.

    `generate(index)` makes the function that episode number `index` of the group samples with.

    What `run_episode` raises cancels the other episodes and is raised here as it is, without an ExceptionGroup.
    """

    async def episode(index: int) -> Rollout:
        try:
            env = make_env(problem)
        except PipelineRLError:
            raise
        except Exception as error:
            return failed_rollout(error)
        return await run_episode(env, generate(index), renderer, max_total_tokens)

    return RolloutGroup(group_id, problem.id, tuple(await together(*(episode(index) for index in range(size)))))
