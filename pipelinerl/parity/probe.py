"""Sample with the engines as training would, through an in-flight weight update, and score it with the trainer.

    fresh        the engines sample at the version they serve
    straddling   sampling goes on while a weight update lands in the middle of sequences
    after        the same prompts again, at the new version

The second set of weights is the trainer's own, nudged (trainer/nudge.py): different enough for a stale parameter to
show, and taken back bit for bit. Nothing of a probe is trained on.
"""

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from pipelinerl.concurrency import together
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ParityError
from pipelinerl.parity.results import PHASES, Evidence
from pipelinerl.types import GroupMeta, Problem, RolloutGroup, ScoredSequence, ScoreRequest

STRADDLING_TRIES = 4  # updates that may miss every sequence before the phase is given up
STRADDLING_SEQUENCES = 64  # scored of them; the replay of one costs two forward passes
HEAD_START_S = 0.05  # of sampling before the update is sent


class Engines(Protocol):
    """The engines, as a probe uses them. A payload is a reference to a RolloutGroup."""

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, Any]: ...


class Trainer(Protocol):
    """The trainer, as a probe uses it."""

    async def nudge(self) -> None: ...

    async def score(self, request: ScoreRequest, payloads: Sequence[Any]) -> list[ScoredSequence]: ...


class Updates(Protocol):
    """Weight updates, as a probe uses them."""

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]: ...


@dataclass
class Samples:
    """What the engines sampled, phase by phase, and which weights each version had."""

    phases: dict[str, list[RolloutGroup]] = field(default_factory=dict)
    nudged: dict[int, bool] = field(default_factory=dict)  # version -> its weights were the nudged ones
    fresh_metas: list[GroupMeta] = field(default_factory=list)
    completions: int = 0
    aborted: int = 0
    pause_s: float | None = None


def score_temperatures(temperature: float) -> tuple[float, ...]:
    """The configured temperature first, then those under which a fault of meaning would make the logprobs agree:

    1 (raw logprobs), T^2 (applied twice), and a grid around T (another temperature on one side).
    """
    candidates = [
        temperature,
        1.0,
        temperature**2,
        *(temperature * f for f in (0.5, 0.7, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0)),
    ]
    return tuple(dict.fromkeys(round(max(t, 0.01), 6) for t in candidates))


def score_request(config: RunConfig, samples: "Samples") -> ScoreRequest:
    """How training with this configuration would score the samples, and under which other meanings to try them."""
    return ScoreRequest(
        temperatures=score_temperatures(config.sampling.temperature),
        nudged=dict(samples.nudged),
        head_dtype=config.model.head_dtype,
    )


def stale_request(request: ScoreRequest) -> ScoreRequest:
    """Scores every version with the nudged weights of the next: what ratios would be had an update not arrived."""
    return replace(request, nudged={version: not nudged for version, nudged in request.nudged.items()})


async def sample(
    engines: Engines, trainer: Trainer, updates: Updates, problems: Sequence[Problem], config: RunConfig
) -> Samples:
    """All three phases. Engines and trainer must hold the same weights, which the engines call version 0.

    Afterwards the trainer holds its own weights again, and the engines the last version of `Samples.nudged`.
    """
    max_tokens = min(config.parity.max_tokens, config.sampling.max_tokens)
    prober = _Prober(engines, max_tokens)
    samples = Samples(nudged={0: False})
    fresh = await prober.groups(problems)
    samples.fresh_metas = [meta for meta, _ in fresh]
    samples.phases["fresh"] = [group for _, group in fresh]
    try:
        samples.phases["straddling"] = await _straddling(prober, trainer, updates, problems, config, samples)
        samples.phases["after"] = [group for _, group in await prober.groups(problems)]
    finally:
        if samples.nudged[max(samples.nudged)]:
            await trainer.nudge()
    samples.completions, samples.aborted = prober.completions, prober.aborted
    return samples


