"""The trainer ranks as one trainer."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from pipelinerl.checkpoint.manifest import FileRecord
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.config.schema import TrainerConfig
from pipelinerl.types import FloatArray, RankBatch, SampleKL, ScoredSequence, ScoreRequest, StepResult


class TrainerGroup:
    """Calls go to all ranks at once; weight updates, scores and exports are rank 0's.

    With ZeRO 3 no rank has a whole parameter, so the others take part in those too.
    """

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

    async def reference_kl(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> list[SampleKL]:
        """KL to the reference policy of every completion in `updates`, numbered as there; arguments as of `step`."""
        shares = list(zip(*updates, strict=True))
        calls = (
            rank.call("reference_kl", *_own_share(own, payloads), timeout_s=self._config.step_timeout_s)
            for rank, own in zip(self._ranks, shares, strict=True)
        )
        results: list[list[SampleKL]] = await asyncio.gather(*calls)
        measured = list(zip(shares, results, strict=True))[:: self._config.sequence_parallel]  # which hold the same
        return [replace(sample, group=_groups_of(own)[sample.group]) for own, samples in measured for sample in samples]

    async def listen(self, backend: str) -> dict[str, Any]:
        """Open the weight transport on rank 0."""
        return dict(await self._transport("listen", backend, self._address))

    async def connect_weights(self, world_size: int) -> dict[str, Any]:
        """Wait on rank 0 for the engines; returns the manifest."""
        return dict(await self._transport("connect", world_size))

    async def send_weights(self, transmission: int) -> dict[str, Any]:
        """Send the weights from rank 0."""
        return dict(await self._from_rank_0("send_weights", transmission, timeout_s=self._config.step_timeout_s))

    async def resend_weights(self, transmission: int) -> None:
        """Send from rank 0 what was sent last."""
        await self._transport("resend_weights", transmission)

    async def _transport(self, method: str, *args: Any) -> Any:
        """Rank 0 may be in a step, for which these wait."""
        return await self._ranks[0].call(method, *args, timeout_s=self._config.step_timeout_s)

    async def nudge(self) -> None:
        """Exchange the weights of all ranks for a probe's second set, or the second set for the weights."""
        await asyncio.gather(*(rank.call("nudge", timeout_s=self._config.step_timeout_s) for rank in self._ranks))

    async def score(self, request: ScoreRequest, payloads: Sequence[Any]) -> list[ScoredSequence]:
        """Rank 0's logprobs of the completions in groups, or in references to groups."""
        return list(await self._from_rank_0("score", request, *payloads, timeout_s=self._config.step_timeout_s))

    async def hidden_states(self, tokens: list[int]) -> list[FloatArray]:
        """Rank 0's residual stream [tokens, hidden] at each place."""
        return list(await self._from_rank_0("hidden_states", tokens, timeout_s=self._config.step_timeout_s))

    async def export(self, target: str) -> None:
        """Write the model to `target`."""
        await self._from_rank_0("export", target, timeout_s=self._config.step_timeout_s)

    async def export_adapter(self, target: str) -> None:
        """Write the adapter that is trained to `target`, for peft."""
        await self._from_rank_0("export_adapter", target, timeout_s=self._config.step_timeout_s)

    async def snapshot(self, folder: str) -> None:
        """Copy the state of all ranks, and begin to write it into `folder`."""
        await self._all_ranks("snapshot", folder)

    async def checkpoint_poll(self) -> dict[str, FileRecord] | None:
        """The files of the last snapshot when all ranks have written theirs; None before."""
        parts: list[dict[str, FileRecord] | None] = await self._all_ranks("checkpoint_poll")
        files = {name: record for part in parts if part is not None for name, record in part.items()}
        return None if None in parts else files

    async def restore(self, folder: str) -> int:
        """Go on from the checkpoint in `folder`; returns its version."""
        versions: list[int] = await self._all_ranks("restore", folder)
        return versions[0]

    async def _all_ranks(self, method: str, *args: Any) -> list[Any]:
        calls = (rank.call(method, *args, timeout_s=self._config.step_timeout_s) for rank in self._ranks)
        return await asyncio.gather(*calls)

    async def _from_rank_0(self, method: str, *args: Any, **options: Any) -> Any:
        """Rank 0's answer to a call that needs whole parameters."""
        ranks = self._ranks if self._config.zero_stage == 3 else self._ranks[:1]
        return (await asyncio.gather(*(rank.call(method, *args, **options) for rank in ranks)))[0]


def _own_share(updates: Sequence[RankBatch], payloads: Sequence[Any]) -> tuple[Any, ...]:
    """The updates and only the payloads they name, renumbered: no rank fetches groups it does not train on."""
    used = _groups_of(updates)
    number = {group: index for index, group in enumerate(used)}

    def renumbered(batch: RankBatch) -> RankBatch:
        rows = (tuple(replace(ref, group=number[ref.group]) for ref in refs) for refs in batch.micro_batches)
        return replace(batch, micro_batches=tuple(rows))

    return tuple(map(renumbered, updates)), *(payloads[group] for group in used)


def _groups_of(updates: Sequence[RankBatch]) -> list[int]:
    """The groups that the updates name, ascending: at index i, the one that `_own_share` calls i."""
    return sorted({ref.group for batch in updates for refs in batch.micro_batches for ref in refs})
