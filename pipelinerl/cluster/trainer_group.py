"""The trainer ranks as one trainer."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from pipelinerl.checkpoint.manifest import FileRecord
from pipelinerl.cluster.remote import RemoteWorker
from pipelinerl.concurrency import raised, together
from pipelinerl.config.schema import TrainerConfig
from pipelinerl.errors import EnvironmentProblem, Stalled, TrainerLost, WorkerDied, first_line
from pipelinerl.types import FloatArray, RankBatch, SampleKL, ScoredSequence, ScoreRequest, StepResult

CAUSE_GRACE_S = 3.0  # how long the other ranks have to report after one has failed


class TrainerGroup:
    """Calls go to all ranks at once; weight updates, scores and exports are rank 0's.

    With ZeRO 3 no rank has a whole parameter, so the others take part in those too. A rank that dies or hangs takes the
    group with it: the call in hand and all that follow raise TrainerLost, until `restart`.
    """

    def __init__(self, launch: Callable[[], Awaitable[Sequence[RemoteWorker]]], config: TrainerConfig):
        self.restarts = 0
        self._launch = launch
        self._config = config
        self._ranks: Sequence[RemoteWorker] = ()
        self._address = ""
        self._lost: TrainerLost | None = None
        self._recording = ""
        self._up = asyncio.Event()

    async def setup(self) -> dict[str, Any]:
        """Start the ranks, bring up their process group, load the model on each. Returns what there is to log."""
        self._ranks = await self._launch()
        self._address, port = await self._ranks[0].endpoint(self._config.start_timeout_s)
        described = await self._together(
            rank.call("setup", self._address, port, timeout_s=self._config.start_timeout_s) for rank in self._ranks
        )
        self._up.set()
        return dict(described[0])

    async def restart(self) -> None:
        """New processes in the place of those that are lost, with the weights of model.path. Raises TrainerLost when
        they cannot be had."""
        self._end(TrainerLost("the trainer is being restarted"))
        self.restarts += 1
        self._lost = None
        try:
            await self.setup()
        except (EnvironmentProblem, Stalled, WorkerDied) as error:
            raise TrainerLost(first_line(error)) from error
        if self._recording:
            await self.record_batches(self._recording)

    async def supervise(self) -> None:
        """Look at every rank's pulse for ever. One without a pulse for `trainer.hang_timeout_s` ends the group."""
        while True:
            await self._up.wait()
            try:
                await together(*(rank.pulse(self._config.hang_timeout_s) for rank in self._ranks))
            except (Stalled, WorkerDied) as error:
                if self._up.is_set():
                    self._end(TrainerLost(first_line(error)))
            await asyncio.sleep(self._config.pulse_s)

    def _end(self, cause: TrainerLost) -> None:
        """Kill all ranks: what waits for one of them learns of it now, not at a timeout."""
        self._lost = self._lost or cause
        self._up.clear()
        for rank in self._ranks:
            rank.kill()

    async def step(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> StepResult:
        """The optimizer updates of a step, each as [rank]. `payloads[i]` is a reference to the group that
        `SampleRef.group == i` names."""
        calls = (
            rank.call("step", *_own_share(own, payloads), timeout_s=self._config.step_timeout_s)
            for rank, own in zip(self._ranks, zip(*updates, strict=True), strict=True)
        )
        results: list[StepResult] = await self._together(calls)
        return results[0]

    async def begin_step(self) -> None:
        """The first of a step that comes in parts, as groups become ready."""
        await self._all_ranks("begin_step")

    async def accumulate(self, batches: Sequence[RankBatch], payloads: Sequence[Any], last: bool) -> None:
        """Add up the gradient of one part, [rank]; `payloads` as of `step`. `last`: `finish_step` follows."""

        def call(rank: RemoteWorker, batch: RankBatch) -> Coroutine[Any, Any, None]:
            (own,), *used = _own_share([batch], payloads)
            return rank.call("accumulate", own, last, *used, timeout_s=self._config.step_timeout_s)

        await self._together(map(call, self._ranks, batches))

    async def finish_step(self, scale: float) -> StepResult:
        """The optimizer update of what was accumulated, times `scale`."""
        results: list[StepResult] = await self._all_ranks("finish_step", scale)
        return results[0]

    async def record_batches(self, folder: str) -> None:
        """From now on every rank writes what its steps train on into `folder`."""
        self._recording = folder
        await self._all_ranks("record_batches", folder)

    async def finish_recording(self) -> None:
        """Wait until all of it is written. Raises EnvironmentProblem when it could not be."""
        await self._all_ranks("finish_recording")

    async def replay(self, folder: str, step: int) -> StepResult:
        """Do a step that was recorded in `folder`."""
        results: list[StepResult] = await self._all_ranks("replay", folder, step)
        return results[0]

    async def reference_kl(self, updates: Sequence[Sequence[RankBatch]], payloads: Sequence[Any]) -> list[SampleKL]:
        """KL to the reference policy of every completion in `updates`, numbered as there; arguments as of `step`."""
        shares = list(zip(*updates, strict=True))
        calls = (
            rank.call("reference_kl", *_own_share(own, payloads), timeout_s=self._config.step_timeout_s)
            for rank, own in zip(self._ranks, shares, strict=True)
        )
        results: list[list[SampleKL]] = await self._together(calls)
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
        call = self._ranks[0].call(method, *args, timeout_s=self._config.step_timeout_s)
        return (await self._together([call]))[0]

    async def nudge(self) -> None:
        """Exchange the weights of all ranks for a probe's second set, or the second set for the weights."""
        await self._all_ranks("nudge")

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
        return await self._together(calls)

    async def _from_rank_0(self, method: str, *args: Any, **options: Any) -> Any:
        """Rank 0's answer to a call that needs whole parameters."""
        ranks = self._ranks if self._config.zero_stage == 3 else self._ranks[:1]
        return (await self._together(rank.call(method, *args, **options) for rank in ranks))[0]

    async def _together(self, calls: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
        """The results of all calls. Raises TrainerLost when a rank is gone or too late; the peers of a dead rank
        complain too, often before the news of its death, and their complaint is not the cause."""
        tasks = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if raised(tasks):
                await asyncio.wait(tasks, timeout=CAUSE_GRACE_S)
                self._raise_cause(raised(tasks))
            return [task.result() for task in tasks]
        finally:
            for task in tasks:
                task.cancel()

    def _raise_cause(self, errors: Sequence[BaseException]) -> NoReturn:
        gone = [error for error in errors if isinstance(error, WorkerDied | Stalled)]
        if not gone and self._lost is None:
            raise errors[0]
        if self._lost is None:
            self._end(TrainerLost(first_line(gone[0])))
        assert self._lost is not None
        raise self._lost


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
