"""May the policy ratios of this configuration be trusted, and if not: which layer is at fault?

The layers are judged in the order in which they build on each other, and the first that fails is named:

    semantic         the engine's logprobs are not those of the distribution the trainer scores     (semantic.py)
    inference_path   they mean the same, but are computed from other weights, KV or precision       (inference_path.py)
    objective        parity holds, and the objective clips noise, or breaks down under staleness    (objective.py)

Parity is judged by mean |Delta|, k3, mean exp|Delta| and the fraction outside [0.5, 2], the objective by its clip rate
and k3. A mean ratio near 1 passes nothing: it is 1 in expectation for noise of any size.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pipelinerl.config.plan import parity_fixes
from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.findings import Finding, Gain
from pipelinerl.parity.inference_path import execution, thrown_away
from pipelinerl.parity.limits import Limits, exceeded
from pipelinerl.parity.limits import limits as limits
from pipelinerl.parity.objective import narrow_bounds, staleness
from pipelinerl.parity.results import CONFIGURED, PHASES, REFERENCE, CaseResult, Evidence, LagEvidence, Layer
from pipelinerl.parity.semantic import meaning
from pipelinerl.parity.statistics import Measurement, measure


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether the user's own configuration passed, and why (not)."""

    passed: bool
    layer: Layer | None  # the first that failed; None when all passed, and when nothing could be measured
    advice: str  # one line: the setting to change and the expected gain in numbers
    findings: tuple[Finding, ...]  # what failed, then notes
    gain: Gain | None  # of the advice, where it was measured


def judge(results: Sequence[CaseResult], lags: Sequence[LagEvidence], config: RunConfig) -> Verdict:
    """The verdict on the case `CONFIGURED` of `results`.

    The case `REFERENCE`, where it is among them, says what the configuration would measure with all fixes in force. The
    other cases have no say. Without `lags` (sync mode, or nothing to train on) staleness is not judged.
    """
    cases = {case.name: case for case in results}
    configured = cases[CONFIGURED]
    evidence = configured.evidence
    if evidence is None:
        return Verdict(False, None, f"parity was not measured: {configured.reason}", (), None)
    measured = measure(evidence, config.algo)
    reference = _measured(cases.get(REFERENCE), config)
    failures = tuple(_failures(evidence, measured, reference, lags, config))
    notes = tuple(_notes(evidence, measured, config))
    if not measured.whole.tokens and not failures:
        return Verdict(False, None, "parity was not measured: no sampled token could be scored", notes, None)
    if failures:
        first = failures[0]
        advice = f"{first.advice}: {first.gain}" if first.gain else first.advice
        return Verdict(False, first.layer, advice, failures + notes, first.gain)
    whole = measured.whole
    advice = f"nothing to change: mean |Δ| {whole.mean_abs:.2g} nats, k3 {whole.k3:.2g} over {whole.tokens:,} tokens"
    return Verdict(True, None, advice, notes, None)


def _failures(
    evidence: Evidence,
    measured: Measurement,
    reference: Measurement | None,
    lags: Sequence[LagEvidence],
    config: RunConfig,
) -> Iterator[Finding]:
    """In the order of the layers. What a failing layer makes of the next one's numbers is not reported as its fault."""
    bounds = limits(config)
    parity: list[Finding] = []
    if measured.whole.tokens:
        mean = meaning(evidence, measured.whole, reference.whole if reference else None, config, bounds)
        first = mean or execution(measured, reference, config, bounds)
        parity += [first] if first else []
    if lost := thrown_away(evidence, config):
        parity.append(lost)
    yield from parity
    if measured.whole.tokens and not parity:
        clipped = narrow_bounds(evidence, measured.whole, config, bounds)
        stale = staleness(lags, measured.whole, config, bounds)
        yield from (finding for finding in (clipped, stale) if finding)


def _notes(evidence: Evidence, measured: Measurement, config: RunConfig) -> Iterator[Finding]:
    """What a reader should know although nothing failed by it."""
    bounds = limits(config)
    within = {name for name, found in measured.phases.items() if not exceeded(found, bounds)}
    for fix in parity_fixes(config):
        if not fix.in_force and within == set(PHASES):
            yield Finding(None, f"fix {fix.name} is off ({fix.settings}), but within limits here")
        elif not fix.in_force:
            yield Finding(None, f"fix {fix.name} is off ({fix.settings})")
    for phase in PHASES:
        if phase not in measured.phases:
            yield Finding(None, f"no token of the phase {phase!r} was measured: it is not proved")
    if config.engine.update_pause == "wait" and evidence.pause_s is not None:
        yield Finding(
            None, f"engine.update_pause=wait: the update made generation stand still for {evidence.pause_s:.2g} s"
        )


def _measured(case: CaseResult | None, config: RunConfig) -> Measurement | None:
    return measure(case.evidence, config.algo) if case and case.evidence and len(case.evidence.engine) else None


__all__ = ["Limits", "Verdict", "judge", "limits"]
