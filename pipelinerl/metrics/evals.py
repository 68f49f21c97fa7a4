"""`evals/version_000050.jsonl`: what every held-out problem came to, one line per problem.

    jq -c 'select(.rewards | max == 0) | .problem_id' evals/version_000050.jsonl

The completions of a problem are columns of equal length: `rewards` (null: it has none), `outcomes`,
`completion_tokens` and `details`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelinerl.errors import EnvironmentProblem
from pipelinerl.metrics.jsonl import LineFile, from_json_float, json_float, read_lines
from pipelinerl.types import GroupMeta

FOLDER = "evals"


def evaluation_path(run_dir: Path, version: int) -> Path:
    """Where the evaluation of `version` is, or would be."""
    return run_dir / FOLDER / f"version_{version:06d}.jsonl"


def write_evaluation(run_dir: Path, version: int, groups: Sequence[GroupMeta]) -> Path:
    """Write the file of `version`, whole or not at all; one that a run before it was resumed left is replaced.

    Raises EnvironmentProblem when it cannot be written; names it.
    """
    target = evaluation_path(run_dir, version)
    staged = target.with_suffix(".partial")
    file = LineFile(staged, truncate=True)
    try:
        for group in groups:
            file.append(_record(version, group))
    finally:
        file.close()
    try:
        staged.replace(target)
    except OSError as error:
        raise EnvironmentProblem(f"cannot write {target}: {error.strerror or error}") from error
    return target


def read_evaluation(run_dir: Path, version: int) -> list[dict[str, Any]]:
    """The lines of an evaluation, non-finite rewards restored. Raises DataError when it is missing or damaged."""
    records = read_lines(evaluation_path(run_dir, version))
    for record in records:
        record["rewards"] = [None if reward is None else from_json_float(reward) for reward in record["rewards"]]
    return records


def read_mean_rewards(run_dir: Path, version: int) -> dict[str, float] | None:
    """As `evaluation.mean_rewards`, of an evaluation on disk; None when there is none."""
    if not evaluation_path(run_dir, version).is_file():
        return None
    scored = {
        record["problem_id"]: [reward for reward in record["rewards"] if reward is not None]
        for record in read_evaluation(run_dir, version)
    }
    return {problem: float(np.mean(rewards)) for problem, rewards in scored.items() if rewards}


def _record(version: int, group: GroupMeta) -> dict[str, Any]:
    return {
        "version": version,
        "problem_id": group.problem_id,
        "rewards": [json_float(meta.reward) if meta.outcome.scored else None for meta in group.rollouts],
        "outcomes": [str(meta.outcome) for meta in group.rollouts],
        "completion_tokens": [meta.completion_len for meta in group.rollouts],
        "details": [meta.detail for meta in group.rollouts],
        "worker": group.worker,
        "seconds": round(group.seconds, 4),
    }
