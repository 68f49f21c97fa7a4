"""`pipelinerl parity`: start the processes of a run and measure whether its ratios can be trusted.

The configuration as it is comes first, and the verdict rests on it. Where it deviates from the four fixes, the same
configuration with all of them in force is measured too, so that the expected gain is a measured one. With `cases`,
one setting at a time is switched from there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from pipelinerl.config.preflight import with_absolute_paths
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import EXIT_DONE, PipelineRLError, first_line
from pipelinerl.parity.ablation import FIXES, Case, Setup, all_fixes, as_overrides, with_settings
from pipelinerl.parity.bisect import LayerCurve, locate
from pipelinerl.parity.probe import Samples, sample, score, score_request
from pipelinerl.parity.report import Report, write_report
from pipelinerl.parity.results import CONFIGURED, REFERENCE, CaseResult, Evidence, LagEvidence
from pipelinerl.parity.verdict import judge
from pipelinerl.run_dir import new_run_dir
from pipelinerl.session import Session, open_session, until_done_or_signal
from pipelinerl.tasks.registry import build_task
from pipelinerl.types import LAG_BUCKETS, Problem
from pipelinerl.updates import make_batches

EXIT_NO_PARITY = 1


def examine(config: RunConfig, cases: Sequence[Case], bisect: bool) -> int:
    """Measure, write the report, and return the exit code: 0 when parity holds, 1 when it does not."""
    return until_done_or_signal(_examine(config, cases, bisect))


async def _examine(config: RunConfig, cases: Sequence[Case], bisect: bool) -> int:
    config = with_absolute_paths(config)
    problems = build_task(config.task, config.seed).problems("train")[: config.parity.groups]
    run_dir = new_run_dir(config, "parity-", ("metrics.jsonl", "parity.json"))
    async with open_session(config, run_dir, _say) as session:
        session.write_settings(run_dir, _say)
        settings = dict(session.settings)
        bench = Bench(session, problems)
        configured = await bench.measure(config)
        curve = await _layer_curve(bench, configured.samples) if bisect else None
        results = [_result(CONFIGURED, "the configuration as it is", configured.evidence)]
        reference = configured
        if (base := all_fixes(config)) != config:
            reference = await bench.measure(base, fresh_engines=True)
            results.append(
                _result(REFERENCE, "the same with all four fixes in force", reference.evidence, _fixed(config))
            )
        if cases:
            results += await _ablate(bench, cases, base, reference)
        lags = await _lag_evidence(session, config, configured.samples)
    verdict = judge(results, lags, config)
    write_report(run_dir, Report(config, settings, results, lags, verdict, curve), _say)
    return EXIT_DONE if verdict.passed else EXIT_NO_PARITY


@dataclass(frozen=True, slots=True)
class Measured:
    samples: Samples
    evidence: Evidence


class Bench:
    """A session on which one configuration after the other is probed with the same problems."""

    def __init__(self, session: Session, problems: Sequence[Problem]):
        self.session = session
        self.problems = problems

    async def sample(self, config: RunConfig, fresh_engines: bool = False) -> Samples:
        """Sample with the engine settings of `config`; its trainer settings are those of the session."""
        session = self.session
        if fresh_engines:
            await session.replace_engines(config)
        return await sample(session.fleet, session.trainer, session.publisher, self.problems, config)

    async def measure(self, config: RunConfig, fresh_engines: bool = False) -> Measured:
        """Sample, and score as training with `config` would."""
        samples = await self.sample(config, fresh_engines)
        return Measured(samples, await score(self.session.trainer, samples, score_request(config, samples)))


async def _ablate(bench: Bench, cases: Sequence[Case], base: RunConfig, reference: Measured) -> list[CaseResult]:
    session = bench.session
    prompt = min(rollout.prompt_len for meta in reference.samples.fresh_metas for rollout in meta.rollouts)
    setup = Setup(base, session.device, prompt)
    results = []
    for case in cases:
        _say(f"case {case.name}: {case.what}")
        results.append(await _run_case(bench, case, setup, reference))
    return results


async def _run_case(bench: Bench, case: Case, setup: Setup, reference: Measured) -> CaseResult:
    """One case. Whatever keeps it from running is its result: it must not take the others along."""
    changes = case.settings(setup)
    result = CaseResult(case.name, case.what, case.expect, as_overrides(changes), case.layer, None)
    if reason := case.blocked(setup):
        return replace(result, reason=reason)
    scoring: Callable[[Any], Any] = case.scoring or (lambda request: request)
    try:
        config = with_settings(setup.config, changes)
        samples = await bench.sample(config, fresh_engines=True) if changes else reference.samples
        request = scoring(score_request(config, samples))
        return replace(result, evidence=await score(bench.session.trainer, samples, request))
    except ValidationError as error:
        return replace(result, reason=f"not a legal configuration: {error.errors()[0]['msg']}")
    except (PipelineRLError, RuntimeError, ValueError) as error:
        return replace(result, reason=first_line(error))


async def _layer_curve(bench: Bench, samples: Samples) -> LayerCurve:
    """Hidden states of engine and trainer for the first completion, after one more update that makes them equal."""
    session = bench.session
    await session.publisher.publish(max(samples.nudged) + 1)
    rollout = samples.phases["fresh"][0].rollouts[0]
    turn = rollout.turns[0]
    tokens = [*turn.context.tolist(), *turn.completion.tokens[:-1].tolist()]  # the engine samples one more
    engine = await session.fleet.engines[0].hidden_states(tokens)
    return locate(engine, await session.trainer.hidden_states(tokens), session.config.model.dtype)


async def _lag_evidence(session: Session, config: RunConfig, samples: Samples) -> list[LagEvidence]:
    """Real optimizer steps on what version 0 sampled, with the run's own schedule: its objective at each lag in turn.

    Empty when no group has an advantage to train on.
    """
    pairs = zip(samples.fresh_metas, samples.phases["fresh"], strict=True)
    groups = [(meta, group) for meta, group in pairs if meta.scored >= 2]
    batches = make_batches([meta for meta, _ in groups], config, step=1) if groups else None
    if batches is None or not any(values.any() for values in batches.advantages):
        return []
    found = []
    for lag in range(config.async_.lag_bound + 1):
        metrics = (await session.trainer.step(batches.updates, [group for _, group in groups])).metrics
        found.append(_at_lag(lag, metrics))
    return found


def _at_lag(lag: int, metrics: Mapping[str, float]) -> LagEvidence:
    bucket = min(lag, LAG_BUCKETS - 1)
    return LagEvidence(
        lag,
        metrics[f"staleness/abs_log_ratio_lag_{bucket}"],
        metrics[f"staleness/k3_lag_{bucket}"],
        metrics[f"staleness/clip_rate_lag_{bucket}"],
    )


def _result(name: str, what: str, evidence: Evidence, setting: str = "") -> CaseResult:
    return CaseResult(name, what, "", setting, None, evidence)


def _fixed(config: RunConfig) -> str:
    """The overrides that put the missing fixes in force."""
    data = config.dump()
    missing = {key: value for key, value in FIXES.items() if data[key.split(".")[0]][key.split(".")[1]] != value}
    return as_overrides(missing)


def _say(text: str) -> None:
    print(text, flush=True)
