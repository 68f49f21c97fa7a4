"""The console in a pipe and in a (pretended) terminal."""

import io
import logging
import sys

import pytest

from pipelinerl.config.schema import MetricsConfig
from pipelinerl.metrics.console import Console, clock

STEP = {
    "time/elapsed_s": 10.0, "reward/mean": 0.531, "staleness/mean": 1.24, "staleness/max": 2.0,
    "policy/kl_old_new": 0.00121, "policy/clip_rate": 0.0042, "perf/trainer_tokens_per_s": 1234.4, "perf/step_s": 1.08,
}  # fmt: skip


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_plain_lines() -> None:
    out = io.StringIO()
    console = Console(MetricsConfig(), 100, out)
    console.status("starting engines...")
    console.write("eval", 0, {"eval/sort/accuracy": 0.453, "eval/math/accuracy": 0.1, "eval/sort/tokens_mean": 9})
    gain = {"eval/sort/gain": 0.05, "eval/sort/gain/ci_low": -0.01, "eval/sort/gain/ci_high": 0.11}
    console.write("eval", 9, {"eval/sort/accuracy": 0.5, "eval/sort/avg@1": 0.5} | gain)
    console.write("eval", 18, {"eval/sort/missed": 1.0})
    console.write("train", 12, STEP)
    console.write("run", 12, {"time/start_s": 3.0})
    console.status("")
    console.close()
    assert out.getvalue().splitlines() == [
        "starting engines...",
        "eval  step 0  math  accuracy 10.0%",
        "eval  step 0  sort  accuracy 45.3%",
        "eval  step 9  sort  accuracy 50.0%  gain +5.0 points (-1.0 to +11.0)",
        # no earlier step to measure the pace by: eta = 88 steps * 1.08 s = 95.04 s
        "step  12/100  reward 0.53  lag 1.2 (max 2)  kl 1.2e-03  clip 0.4%  1234 tok/s  1.1 s/step  eta 01:35",
    ]


def test_eta_follows_the_clock_not_only_the_steps() -> None:
    out = io.StringIO()
    console = Console(MetricsConfig(console="plain"), 10, out)
    console.write("train", 1, {"time/elapsed_s": 100.0, "perf/step_s": 1.0})
    console.write("train", 3, {"time/elapsed_s": 120.0, "perf/step_s": 1.0})
    assert out.getvalue().splitlines()[1].endswith("eta 01:10")  # 20 s for 2 steps, 7 steps left = 70 s


def test_a_missing_metric_leaves_its_place_out_and_a_skipped_step_is_said() -> None:
    out = io.StringIO()
    Console(MetricsConfig(), 5, out).write("train", 1, {"reward/mean": 0.0, "optim/skipped": 1.0})
    assert out.getvalue() == "step 1/5  reward 0.00  SKIPPED (not finite)\n"


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00"), (59.6, "01:00"), (3599, "59:59"), (7295, "2:01:35")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def test_a_terminal_gets_a_live_display(terminal: Terminal) -> None:
    console = Console(MetricsConfig(), 100, terminal)
    console.status("starting engines...")
    console.write("train", 12, STEP)
    console.close()
    console.close()
    text = terminal.getvalue()
    assert "\x1b[?25l" in text and text.count("\x1b[?25h") == 1  # cursor hidden, then given back once
    assert "starting engines..." in text and "12/100" in text and "reward 0.53" in text
    console.status("after")
    assert terminal.getvalue().endswith("after\n")


def test_log_lines_go_above_the_live_display(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    real = io.StringIO()
    monkeypatch.setattr(sys, "stderr", real)
    handler = logging.StreamHandler(real)
    logger = logging.getLogger("test_metrics_console")
    logger.addHandler(handler)
    try:
        console = Console(MetricsConfig(), 100, terminal)
        logger.warning("engine 0 [red]slow[/red]")
        assert "engine 0 [red]slow[/red]" in terminal.getvalue() and real.getvalue() == ""
        console.close()
        logger.warning("after")
        assert real.getvalue() == "after\n" and sys.stderr is real
    finally:
        logger.removeHandler(handler)


def test_no_color_and_dumb_terminals(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = Console(MetricsConfig(), 10, terminal)
    console.write("train", 1, STEP)
    console.close()
    assert "\x1b[3" not in terminal.getvalue()  # no colour codes
    monkeypatch.setenv("TERM", "dumb")
    dumb = Terminal()
    Console(MetricsConfig(console="live"), 10, dumb).write("train", 1, STEP)
    assert "\x1b" not in dumb.getvalue() and dumb.getvalue().startswith("step  1/10  reward 0.53")
