"""Series, summary and plots of a small run whose numbers are known."""

import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipelinerl.metrics.log import MetricsLog, read_metrics
from pipelinerl.metrics.plots import write_plots
from pipelinerl.metrics.series import series
from pipelinerl.metrics.summary import format_summary, summarize


def train(step: int, **values: float) -> dict[str, Any]:
    return {"kind": "train", "step": step, "time/elapsed_s": float(step)} | {
        name.replace("__", "/"): value for name, value in values.items()
    }


def test_series_takes_the_last_word_on_a_step_and_leaves_nan_out() -> None:
    records = [train(2, a=1.0), train(1, a=5.0), train(2, a=3.0), train(3, a=math.nan), train(4, b=1.0)]
    found = series(records, "train", "a")
    assert found.steps.tolist() == [1, 2] and found.values.tolist() == [5.0, 3.0]
    assert series(records, "eval", "a").first(5) is not None and math.isnan(series(records, "eval", "a").first(5))


def test_running_mean_ends_at_each_step() -> None:
    found = series([train(step, a=float(step)) for step in range(1, 5)], "train", "a")
    assert found.running_mean(2).tolist() == [1.0, 1.5, 2.5, 3.5]


def test_summary_by_hand() -> None:
    rewards = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
    records = [
        train(
            step, reward__mean=reward, staleness__max=min(step, 2), staleness__multi_version_frac=0.1 * step,
            mismatch__abs_logprob_mean=1e-6 if step == 1 else (4e-6 if step == 2 else math.nan),
            mismatch__tokens=300 if step == 1 else (100 if step == 2 else 0), completion__tokens_sum=50,
        )
        for step, reward in enumerate(rewards, start=1)
    ]  # fmt: skip
    records = [
        {"kind": "eval", "step": 0, "time/elapsed_s": 0.5, "eval/sort/accuracy": 0.4},
        *records,
        {"kind": "eval", "step": 10, "time/elapsed_s": 95.0, "eval/sort/accuracy": 0.9, "eval/math/accuracy": 0.2},
    ]
    summary = summarize(records)
    assert summary.reward_first == pytest.approx(0.3)  # mean of 0.1 .. 0.5
    assert summary.reward_last == pytest.approx(0.8)  # mean of 0.6 .. 1.0
    assert summary.gain == pytest.approx(0.5)
    assert summary.eval_before == {"math": 0.2, "sort": 0.4} and summary.eval_after == {"sort": 0.9}
    assert (summary.steps, summary.max_lag, summary.tokens, summary.wall_s) == (10, 2, 500, 95.0)
    assert summary.multi_version_frac == pytest.approx(0.8)  # steps 6..10: 0.6 .. 1.0
    assert summary.mismatch == pytest.approx((300 * 1e-6 + 100 * 4e-6) / 400)


def test_the_gain_of_the_last_evaluation_is_told_with_its_interval(tmp_path: Path) -> None:
    first = {"kind": "eval", "step": 0, "eval/sort/accuracy": 0.4}
    last = {"kind": "eval", "step": 9, "eval/sort/accuracy": 0.9}
    gain = {"eval/sort/gain": 0.5, "eval/sort/gain/ci_low": 0.437, "eval/sort/gain/ci_high": 0.5521}
    plain = format_summary(summarize([first, train(9, reward__mean=0.5), last]), tmp_path)
    assert "accuracy 40.0% -> 90.0%\n" in plain
    text = format_summary(summarize([first, train(9, reward__mean=0.5), last | gain]), tmp_path)
    assert "accuracy 40.0% -> 90.0%  (gain +43.7 to +55.2 points, 95%)" in text


def test_the_closing_text_points_only_at_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "rollouts").mkdir()
    records = [train(1, reward__mean=0.25), train(2, reward__mean=0.75)]
    text = format_summary(summarize(records), tmp_path, sync_hint="wandb sync outputs/run/wandb/offline-run-1")
    assert "reward    0.500 -> 0.500" in text  # fewer than five steps: both ends are the whole run
    assert str(tmp_path / "rollouts") in text and "wandb sync outputs/run/wandb/offline-run-1" in text
    for absent in ("plots", "model", "nan", "mismatch", "lag"):
        assert absent not in text.replace(str(tmp_path), ""), absent


def test_an_empty_run_can_be_summarised(tmp_path: Path) -> None:
    text = format_summary(summarize([]), tmp_path)
    assert "0 steps" in text and "nan" not in text.replace(str(tmp_path), "")


def small_run(run_dir: Path, **values: float) -> None:
    log = MetricsLog(run_dir)
    log.log("eval", 0, {"eval/sort/accuracy": 0.4})
    interval = {"eval/sort/accuracy/ci_low": 0.4, "eval/sort/accuracy/ci_high": 0.6}
    log.log("eval", 3, {"eval/sort/accuracy": 0.5} | interval)
    for step in range(1, 4):
        log.log("train", step, {name.replace("__", "/"): value for name, value in values.items()})
    log.close()


def test_plots_are_drawn_for_what_the_run_logged(tmp_path: Path) -> None:
    small_run(tmp_path, reward__mean=0.5, staleness__max=2, mismatch__k3=0.0)
    paths = write_plots(tmp_path, lag_bound=2)
    # a mismatch of exactly zero has no place on a log scale, and nothing else was logged
    assert [path.name for path in paths] == ["reward.png", "staleness.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)


def test_a_plot_that_fails_is_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    small_run(tmp_path, reward__mean=0.5, staleness__max=2)
    (tmp_path / "plots" / "reward.png").mkdir(parents=True)  # cannot be written as a file
    with caplog.at_level(logging.WARNING, logger="pipelinerl"):
        assert [path.name for path in write_plots(tmp_path)] == ["staleness.png"]
    assert "reward.png was not drawn" in caplog.text


def test_every_figure_of_a_full_run(tmp_path: Path) -> None:
    small_run(
        tmp_path, reward__mean=0.5, policy__ess=0.9, policy__entropy=0.4, policy__kl_old_new=1e-3, staleness__mean=1,
        staleness__max=2, mismatch__abs_logprob_mean=1e-6, perf__trainer_tokens_per_s=900, sync__pause_s=0.1,
    )  # fmt: skip
    names = ["reward", "policy", "staleness", "mismatch", "throughput"]
    assert [path.stem for path in write_plots(tmp_path)] == names
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 5


def test_importing_the_metrics_package_pulls_in_nothing_heavy() -> None:
    modules = "records, log, wandb_sink, console, plots, rollouts, summary"
    code = (
        f"import sys; from pipelinerl.metrics import {modules}; "
        "print([name for name in ('torch', 'wandb', 'matplotlib', 'ray', 'vllm') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
