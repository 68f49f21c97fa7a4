"""The end of a run in a few lines: did it learn, how stale was it, did the engine agree, where to look next."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipelinerl.metrics.console import clock
from pipelinerl.metrics.log import ELAPSED
from pipelinerl.metrics.series import Records, accuracies, intervals, mean, series

ENDS = 5  # steps at either end of the run that its gain is measured between


@dataclass(frozen=True, slots=True)
class Summary:
    """What a whole run comes to. A number that the run did not log is nan."""

    steps: int  # last optimizer step
    reward_first: float  # mean training reward over the first 5 steps
    reward_last: float  # and over the last 5
    eval_before: Mapping[str, float]  # task -> accuracy (0..1) of its first evaluation
    eval_after: Mapping[str, float]  # and of its last; empty when there was only one
    eval_gain: Mapping[str, tuple[float, float]]  # 95% interval of the last one's gain over version 0, where measured
    max_lag: float  # optimizer steps, over all trained tokens
    multi_version_frac: float  # mean share of rollouts with >= 2 weight versions, second half of the steps
    mismatch: float  # mean |engine - trainer logprob| over all lag-0 tokens, nats
    tokens: float  # sampled tokens that were trained on
    wall_s: float  # seconds

    @property
    def gain(self) -> float:
        """`reward_last - reward_first`."""
        return self.reward_last - self.reward_first


def summarize(records: Records) -> Summary:
    """Reduce the records of a run, as `read_metrics` returns them."""
    reward = series(records, "train", "reward/mean")
    steps = [int(record["step"]) for record in records if record["kind"] == "train"]
    lag = series(records, "train", "staleness/max").values
    evals = {task: values for task, values in accuracies(records).items() if len(values)}
    return Summary(
        steps=max(steps, default=0),
        reward_first=reward.first(ENDS),
        reward_last=reward.last(ENDS),
        eval_before={task: float(values.values[0]) for task, values in evals.items()},
        eval_after={task: float(values.values[-1]) for task, values in evals.items() if len(values) > 1},
        eval_gain={task: gain for task in evals if (gain := _gain(records, task))},
        max_lag=float(lag.max()) if lag.size else math.nan,
        multi_version_frac=_second_half_mean(records, "staleness/multi_version_frac"),
        mismatch=_mismatch(records),
        tokens=float(series(records, "train", "completion/tokens_sum").values.sum()),
        wall_s=max((float(record[ELAPSED]) for record in records if ELAPSED in record), default=math.nan),
    )


def format_summary(summary: Summary, run_dir: Path, sync_hint: str = "", journal: str = "") -> str:
    """The closing lines of a run; names the plots, rollouts and model that are there, and `sync_hint` if given.

    `journal`: whether it balances, in a line.
    """
    rows = [("run", f"{summary.steps} steps, {summary.tokens:,.0f} tokens trained, {_time(summary.wall_s)}")]
    if not math.isnan(summary.reward_first):
        rows.append(("reward", f"{_change(summary.reward_first, summary.reward_last)}  (first and last {ENDS} steps)"))
    rows += [(f"eval {task}", _accuracy(summary, task)) for task in summary.eval_before]
    if not math.isnan(summary.max_lag):
        several = f"{100 * summary.multi_version_frac:.0f}% of completions carry several weight versions (second half)"
        rows.append(("lag", f"max {summary.max_lag:.0f} steps; {several}"))
    if not math.isnan(summary.mismatch):
        rows.append(("mismatch", f"{summary.mismatch:.1e} nats per token between engine and trainer, same weights"))
    if journal:
        rows.append(("journal", journal))
    width = max(len(name) for name, _ in rows + _next_looks(run_dir, sync_hint))
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    lines += ["", "Look next:", *(f"  {name:<{width}}  {text}" for name, text in _next_looks(run_dir, sync_hint))]
    return "\n".join(lines)


def _next_looks(run_dir: Path, sync_hint: str) -> list[tuple[str, str]]:
    looks = [
        ("plots", run_dir / "plots" / "reward.png"),
        ("model", run_dir / "model"),
        ("rollouts", run_dir / "rollouts"),
        ("metrics", run_dir / "metrics.jsonl"),
    ]
    found = [(name, shlex.quote(str(path))) for name, path in looks if path.exists()]
    return found + ([("W&B", sync_hint)] if sync_hint else [])


def _second_half_mean(records: Records, name: str) -> float:
    values = series(records, "train", name)
    if not len(values):
        return math.nan
    last = int(values.steps[-1])
    return mean(values.since(last // 2 + 1).values)


def _gain(records: Records, task: str) -> tuple[float, float] | None:
    low, high = intervals(records, task, "gain")
    return (float(low.values[-1]), float(high.values[-1])) if len(low) and len(high) else None


def _mismatch(records: Records) -> float:
    """Mean over tokens: a step with more lag-0 tokens weighs more."""
    means = series(records, "train", "mismatch/abs_logprob_mean")
    counted = series(records, "train", "mismatch/tokens")
    tokens = dict(zip(counted.steps.tolist(), counted.values.tolist(), strict=True))
    weights = np.array([tokens.get(step, 0.0) for step in means.steps.tolist()])
    return float(np.average(means.values, weights=weights)) if weights.sum() > 0 else math.nan


def _accuracy(summary: Summary, task: str) -> str:
    before = summary.eval_before[task]
    if task not in summary.eval_after:
        return f"accuracy {100 * before:.1f}%"
    interval = summary.eval_gain.get(task)
    gain = "" if interval is None else f"  (gain {100 * interval[0]:+.1f} to {100 * interval[1]:+.1f} points, 95%)"
    return f"accuracy {100 * before:.1f}% -> {100 * summary.eval_after[task]:.1f}%{gain}"


def _change(before: float, after: float) -> str:
    return f"{before:.3f} -> {after:.3f}  ({after - before:+.3f})"


def _time(seconds: float) -> str:
    return "unknown time" if math.isnan(seconds) else clock(seconds)
