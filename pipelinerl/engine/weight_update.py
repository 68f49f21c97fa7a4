"""How an engine takes over weights in the middle of running sequences.

              StagedUpdate (gloo)                           PausedUpdate (nccl, ipc)
    receive   take and prepare it while the engine steps    pause; take and load it
    commit    pause; exchange; verify                       verify
    resume

Each ends with an engine that serves the new version, or with an error. After an error of a staged update that was not
yet exchanged the engine serves what it served before. After any other it stays paused: it does not resume until a full
update has reached it. Sequences wait, none is aborted (engine.update_pause=keep).
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pipelinerl.config.schema import EngineConfig
from pipelinerl.errors import VerificationFailed, WeightSyncError, WorkerDied, first_line
from pipelinerl.mailbox import Mailbox, post

NAMED = 3  # parameters that a failed update names; the others are counted
SILENCE_S = 0.5  # without news of the workers, after which they are asked; they answer between two steps only

TRANSPORT = "joining or leaving the weight transport"

Times = dict[str, float]


class Update(Protocol):
    """The weight updates of one engine."""

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the transport; returns when all members have."""

    async def disconnect(self) -> None:
        """Leave it. What has been received and not committed is dropped."""

    async def receive(self, update_info: dict[str, Any], version: int) -> Times:
        """The first half. Returns seconds."""

    async def commit(self, version: int, names: Sequence[str], digests: Sequence[int]) -> Times:
        """The second half: verify against the trainer's `digests` of the parameters `names`. Generation is paused."""

    async def resume(self) -> Times:
        """Generate again."""


class _Update:
    """What both kinds share: the pause, the canary, and what is said when they fail."""

    def __init__(self, llm: AsyncLLM, config: EngineConfig, canary: bool, index: int):
        self._llm = llm
        self._config = config
        self._canary = canary
        self._index = index
        self._paused_at: float | None = None
        self._not_read_back: set[str] = set()

    @property
    def now(self) -> str:
        """What an engine does after an error, as far as its sequences are concerned."""
        return "goes on with the weights it has" if self._paused_at is None else "stays paused"

    async def _pause(self) -> float:
        """Seconds until the step that ran was over."""
        start = time.perf_counter()
        self._paused_at = self._paused_at or start  # an update before this one may have failed
        mode = self._config.update_pause
        if mode == "keep":  # as pause_generation, without its wait for outputs: none is awaited
            await self._llm.engine_core.pause_scheduler_async(mode=mode, clear_cache=False)
        else:
            await self._llm.pause_generation(mode=mode, clear_cache=False)
        return time.perf_counter() - start

    async def resume(self) -> Times:
        """Seconds: `resume_s`, and `pause_s` since generation stood still."""
        start = time.perf_counter()
        await self._llm.resume_generation()
        assert self._paused_at is not None
        now, since, self._paused_at = time.perf_counter(), self._paused_at, None
        return {"resume_s": now - start, "pause_s": now - since}

    def _judge(self, version: int, ranks: Sequence[Mapping[str, str]]) -> None:
        """Raise VerificationFailed when a worker found a parameter to be wrong."""
        if wrong := wrong_on_any(ranks):
            more = [f"and {len(wrong) - NAMED} more"] if len(wrong) > NAMED else []
            raise VerificationFailed(
                f"engine {self._index}: version {version} did not pass verification and the engine {self.now}; "
                f"inference path: {'; '.join(wrong[:NAMED] + more)}"
            )

    def _verified(self, version: int, names: Sequence[str], found: Sequence[Mapping[str, Any]]) -> Times:
        """What the workers' canaries `found`, as metrics. Raises VerificationFailed."""
        self._judge(version, [of_rank["wrong"] for of_rank in found])
        not_read_back = {name for of_rank in found for name in of_rank["not_read_back"]}
        if not_read_back - self._not_read_back:
            self._not_read_back = not_read_back
            print(  # into its log file
                f"engine {self._index}: the canary verifies the arrival of {len(not_read_back)} of {len(names)} "
                f"parameters but cannot read them back: {', '.join(sorted(not_read_back))}",
                flush=True,
            )
        return {"params_read_back": 1 - len(not_read_back) / max(len(names), 1)}

    @asynccontextmanager
    async def _errors_of(self, what: str) -> AsyncIterator[None]:
        """Whatever vLLM raises meanwhile, as our own error."""
        try:
            yield
        except EngineDeadError as error:
            raise WorkerDied(
                f"engine {self._index}: its vLLM core process died; see logs/engine_{self._index}.log"
            ) from error
        except WeightSyncError:
            raise
        except Exception as error:
            raise WeightSyncError(
                f"engine {self._index}: {what} did not complete and the engine {self.now}: "
                f"{type(error).__name__}: {first_line(error)}"
            ) from error


