"""vLLM's AsyncLLM behind the few calls the rollout worker needs: token ids in, token ids with logprobs out.

The four parity fixes are arguments here, nothing is left to a default of vLLM's, and what vLLM made of them is read
back and compared before the first token is sampled (`resolved_settings`, `check_settings`).

Versions: the engine labels every sampled token with the version of its weights. The label changes only while
generation is paused, so the spans of a completion are exact. An update has two halves, `update_weights` and `commit`:
between them the weights are loaded and generation stands still, until the canary has verified them.
"""

import itertools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.distributed.weight_transfer.base import WeightTransferInitRequest, WeightTransferUpdateRequest
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
from pipelinerl.errors import ParityError, WeightSyncError, WorkerDied, first_line
from pipelinerl.types import Completion, FloatArray, VersionSpan

WORKER_EXTENSION = "pipelinerl.engine.extension.WorkerExtension"
NAMED = 3  # parameters that a failed update names; the others are counted


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
        # Inside a Ray actor vLLM would have Ray place the workers; they belong beside it, on the GPUs of its bundle.
        distributed_executor_backend="mp" if engine.tensor_parallel > 1 else None,
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
        weight_transfer_config={"backend": backend},
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """An update that waits for its commit, and the seconds it took so far."""

    version: int
    drain_s: float
    transfer_s: float
    canary_s: float


class VllmEngine:
    """One engine. All methods belong to one event loop."""

    def __init__(self, llm: AsyncLLM, settings: dict[str, Any], config: EngineConfig, canary: bool, index: int):
        self._llm = llm
        self._config = config
        self._canary = canary
        self._index = index
        self._paused_at: float | None = None
        self._loaded: Loaded | None = None
        self._not_read_back: set[str] = set()
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
        engine = cls(llm, settings, config.engine, config.parity.canary, index)
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

    async def connect(self, init_info: dict[str, Any]) -> None:
        """Join the weight transport; returns when all members have."""
        await self._llm.init_weight_transfer_engine(WeightTransferInitRequest(init_info))

    async def update_weights(self, update_info: dict[str, Any], version: int) -> dict[str, float]:
        """Take over the weights that the trainer is sending, in the middle of running sequences.

        Pause, receive, load. The engine stays paused until `commit`. Returns the seconds of each phase. Raises
        WeightSyncError when the update does not complete.
        """
        start = time.perf_counter()
        self._paused_at = self._paused_at or start  # an update before this one may have failed
        self._loaded = None
        with self._errors_of_update(version):
            await self._llm.pause_generation(mode=self._config.update_pause, clear_cache=False)
            paused = time.perf_counter()
            if self._canary:
                await self._llm.collective_rpc("canary_begin", args=(version,))
            begun = time.perf_counter()
            await self._llm.start_weight_update()
            await self._llm.update_weights(WeightTransferUpdateRequest(update_info))
            await self._llm.finish_weight_update(str(version))
            await self._apply_kv_policy(version)
        drain_s, transfer_s, canary_s = paused - start, time.perf_counter() - begun, begun - paused
        self._loaded = Loaded(version, drain_s, transfer_s, canary_s)
        return {"drain_s": drain_s, "transfer_s": transfer_s}

    async def _apply_kv_policy(self, version: int) -> None:
        """While paused, with the weights of `version` loaded: have old KV made anew, if the policy says so.

        Raises WeightSyncError when vLLM did not drop all of it.
        """
        await self._kv.apply(self._llm, version)

    async def commit(self, version: int, names: Sequence[str], digests: Sequence[int]) -> dict[str, float]:
        """Verify the loaded weights against the trainer's `digests` of the parameters `names`, then resume.

        Raises WeightSyncError, and stays paused, when a parameter is not what was sent. Without the canary it only
        resumes. Returns seconds: `pause_s` is how long generation stood still, and in it `drain_s`, `transfer_s` and
        `canary_s` (recording and verifying); and `params_read_back`, the fraction of parameters that were verified in
        what the engine computes with, and not only on their arrival.
        """
        loaded, self._loaded = self._loaded, None
        assert loaded is not None and loaded.version == version, "update_weights comes first"
        assert self._paused_at is not None
        times = {"drain_s": loaded.drain_s, "transfer_s": loaded.transfer_s}
        if self._canary:
            start = time.perf_counter()
            recording_s, read_back = await self._verify(version, list(names), list(digests))
            times["canary_s"] = loaded.canary_s + recording_s + time.perf_counter() - start
            times["transfer_s"] -= recording_s
            times["params_read_back"] = read_back
        self.version = version
        await self._llm.resume_generation()
        times["pause_s"] = time.perf_counter() - self._paused_at
        self._paused_at = None
        return times

    async def _verify(self, version: int, names: list[str], digests: list[int]) -> tuple[float, float]:
        """Seconds that recording took, and the fraction of parameters read back. Raises WeightSyncError."""
        with self._errors_of_update(version):
            ranks = await self._llm.collective_rpc("canary_check", args=(names, digests))
        if wrong := _wrong_on_any([found["wrong"] for found in ranks]):
            more = [f"and {len(wrong) - NAMED} more"] if len(wrong) > NAMED else []
            raise WeightSyncError(
                f"engine {self._index}: version {version} did not pass verification and the engine stays paused; "
                f"inference path: {'; '.join(wrong[:NAMED] + more)}"
            )
        not_read_back = {name for found in ranks for name in found["not_read_back"]}
        if not_read_back - self._not_read_back:
            self._not_read_back = not_read_back
            print(  # into its log file
                f"engine {self._index}: the canary verifies the arrival of {len(not_read_back)} of {len(names)} "
                f"parameters but cannot read them back: {', '.join(sorted(not_read_back))}",
                flush=True,
            )
        return max(found["seconds"] for found in ranks), 1 - len(not_read_back) / max(len(names), 1)

    @contextmanager
    def _errors_of_update(self, version: int) -> Iterator[None]:
        """Whatever vLLM raises in an update, as our own error."""
        try:
            yield
        except EngineDeadError as error:
            raise self._died() from error
        except Exception as error:
            raise WeightSyncError(
                f"engine {self._index}: the update to version {version} did not complete and the engine stays "
                f"paused: {type(error).__name__}: {first_line(error)}"
            ) from error

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


def _wrong_on_any(ranks: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for every parameter that is wrong on a tensor-parallel rank, from what the ranks found."""
    lines: dict[str, str] = {}
    for rank, wrong in enumerate(ranks):
        for name, what in wrong.items():
            everywhere = all(name in other for other in ranks)
            lines.setdefault(name, f"{name} {what}" + ("" if everywhere else f" on rank {rank}"))
    return list(lines.values())


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
