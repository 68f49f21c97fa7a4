"""`pipelinerl eval`: start the engines of a run, without a trainer, and evaluate `model.path` as version 0."""

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from pipelinerl.concurrency import background, nap
from pipelinerl.config.preflight import with_absolute_paths
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_DONE, BudgetSpent, ConfigError, Stalled
from pipelinerl.metrics.evals import write_evaluation
from pipelinerl.metrics.evaluation import counts, evaluation_metrics, figures
from pipelinerl.metrics.intervals import Estimate
from pipelinerl.metrics.jsonl import json_float
from pipelinerl.metrics.log import MetricsLog
from pipelinerl.rollout.evaluate import sample_problems
from pipelinerl.run_dir import new_run_dir
from pipelinerl.session import Session, open_session, until_done_or_signal
from pipelinerl.tasks.registry import build_task
from pipelinerl.types import GroupMeta, Problem

RESULTS = "eval.json"
HEALTH_INTERVAL_S = 2.0
TOLD_EVERY_S = 30.0
VERSION = 0  # of the only weights there are


def appraise(config: RunConfig) -> int:
    """Evaluate, write the results, print them, and return the exit code."""
    return until_done_or_signal(_appraise(config))


async def _appraise(config: RunConfig) -> int:
    config = with_absolute_paths(config)
    task = build_task(config.task, config.seed)
    problems = task.problems("eval")
    if not problems:
        raise ConfigError(f"task.kind={config.task.kind} holds no problems out, so there is nothing to evaluate on")
    run_dir = new_run_dir(config, "eval-", ("metrics.jsonl", RESULTS))
    async with open_session(config, run_dir, _say, trainer=False) as session:
        session.write_settings(run_dir, _say)
        session.fleet.recovery = "reload"
        _say(f"evaluating {config.model.path} on {len(problems)} problems of {task.name}")
        start, progress = time.perf_counter(), Progress(session, len(problems))
        async with background(progress.watch()):
            groups, _ = await sample_problems(problems, VERSION, progress.solve)
        seconds = time.perf_counter() - start
    write_evaluation(run_dir, VERSION, groups)
    log = MetricsLog(run_dir)
    log.log("eval", VERSION, evaluation_metrics(task.name, VERSION, groups, config.eval))
    log.close()
    document = results(config, task.name, groups, seconds)
    (run_dir / RESULTS).write_text(json.dumps(document, indent=2, allow_nan=False) + "\n")
    if not any(group.scored for group in groups):
        raise BudgetSpent(f"none of {len(groups)} problems has a scored completion; {_first_detail(groups)}")
    _say(table(config, groups))
    _say(f"\nresults in {run_dir}: {RESULTS}, and evals/ with a line per problem")
    return EXIT_DONE


@dataclass
class Progress:
    """Samples problems on the engines of a session, and sees to it that it goes on."""

    session: Session
    problems: int
    done: int = 0
    last: float = field(default_factory=time.monotonic)

    async def solve(self, index: int, problem: Problem) -> GroupMeta:
        group = await self.session.fleet.evaluate(index, problem)
        self.done += 1
        self.last = time.monotonic()
        return group

    async def watch(self) -> None:
        """Raise when no problem was finished for too long; tell now and then how far it is."""
        limit, told = self.session.config.cluster.stall_timeout_s, time.monotonic()
        while True:
            stood_still = await nap(HEALTH_INTERVAL_S)
            self.last += stood_still
            now = time.monotonic()
            if now - self.last > limit:
                raise Stalled(f"no problem was finished for cluster.stall_timeout_s={limit:g} s")
            if now - told >= TOLD_EVERY_S:
                _say(f"{self.done} of {self.problems} problems done")
                told = now


def results(config: RunConfig, task: str, groups: Sequence[GroupMeta], seconds: float) -> dict[str, Any]:
    """`eval.json`. Its figures are means over problems, with 95% intervals."""
    sampling = {
        "samples": config.eval.samples,
        "temperature": config.eval.temperature,
        "max_tokens": config.sampling.max_tokens,
        "pass_reward": config.eval.pass_reward,
        "seed": config.seed,
    }
    outcomes = Counter(rollout.outcome for group in groups for rollout in group.rollouts)
    return {
        "model": config.model.path,
        "task": task,
        "sampling": sampling,
        "figures": {
            name: {key: json_float(value) if isinstance(value, float) else value for key, value in asdict(each).items()}
            for name, each in figures(groups, config.eval).items()
        },
        **{name: json_float(value) for name, value in counts(groups).items()},
        "outcomes": {str(outcome): count for outcome, count in sorted(outcomes.items())},
        "seconds": round(seconds, 3),
    }


def table(config: RunConfig, groups: Sequence[GroupMeta]) -> str:
    """The results for a person."""
    found, counted = figures(groups, config.eval), counts(groups)
    evaluation = config.eval
    how = "greedy" if evaluation.temperature == 0 else f"at temperature {evaluation.temperature:g}"
    completions = sum(len(group.rollouts) for group in groups)
    lines = ["", f"{len(groups)} problems, {evaluation.samples} completion(s) each, {how}", ""]
    lines.append(f"  {'':<12} {'value':>7}   {'95% interval':<17} problems")
    lines += [f"  {name:<12} {_row(estimate)}" for name, estimate in found.items()]
    lines += [
        "",
        f"  {'truncated':<12} {100 * counted['truncated_frac']:6.1f}%",
        f"  {'tokens':<12} {counted['tokens_mean']:7.1f}   a completion, {config.sampling.max_tokens} at most",
        f"  {'no reward':<12} {counted['errored']:7.0f}   of {completions} completions",
    ]
    return "\n".join(lines)


def _row(estimate: Estimate) -> str:
    interval = f"{estimate.low:.3f} to {estimate.high:.3f}"
    return f"{estimate.value:7.3f}   {interval:<17} {estimate.problems}"


def _first_detail(groups: Sequence[GroupMeta]) -> str:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    detail = next((rollout.detail for rollout in rollouts if rollout.detail), "no detail")
    return f"{rollouts[0].outcome} ({detail})"


def _say(text: str) -> None:
    print(text, flush=True)