class StagedUpdate(_Update):
    """See pipelinerl/weights/gloo.py, whose methods it calls in the workers."""

    _numbers = 0  # of orders to the workers
    _reports: Mailbox | None = None
    _doors: Sequence[str] = ()  # addresses of those of the workers

    async def connect(self, init_info: dict[str, Any]) -> None:
        """`init_info` has the `places` of the workers, the manifest of updates, and where the trainer listens."""
        info = {key: value for key, value in init_info.items() if key != "places"}
        self._numbers += 1
        self._reports = self._reports or Mailbox()
        how = self._config.enforce_eager, self._canary, self._reports.address, self._numbers
        async with self._errors_of(TRANSPORT):
            self._doors = await self._rpc("weights_join", info, init_info["places"], *how)
            await self._all_done(TRANSPORT)

    async def disconnect(self) -> None:
        async with self._errors_of(TRANSPORT):
            await self._rpc("weights_leave")

    async def receive(self, update_info: dict[str, Any], version: int) -> Times:
        """Seconds: `transfer_s` waiting for bytes, `load_s` preparing them."""
        self._numbers += 1
        order = {"transmission": update_info["transmission"], "version": version, "number": self._numbers}
        async with self._errors_of(update_to(version)):
            try:
                assert self._reports is not None, "connect comes first"
                for door in self._doors:  # not by a call of the engine: that would wait for the end of a step
                    post(door, json.dumps(order).encode())
            except OSError:
                await self._rpc("weights_state")  # raises when the engine is gone
                raise
            return await self._all_done(update_to(version))

    async def commit(self, version: int, names: Sequence[str], digests: Sequence[int]) -> Times:
        names, digests = list(names), list(digests)
        times: Times = {}
        async with self._errors_of(update_to(version)):
            # What is sent together the core works off in this order, without waiting for us in between.
            if self._canary and self._config.enforce_eager:
                times |= await self._pause_if_arrived(version, names, digests)
            else:
                times["drain_s"] = await self._pause()
            start = time.perf_counter()
            calls = [self._rpc("weights_exchange", version), self._llm.update_weight_version(str(version))]
            if self._canary:
                calls.append(self._rpc("canary_check", names, digests))
            results = await asyncio.gather(*calls)
            times["exchange_s"] = time.perf_counter() - start
            if self._canary:
                times |= self._verified(version, names, results[-1])
                times["canary_s"] = max(of_rank["check_s"] for of_rank in results[-1])
        return times

    async def _pause_if_arrived(self, version: int, names: list[str], digests: list[int]) -> Times:
        """Pause, unless what has arrived is not what was sent: then the engine goes on as it did."""
        stood_still = self._paused_at is not None
        drained, ranks = await asyncio.gather(self._pause(), self._rpc("canary_arrived", names, digests))
        if any(ranks) and not stood_still:
            await self.resume()
        self._judge(version, ranks)
        return {"drain_s": drained}

    async def _all_done(self, what: str) -> Times:
        """Wait for the ends of the threads that the newest order has started in the workers.

        Returns the times of the slowest. Raises WeightSyncError with the words of the first that failed.
        """
        done: dict[int, Times] = {}
        while True:
            for rank, state in await self._news():
                if state["error"]:
                    raise WeightSyncError(
                        f"engine {self._index} worker {rank}: {what} failed and the engine {self.now}: {state['error']}"
                    )
                done[rank] = state["times"]
            if len(done) == self._config.tensor_parallel:
                return {key: max(times[key] for times in done.values()) for key in done[0]}

    async def _news(self) -> list[tuple[int, dict[str, Any]]]:
        """Workers that are done with the newest order, with what their threads report."""
        assert self._reports is not None
        try:
            async with asyncio.timeout(SILENCE_S):
                report = json.loads(await self._reports.taken())
        except TimeoutError:  # the engine may be gone, or may have been told to leave
            states = enumerate(await self._rpc("weights_state"))
            return [(r, state) for r, state in states if state["done"] and state["number"] in (self._numbers, None)]
        return [(report["rank"], report)] if report["number"] == self._numbers else []

    async def _rpc(self, method: str, *args: Any) -> list[Any]:
        found: list[Any] = await self._llm.collective_rpc(method, args=args)
        return found


