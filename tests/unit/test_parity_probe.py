"""A probe, on engines and a trainer without processes: what it samples, and the state it leaves behind."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from pipelinerl.config.load import load_config
from pipelinerl.errors import ParityError, WeightSyncError
from pipelinerl.parity.probe import sample, score, score_request, stale_request
from pipelinerl.parity.results import PHASES
from pipelinerl.types import (
    Completion,
    GroupMeta,
    Outcome,
    Problem,
    Rollout,
    RolloutGroup,
    RolloutMeta,
    ScoredSequence,
    ScoreRequest,
    Turn,
    VersionSpan,
)

CONFIG = load_config(["batch.group_size=2", "sampling.temperature=0.8"])
PROBLEMS = [Problem(f"p/{i}", {}) for i in range(3)]
PAUSE_S = 0.25


class Side:
    """Engines and trainer in one: a completion of four tokens takes four ticks, an update one."""

    def __init__(self, pause: str = "keep", tokens: int = 4, fail_update: int | None = None):
        self.pause = pause
        self.tokens = tokens
        self.fail_update = fail_update
        self.version = 0
        self.nudged = False
        self.updates: list[tuple[int, bool]] = []  # version, whether the trainer's weights were nudged
        self.max_tokens: set[int] = set()
        self._running = 0
        self._aborts = 0
        self._paused = asyncio.Event()
        self._paused.set()

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, Any]:
        self.max_tokens.add(max_tokens)
        await self._paused.wait()
        self._running += 1
        versions, aborts, reason = [], self._aborts, "stop"
        for _ in range(self.tokens):
            versions.append(self.version)
            await asyncio.sleep(0.01)
            if self.pause == "abort" and self._aborts > aborts:
                reason = "abort"
                break
        self._running -= 1
        spans = tuple(
            VersionSpan(v, versions.index(v), versions.index(v) + versions.count(v)) for v in dict.fromkeys(versions)
        )
        n = len(versions)
        completion = Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), spans, reason, "")
        rollout = Rollout((Turn(np.zeros(5, np.int32), completion),), 1.0, Outcome.OK)
        group = RolloutGroup(group_id, problem.id, (rollout, rollout))
        return GroupMeta(group_id, problem.id, 0, tuple(map(RolloutMeta.of, group.rollouts)), 0.1), _value(group)

    async def nudge(self) -> None:
        self.nudged = not self.nudged

    async def publish(self, version: int, changed: bool | None = None) -> dict[str, float]:
        assert changed is True
        if version == self.fail_update:
            raise WeightSyncError("the update broke off")
        if self.pause == "wait":
            self._paused.clear()
            while self._running:
                await asyncio.sleep(0.001)
        if self.pause == "abort":
            self._paused.clear()
            self._aborts += 1
            await asyncio.sleep(0.02)
        self.version = version
        self._paused.set()
        self.updates.append((version, self.nudged))
        return {"sync/pause_s": PAUSE_S}

    async def score(self, request: ScoreRequest, payloads: Sequence[RolloutGroup]) -> list[ScoredSequence]:
        """The trainer's logprob of a token is -version, or -100 where the version's weights were the nudged ones."""
        scored = []
        for rollout in (rollout for group in payloads for rollout in group.rollouts):
            completion = rollout.turns[0].completion
            versions = np.concatenate([np.full(s.end - s.start, s.version, np.int32) for s in completion.spans])
            values = np.array([-100.0 if request.nudged[v] else -float(v) for v in versions], np.float32)
            scored.append(
                ScoredSequence(completion.logprobs, dict.fromkeys(request.temperatures, values), versions, None)
            )
        return scored


async def _value(group: RolloutGroup) -> RolloutGroup:
    return group


@pytest.mark.asyncio
async def test_each_phase_holds_what_its_name_says_and_the_trainer_gets_its_weights_back() -> None:
    side = Side()
    samples = await sample(side, side, side, PROBLEMS, CONFIG)

    def versions(phase: str) -> set[tuple[int, ...]]:
        rollouts = [rollout for group in samples.phases[phase] for rollout in group.rollouts]
        return {tuple(span.version for span in rollout.turns[0].completion.spans) for rollout in rollouts}

    assert versions("fresh") == {(0,)}
    assert versions("straddling") == {(0, 1)}
    assert versions("after") == {(1,)}
    assert side.updates == [(1, True)] and samples.nudged == {0: False, 1: True}
    assert not side.nudged
    assert samples.pause_s == PAUSE_S and samples.aborted == 0
    assert side.max_tokens == {min(CONFIG.sampling.max_tokens, CONFIG.parity.max_tokens)}


@pytest.mark.asyncio
async def test_every_token_is_scored_with_the_weights_of_its_version() -> None:
    side = Side()
    samples = await sample(side, side, side, PROBLEMS, CONFIG)
    request = score_request(CONFIG, samples)
    evidence = await score(side, samples, request)
    assert evidence.temperature == request.temperatures[0] == 0.8
    assert {PHASES[phase] for phase in evidence.phase} == {*PHASES}
    assert (evidence.trainer[0.8] == np.where(evidence.versions == 1, -100, 0)).all()
    assert len(set(evidence.sequence)) == sum(
        len(group.rollouts) for groups in samples.phases.values() for group in groups
    )
    stale = await score(side, samples, stale_request(request))
    assert (stale.trainer[0.8][stale.versions == 0] == -100).all()


@pytest.mark.asyncio
async def test_an_update_that_misses_every_sequence_is_repeated() -> None:
    side = Side(tokens=1)  # one token: nothing can straddle
    samples = await sample(side, side, side, PROBLEMS, CONFIG)
    assert samples.phases["straddling"] == []
    assert [version for version, _ in side.updates] == [1, 2, 3, 4]
    assert [nudged for _, nudged in side.updates] == [True, False, True, False]
    assert not side.nudged and samples.nudged == {0: False, 1: True, 2: False, 3: True, 4: False}


@pytest.mark.asyncio
async def test_aborted_completions_are_counted_and_never_scored_as_straddling() -> None:
    side = Side(pause="abort")
    config = load_config(["batch.group_size=2", "engine.update_pause=abort"])
    samples = await sample(side, side, side, PROBLEMS, config)
    assert samples.aborted >= 2 and samples.completions > samples.aborted
    assert samples.phases["straddling"] == []
    assert len(side.updates) == 1


@pytest.mark.asyncio
async def test_an_update_that_waits_leaves_nothing_straddling() -> None:
    side = Side(pause="wait")
    config = load_config(["batch.group_size=2", "engine.update_pause=wait"])
    samples = await sample(side, side, side, PROBLEMS, config)
    assert samples.phases["straddling"] == [] and samples.aborted == 0
    evidence = await score(side, samples, score_request(config, samples))
    assert {PHASES[phase] for phase in evidence.phase} == {"fresh", "after"}


@pytest.mark.asyncio
async def test_an_update_that_fails_ends_the_probe_and_the_trainer_gets_its_weights_back() -> None:
    side = Side(fail_update=1)
    with pytest.raises(WeightSyncError, match="broke off"):
        await sample(side, side, side, PROBLEMS, CONFIG)
    assert not side.nudged


@pytest.mark.asyncio
async def test_a_probe_without_a_single_token_is_an_error() -> None:
    side = Side()
    samples = await sample(side, side, side, PROBLEMS, CONFIG)
    samples.phases = {phase: [] for phase in PHASES}
    with pytest.raises(ParityError, match="no token"):
        await score(side, samples, score_request(CONFIG, samples))


def test_the_temperatures_start_with_the_configured_one_and_include_the_raw_one() -> None:
    request = score_request(CONFIG, _samples_at_rest())
    assert request.temperatures[0] == 0.8 and 1.0 in request.temperatures and 0.64 in request.temperatures
    assert len(set(request.temperatures)) == len(request.temperatures)


def _samples_at_rest() -> Any:
    from pipelinerl.parity.probe import Samples

    return Samples(nudged={0: False})
