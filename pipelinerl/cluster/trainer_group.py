"""The trainer ranks as one trainer."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import TrainerConfig
from pipelinerl.types import FloatArray, RankBatch, ScoredSequence, ScoreRequest, StepResult


class TrainerGroup:
    """Calls go to all ranks at once; weight updates and exports are rank 0's."""

    def __init__(self, ranks: Sequence[RemoteWorker], config: TrainerConfig):
        self._ranks = ranks
        self._config = config
        self._address = ""

    async def setup(self) -> dict[str, Any]:
        """Bring up the process group and load the model on every rank. Returns what there is to log."""
        self._address, port = await self._ranks[0].endpoint(self._config.start_timeout_s)
        described = await asyncio.gather(
            *(rank.call("setup", self._address, port, timeout_s=self._config.start_timeout_s) for rank in self._ranks)
        )
        return dict(described[0])

    async def step(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> StepResult:
        """The optimizer updates of a step, each as [rank]. `payloads[i]` is a reference to the group that
        `SampleRef.group == i` names."""
        calls = (
            rank.call("step", *_own_share(own, payloads), timeout_s=self._config.step_timeout_s)
            for rank, own in zip(self._ranks, zip(*updates, strict=True), strict=True)
        )
        results: list[StepResult] = await asyncio.gather(*calls)
        return results[0]

    async def listen(self, backend: str) -> dict[str, Any]:
        """Open the weight transport on rank 0."""
        return dict(await self._ranks[0].call("listen", backend, self._address))

    async def connect_weights(self, world_size: int) -> dict[str, Any]:
        """Wait on rank 0 for the engines; returns the manifest."""
        return dict(await self._ranks[0].call("connect", world_size))

    async def send_weights(self) -> dict[str, float]:
        """Broadcast rank 0's weights."""
        return dict(await self._ranks[0].call("send_weights"))

    async def nudge(self) -> None:
        """Exchange the weights of all ranks for a probe's second set, or the second set for the weights."""
        await asyncio.gather(*(rank.call("nudge", timeout_s=self._config.step_timeout_s) for rank in self._ranks))

    async def score(self, request: ScoreRequest, payloads: Sequence[Any]) -> list[ScoredSequence]:
        """Rank 0's logprobs of the completions in groups, or in references to groups."""
        return list(await self._ranks[0].call("score", request, *payloads, timeout_s=self._config.step_timeout_s))

    async def hidden_states(self, tokens: list[int]) -> list[FloatArray]:
        """Rank 0's residual stream [tokens, hidden] at each place."""
        return list(await self._ranks[0].call("hidden_states", tokens, timeout_s=self._config.step_timeout_s))

    async def export(self, target: str) -> None:
        """Write the model to `target`."""
        await self._ranks[0].call("export", target, timeout_s=self._config.step_timeout_s)


def _own_share(updates: Sequence[RankBatch], payloads: Sequence[Any]) -> tuple[Any, ...]:
    """The updates and only the payloads they name, renumbered: no rank fetches groups it does not train on."""
    refs = [ref for batch in updates for micro_batch in batch.micro_batches for ref in micro_batch]
    used = sorted({ref.group for ref in refs})
    number = {group: index for index, group in enumerate(used)}

    def renumbered(batch: RankBatch) -> RankBatch:
        rows = (tuple(replace(ref, group=number[ref.group]) for ref in refs) for refs in batch.micro_batches)
        return replace(batch, micro_batches=tuple(rows))

    return tuple(map(renumbered, updates)), *(payloads[group] for group in used)
