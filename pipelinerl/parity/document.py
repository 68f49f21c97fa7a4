"""`parity.json`: the report for programs.

    {"model", "settings", "cases": [{"name", <numbers>, "ran", "reason", "detail"}], "verdict", "layer", "advice"}

Valid JSON, without NaN and Infinity. A number that does not exist is null: the case did not run, or had no token. One
that is infinite, because a logprob was not finite, is the string "inf" (or "-inf"): null would say that it was not
measured. What is about the verdict and not about a case stands in the detail of the case `CONFIGURED`, on which the
verdict rests.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.bisect import LayerCurve
from pipelinerl.parity.limits import limits
from pipelinerl.parity.results import CONFIGURED, CaseResult, LagEvidence
from pipelinerl.parity.statistics import Statistics, measure
from pipelinerl.parity.verdict import Verdict

NUMBERS: Mapping[str, str] = {  # key in the document -> field of Statistics
    "tokens": "tokens",
    "mean_abs": "mean_abs",
    "max_abs": "max_abs",
    "mean_signed": "mean_signed",
    "k3": "k3",
    "ratio_mean": "ratio_mean",
    "token_mult_prob_error": "token_mult_prob_error",
    "frac_out_0.5_2": "frac_out",
    "clip_rate": "clip_rate",
    "argmax_flips": "argmax_flips",
}


def document(
    config: RunConfig,
    settings: Mapping[str, Any],
    results: Sequence[CaseResult],
    lags: Sequence[LagEvidence],
    verdict: Verdict,
    curve: LayerCurve | None,
) -> dict[str, Any]:
    """The report as plain data. `settings` is what engines and trainer resolved to, and must be plain data itself."""
    cases = [_case(case, config) for case in results]
    places = zip(curve.places, curve.differences, strict=True) if curve else ()
    for case in cases:
        if case["name"] == CONFIGURED:
            case["detail"] |= {
                "limits": asdict(limits(config)),
                "findings": [{"layer": finding.layer, "text": finding.text} for finding in verdict.findings],
                "lags": [{name: _number(value) for name, value in asdict(lag).items()} for lag in lags],
                "layer_curve": [{"place": place, "difference": _number(value)} for place, value in places],
            }
    return {
        "model": config.model.path,
        "settings": dict(settings),
        "cases": cases,
        "verdict": "pass" if verdict.passed else "fail",
        "layer": verdict.layer,
        "advice": verdict.advice,
    }


def _case(case: CaseResult, config: RunConfig) -> dict[str, Any]:
    evidence = case.evidence
    found = measure(evidence, config.algo) if evidence else None
    return {
        "name": case.name,
        **_numbers(found.whole if found else None),
        "ran": evidence is not None,
        "reason": case.reason,
        "detail": {
            "what": case.what,
            "expect": case.expect,
            "setting": case.setting,
            "layer": case.layer,
            "phases": {name: _numbers(part) for name, part in found.phases.items()} if found else {},
            "mean_signed_error": _number(found.whole.mean_signed_error) if found else None,
            "aborted": evidence.aborted if evidence else None,
            "completions": evidence.completions if evidence else None,
            "pause_s": _number(evidence.pause_s) if evidence else None,
        },
    }


def _numbers(found: Statistics | None) -> dict[str, int | float | str | None]:
    return {key: _number(getattr(found, name)) if found else None for key, name in NUMBERS.items()}


def _number(value: float | None) -> float | str | None:
    if value is None or math.isnan(value):
        return None
    if math.isinf(value):
        return "inf" if value > 0 else "-inf"
    return value