async def score(trainer: Trainer, samples: Samples, request: ScoreRequest, phases: Iterable[str] = PHASES) -> Evidence:
    """The trainer's scores of what was sampled. `request.temperatures[0]` is the configured temperature.

    Raises ParityError when a phase holds no sampled token at all: then there is nothing to judge.
    """
    scored: list[tuple[int, ScoredSequence]] = []
    for phase in phases:
        groups = samples.phases.get(phase, [])
        if groups:
            scored += [(PHASES.index(phase), sequence) for sequence in await trainer.score(request, groups)]
    if not scored:
        raise ParityError("the engines sampled no token that could be compared; is sampling.max_tokens too small?")
    lengths = [len(sequence.engine) for _, sequence in scored]
    flips = [sequence.flips for _, sequence in scored]
    return Evidence(
        temperature=request.temperatures[0],
        engine=np.concatenate([sequence.engine for _, sequence in scored]),
        trainer={t: np.concatenate([sequence.trainer[t] for _, sequence in scored]) for t in request.temperatures},
        phase=np.repeat(np.array([phase for phase, _ in scored], np.int32), lengths),
        sequence=np.repeat(np.arange(len(scored), dtype=np.int32), lengths),
        versions=np.concatenate([sequence.versions for _, sequence in scored]),
        flips=None if any(f is None for f in flips) else np.concatenate([f for f in flips if f is not None]),
        completions=samples.completions,
        aborted=samples.aborted,
        pause_s=samples.pause_s,
    )


class _Prober:
    """Numbers the groups it asks for, fetches them, and counts what became of the completions."""

    def __init__(self, engines: Engines, max_tokens: int):
        self._engines = engines
        self._max_tokens = max_tokens
        self._next_id = 0
        self.completions = 0
        self.aborted = 0

    async def groups(self, problems: Sequence[Problem]) -> list[tuple[GroupMeta, RolloutGroup]]:
        """One group for each problem, all at the same time."""
        return await together(*(self.group(problem) for problem in problems))

    async def group(self, problem: Problem) -> tuple[GroupMeta, RolloutGroup]:
        number, self._next_id = self._next_id, self._next_id + 1
        meta, payload = await self._engines.probe(number, problem, self._max_tokens)
        group: RolloutGroup = await payload
        turns = [turn for rollout in group.rollouts for turn in rollout.turns]
        self.completions += len(turns)
        self.aborted += sum(turn.completion.finish_reason == "abort" for turn in turns)
        return meta, group


async def _straddling(
    prober: _Prober,
    trainer: Trainer,
    updates: Updates,
    problems: Sequence[Problem],
    config: RunConfig,
    samples: Samples,
) -> list[RolloutGroup]:
    """Groups, cut down to the completions in which an update fell.

    As many updates as it takes for one to meet running sequences; one that waits for them to end never does.
    """
    waits = config.engine.update_pause == "wait"
    found: list[RolloutGroup] = []
    for version in range(1, 1 + (1 if waits else STRADDLING_TRIES)):
        await trainer.nudge()
        samples.nudged[version] = not samples.nudged[version - 1]
        groups, pause_s = await _across_update(prober, updates, problems, version)
        samples.pause_s = max(pause_s, samples.pause_s or 0.0)
        found += [straddlers for group in groups if (straddlers := _straddlers(group)).rollouts]
        if found or prober.aborted:
            break
    return _at_most(found, STRADDLING_SEQUENCES)


async def _across_update(
    prober: _Prober, updates: Updates, problems: Sequence[Problem], version: int
) -> tuple[list[RolloutGroup], float]:
    """Keep every problem in flight while the update to `version` lands. Returns all groups, and how long it paused."""
    done = asyncio.Event()
    groups: list[RolloutGroup] = []

    async def keep_asking(problem: Problem) -> None:
        while not done.is_set():
            groups.append((await prober.group(problem))[1])

    async def update() -> dict[str, float]:
        await asyncio.sleep(HEAD_START_S)
        try:
            return await updates.publish(version, changed=True)
        finally:
            done.set()

    metrics, *_ = await together(update(), *(keep_asking(problem) for problem in problems))
    return groups, float(metrics["sync/pause_s"])


def _straddlers(group: RolloutGroup) -> RolloutGroup:
    """The rollouts of the group that were sampled by more than one version and not aborted."""

    def straddles(versions: set[int], reasons: set[str]) -> bool:
        return len(versions) > 1 and "abort" not in reasons

    kept = tuple(
        rollout
        for rollout in group.rollouts
        if straddles(
            {span.version for turn in rollout.turns for span in turn.completion.spans},
            {turn.completion.finish_reason for turn in rollout.turns},
        )
    )
    return replace(group, rollouts=kept)


def _at_most(groups: Sequence[RolloutGroup], sequences: int) -> list[RolloutGroup]:
    kept: list[RolloutGroup] = []
    for group in groups:
        room = sequences - sum(len(other.rollouts) for other in kept)
        if room > 0:
            kept.append(replace(group, rollouts=group.rollouts[:room]))
    return kept
