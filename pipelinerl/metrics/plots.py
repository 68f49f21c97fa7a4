"""`plots/*.png` of a run, drawn from `metrics.jsonl`. matplotlib is imported when a plot is written, not before."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelinerl.metrics.log import FILE_NAME, read_metrics
from pipelinerl.metrics.series import Records, Series, accuracies, intervals, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

BLUE, ORANGE, GREEN, RED, GREY = "#2563eb", "#ea8a0c", "#0f9d76", "#dc2626", "#64748b"
STYLE: dict[Any, Any] = {
    "font.size": 12,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#334155",
    "axes.edgecolor": "#94a3b8",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e2e8f0",
    "xtick.color": "#475569",
    "ytick.color": "#475569",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}
RUNNING = 5  # steps in the running mean
DPI = 160  # of a figure 10 inches wide: readable when shown 1000 pixels wide

Curve = tuple[str, str, str]  # metric, label, colour


def write_plots(run_dir: Path, lag_bound: int | None = None) -> list[Path]:
    """Draw every figure for which the run has data; `lag_bound` (optimizer steps) is drawn into the staleness figure.

    Returns:
        The files written. A figure that cannot be drawn is left out with a warning: plots never fail a run.

    Raises:
        DataError: `run_dir/metrics.jsonl` is missing or damaged.
    """
    records = read_metrics(run_dir / FILE_NAME)
    return draw(
        run_dir / "plots",
        {
            "reward": lambda: _reward(records),
            "policy": lambda: _policy(records),
            "staleness": lambda: _staleness(records, lag_bound),
            "mismatch": lambda: _mismatch(records),
            "throughput": lambda: _throughput(records),
        },
    )


def draw(folder: Path, figures: "Mapping[str, Callable[[], Figure | None]]") -> list[Path]:
    """Draw each figure, in the common style, to `folder/<name>.png`; one that is None has no data and is left out.

    Returns the files written. A figure that cannot be drawn is left out with a warning.
    """
    import matplotlib

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure_of in figures.items():
        path = folder / f"{name}.png"
        try:
            with matplotlib.rc_context(STYLE):
                figure = figure_of()
                if figure is not None:
                    figure.savefig(path, dpi=DPI, format="png")
                    written.append(path)
        except Exception as error:
            logger.warning("%s was not drawn: %s: %s", path, type(error).__name__, error)
    return written


def _reward(records: Records) -> "Figure | None":
    reward = series(records, "train", "reward/mean")
    evals = {task: found for task, found in accuracies(records).items() if len(found)}
    if not len(reward):
        return None
    figure, (axes,) = panels(1, 1, height=5.2)
    axes.plot(reward.steps, reward.values, color=BLUE, alpha=0.3, linewidth=1.2, marker=".", label="each step")
    smooth = Series(reward.steps, reward.running_mean(RUNNING))
    _line(axes, smooth, BLUE, f"running mean of {RUNNING} steps", linewidth=3)
    for (task, points), colour in zip(evals.items(), _cycle(len(evals)), strict=True):
        _intervals(axes, points, *intervals(records, task, "accuracy"), colour)
        _evaluations(axes, points, colour, f"held-out accuracy ({task})")
    ends = f"{reward.first(RUNNING):.2f} (first {RUNNING} steps) → {reward.last(RUNNING):.2f} (last {RUNNING} steps)"
    axes.set_title(f"Training reward: {ends}")
    axes.set_ylabel("mean reward of the step's rollouts")
    axes.margins(y=0.12)
    axes.legend(loc="lower right")
    return figure


def _policy(records: Records) -> "Figure | None":
    return _grid(
        records,
        [
            ("policy/kl_old_new", "KL of sampling to training policy", "nats per token", BLUE, 1),
            ("policy/clip_rate", "Clipped tokens", "% of tokens", ORANGE, 100),
            ("policy/entropy", "Entropy of the policy", "nats per token", GREEN, 1),
            ("policy/ess", "Effective sample size", "% of samples", GREY, 100),
        ],
    )


def _staleness(records: Records, bound: int | None) -> "Figure | None":
    oldest = series(records, "train", "staleness/max")
    if not len(oldest):
        return None
    by_lag = [
        (f"staleness/abs_log_ratio_lag_{k}", f"lag {k}", colour)
        for k, colour in enumerate(_cycle(9))
        if len(series(records, "train", f"staleness/abs_log_ratio_lag_{k}"))
    ]
    figure, axes = panels(3 if by_lag else 2, 1, height=10 if by_lag else 7)
    lag, share = axes[:2]
    if bound is not None:
        lag.axhline(bound, color=GREY, linestyle="--", linewidth=1.5, label=f"bound {bound}")
    _line(lag, oldest, "#fca5a5", "max", linewidth=6)  # wide and pale: it often coincides with the percentile
    _curves(lag, records, [("staleness/p95", "95th percentile", ORANGE), ("staleness/mean", "mean", BLUE)])
    lag.set_title("Lag of the trained tokens")
    lag.set_ylabel("optimizer steps")
    lag.set_ylim(bottom=0, top=lag.get_ylim()[1] * 1.08 + 0.05)
    legend(lag)
    several = series(records, "train", "staleness/multi_version_frac")
    share.fill_between(several.steps, 100 * several.values, color=BLUE, alpha=0.15, linewidth=0)
    _line(share, several, BLUE, "", scale=100)
    share.set_title("Completions sampled by two or more weight versions")
    share.set_ylabel("% of rollouts")
    share.set_ylim(0, 104)
    if by_lag:
        axes[2].set_yscale("log", nonpositive="mask")
        _curves(axes[2], records, by_lag)
        axes[2].set_title("|log ratio| by lag")
        axes[2].set_ylabel("nats per token (log)")
        legend(axes[2])
    return figure


def _mismatch(records: Records) -> "Figure | None":
    curves = [
        ("mismatch/abs_logprob_max", "max |Δ logprob|", ORANGE),
        ("mismatch/abs_logprob_mean", "mean |Δ logprob|", BLUE),
        ("mismatch/k3", "k3 estimate of KL", GREEN),
    ]
    if not any((series(records, "train", name).values > 0).any() for name, _, _ in curves):
        return None
    figure, (axes,) = panels(1, 1, height=5.2)
    axes.set_yscale("log", nonpositive="mask")
    _curves(axes, records, curves)
    axes.set_title("Engine vs trainer at lag 0")
    axes.set_ylabel("nats per token (log scale)")
    legend(axes)
    return figure


def _throughput(records: Records) -> "Figure | None":
    wanted: list[tuple[str, str, float, list[Curve]]] = [
        ("Throughput", "tokens per second", 1, [
            ("perf/trainer_tokens_per_s", "trainer", BLUE), ("perf/rollout_tokens_per_s", "rollout", ORANGE)]),
        ("Idle time", "% of step time", 100, [
            ("perf/trainer_idle_frac", "trainer", BLUE), ("perf/rollout_idle_frac", "rollout", ORANGE)]),
        ("Weight update", "seconds", 1, [
            ("sync/transfer_s", "transfer", GREEN), ("sync/pause_s", "generation paused", RED)]),
    ]  # fmt: skip
    filled = [panel for panel in wanted if any(len(series(records, "train", name)) for name, _, _ in panel[3])]
    if not filled:
        return None
    figure, all_axes = panels(len(filled), 1, height=3.2 * len(filled))
    for axes, (title, unit, scale, curves) in zip(all_axes, filled, strict=True):
        _curves(axes, records, curves, scale)
        axes.set_title(title)
        axes.set_ylabel(unit)
        axes.set_ylim(bottom=0, top=axes.get_ylim()[1] * 1.05)
        legend(axes)
    return figure


def _grid(records: Records, wanted: Sequence[tuple[str, str, str, str, float]]) -> "Figure | None":
    """Two columns of small figures, one metric each: (metric, title, unit, colour, scale)."""
    filled = [(series(records, "train", panel[0]), *panel[1:]) for panel in wanted]
    filled = [panel for panel in filled if len(panel[0])]
    if not filled:
        return None
    rows = (len(filled) + 1) // 2
    figure, all_axes = panels(rows, 2, height=3.5 * rows)
    for axes, (values, title, unit, colour, scale) in zip(all_axes, filled, strict=False):
        axes.plot(values.steps, scale * values.values, color=colour, alpha=0.3, linewidth=1.2, marker=".")
        _line(axes, Series(values.steps, values.running_mean(RUNNING)), colour, "", scale, linewidth=2.5)
        axes.set_title(title)
        axes.set_ylabel(unit)
    for axes in all_axes[len(filled) :]:
        axes.set_visible(False)
    return figure


def panels(rows: int, columns: int, height: float, x_label: str = "optimizer step") -> "tuple[Figure, list[Axes]]":
    """A figure 10 inches wide and `height` inches high whose panels share an x axis, by default of optimizer steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(10, height), layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]
    FigureCanvasAgg(figure)
    grid = np.atleast_1d(figure.subplots(rows, columns, sharex=True, squeeze=False))
    for axes in grid[-1]:
        axes.set_xlabel(x_label)
        if x_label == "optimizer step":
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10], min_n_ticks=1))
    return figure, list(grid.flat)