class PausedUpdate(_Update):
    """vLLM's own lifecycle of an update, for its transfer engines."""

    _loaded: tuple[int, Times] | None = None
    _leave_at: Sequence[str] = ()  # mailboxes of workers that may wait for the transport and hear nothing else

    async def connect(self, init_info: dict[str, Any]) -> None:
        async with self._errors_of(TRANSPORT):
            await self._llm.collective_rpc("weights_warn_of_losses_only")
            await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))
            self._leave_at = [address for address in await self._llm.collective_rpc("weights_leave_at") if address]

    async def disconnect(self) -> None:
        """An update that broke off may have left the session open, in which vLLM would refuse to leave."""
        for address in self._leave_at:
            with suppress(OSError):  # it is gone
                post(address, b"")
        async with self._errors_of(TRANSPORT):
            await self._llm.collective_rpc("weights_close_session")
            await self._llm.shutdown_weight_transfer_engine()

    async def receive(self, update_info: dict[str, Any], version: int) -> Times:
        """Seconds: `drain_s` and `transfer_s`, which includes loading."""
        self._loaded = None
        async with self._errors_of(update_to(version)):
            times = {"drain_s": await self._pause()}
            if self._canary:
                await self._llm.collective_rpc("canary_begin", args=(version,))
            start = time.perf_counter()
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))
            await self._llm.finish_weight_update(str(version))
            times["transfer_s"] = time.perf_counter() - start
        self._loaded = version, times
        return times

    async def commit(self, version: int, names: Sequence[str], digests: Sequence[int]) -> Times:
        loaded, self._loaded = self._loaded, None
        assert loaded is not None and loaded[0] == version, "receive comes first"
        times = dict(loaded[1])
        if self._canary:
            start = time.perf_counter()
            async with self._errors_of(update_to(version)):
                found = await self._llm.collective_rpc("canary_check", args=(list(names), list(digests)))
                times |= self._verified(version, names, found)
            recording_s = max(of_rank["seconds"] for of_rank in found)
            times["canary_s"] = recording_s + time.perf_counter() - start
            times["transfer_s"] -= recording_s
        return times


def update_to(version: int) -> str:
    """For an error message."""
    return f"the update to version {version}"


def wrong_on_any(ranks: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for every parameter that is wrong on a tensor-parallel rank, from what the ranks found."""
    lines: dict[str, str] = {}
    for rank, wrong in enumerate(ranks):
        for name, what in wrong.items():
            everywhere = all(name in other for other in ranks)
            lines.setdefault(name, f"{name} {what}" + ("" if everywhere else f" on rank {rank}"))
    return list(lines.values())
