"""What a person sees while the run goes on: a live display in a terminal, one plain line per step otherwise."""

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from rich.console import Console as RichConsole
from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn
from rich.spinner import Spinner
from rich.text import Text

from pipelinerl.config.schema import MetricsConfig
from pipelinerl.metrics.log import ELAPSED, Kind

ETA_WINDOW = 20  # steps
ACCURACY = "/accuracy"


class Console:
    """A sink that shows a line of state, the progress in optimizer steps, and the last step's main metrics.

    Args:
        config: `console` = auto (live in a terminal that can move its cursor, else plain), live or plain.
        total_steps: optimizer steps of the run.
        stream: where to write; stdout unless given.
    """

    def __init__(self, config: MetricsConfig, total_steps: int, stream: TextIO | None = None) -> None:
        self._total = total_steps
        self._times: deque[tuple[int, float]] = deque(maxlen=ETA_WINDOW + 1)
        self._stream = sys.stdout if stream is None else stream
        live = config.console == "live" or (config.console == "auto" and self._stream.isatty())
        live = live and os.environ.get("TERM", "") not in ("dumb", "")
        self._view: _Live | _Plain = _Live(self._stream, total_steps) if live else _Plain(self._stream)

    def status(self, text: str) -> None:
        """Say what the run is doing, e.g. "starting engines..."; "" clears the live state line."""
        self._view.status(text)

    def note(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._view.note(text)

    def write(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        """Show a training step or an evaluation. Other kinds are only in the files."""
        if kind == "train":
            self._view.step(step, self._total, step_metrics(values, self._eta_s(step, values)))
        elif kind == "eval":
            for line in eval_lines(step, values):
                self._view.note(line)

    def close(self) -> None:
        """Give the terminal back; what comes later is printed plainly. Safe to call twice."""
        self._view.close()
        self._view = _Plain(self._stream)

    def _eta_s(self, step: int, values: Mapping[str, float]) -> float | None:
        """Seconds to the last step at the pace of the last steps; evaluation and checkpoints count in."""
        if ELAPSED in values:
            self._times.append((step, values[ELAPSED]))
        first, last = (self._times[0], self._times[-1]) if self._times else ((0, 0.0), (0, 0.0))
        if last[0] > first[0]:
            return (last[1] - first[1]) / (last[0] - first[0]) * (self._total - step)
        pace = values.get("perf/step_s")
        return None if pace is None else pace * (self._total - step)


def step_metrics(values: Mapping[str, float], eta_s: float | None) -> str:
    """`reward 0.53  lag 1.2 (max 2)  kl 1.2e-03  clip 0.4%  1234 tok/s  1.1 s/step  eta 01:35`.

    A metric that the step did not log is left out.
    """
    parts: list[tuple[str, Callable[[float], str]]] = [
        ("reward/mean", lambda x: f"reward {x:.2f}"),
        ("staleness/mean", lambda x: f"lag {x:.1f} (max {values.get('staleness/max', x):.0f})"),
        ("policy/kl_old_new", lambda x: f"kl {x:.1e}"),
        ("policy/clip_rate", lambda x: f"clip {100 * x:.1f}%"),
        ("perf/trainer_tokens_per_s", lambda x: f"{x:.0f} tok/s"),
        ("perf/step_s", lambda x: f"{x:.1f} s/step"),
    ]
    shown = [form(values[name]) for name, form in parts if name in values]
    if values.get("optim/skipped", 0) > 0:
        shown.append("SKIPPED (not finite)")
    if eta_s is not None:
        shown.append(f"eta {clock(eta_s)}")
    return "  ".join(shown)


def eval_lines(step: int, values: Mapping[str, float]) -> Iterator[str]:
    """One line per evaluated task: `eval  step 0  sort  accuracy 45.3%  gain +2.1 points (-0.5 to +4.7)`."""
    for name in sorted(values):
        if name.startswith("eval/") and name.endswith(ACCURACY):
            task = name.removeprefix("eval/").removesuffix(ACCURACY)
            gain = [values.get(f"eval/{task}/gain{part}") for part in ("", "/ci_low", "/ci_high")]
            shown = [f"{100 * value:+.1f}" for value in gain if value is not None]
            tail = "  gain {} points ({} to {})".format(*shown) if len(shown) == len(gain) else ""
            yield f"eval  step {step}  {task}  accuracy {100 * values[name]:.1f}%{tail}"


def clock(seconds: float) -> str:
    """`01:35`, or `2:01:35` from one hour on."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class _Plain:
    """One line per event, flushed; no colour and no cursor movement, so logs and pipes stay readable."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def status(self, text: str) -> None:
        if text:
            self.note(text)

    def step(self, step: int, total: int, metrics: str) -> None:
        self.note(f"step {step:>{len(str(total))}}/{total}  {metrics}")

    def note(self, line: str) -> None:
        print(line, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class _Live:
    """State, progress bar and metrics at the bottom of the terminal; everything else that is printed goes above."""

    def __init__(self, stream: TextIO, total_steps: int) -> None:
        console = RichConsole(file=stream, force_terminal=True, highlight=False)  # honours NO_COLOR itself
        self._progress = Progress(
            TextColumn("step"), MofNCompleteColumn(), BarColumn(bar_width=None), TaskProgressColumn(), expand=True
        )
        self._task = self._progress.add_task("step", total=total_steps)
        self._state = Spinner("dots", style="cyan")
        self._metrics = Text()
        self._live = Live(self._render(""), console=console, refresh_per_second=4)
        before = (sys.stdout, sys.stderr)
        self._live.start()
        self._moved = _move_log_handlers(before, (sys.stdout, sys.stderr))

    def status(self, text: str) -> None:
        self._live.update(self._render(text), refresh=True)

    def step(self, step: int, total: int, metrics: str) -> None:
        self._metrics = Text(metrics)
        self._progress.update(self._task, completed=step)
        self._live.update(self._render(""))

    def note(self, line: str) -> None:
        self._live.console.print(line, markup=False)

    def close(self) -> None:
        self._live.update(self._render(""))
        self._live.stop()
        for handler, stream in self._moved:
            handler.setStream(stream)

    def _render(self, state: str) -> Group:
        self._state.update(text=Text(state))
        return Group(*([self._state] if state else []), self._progress, self._metrics)


def _move_log_handlers(
    old: tuple[TextIO, TextIO], new: tuple[TextIO, TextIO]
) -> "list[tuple[logging.StreamHandler[TextIO], TextIO]]":
    """Point log handlers that hold the real terminal at rich's streams, which print above the display.

    Returns the handlers with the streams they had, to be put back.
    """
    moved = []
    for logger in [logging.root, *logging.root.manager.loggerDict.values()]:
        for handler in getattr(logger, "handlers", []):  # a PlaceHolder has none
            for real, redirected in zip(old, new, strict=True):
                if isinstance(handler, logging.StreamHandler) and handler.stream is real:
                    moved.append((handler, real))
                    handler.setStream(redirected)
    return moved
