"""The parity probe on a rollout worker and a policy in this process: all of it but Ray and DeepSpeed."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from pipelinerl.config.schema import RunConfig
from pipelinerl.engine.worker import RolloutWorker
from pipelinerl.parity.probe import Samples, sample, score, score_request
from pipelinerl.parity.results import CONFIGURED, CaseResult, Evidence
from pipelinerl.parity.verdict import Verdict, judge
from pipelinerl.tasks.registry import build_task
from pipelinerl.trainer.model import PolicyModel, load_policy
from pipelinerl.trainer.nudge import Weights
from pipelinerl.trainer.scoring import score_completions
from pipelinerl.types import GroupMeta, Problem, RolloutGroup, ScoredSequence, ScoreRequest
from pipelinerl.weights.host_sender import HostSender
from pipelinerl.weights.membership import FixedMembers
from pipelinerl.weights.publisher import Publisher
from pipelinerl.weights.source import WholeModel
from tests.integration.serving import forked_cores


class LocalEngine:
    """A rollout worker as the probe and the publisher see it."""

    def __init__(self, worker: RolloutWorker):
        self.worker = worker
        self.locate = worker.locate
        self.connect = worker.connect
        self.disconnect = worker.disconnect
        self.update_weights = worker.update_weights
        self.commit = worker.commit

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, Any]:
        meta, group = await self.worker.probe(group_id, problem, max_tokens)
        return meta, _value(group)


class LocalTrainer:
    """A policy as the probe and the publisher see it."""

    def __init__(self, config: RunConfig):
        self.policy: PolicyModel = load_policy(config.model, config.sampling.temperature, 2048, False)
        self.weights = Weights(self.policy)
        self._source = WholeModel(self.policy.hf, config.weights.bucket_mb * 2**20)
        self._sender = HostSender(self._source, config.weights.timeout_s)
        self._canary = config.parity.canary

    async def nudge(self) -> None:
        self.weights.use(not self.weights.nudged)

    async def score(self, request: ScoreRequest, payloads: Sequence[RolloutGroup]) -> list[ScoredSequence]:
        rollouts = [rollout for group in payloads for rollout in group.rollouts]
        return await asyncio.to_thread(score_completions, self.policy, rollouts, request, self.weights)

    async def listen(self, backend: str) -> dict[str, Any]:
        return self._sender.listen("127.0.0.1")

    async def connect_weights(self, world_size: int) -> dict[str, Any]:
        await asyncio.to_thread(self._sender.connect, world_size)
        return self._source.manifest.to_dict()

    async def send_weights(self, transmission: int) -> dict[str, Any]:
        digests = await asyncio.to_thread(self._sender.send, transmission, self._canary)
        return {"seconds": 0.0} | ({"digests": digests} if self._canary else {})

    async def resend_weights(self, transmission: int) -> None:
        await asyncio.to_thread(self._sender.resend, transmission)


@dataclass
class Bench:
    """What a probe needs. One probe after the other, each with problems of its own."""

    config: RunConfig
    engine: LocalEngine
    trainer: LocalTrainer
    publisher: Publisher

    async def sample(self, seed: int) -> Samples:
        """A probe's samples; afterwards engine and trainer hold the same weights again, under the label 0."""
        problems = build_task(self.config.task, seed).problems("train")[: self.config.parity.groups]
        samples = await sample(self.engine, self.trainer, self.publisher, problems, self.config)
        metrics = await self.publisher.publish(0)
        assert metrics["sync/params_read_back"] == 1 and metrics["sync/params_changed"] in (0, 1)
        return samples

    async def score(self, samples: Samples, request: ScoreRequest | None = None) -> Evidence:
        return await score(self.trainer, samples, request or score_request(self.config, samples))

    async def evidence(self, seed: int) -> Evidence:
        return await self.score(await self.sample(seed))

    @contextmanager
    def engine_settings(self, config: RunConfig) -> "Iterator[Bench]":
        """The same engine under settings that are ours and not vLLM's: what an update does, the salt of the cache."""
        engine: Any = self.engine.worker._engine
        before, engine._config = engine._config, config.engine
        engine._update._config = config.engine
        try:
            yield replace(self, config=config)
        finally:
            engine._config = engine._update._config = before

    def verdict(self, evidence: Evidence) -> Verdict:
        return judge([CaseResult(CONFIGURED, "", "", "", None, evidence)], [], self.config)


@asynccontextmanager
async def bench(config: RunConfig) -> AsyncIterator[Bench]:
    """A running bench."""
    worker = RolloutWorker(config, 0, "gloo")
    try:
        with forked_cores():
            await worker.start()
        engine, trainer = LocalEngine(worker), LocalTrainer(config)
        members = FixedMembers([engine])
        publisher = Publisher(trainer, members, config.weights, "gloo", config.engine.tensor_parallel)
        yield Bench(config, engine, trainer, publisher)
    finally:
        await worker.close()


async def _value(group: RolloutGroup) -> RolloutGroup:
    return group
