"""`rollouts/step_000012.jsonl`: what the policy wrote, token by token, one line per rollout.

Every line has the same scalar columns, so that `pandas.read_json(path, lines=True)` and `jq` work as they are:

    jq -r 'select(.reward == 0) | .completion' rollouts/step_000012.jsonl

A single-turn rollout has its token arrays at the top level (`prompt_ids`, `completion_ids`, `logprobs`,
`weight_versions`); one with more turns has them per turn under `turns`, and `completion` is the last turn's text.
`logprobs[t]` and `weight_versions` ([version, start, end) spans) are about `completion_ids`. Logprobs are written
so that they read back to the same float32.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelinerl.errors import DataError
from pipelinerl.metrics.jsonl import LineFile, from_json_float, json_float, read_lines
from pipelinerl.types import FloatArray, GroupMeta, Rollout, RolloutGroup, Turn, VersionSpan

GroupRecord = tuple[GroupMeta, RolloutGroup, Sequence[float]]


class RolloutWriter:
    """Writes the first `groups_per_step` groups of each step (None: all, 0: none). Safe to call from any thread.

    The first write of a step replaces the step's file: after a resume the file holds what was really trained on.

    Raises:
        EnvironmentProblem: a file cannot be written; names it.
    """

    def __init__(self, run_dir: Path, groups_per_step: int | None) -> None:
        self._dir = run_dir / "rollouts"
        self._limit = groups_per_step
        self._written: dict[int, int] = {}  # step -> groups
        self._lock = threading.Lock()

    def write(self, step: int, groups: Sequence[GroupRecord]) -> None:
        """Append groups trained at optimizer step `step`; advantages are given one per rollout."""
        with self._lock:
            before = self._written.get(step, 0)
            chosen = groups if self._limit is None else groups[: max(0, self._limit - before)]
            if not chosen:
                return
            file = LineFile(_path(self._dir, step), truncate=step not in self._written)
            try:
                for meta, group, advantages in chosen:
                    for record in _records(step, meta, group, advantages):
                        file.append(record)
            finally:
                file.close()
            self._written[step] = before + len(chosen)


def read_rollouts(run_dir: Path, step: int | None = None) -> list[dict[str, Any]]:
    """The rollouts of one step, or of all steps in order, as dicts; non-finite numbers are floats again.

    Raises:
        DataError: nothing was written for `step`, or a file is damaged; names file and line.
    """
    folder = run_dir / "rollouts"
    paths = sorted(folder.glob("step_*.jsonl")) if step is None else [_path(folder, step)]
    if step is not None and not paths[0].is_file():
        raise DataError(f"{paths[0]} does not exist: no rollouts of step {step} were written")
    return [_restored(record) for path in paths for record in read_lines(path)]


def _path(folder: Path, step: int) -> Path:
    return folder / f"step_{step:06d}.jsonl"


def _records(step: int, meta: GroupMeta, group: RolloutGroup, advantages: Sequence[float]) -> list[dict[str, Any]]:
    assert meta.id == group.id, (meta.id, group.id)
    return [
        {
            "step": step,
            "group_id": group.id,
            "problem_id": group.problem_id,
            "rollout": index,
            "worker": meta.worker,
            "reward": json_float(rollout.reward),
            "advantage": json_float(advantage),
            "outcome": str(rollout.outcome),
            "detail": rollout.detail,
            "components": {name: json_float(value) for name, value in rollout.components.items()},
            "prompt": rollout.prompt_text,
            "completion": rollout.turns[-1].completion.text if rollout.turns else "",
            "completion_tokens": rollout.completion_len,
            **_tokens(rollout),
        }
        for index, (rollout, advantage) in enumerate(zip(group.rollouts, advantages, strict=True))
    ]


def _tokens(rollout: Rollout) -> dict[str, Any]:
    if len(rollout.turns) != 1:
        return {"turns": [{"completion": turn.completion.text} | _turn(turn, "context_ids") for turn in rollout.turns]}
    return _turn(rollout.turns[0], "prompt_ids")


def _turn(turn: Turn, context_key: str) -> dict[str, Any]:
    completion = turn.completion
    return {
        "finish_reason": completion.finish_reason,
        "weight_versions": [_span(span) for span in completion.spans],
        context_key: turn.context.tolist(),
        "completion_ids": completion.tokens.tolist(),
        "logprobs": _shortest(completion.logprobs),
    }


def _span(span: VersionSpan) -> list[int]:
    return [span.version, span.start, span.end]


def _shortest(values: FloatArray) -> list[float | str]:
    """Each float32 with the fewest digits that read back to it: -0.1 instead of -0.10000000149011612."""
    return [json_float(float(str(value))) for value in values]


def _restored(record: dict[str, Any]) -> dict[str, Any]:
    """Undo `json_float` where numbers are; texts may say "nan" and stay as they are."""
    for part in [record, *record.get("turns", [])]:
        for name in ("reward", "advantage"):
            if name in part:
                part[name] = from_json_float(part[name])
        if "logprobs" in part:
            part["logprobs"] = [from_json_float(value) for value in part["logprobs"]]
    record["components"] = {name: from_json_float(value) for name, value in record["components"].items()}
    return record
