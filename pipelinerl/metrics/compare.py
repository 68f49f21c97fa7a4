"""Several runs in one figure and one table: each variant is the mean of its seeds, with the range they span.

compare(variants, PANELS, path)      a panel per metric, a curve per variant
table(variants, PANELS, last)        the numbers behind it, as Markdown
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pipelinerl.metrics.log import FILE_NAME, read_metrics
from pipelinerl.metrics.plots import BLUE, DPI, GREEN, GREY, ORANGE, RED, STYLE, panels
from pipelinerl.metrics.series import Series, series

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = (BLUE, GREEN, RED, ORANGE, GREY, "#7c3aed", "#0891b2", "#be185d")
SMOOTH = 5  # steps in the running mean that is drawn
Variants = Mapping[str, Sequence[Path]]  # label -> run directories, one for each seed


@dataclass(frozen=True, slots=True)
class Panel:
    """One metric of kind `train`."""

    metric: str
    title: str
    unit: str
    scale: float = 1.0
    log_from: float | None = None  # a logarithmic axis that starts here at the lowest


def compare(variants: Variants, wanted: Sequence[Panel], path: Path) -> None:
    """Draw the figure to `path`. A variant without a metric is left out of its panel.

    Raises DataError when a run has no readable metrics.
    """
    import matplotlib

    path.parent.mkdir(parents=True, exist_ok=True)
    loaded = {label: [read_metrics(run / FILE_NAME) for run in runs] for label, runs in variants.items()}
    with matplotlib.rc_context(STYLE):
        rows = (len(wanted) + 1) // 2
        figure, all_axes = panels(rows, 2, height=3.7 * rows + 0.5)
        for axes, panel in zip(all_axes, wanted, strict=False):
            for (label, runs), colour in zip(loaded.items(), COLOURS, strict=False):
                _curve(axes, [series(records, "train", panel.metric) for records in runs], label, colour, panel)
            axes.set_title(panel.title)
            axes.set_ylabel(panel.unit)
            if panel.log_from is not None:
                axes.set_yscale("log", nonpositive="mask")
                axes.set_ylim(bottom=max(panel.log_from, axes.get_ylim()[0]))
        for axes in all_axes[len(wanted) :]:
            axes.set_visible(False)
        handles, labels = all_axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)))
        figure.savefig(path, dpi=DPI, format="png")


def table(variants: Variants, wanted: Sequence[Panel], last: int) -> str:
    """Markdown: for each variant and metric the mean over the last `last` steps, and the range over the seeds."""
    lines = [
        "| variant | seeds | " + " | ".join(panel.title for panel in wanted) + " |",
        "|---|---|" + "---|" * len(wanted),
    ]
    for label, runs in variants.items():
        records = [read_metrics(run / FILE_NAME) for run in runs]
        cells = []
        for panel in wanted:
            values = [panel.scale * series(run, "train", panel.metric).last(last) for run in records]
            cells.append(_cell([value for value in values if not np.isnan(value)]))
        lines.append(f"| {label} | {len(runs)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = f"{np.mean(values):.3g}"
    return middle if len(values) == 1 else f"{middle} ({min(values):.3g} to {max(values):.3g})"


def _curve(axes: "Axes", runs: Sequence[Series], label: str, colour: str, panel: Panel) -> None:
    runs = [run for run in runs if len(run)]
    if not runs:
        return
    steps = np.array(sorted(set.intersection(*(set(run.steps.tolist()) for run in runs))))
    rows = np.stack([panel.scale * _at(run, steps) for run in runs])
    axes.plot(steps, rows.mean(0), color=colour, label=label)
    if len(rows) > 1:
        axes.fill_between(steps, rows.min(0), rows.max(0), color=colour, alpha=0.15, linewidth=0)


def _at(run: Series, steps: NDArray[np.int64]) -> NDArray[np.float64]:
    smooth = dict(zip(run.steps.tolist(), run.running_mean(SMOOTH), strict=True))
    return np.array([smooth[step] for step in steps.tolist()])
