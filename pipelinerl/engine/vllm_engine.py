"""vLLM's AsyncLLM behind the few calls the rollout worker needs: token ids in, token ids with logprobs out.

The four parity fixes are arguments here, nothing is left to a default of vLLM's, and what vLLM made of them is read
back and compared before the first token is sampled (`resolved_settings`, `check_settings`).

Versions: the engine labels every sampled token with the version of its weights. The label changes only while
generation is paused, so the spans of a completion are exact. Updates are in weight_update.py.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.inputs import tokens_input
from vllm.logprobs import FlatLogprobs
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from pipelinerl.config.schema import EngineConfig, RunConfig
from pipelinerl.engine.hidden_states import hidden_states
from pipelinerl.engine.kv_policy import KVPolicy
from pipelinerl.engine.weight_update import PausedUpdate, StagedUpdate, Update
from pipelinerl.errors import ParityError, WorkerDied
from pipelinerl.types import Completion, FloatArray, VersionSpan
from pipelinerl.weights.ipc import NAME as IPC
from pipelinerl.weights.nccl import NAME as NCCL

RECEIVERS = {"ipc": IPC, "nccl": NCCL}  # vLLM's name of ours
WORKER_EXTENSION = "pipelinerl.engine.extension.WorkerExtension"


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
        pipeline_parallel_size=engine.pipeline_parallel,
        # Inside a Ray actor vLLM would have Ray place the workers; they belong beside it, on the GPUs of its bundle.
        distributed_executor_backend="mp" if engine.workers > 1 else None,
        max_model_len=engine.max_model_len,
        max_num_seqs=engine.max_num_seqs,
        max_num_batched_tokens=engine.max_num_batched_tokens,
        gpu_memory_utilization=engine.gpu_memory_utilization,
        kv_cache_memory_bytes=None if engine.kv_cache_mb is None else engine.kv_cache_mb * 2**20,
        enforce_eager=engine.enforce_eager,
        attention_backend=engine.attention_backend,
        logprobs_mode=engine.logprobs_mode,
        enable_prefix_caching=engine.prefix_caching,
        block_size=engine.block_size,
        async_scheduling=engine.async_scheduling,
        enable_chunked_prefill=engine.chunked_prefill,
        scheduling_policy="fcfs",
        generation_config=engine.generation_config,
        weight_transfer_config={"backend": RECEIVERS.get(backend, backend)},
        worker_extension_cls=WORKER_EXTENSION,
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
        "pipeline_parallel": config.parallel_config.pipeline_parallel_size,
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
        if wanted.get(key) not in (None, value)  # None leaves the choice to vLLM
    ]
    if wrong:
        raise ParityError("vLLM did not take the settings as given: " + "; ".join(wrong))


class VllmEngine:
    """One engine. All methods belong to one event loop."""

    def __init__(
        self, llm: AsyncLLM, settings: dict[str, Any], config: EngineConfig, canary: bool, index: int, backend: str
    ):
        self._llm = llm
        self._config = config
        self._index = index
        self._update: Update = (StagedUpdate if backend == "gloo" else PausedUpdate)(llm, config, canary, index)
        self._request_ids = itertools.count()
        self._kv = KVPolicy(config.kv_policy, config.kv_max_lag)
        self.settings = settings
        self.version = 0

    @classmethod
    async def start(cls, config: RunConfig, index: int, backend: str) -> "VllmEngine":
        """Load the model and serve it as version 0. Each engine has a seed of its own, derived from the run's."""
        vllm_config = engine_args(config, backend, seed=config.seed + index).create_engine_config()
        settings = resolved_settings(vllm_config)
        check_settings(config, settings)
        llm = AsyncLLM.from_vllm_config(vllm_config, disable_log_stats=True)  # not read from the arguments here
        engine = cls(llm, settings, config.engine, config.parity.canary, index, backend)
        await engine._llm.update_weight_version("0")
        await engine._llm.collective_rpc("discarded_tokens_draw_nothing")
        return engine

    async def generate(
        self,
        prompt: Sequence[int],
        temperature: float,
        max_tokens: int,
        with_argmax: bool = False,
        seed: int | None = None,
        past_end: bool = False,
    ) -> Completion:
        """Sample one completion, with a generator of its own if there is a `seed`. `text` is left empty: the caller
        has the tokenizer. `past_end`: always to `max_tokens`.

        Raises WorkerDied when the engine is gone.
        """
        # Only temperature: the trainer reproduces no other transformation of the distribution.
        params = SamplingParams(
            seed=seed,
            temperature=temperature,
            max_tokens=min(max_tokens, self._config.max_model_len - len(prompt)),
            ignore_eos=past_end,
            logprobs=1 if with_argmax else 0,  # of the sampled token, and of the most likely one
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # it is of this request alone
        )
        salt = f"version {self.version}" if self._config.cache_salt == "version" else None
        inputs = tokens_input(list(prompt), cache_salt=salt)
        request_id = f"engine{self._index}-{next(self._request_ids)}"
        self._kv.asked[request_id] = self.version
        try:
            outputs = [output async for output in self._llm.generate(inputs, params, request_id)]
        except EngineDeadError as error:
            raise self._died() from error
        finally:
            del self._kv.asked[request_id]
        assert outputs and outputs[-1].finished, request_id
        return _completion(outputs[-1].outputs[0], with_argmax, self._kv.made_anew)

    async def locate(self, segment: dict[str, Any] | None) -> list[str]:
        """The memory [worker] that each worker can map; see StagedUpdates.weights_locate."""
        return list(await self._llm.collective_rpc("weights_locate", args=(segment,)))

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the weight transport; returns when all members have. Raises WeightSyncError."""
        await self._update.connect(init_info)

    async def disconnect(self) -> None:
        """Leave the weight transport."""
        await self._update.disconnect()

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        """Take the weights that the trainer sends, in the middle of running sequences; `commit` puts them in force.

        Returns the seconds of each phase. Raises WeightSyncError, or WorkerDied when the engine is gone.
        """
        return await self._update.receive(update_info, version)

    async def commit(self, version: int, names: Sequence[str], digests: Sequence[int]) -> dict[str, float]:
        """Verify them against the trainer's `digests` of the parameters `names`, and serve `version`.

        Raises WeightSyncError when a parameter is not what was sent, or KV that engine.kv_policy has made anew was
        not dropped. Without the canary nothing is verified. Returns
        seconds: `pause_s` is how long generation stood still; with the canary also `params_read_back`, the fraction of
        parameters that were verified in what the engine computes with, and not only on their arrival.
        """
        times = await self._update.commit(version, names, digests)
        await self._kv.apply(self._llm, version)
        self.version = version  # before a request can start
        return times | await self._update.resume()

    async def heartbeat(self) -> None:
        """Return when the engine core has been around the loop in which it samples, and every worker has answered it.

        A process that was stopped keeps its connections, and vLLM's own health check passes. Raises WorkerDied when
        the core is gone.
        """
        try:
            await self._llm.collective_rpc("pulse")
        except EngineDeadError as error:
            raise self._died() from error

    async def shutdown(self) -> None:
        """Stop the engine's processes. Blocks the event loop: its output handler must not see the end coming."""
        self._llm.shutdown(timeout=30)

    async def hidden_states(self, tokens: Sequence[int]) -> list[FloatArray]:
        """The residual stream [tokens, hidden] at each place, while nothing else runs; see engine/hidden_states.py."""
        try:
            return await hidden_states(self._llm, tokens)
        except EngineDeadError as error:
            raise self._died() from error

    def _died(self) -> WorkerDied:
        return WorkerDied(f"engine {self._index}: its vLLM core process died; see logs/engine_{self._index}.log")


def _completion(
    output: CompletionOutput, with_argmax: bool, made_anew: Callable[[Sequence[VersionSpan]], tuple[int, ...]]
) -> Completion:
    tokens, found = np.array(output.token_ids, np.int32), output.logprobs
    assert isinstance(found, FlatLogprobs)
    entries = 2 if with_argmax else 1  # at each place: the sampled token, and then the most likely one
    named = np.array(found.token_ids, np.int32).reshape(-1, entries)
    logprobs = np.array(found.logprobs, np.float32).reshape(-1, entries)[:, 0]
    assert np.array_equal(named[:, 0], tokens), "logprobs of other tokens than the sampled ones"
    spans = tuple(VersionSpan(int(s.version), s.start, s.end) for s in output.weight_versions or ())
    argmax = named[:, 1] if with_argmax else None
    return Completion(tokens, logprobs, spans, output.finish_reason or "abort", "", argmax, made_anew(spans))
