"""One thing switched at a time, from the configuration with all four fixes in force.

A case changes settings of the engine (`changes`), or how the trainer scores (`scoring`): what the reference sampled, if
the engine is the reference's. Each says what it is and what it should show; `blocked` says why it cannot show it here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pipelinerl.config.device import Device
from pipelinerl.config.schema import RunConfig
from pipelinerl.errors import ConfigError
from pipelinerl.parity.probe import stale_request
from pipelinerl.parity.results import Layer
from pipelinerl.types import ScoreRequest

FIXES: Mapping[str, Any] = {
    "engine.logprobs_mode": "processed_logprobs",
    "engine.prefix_caching": False,
    "engine.cache_salt": "none",
    "engine.async_scheduling": False,
    "engine.generation_config": "vllm",
    "engine.update_pause": "keep",
    "engine.kv_policy": "keep",
    "engine.kv_max_lag": None,
    "model.head_dtype": "float32",
}


@dataclass(frozen=True, slots=True)
class Setup:
    """What a case has to know about where it would run."""

    config: RunConfig  # with all fixes in force
    device: Device
    prompt_tokens: int  # of the shortest prompt that was sampled


Blocked = Callable[[Setup], str]
Changes = Mapping[str, Any] | Callable[[Setup], Mapping[str, Any]]


def _never(_: Setup) -> str:
    return ""


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the ablation."""

    name: str
    what: str
    expect: str
    layer: Layer
    changes: Changes = field(default_factory=dict)  # of another engine; none: what the reference sampled is scored
    scoring: Callable[[ScoreRequest], ScoreRequest] | None = None  # what else the trainer does otherwise
    blocked: Blocked = _never

    def settings(self, setup: Setup) -> Mapping[str, Any]:
        return self.changes(setup) if callable(self.changes) else self.changes


def with_settings(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """The configuration with dotted keys replaced. Raises pydantic's ValidationError when they contradict."""
    data = config.dump()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = data
        for part in path:
            section = section[part]
        section[last] = value
    return RunConfig.model_validate(data)


def all_fixes(config: RunConfig) -> RunConfig:
    """The configuration with the four fixes in force, all else as it is."""
    return with_settings(config, FIXES)


def as_overrides(changes: Mapping[str, Any]) -> str:
    """As the user would type them."""
    return " ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in changes.items()
    )


def _needs_gpu(setup: Setup) -> str:
    return "" if setup.device == "cuda" else "needs a GPU: the CPU engine has only one way to do this"


def _raw(setup: Setup) -> str:
    return "" if setup.config.sampling.temperature != 1 else "at temperature 1 raw and processed logprobs are the same"


def _no_async_scheduling(setup: Setup) -> str:
    return "" if setup.device == "cuda" else "vLLM's CPU platform turns async scheduling off whatever is asked"


def _bf16_head(setup: Setup) -> str:
    if setup.config.model.dtype == "float32":
        return "the body is float32, and a head below the body's precision is not a legal configuration"
    return ""


def _block_size(setup: Setup) -> int:
    """vLLM caches whole KV blocks; its CPU default of 128 tokens is longer than many prompts."""
    return setup.config.engine.block_size or (32 if setup.device == "cpu" else 16)


def _caching(setup: Setup) -> Mapping[str, Any]:
    return {"engine.prefix_caching": True, "engine.block_size": _block_size(setup)}


def _salted(setup: Setup) -> Mapping[str, Any]:
    return {**_caching(setup), "engine.cache_salt": "version"}


def _nothing_cached(setup: Setup) -> str:
    size = _block_size(setup)
    if setup.prompt_tokens <= size:
        return (
            f"the shortest prompt has {setup.prompt_tokens} tokens and fills no KV block of {size}: nothing is cached"
        )
    return ""


def _other_dtype(setup: Setup) -> Mapping[str, Any]:
    return {"model.dtype": "float32" if setup.config.model.dtype == "bfloat16" else "bfloat16"}


def _two_workers(setup: Setup) -> str:
    if setup.config.engine.tensor_parallel > 1:
        return "the configured engine is tensor parallel already"
    return "" if setup.device == "cpu" else "the reservation of this run holds one GPU for each engine"


def _no_temperature(request: ScoreRequest) -> ScoreRequest:
    return replace(request, temperatures=tuple(dict.fromkeys((1.0, *request.temperatures))))


def _from_checkpoint(request: ScoreRequest) -> ScoreRequest:
    return replace(request, head="checkpoint")


