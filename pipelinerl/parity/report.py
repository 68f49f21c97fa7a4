"""What a probe found, for people (`table`, plots) and for programs (`parity.json`)."""

import json
import math
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.bisect import LayerCurve
from pipelinerl.parity.document import document
from pipelinerl.parity.findings import percent
from pipelinerl.parity.limits import Limits, exceeded, limits
from pipelinerl.parity.plots import write_plots
from pipelinerl.parity.results import CONFIGURED, REFERENCE, CaseResult, LagEvidence
from pipelinerl.parity.statistics import Measurement, Statistics, measure
from pipelinerl.parity.verdict import Verdict

FILE_NAME = "parity.json"
WIDTH = 120  # columns
HEADER = ("mean |Δ| ", "x ref", "max |Δ|", "signed", "k3 ", "clip rate ", "flips", "aborted ", "pause")


@dataclass(frozen=True, slots=True, eq=False)
class Report:
    """Everything there is to report. `results` hold the case `CONFIGURED`; `curve` is there when it was asked for."""

    config: RunConfig
    settings: Mapping[str, Any]  # what engines and trainer resolved to
    results: Sequence[CaseResult]
    lags: Sequence[LagEvidence]
    verdict: Verdict
    curve: LayerCurve | None


def write_report(run_dir: Path, report: Report, say: Callable[[str], None]) -> None:
    """Print the table; write parity.json, and the plots of `config.metrics.plots`."""
    say(table(report))
    written = [write_json(run_dir, report)]
    if report.config.metrics.plots:
        curve = (report.curve.places, report.curve.differences, report.curve.jump) if report.curve else ()
        written += write_plots(run_dir / "plots", ranked(report), limits(report.config).mean_abs, *curve)
    say("\n".join(f"wrote {path}" for path in written))


def write_json(run_dir: Path, report: Report) -> Path:
    """Write `to_json(report)` to `run_dir/parity.json` and return its path."""
    path = run_dir / FILE_NAME
    path.write_text(json.dumps(to_json(report), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def to_json(report: Report) -> dict[str, Any]:
    """The report as plain data; see `document`."""
    return document(report.config, report.settings, report.results, report.lags, report.verdict, report.curve)


def ranked(report: Report) -> list[tuple[CaseResult, Measurement]]:
    """The cases that ran: the configured one, the reference, then the others, the largest effect first."""
    measured = [(case, measure(case.evidence, report.config.algo)) for case in report.results if case.evidence]

    def rank(item: tuple[CaseResult, Measurement]) -> tuple[int, float]:
        case, found = item
        first = {CONFIGURED: 0, REFERENCE: 1}.get(case.name, 2)
        return first, -found.whole.mean_abs if found.whole.tokens else math.inf

    return sorted(measured, key=rank)


def table(report: Report) -> str:
    """The report as text, at most 120 columns wide, with the verdict at its end."""
    config, bounds, cases = report.config, limits(report.config), ranked(report)
    width = max(len(case.name) for case in report.results) + 2
    reference = {case.name: found.whole for case, found in cases}
    base = reference.get(REFERENCE) or reference.get(CONFIGURED)
    lines = [
        f"parity of {config.model.path} ({config.model.dtype}, temperature {config.sampling.temperature:g}): trainer "
        "minus engine on the tokens the engine sampled, in nats",
        "",
        f"{'case':<{width}}" + _columns(HEADER),
    ]
    lines += [f"{case.name:<{width}}" + _columns(_cells(case, found.whole, base, bounds)) for case, found in cases]
    lines += ["", *_wrapped("! = beyond the limits", _limits(bounds)), ""]
    for case, found in cases:
        lines += _about(case, found, bounds)
    skipped = [case for case in report.results if case.evidence is None]
    if skipped:
        lines += ["", "did not run", *(line for case in skipped for line in _wrapped(f"  {case.name}", case.reason))]
    if report.lags:
        lines += ["", *_lag_table(report.lags)]
    if report.curve:
        lines += ["", *_wrapped("layer by layer", report.curve.describe())]
    return "\n".join([*lines, "", *_verdict(report.verdict)])


def _cells(case: CaseResult, found: Statistics, base: Statistics | None, bounds: Limits) -> Iterator[str]:
    evidence = case.evidence
    assert evidence is not None, case.name
    beyond = exceeded(found, bounds)
    yield _marked(f"{found.mean_abs:.1e}", "mean_abs" in beyond)
    yield _times(found.mean_abs / base.mean_abs) if base and base.mean_abs else "-"
    yield f"{found.max_abs:.1e}"
    yield f"{found.mean_signed:+.1e}"
    yield _marked(f"{found.k3:.1e}", "k3" in beyond)
    yield _marked(percent(found.clip_rate), not found.clip_rate <= bounds.clip_rate)
    yield "-" if found.argmax_flips is None else percent(found.argmax_flips)
    yield _marked(percent(evidence.aborted / max(1, evidence.completions)), evidence.aborted > 0)
    yield "-" if evidence.pause_s is None else f"{evidence.pause_s:.2g} s"


def _times(factor: float) -> str:
    return f"{factor:.0f}" if 10 <= factor < 1e6 else f"{factor:.2g}"


def _marked(text: str, beyond: bool) -> str:
    return text + ("!" if beyond else " ")


def _columns(cells: "Sequence[str] | Iterator[str]") -> str:
    return "".join(f"{cell:>{size}}" for cell, size in zip(cells, (10, 9, 10, 10, 10, 11, 8, 10, 9), strict=True))


def _about(case: CaseResult, found: Measurement, bounds: Limits) -> Iterator[str]:
    """What the case is, what it should show, and what its phases show."""
    yield from _wrapped(case.name, f"{case.what} ({case.setting})" if case.setting else case.what)
    if case.expect:
        yield from _wrapped("    should show", case.expect)
    by_phase = (
        f"{name} {part.mean_abs:.1e}{'!' if exceeded(part, bounds) else ''}" for name, part in found.phases.items()
    )
    yield from _wrapped("    mean |Δ|", f"{', '.join(by_phase) or 'not measured'} ({found.whole.tokens:,} tokens)")


def _limits(bounds: Limits) -> str:
    return (
        f"mean |Δ| {bounds.mean_abs:g}, k3 {bounds.k3:g}, mean exp|Δ| {bounds.token_mult_prob_error:g}, fraction of "
        f"ratios outside [0.5, 2] {bounds.frac_out:g}, clip rate at lag 0 {percent(bounds.clip_rate)}, completions "
        "aborted 0"
    )


def _lag_table(lags: Sequence[LagEvidence]) -> Iterator[str]:
    yield "the same tokens after real optimizer steps: what staleness does to the objective"
    yield f"{'  lag':<8}{'mean |log ratio|':>18}{'k3':>10}{'clip rate':>12}"
    for lag in lags:
        yield f"  {lag.lag:<6}{lag.abs_log_ratio:>18.1e}{lag.k3:>10.1e}{percent(lag.clip_rate):>12}"


def _verdict(verdict: Verdict) -> Iterator[str]:
    yield "verdict: " + ("PASS" if verdict.passed else f"FAIL{f', {verdict.layer}' if verdict.layer else ''}")
    for finding in verdict.findings:
        yield from _wrapped(f"  {finding.layer or 'note'}", finding.text)
    yield from _wrapped("  advice", verdict.advice)


def _wrapped(label: str, text: str) -> list[str]:
    return textwrap.wrap(f"{label}: {text}", WIDTH, subsequent_indent=" " * (len(label) - len(label.lstrip()) + 4))
