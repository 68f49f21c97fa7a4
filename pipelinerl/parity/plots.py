"""Figures of a parity report, in the style of a run's own plots."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipelinerl.metrics.plots import BLUE, GREEN, GREY, ORANGE, RED, draw, legend, panels
from pipelinerl.parity.results import CONFIGURED, REFERENCE, CaseResult
from pipelinerl.parity.statistics import Doubles, Measurement, differences

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Cases = Sequence[tuple[CaseResult, Measurement]]

INK = "#0f172a"
SMALLEST = 1e-9  # nats; what differs by less, or not at all, is drawn here
BINS_PER_DECADE = 6
COLOURS = {
    "as configured": BLUE,
    "all four fixes in force": GREEN,
    "changes the meaning": RED,
    "changes the inference path": ORANGE,
    "other change": GREY,
}


def write_plots(
    folder: Path,
    cases: Cases,
    limit: float,
    places: Sequence[str] = (),
    curve: Sequence[float] = (),
    jump: int | None = None,
) -> list[Path]:
    """Draw what there is data for; returns the files written.

    Args:
        folder: where they go.
        cases: in the order in which they are drawn, from the top.
        limit: of mean |Delta|, nats; drawn as a line.
        places: names of the layers, in forward order.
        curve: relative difference of the hidden states at each of `places`.
        jump: index of the place that differs first.
    """
    with_tokens = [(case, found) for case, found in cases if found.whole.tokens]
    return draw(
        folder,
        {
            "parity_differences": lambda: _histograms(with_tokens, limit),
            "parity_signed": lambda: _signed_means(with_tokens),
            "parity_layers": lambda: _layers(places, curve, jump),
        },
    )


def _histograms(cases: Cases, limit: float) -> "Figure | None":
    """One panel per case, with a shared logarithmic axis of |Delta|."""
    if not cases:
        return None
    sizes = [_sizes(case) for case, _ in cases]
    all_sizes = np.concatenate([*sizes, [limit / 10, limit * 10]])
    low, high = math.floor(math.log10(np.quantile(all_sizes, 0.002))), math.ceil(math.log10(all_sizes.max()))
    edges = np.logspace(low, high, (high - low) * BINS_PER_DECADE + 1)
    label = "|trainer - engine| of the logprob of a token, nats"
    figure, all_axes = panels(len(cases), 1, height=1.7 + 0.85 * len(cases), x_label=label)
    for axes, (case, found), size in zip(all_axes, cases, sizes, strict=True):
        mean = found.whole.mean_abs
        axes.hist(size.clip(edges[0], edges[-1]), edges.tolist(), color=COLOURS[_kind(case)], alpha=0.75)
        axes.axvline(limit, color=GREY, linestyle="--", linewidth=1.5)
        if math.isfinite(mean):
            axes.axvline(max(mean, edges[0]), color=INK, linewidth=2)
        axes.set_xscale("log")
        axes.set_xlim(edges[0], edges[-1])
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_ylabel(f"{case.name}\nmean {mean:.1e}", rotation=0, ha="right", va="center", color=INK, fontsize=11)
    all_axes[0].set_title("Difference per token (line: mean, dashed: its limit)")
    _colour_legend(figure, cases)
    return figure


def _signed_means(cases: Cases) -> "Figure | None":
    """Bars: an offset stands out from the error bars, noise of any size does not."""
    shown = [(case, found.whole) for case, found in cases if math.isfinite(found.whole.mean_signed)]
    if not shown:
        return None
    figure, (axes,) = panels(1, 1, height=1.8 + 0.42 * len(shown), x_label="mean of trainer - engine, nats")
    values = np.array([found.mean_signed for _, found in shown])
    errors = np.array([found.mean_signed_error for _, found in shown])
    errors = np.where(np.isfinite(errors), errors, 0.0)
    rows = np.arange(len(shown))[::-1]
    axes.barh(rows, values, xerr=errors, color=[COLOURS[_kind(case)] for case, _ in shown], height=0.62,
              error_kw={"ecolor": INK, "elinewidth": 1.5, "capsize": 3})  # fmt: skip
    axes.axvline(0, color="#94a3b8", linewidth=1)
    axes.set_yticks(rows, [case.name for case, _ in shown])
    axes.grid(axis="y", visible=False)
    _symmetric_log(axes, values, errors)
    for row, value, error in zip(rows, values, errors, strict=True):
        axes.annotate(
            f"{value:+.1e} ± {error:.0e}", (1, float(row)), xycoords=("axes fraction", "data"), xytext=(8, 0),
            textcoords="offset points", va="center", fontsize=10.5, color="#475569", annotation_clip=False,
        )  # fmt: skip
    axes.set_title("Signed mean of the difference, with its standard error")
    _colour_legend(figure, cases)
    return figure


def _layers(places: Sequence[str], curve: Sequence[float], jump: int | None) -> "Figure | None":
    """The relative difference of the hidden states, place by place."""
    if not curve:
        return None
    assert len(places) == len(curve), (len(places), len(curve))
    values, rows = np.array(curve, np.float64), np.arange(len(curve))
    clear = values[np.isfinite(values) & (values > 0)]
    floor, ceiling = (float(clear.min()) / 3, float(clear.max()) * 3) if clear.size else (SMALLEST, 1.0)
    shown = np.where(np.isfinite(values), values.clip(min=floor), ceiling)
    figure, (axes,) = panels(1, 1, height=5.2, x_label="")
    axes.plot(rows, shown, color=BLUE, marker="o", markersize=5)
    for where, marker, colour, label in (
        (values == 0, "o", "white", "no difference at all"),
        (~np.isfinite(values), "X", RED, "not finite"),
    ):
        if where.any():
            axes.plot(rows[where], shown[where], linestyle="none", marker=marker, markersize=9, markerfacecolor=colour,
                      markeredgecolor=BLUE if colour == "white" else colour, label=label)  # fmt: skip
    if jump is not None:
        axes.axvline(jump, color=RED, linestyle="--", linewidth=1.5, label=f"differs first: {places[jump]}")
    axes.set_yscale("log")
    every = max(1, math.ceil(len(places) / 18))
    last = len(places) - 1
    ticks = [tick for tick in range(0, last, every) if last - tick >= every] + [last]
    axes.set_xticks(ticks, [places[tick] for tick in ticks], rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    axes.set_ylabel("relative difference (log scale)")
    axes.set_title("Hidden states of engine and trainer")
    if axes.get_legend_handles_labels()[0]:
        legend(axes)
    return figure


def _sizes(case: CaseResult) -> Doubles:
    """|Delta| of the tokens with finite logprobs, [<= N], none below `SMALLEST`."""
    assert case.evidence is not None, case.name
    size: Doubles = np.abs(differences(case.evidence))
    shown: Doubles = size[np.isfinite(size)].clip(min=SMALLEST)
    return shown


def _symmetric_log(axes: "Axes", values: Doubles, errors: Doubles) -> None:
    """A logarithmic axis on both sides of zero, linear below the smallest value that can be told from its error."""
    clear = np.abs(values)[np.abs(values) > errors]
    largest = float((np.abs(values) + errors).max())
    threshold = max(float(clear.min()) / 3 if clear.size else largest, largest * 1e-6, 1e-12)
    axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(threshold)))


def _kind(case: CaseResult) -> str:
    """What the colour of a case says."""
    named = {CONFIGURED: "as configured", REFERENCE: "all four fixes in force"}
    changed = {"semantic": "changes the meaning", "inference_path": "changes the inference path"}
    return named.get(case.name) or changed.get(case.layer or "", "other change")


def _colour_legend(figure: "Figure", cases: Cases) -> None:
    from matplotlib.patches import Patch

    present = {_kind(case) for case, _ in cases}
    patches = [Patch(color=colour, label=kind) for kind, colour in COLOURS.items() if kind in present]
    figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
