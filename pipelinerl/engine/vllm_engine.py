"""vLLM's AsyncLLM behind the few calls the rollout worker needs: token ids in, token ids with logprobs out.

The four parity fixes are arguments here, nothing is left to a default of vLLM's, and what vLLM made of them is read
back and compared before the first token is sampled (`resolved_settings`, `check_settings`).

Versions: the engine labels every sampled token with the version of its weights. The label changes only while
generation is paused, so the spans of a completion are exact.
"""

import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pipelinerl.config.schema import EngineConfig, RunConfig
from pipelinerl.errors import ParityError, WeightSyncError, WorkerDied, first_line
from pipelinerl.types import Completion, VersionSpan


def engine_args(config: RunConfig, backend: str, seed: int) -> AsyncEngineArgs:
    """Everything that the behaviour of an engine depends on, spelled out."""
    engine, model = config.engine, config.model
    return AsyncEngineArgs(
        model=model.path,
        dtype=model.dtype,
        hf_overrides={"head_dtype": model.head_dtype},
        trust_remote_code=False,
        seed=seed,
        tensor_parallel_size=engine.tensor_parallel,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_memory_bytes=None if engine.kv_cache_mb is None else engine.kv_cache_mb * 2**20,
        enforce_eager=engine.enforce_eager,
        logprobs_mode=engine.logprobs_mode,
        enable_prefix_caching=engine.prefix_caching,
        block_size=engine.block_size,
        async_scheduling=engine.async_scheduling,
        enable_chunked_prefill=engine.chunked_prefill,
        scheduling_policy="fcfs",
        generation_config=engine.generation_config,
        weight_transfer_config={"backend": backend},
        worker_extension_cls="pipelinerl.weights.gloo.WeightReceiver" if backend == "gloo" else "",
        disable_log_stats=True,
    )


def resolved_settings(config: VllmConfig) -> dict[str, Any]:
    """What vLLM will really do, under the names of the `engine` and `model` sections."""
    return {
        "logprobs_mode": str(config.model_config.logprobs_mode),
        "prefix_caching": bool(config.cache_config.enable_prefix_caching),
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "chunked_prefill": bool(config.scheduler_config.enable_chunked_prefill),
        "generation_config": config.model_config.generation_config,
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "head_dtype": str(config.model_config.head_dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "tensor_parallel": config.parallel_config.tensor_parallel_size,
        "enforce_eager": bool(config.model_config.enforce_eager),
        "seed": config.model_config.seed,
        "v2_model_runner": bool(config.use_v2_model_runner),
    }


def check_settings(asked: RunConfig, resolved: Mapping[str, Any]) -> None:
    """Raise ParityError when vLLM replaced a setting that the run depends on."""
    wanted = asked.engine.model_dump() | {"dtype": asked.model.dtype, "head_dtype": asked.model.head_dtype}
    wrong = [
        f"{key} is {value!r} in the engine, {wanted[key]!r} in the config"
        for key, value in resolved.items()
        if key in wanted and value != wanted[key]
    ]
    if wrong:
        raise ParityError("vLLM did not take the settings as given: " + "; ".join(wrong))


class VllmEngine:
    """One engine. All methods belong to one event loop."""

    def __init__(self, llm: AsyncLLM, settings: dict[str, Any], config: EngineConfig, index: int):
        self._llm = llm
        self._config = config
        self._index = index
        self._request_ids = itertools.count()
        self.settings = settings
        self.version = 0

    @classmethod
    async def start(cls, config: RunConfig, index: int, backend: str) -> "VllmEngine":
        """Load the model and serve it as version 0. Each engine has a seed of its own, derived from the run's."""
        vllm_config = engine_args(config, backend, seed=config.seed + index).create_engine_config()
        settings = resolved_settings(vllm_config)
        check_settings(config, settings)
        engine = cls(AsyncLLM.from_vllm_config(vllm_config), settings, config.engine, index)
        await engine._llm.update_weight_version("0")
        return engine

    async def generate(
        self, prompt: Sequence[int], temperature: float, max_tokens: int, with_argmax: bool = False
    ) -> Completion:
        """Sample one completion. `text` is left empty: the caller has the tokenizer.

        Raises WorkerDied when the engine is gone.
        """
        # No per-request seed: vLLM's CPU sampler dies on one when a pause discards a token. And only temperature:
        # the trainer reproduces no other transformation of the distribution.
        params = SamplingParams(
            temperature=temperature,
            max_tokens=min(max_tokens, self._config.max_model_len - len(prompt)),
            logprobs=1 if with_argmax else 0,  # of the sampled token, and of the most likely one
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        salt = f"version {self.version}" if self._config.cache_salt == "version" else None
        inputs = tokens_input(list(prompt), cache_salt=salt)
        request_id = f"engine{self._index}-{next(self._request_ids)}"
        try:
            outputs = [output async for output in self._llm.generate(inputs, params, request_id)]
        except EngineDeadError as error:
            raise self._died() from error
        assert outputs and outputs[-1].finished, request_id
        return _completion(outputs[-1].outputs[0], with_argmax)

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the weight transport; returns when all members have."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        """Take over the weights that the trainer is sending, in the middle of running sequences.

        Pause, receive, load, resume. Resumes only after a complete update: weights that arrived in part are never
        sampled from. Returns the seconds of each phase; `pause_s` is how long generation stood still.
        """
        start = time.perf_counter()
        try:
            await self._llm.pause_generation(
                mode=self._config.update_pause, clear_cache=self._config.update_clear_cache
            )
            paused = time.perf_counter()
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))
            await self._llm.finish_weight_update(str(version))
        except EngineDeadError as error:
            raise self._died() from error
        except Exception as error:
            raise WeightSyncError(
                f"engine {self._index}: the update to version {version} did not complete and the engine stays "
                f"paused: {type(error).__name__}: {first_line(error)}"
            ) from error
        loaded = time.perf_counter()
        self.version = version
        await self._llm.resume_generation()
        end = time.perf_counter()
        return {"pause_s": end - start, "drain_s": paused - start, "transfer_s": loaded - paused}

    async def check_health(self) -> None:
        """Raise WorkerDied when the engine's core process is gone."""
        try:
            await self._llm.check_health()
        except EngineDeadError as error:
            raise self._died() from error

    async def shutdown(self) -> None:
        """Stop the engine's processes. Blocks the event loop: its output handler must not see the end coming."""
        self._llm.shutdown(timeout=30)

    def _died(self) -> WorkerDied:
        return WorkerDied(f"engine {self._index}: its vLLM core process died; see logs/engine_{self._index}.log")


def _completion(output: CompletionOutput, with_argmax: bool) -> Completion:
    tokens = np.array(output.token_ids, np.int32)
    assert output.logprobs is not None
    logprobs = np.array(
        [entry[token].logprob for entry, token in zip(output.logprobs, tokens.tolist(), strict=True)], np.float32
    )
    argmax = None
    if with_argmax:
        argmax = np.array([max(entry, key=lambda token: entry[token].logprob) for entry in output.logprobs], np.int32)
    spans = tuple(VersionSpan(int(s.version), s.start, s.end) for s in output.weight_versions or ())
    return Completion(tokens, logprobs, spans, output.finish_reason or "abort", "", argmax)