CASES = (
    Case(
        "raw_logprobs",
        "the engine returns logprobs of the raw model output",
        "a systematic offset that temperature explains",
        "semantic",
        {"engine.logprobs_mode": "raw_logprobs"},
        blocked=_raw,
    ),
    Case(
        "trainer_temperature",
        "the trainer scores at temperature 1",
        "the same offset with the opposite sign of blame",
        "semantic",
        scoring=_no_temperature,
        blocked=_raw,
    ),
    Case(
        "bf16_head",
        "lm_head in bfloat16 on both sides",
        "rounding noise that grows with the size of the logits",
        "inference_path",
        {"model.head_dtype": "bfloat16"},
        blocked=_bf16_head,
    ),
    Case(
        "bf16_head_engine",
        "lm_head in bfloat16 in the engine only (a fix that skips tied heads)",
        "rounding noise of one side",
        "inference_path",
        {"model.head_dtype": "bfloat16"},
        scoring=lambda request: replace(request, head_dtype="float32"),
        blocked=_bf16_head,
    ),
    Case(
        "checkpoint_head",
        "the trainer's head from the float32 weights, not from the rounded ones that the engine has",
        "the rounding of the head's weights",
        "inference_path",
        scoring=_from_checkpoint,
    ),
    Case(
        "prefix_caching",
        "prefix caching on across a weight update",
        "after the update prompts attend to KV of the old weights",
        "inference_path",
        _caching,
        blocked=_nothing_cached,
    ),
    Case(
        "prefix_caching_salted",
        "prefix caching on, shared within one weight version only",
        "no effect: the cache is never older than the weights",
        "inference_path",
        _salted,
        blocked=_nothing_cached,
    ),
    Case(
        "async_scheduling",
        "the scheduler runs one step ahead of the model",
        "no effect with a pause that drains the steps in flight",
        "inference_path",
        {"engine.async_scheduling": True},
        blocked=_no_async_scheduling,
    ),
    Case(
        "update_abort",
        "a weight update aborts running requests",
        "completions that are thrown away, none that straddles",
        "inference_path",
        {"engine.update_pause": "abort"},
    ),
    Case(
        "update_wait",
        "a weight update waits until running requests have ended",
        "none that straddles; generation stands still for the longest completion",
        "inference_path",
        {"engine.update_pause": "wait"},
    ),
    Case(
        "kv_recompute",
        "a weight update has the KV of running requests made anew",
        "tokens agree with one full pass of their version; the pause is followed by a prefill of everything",
        "inference_path",
        {"engine.kv_policy": "recompute"},
    ),
    Case(
        "no_update",
        "the trainer moved on and the engine did not",
        "the size of one nudge of all weights: what stale weights look like",
        "inference_path",
        scoring=stale_request,
    ),
    Case(
        "engine_dtype",
        "engine and trainer in different precision",
        "rounding noise of the whole body",
        "inference_path",
        _other_dtype,
    ),
    Case(
        "tensor_parallel",
        "two engine workers share the weights",
        "another order of summation: no effect beyond the precision",
        "inference_path",
        {"engine.tensor_parallel": 2},
        blocked=_two_workers,
    ),
    Case(
        "cuda_graphs",
        "CUDA graphs and compilation the other way round",
        "other kernels: no effect beyond the precision",
        "inference_path",
        lambda setup: {"engine.enforce_eager": not setup.config.engine.enforce_eager},
        blocked=_needs_gpu,
    ),
    Case(
        "attention_backend",
        "another attention kernel",
        "no effect beyond the precision",
        "inference_path",
        lambda setup: {
            "engine.attention_backend": "TRITON_ATTN"
            if setup.config.engine.attention_backend != "TRITON_ATTN"
            else "FLASH_ATTN"
        },
        blocked=_needs_gpu,
    ),
    Case(
        "v1_model_runner",
        "vLLM's V1 model runner",
        "another sampler: no effect",
        "inference_path",
        {"engine.v2_model_runner": False},
        blocked=_needs_gpu,
    ),
)


def cases_named(names: str) -> tuple[Case, ...]:
    """The cases that a comma-separated list names; all of them for an empty one. Raises ConfigError."""
    wanted = [name for name in names.split(",") if name]
    known = {case.name: case for case in CASES}
    if unknown := [name for name in wanted if name not in known]:
        raise ConfigError(f"--ablate={names}: no case {', '.join(unknown)}; the cases are {', '.join(known)}")
    return tuple(known[name] for name in wanted) or CASES