def _curves(axes: "Axes", records: Records, curves: Sequence[Curve], scale: float = 1) -> None:
    for name, label, colour in curves:
        values = series(records, "train", name)
        if len(values):
            _line(axes, values, colour, label, scale)


def _line(
    axes: "Axes", values: Series, colour: str, label: str, scale: float = 1, linewidth: float | None = None
) -> None:
    marker = "o" if len(values) == 1 else None  # a line through one point is invisible
    axes.plot(values.steps, scale * values.values, color=colour, label=label, marker=marker, linewidth=linewidth)


def _intervals(axes: "Axes", points: Series, low: Series, high: Series, colour: str) -> None:
    """The 95% interval of each evaluation that has one."""
    ends = dict(zip(low.steps.tolist(), zip(low.values, high.values, strict=True), strict=True))
    known = [
        (step, value, *ends[step]) for step, value in zip(points.steps, points.values, strict=True) if step in ends
    ]
    if known:
        steps, values, lows, highs = np.array(known).T
        reach = np.array([values - lows, highs - values])
        axes.errorbar(steps, values, yerr=reach, color=colour, linestyle="none", capsize=4)


def _evaluations(axes: "Axes", points: Series, colour: str, label: str) -> None:
    """Markers, and the values of the first and last one. No line: it would tell of steps that nobody evaluated."""
    from matplotlib.patheffects import withStroke

    axes.plot(
        points.steps, points.values, color=colour, linestyle="none", marker="D", markersize=10,
        markeredgecolor="white", markeredgewidth=1.5, label=label, zorder=5,
    )  # fmt: skip
    for index in {0, len(points) - 1}:
        at_end = index > 0
        axes.annotate(
            f"{100 * points.values[index]:.1f}%", (float(points.steps[index]), float(points.values[index])),
            xytext=(-12, 14) if at_end else (12, -16), textcoords="offset points", ha="right" if at_end else "left",
            color=colour, fontsize=13, fontweight="bold", zorder=6,
            path_effects=[withStroke(linewidth=4, foreground="white")],
        )  # fmt: skip


def legend(axes: "Axes") -> None:
    """Right of the panel's title, where it hides no data."""
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0.2)


def _cycle(count: int) -> list[str]:
    colours = (ORANGE, GREEN, RED, GREY, BLUE)
    return [colours[index % len(colours)] for index in range(count)]
