"""What a weight update does to the keys and values of sequences that are running.

    keep                nothing: they go on with what they have, made by older weights
    recompute           all of it is dropped, and made anew by the new weights before the next token
    recompute_at_lag    the same, but only at an update after which some of it would be `max_lag` versions old or older

vLLM drops KV by moving every running request back to its waiting queue, with the tokens that it has; cached prefixes go
too. Its answer says whether really no block of the cache is in use any more. An update whose KV was not dropped fails.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from vllm.v1.engine.async_llm import AsyncLLM

from pipelinerl.errors import WeightSyncError
from pipelinerl.types import VersionSpan


class KVPolicy:
    """The policy of one engine, and the versions at whose updates the KV was made anew."""

    def __init__(self, policy: str, max_lag: int | None):
        self._policy = policy
        self._max_lag = max_lag
        self._anew: set[int] = set()
        self.asked: dict[str, int] = {}  # request id -> version that was served when it came, of those in flight

    async def apply(self, llm: AsyncLLM, version: int) -> None:
        """While `llm` is paused and holds the weights of `version`. Raises WeightSyncError when KV was not dropped."""
        self._anew = {earlier for earlier in self._anew if earlier < version}  # a version can come a second time
        if self._policy == "keep":
            return
        if self._max_lag is not None:
            oldest = await self._oldest(llm)
            if oldest is None or version - oldest < self._max_lag:
                return
        if not await llm.reset_prefix_cache(reset_running_requests=True):
            raise WeightSyncError(
                f"engine.kv_policy={self._policy}: vLLM did not drop all keys and values of the running sequences"
            )
        self._anew.add(version)

    def made_anew(self, spans: Sequence[VersionSpan]) -> tuple[int, ...]:
        """Starts of the spans of a completion before which its KV was made anew, as `Completion.kv_from` has them."""
        return tuple(
            span.start
            for before, span in pairwise(spans)
            if any(before.version < version <= span.version for version in self._anew)
        )

    async def _oldest(self, llm: AsyncLLM) -> int | None:
        """The oldest version that any KV in use is of; None when there is none.

        A sequence has KV of the version that sampled its first token, or, in the midst of its prefill, of one that is
        no older than its request; and nothing is older than what was made anew last.
        """
        ranks: list[list[str]] = await llm.collective_rpc("requests_with_kv")
        states = llm.output_processor.request_states
        found = [states[request] for request in ranks[0] if request in states]  # the worker forgets late
        if not found:
            return None
        return max(min(map(self._first, found)), max(self._anew, default=0))

    def _first(self, state: Any) -> int:
        starts = state.weight_version_starts
        return int(starts[0][0]) if starts else self.asked[state.external_req_id]


class KVPolicyWorker:
    """A part of the worker extension."""

    model_runner: Any

    def requests_with_kv(self) -> list[str]:
        """vLLM's names of the requests that this worker has state of: they hold KV, or have ended just now."""
        runner = self.model_runner
        if hasattr(runner, "req_states"):  # the V2 runner, on a GPU
            return list(runner.req_states.req_id_to_index)
        return list(runner.requests)
