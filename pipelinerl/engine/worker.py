"""A rollout worker: one engine, the episodes that run on it, and the grader processes that score them.

A plain class: the cluster layer makes it an async Ray actor, so that many groups run at a time in one event loop.
Generation is a local call; only finished groups leave the process.
"""

import asyncio
import gc
import itertools
import time
from collections.abc import Callable, Coroutine
from typing import Any

from pipelinerl.config.schema import RunConfig
from pipelinerl.engine.vllm_engine import VllmEngine
from pipelinerl.errors import WorkerFailed
from pipelinerl.rollout.episode import GenerateFn
from pipelinerl.rollout.group import run_group
from pipelinerl.rollout.seeds import Purpose, completion_seed
from pipelinerl.rollout.tokens import ChatRenderer
from pipelinerl.tasks.grading import GraderPool
from pipelinerl.tasks.registry import build_task
from pipelinerl.types import Completion, FloatArray, GroupMeta, Problem, RolloutGroup, RolloutMeta


class RolloutWorker:
    """Generates and scores groups of completions, and takes weight updates while doing so."""

    def __init__(self, config: RunConfig, index: int, backend: str):
        self._config = config
        self._index = index
        self._backend = backend
        self._task = build_task(config.task, config.seed)
        self._engine: VllmEngine
        self._renderer: ChatRenderer
        self._graders: GraderPool
        self._groups: set[asyncio.Task[RolloutGroup]] = set()

    async def start(self) -> dict[str, Any]:
        """Start engine and graders. Returns the engine's resolved settings."""
        from transformers import AutoTokenizer

        config = self._config
        grading = config.grading
        self._graders = GraderPool(grading.processes, grading.timeout_s, grading.memory_mb)
        await self._graders.start()
        self._engine = await VllmEngine.start(config, self._index, self._backend)
        print(f"engine {self._index} resolved to {self._engine.settings}", flush=True)  # into its log file
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        self._renderer = ChatRenderer(tokenizer, config.model.enable_thinking)
        gc.collect()
        gc.freeze()  # half a million objects of libraries, which every full collection would visit
        return self._engine.settings

    async def rollout(self, group_id: int, problem: Problem) -> tuple[GroupMeta, RolloutGroup]:
        """A group of training completions: what the driver looks at, and the payload for the trainer."""
        sampling = self._config.sampling
        return await self._group(
            "train", group_id, problem, self._config.batch.group_size, sampling.temperature, sampling.max_tokens
        )

    async def evaluate(self, group_id: int, problem: Problem) -> tuple[GroupMeta, RolloutGroup]:
        """The completions of one evaluation problem."""
        config = self._config
        return await self._group(
            "eval", group_id, problem, config.eval.samples, config.eval.temperature, config.sampling.max_tokens
        )

    async def probe(self, group_id: int, problem: Problem, max_tokens: int) -> tuple[GroupMeta, RolloutGroup]:
        """Like `rollout`, with completions of at most `max_tokens` and the engine's most likely tokens."""
        size, temperature = self._config.batch.group_size, self._config.sampling.temperature
        return await self._group("probe", group_id, problem, size, temperature, max_tokens, with_argmax=True)

    async def locate(self, segment: dict[str, Any] | None) -> list[str]:
        """The memory that each of the engine's workers shares; see VllmEngine.locate."""
        return await self._engine.locate(segment)

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the weight transport."""
        await self._engine.connect(init_info)

    async def disconnect(self) -> None:
        """Leave the weight transport."""
        await self._engine.disconnect()

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        """Receive the weights of `version`; see VllmEngine.update_weights."""
        return await self._engine.update_weights(update_info, version)

    async def commit(self, version: int, names: list[str], digests: list[int]) -> dict[str, float]:
        """Verify them and serve `version`; see VllmEngine.commit."""
        return await self._engine.commit(version, names, digests)

    async def heartbeat(self) -> int:
        """The version being served, when the engine has been around its loop. Raises WorkerDied when it is gone."""
        await self._engine.heartbeat()
        return self._engine.version

    async def abandon(self) -> None:
        """Give up all groups that are in the making: what they are made of is void."""
        for task in tuple(self._groups):
            task.cancel()

    async def hidden_states(self, tokens: list[int]) -> list[FloatArray]:
        """The engine's residual stream; see VllmEngine.hidden_states."""
        return await self._engine.hidden_states(tokens)

    async def close(self) -> None:
        """Stop engine and graders; safe to call at any time after construction."""
        if hasattr(self, "_engine"):
            await self._engine.shutdown()
        if hasattr(self, "_graders"):
            await self._graders.close()

    async def _group(
        self,
        purpose: Purpose,
        group_id: int,
        problem: Problem,
        size: int,
        temperature: float,
        max_tokens: int,
        with_argmax: bool = False,
    ) -> tuple[GroupMeta, RolloutGroup]:
        start = time.perf_counter()
        seeded = self._config.sampling.seeded
        seeded = self._backend == "gloo" if seeded is None else seeded  # the transport of CPUs
        given = problem.completion_tokens
        limit = max_tokens if given is None else min(given, max_tokens)

        def generate_for(rollout: int) -> GenerateFn:
            turns = itertools.count()

            async def generate(tokens: list[int]) -> Completion:
                seed = completion_seed(self._config.seed, purpose, group_id, rollout, next(turns))
                return await self._engine.generate(
                    tokens, temperature, limit, with_argmax, seed if seeded else None, past_end=given is not None
                )

            return generate

        group = await self._tracked(
            run_group(
                group_id,
                problem,
                size,
                self._make_env(),
                generate_for,
                self._renderer,
                self._config.engine.max_model_len,
            )
        )
        metas = tuple(RolloutMeta.of(rollout) for rollout in group.rollouts)
        return GroupMeta(group_id, problem.id, self._index, metas, time.perf_counter() - start), group

    async def _tracked(self, making: Coroutine[Any, Any, RolloutGroup]) -> RolloutGroup:
        """The group, in a task that `abandon` can end."""
        task = asyncio.ensure_future(making)
        self._groups.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            raise WorkerFailed(f"engine {self._index}: the group was abandoned") from None
        finally:
            self._groups.discard(task)

    def _make_env(self) -> Callable[[Problem], Any]:
        return lambda problem: self._task.env(problem, self._graders.grade)
