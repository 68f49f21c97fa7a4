"""The table, parity.json and the figures of a small report whose numbers are known."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from pipelinerl.parity.bisect import LayerCurve
from pipelinerl.parity.plots import write_plots
from pipelinerl.parity.report import Report, ranked, table, to_json, write_json, write_report
from pipelinerl.parity.results import REFERENCE, LagEvidence
from pipelinerl.parity.verdict import judge
from tests.unit.evidence import by_hand, case, run_config

CONFIG = run_config(sampling={"temperature": 1.0})
LAGS = [LagEvidence(0, 0.01, 1e-4, 0.0), LagEvidence(1, 0.2, math.inf, math.nan)]
CURVE = LayerCurve(("embedding", "block 0", "final norm"), (0.0, 0.5, math.inf), 1)
NUMBERS = {
    "tokens", "mean_abs", "max_abs", "mean_signed", "k3", "ratio_mean", "token_mult_prob_error", "frac_out_0.5_2",
    "clip_rate", "argmax_flips",
}  # fmt: skip


def noise(size, **others):
    return by_hand([size, -size] * 50, engine=-3.0, **others)


def report(*cases, lags=(), curve=None):
    results = cases or (
        case(noise(0.01, completions=100, aborted=25, pause_s=0.5)),
        case(noise(0.02), "small", "semantic"),
        case(noise(0.002), REFERENCE),
        case(None, "absent", reason="needs a GPU"),
        case(noise(0.8), "large", "inference_path"),
    )
    return Report(CONFIG, {"device": "cpu"}, results, lags, judge(results, lags, CONFIG), curve)


def row(text, name):
    return next(line.split() for line in text.splitlines() if line.startswith(f"{name} "))


def test_the_table_ranks_the_effects_and_ends_with_the_verdict():
    text = table(report())
    lines = text.splitlines()
    names = [line.split()[0] for line in lines[3:7]]
    assert names == ["configured", "all_fixes", "large", "small"]
    assert lines[-1].startswith("  advice: ") and any(line == "verdict: FAIL, inference_path" for line in lines)


def test_a_row_has_what_was_measured():
    text = table(report())
    # mean |Delta| 0.01, 5 times the reference, no flips known, a quarter of 100 aborted
    cells = row(text, "configured")
    assert cells[1:4] + cells[5:] == ["1.0e-02", "5", "1.0e-02", "5.0e-05", "0.0%", "-", "25.0%!", "0.5", "s"]
    assert row(text, "large")[1:3] == ["8.0e-01!", "400"] and row(text, "large")[6] == "100.0%!"


def test_the_table_says_what_each_case_is_and_should_show():
    text = table(report())
    assert "large: what large is (set.large=true)" in text and "should show: what large shows" in text
    assert "absent: needs a GPU" in text


def test_phases_are_told_apart_and_marked():
    evidence = by_hand([0.001, -0.001] * 50 + [0.5, -0.5] * 50, phase=[0] * 100 + [2] * 100, engine=-3.0)
    assert "mean |Δ|: fresh 1.0e-03, after 5.0e-01! (200 tokens)" in table(report(case(evidence)))


def test_the_table_fits_120_columns():
    long = replace(
        case(noise(0.8), "a_case_with_quite_a_long_name", "semantic"), what="word " * 60, expect="word " * 60
    )
    text = table(report(case(noise(0.01)), long, lags=LAGS, curve=CURVE))
    assert max(map(len, text.splitlines())) <= 120
    assert "nan%" in text and "block 0" in text


def test_json_has_exactly_the_agreed_shape(tmp_path):
    path = write_json(tmp_path, report(lags=LAGS, curve=CURVE))
    assert path == tmp_path / "parity.json"

    def no_constants(name):
        raise AssertionError(name)

    found = json.loads(path.read_text(), parse_constant=no_constants)
    assert set(found) == {"model", "settings", "cases", "verdict", "layer", "advice"}
    assert (found["model"], found["settings"], found["verdict"]) == ("a-model", {"device": "cpu"}, "fail")
    assert found["layer"] == "inference_path" and found["advice"].startswith("see logs/engine_0.log")
    assert [entry["name"] for entry in found["cases"]] == ["configured", "small", "all_fixes", "absent", "large"]
    for entry in found["cases"]:
        assert set(entry) == {"name", "ran", "reason", "detail"} | NUMBERS
        assert {"what", "expect", "setting", "layer", "phases", "aborted", "completions", "pause_s"} <= set(
            entry["detail"]
        )


def test_json_numbers_are_those_of_the_case():
    configured, small, _, absent, large = to_json(report())["cases"]
    assert configured["mean_abs"] == pytest.approx(0.01, rel=1e-4) and configured["tokens"] == 100
    assert configured["ratio_mean"] == pytest.approx(math.cosh(0.01), rel=1e-6)
    assert configured["argmax_flips"] is None and configured["ran"] is True
    assert configured["detail"]["aborted"] == 25 and configured["detail"]["pause_s"] == 0.5
    assert configured["detail"]["phases"]["fresh"]["mean_abs"] == configured["mean_abs"]
    assert (large["frac_out_0.5_2"], large["clip_rate"]) == (1.0, 1.0)
    assert small["detail"]["layer"] == "semantic"
    assert (absent["ran"], absent["reason"]) == (False, "needs a GPU")
    assert all(absent[name] is None for name in NUMBERS) and absent["detail"]["phases"] == {}


def test_what_is_about_the_verdict_is_in_the_detail_of_the_configured_case():
    configured, small = to_json(report(lags=LAGS, curve=CURVE))["cases"][:2]
    assert configured["detail"]["lags"][1] == {"lag": 1, "abs_log_ratio": 0.2, "k3": "inf", "clip_rate": None}
    assert configured["detail"]["layer_curve"][2] == {"place": "final norm", "difference": "inf"}
    assert configured["detail"]["limits"]["mean_abs"] == 0.05
    assert "lags" not in small["detail"]


def test_a_non_finite_logprob_is_inf_in_json_and_a_missing_number_null():
    evidence = noise(0.01)
    engine = evidence.engine.copy()
    engine[3] = -math.inf
    broken, empty = to_json(report(case(replace(evidence, engine=engine)), case(by_hand([]), "empty")))["cases"]
    assert (broken["mean_abs"], broken["k3"]) == ("inf", "inf")
    assert (empty["ran"], empty["tokens"], empty["mean_abs"]) == (True, 0, None)


def test_a_passing_report_says_pass():
    passing = report(case(noise(0.001)))
    assert "verdict: PASS" in table(passing).splitlines()
    document = to_json(passing)
    assert (document["verdict"], document["layer"]) == ("pass", None)


def test_cases_without_tokens_are_ranked_last():
    names = [
        found.name for found, _ in ranked(report(case(noise(0.1)), case(by_hand([]), "empty"), case(noise(0.1), "b")))
    ]
    assert names == ["configured", "b", "empty"]


def test_the_report_is_printed_and_written_with_its_figures(tmp_path):
    said = []
    write_report(tmp_path, report(lags=LAGS, curve=CURVE), said.append)
    assert said[0] == table(report(lags=LAGS, curve=CURVE))
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*"))
    assert written == [
        "parity.json", "plots/parity_differences.png", "plots/parity_layers.png", "plots/parity_signed.png",
    ]  # fmt: skip
    assert all(name in said[1] for name in written)


def test_figures_are_drawn_of_whatever_there_is(tmp_path):
    def names(paths):
        return [path.stem for path in paths]

    assert names(write_plots(tmp_path, [], 0.05)) == []
    assert names(write_plots(tmp_path, [], 0.05, ["embedding", "final norm"], [0.0, 0.0])) == ["parity_layers"]
    equal = ranked(report(case(by_hand([0.0, 0.0]))))
    assert names(write_plots(tmp_path, equal, 0.05)) == ["parity_differences", "parity_signed"]
    broken = by_hand([0.1, 0.1])
    broken = replace(broken, engine=np.full(2, math.nan, np.float32))
    assert names(write_plots(tmp_path, ranked(report(case(broken))), 0.05)) == ["parity_differences"]
