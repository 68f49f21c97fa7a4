"""The probe of `pipelinerl parity`, before step 1 of a training run: a run whose ratios lie should not begin.

It takes the engines through one in-flight update and back; the trainer's weights are bit for bit what they were.
What it measured calibrates the alarm that watches the run.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ParityError
from pipelinerl.parity.alarm import Alarm
from pipelinerl.parity.probe import Engines, Trainer, Updates, sample, score, score_request
from pipelinerl.parity.report import Report, write_json
from pipelinerl.parity.results import CONFIGURED, CaseResult
from pipelinerl.parity.statistics import Statistics, statistics
from pipelinerl.parity.verdict import judge, limits
from pipelinerl.tasks.base import Task


async def preflight(
    config: RunConfig,
    task: Task,
    engines: Engines,
    trainer: Trainer,
    updates: Updates,
    settings: dict[str, Any],
    run_dir: Path,
    status: Callable[[str], None],
    tell: Callable[[str], None],
) -> Statistics | None:
    """Probe and write parity.json; `status` says what goes on, `tell` what came out.

    Returns what was measured, or None with `parity.preflight=off`.

    Raises ParityError when parity does not hold and `parity.preflight=strict`.
    """
    if config.parity.preflight == "off":
        return None
    status("parity preflight")
    start = time.perf_counter()
    problems = task.problems("train")[: config.parity.groups]
    samples = await sample(engines, trainer, updates, problems, config)
    evidence = await score(trainer, samples, score_request(config, samples))
    results = [CaseResult(CONFIGURED, "the configuration as it is", "", "", None, evidence)]
    verdict = judge(results, [], config)
    write_json(run_dir, Report(config, settings, results, [], verdict, None))
    measured = statistics(evidence, config.algo)
    if verdict.passed:
        tell(
            f"parity holds: mean |Δlogprob| {measured.mean_abs:.1e}, k3 {measured.k3:.1e} over "
            f"{measured.tokens} tokens ({time.perf_counter() - start:.1f} s)"
        )
        return measured
    problem = f"no parity, {verdict.layer}: {verdict.advice}"
    if config.parity.preflight == "strict":
        raise ParityError(
            f"{problem} (parity.preflight=warn trains all the same; pipelinerl parity shows the evidence)"
        )
    tell(f"{problem}; training all the same (parity.preflight=warn)")
    return measured


def make_alarm(config: RunConfig, calibrated: Statistics | None) -> Alarm | None:
    """The alarm of the run; None with `parity.alarm=off`."""
    return None if config.parity.alarm == "off" else Alarm(limits(config), calibrated)
