"""The configuration: one frozen section per concern. Every default of the project lives here.

`conf/` composes these sections with Hydra; `load.py` turns the result into a `RunConfig`, and no `DictConfig`
goes further than that. A setting is either honoured or an error: there are no knobs that are silently ignored.
Rules between sections are in `RunConfig`; each names the keys it is about.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(gt=0)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]
Dtype = Literal["bfloat16", "float32"]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, `true` is no number, values never change after validation.

    A message of a validator starts with the key it is about (`top_p=0.9 ...`): the section is put in front of it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, strict=True)


class ModelConfig(Section):
    """The policy. Engine and trainer both load it from `path`, so version 0 is the same on both sides."""

    path: str = Field(min_length=1, description="HF model directory or hub id")
    dtype: Dtype = Field("bfloat16", description="of the weights in the engine and of the trainer's forward pass")
    head_dtype: Dtype = Field(
        "float32", description="of the final projection, in the engine and in the trainer (parity fix 4)"
    )
    enable_thinking: bool | None = Field(None, description="passed to the chat template when set")

    @model_validator(mode="after")
    def _head_not_below_body(self) -> "ModelConfig":
        if self.head_dtype == "bfloat16" and self.dtype == "float32":
            raise ValueError("head_dtype=bfloat16 with dtype=float32 would round the logits of a float32 model")
        return self


class _SyntheticTask(Section):
    train_problems: PositiveInt = Field(100_000, description="size of the training split; it is cycled")
    eval_problems: PositiveInt = Field(256, description="held-out problems in an evaluation")


class SortTask(_SyntheticTask):
    """Sort the digits of a number; exact match. With `scratchpad`, write the insertion sort out step by step."""

    kind: Literal["sort"] = "sort"
    digits: Annotated[int, Field(ge=2, le=16)] = 6
    scratchpad: bool = False
    system_prompt: str | None = Field(None, description="in front of every problem: a prefix that all prompts share")


class JsonlTask(Section):
    """The user's own data: one `{"prompt": ..., "answer": ...}` object per line."""

    kind: Literal["jsonl"] = "jsonl"
    path: str = Field(min_length=1, description="file with the rows that are trained on")
    eval_path: str | None = Field(None, description="held-out rows; without it `eval_fraction` of `path` is held out")
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    scorer: Literal["exact_match", "last_number"] = "last_number"
    system_prompt: str | None = None
    on_bad_row: Literal["error", "skip"] = Field("error", description="skip counts the rows it left out")


TaskConfig = Annotated[SortTask | JsonlTask, Field(discriminator="kind")]


class GradingConfig(Section):
    """Rewards are computed in child processes that are killed when they take too long."""

    processes: PositiveInt = Field(1, description="grader processes per rollout worker")
    timeout_s: PositiveFloat = Field(10.0, description="per completion; beyond it the outcome is verifier_timeout")


class BatchConfig(Section):
    """What one optimizer step trains on."""

    groups_per_step: PositiveInt = Field(32, description="prompts per optimizer step")
    group_size: Annotated[int, Field(ge=2)] = Field(
        8, description="completions per prompt; the baseline is the group's"
    )
    max_dropped_groups_in_a_row: PositiveInt = Field(
        64, description="give up (exit 5) when so many groups in a row were unusable"
    )


class SamplingConfig(Section):
    """How training completions are sampled: temperature only.

    The trainer must be able to reproduce the sampled distribution. top_p, top_k, min_p and penalties change it in
    ways that the trainer does not replay, so their only legal values are the neutral ones.
    """

    temperature: Annotated[float, Field(ge=0.01, le=2.0)] = Field(1.0, description="of training completions")
    max_tokens: PositiveInt = Field(1024, description="per completion")
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @model_validator(mode="after")
    def _reproducible(self) -> "SamplingConfig":
        neutral = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        neutral |= {"presence_penalty": 0.0, "frequency_penalty": 0.0}
        for name, value in neutral.items():
            if getattr(self, name) != value:
                raise ValueError(
                    f"{name}={getattr(self, name)} changes the sampled distribution in a way the trainer cannot "
                    f"reproduce, so policy ratios would be wrong; leave it at {value} and use temperature"
                )
        return self


class _AlgoCommon(Section):
    advantage: Literal["loo", "grpo"] = Field(
        "loo", description="baseline of a group: mean of the others (RLOO) or mean of all (GRPO)"
    )
    normalize_std: bool = Field(False, description="divide a group's advantages by its reward std")


class PPOClip(_AlgoCommon):
    """PPO-clip on the ratio of the current policy to the engine's logprobs (1707.06347; bounds of 2503.14476)."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28


class ReinforceIS(_AlgoCommon):
    """REINFORCE with a truncated importance weight, capped at `max_ratio` (2505.24034)."""

    kind: Literal["reinforce_is"] = "reinforce_is"
    max_ratio: Annotated[float, Field(ge=1)] = 2.0


class GSPO(_AlgoCommon):
    """PPO-clip on the geometric mean of a sequence's token ratios (2507.18071, and its bounds); a mean over sequences.

    The mean over tokens takes most of the spread out of the ratio, hence bounds that are so much tighter.
    """

    kind: Literal["gspo"] = "gspo"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 3e-4
    clip_high: PositiveFloat = 4e-4


AlgoConfig = Annotated[PPOClip | ReinforceIS | GSPO, Field(discriminator="kind")]


class EngineConfig(Section):
    """vLLM V1 engines, one Ray actor each. The four parity fixes are settings here and on by default.

    Each resolved value is read back from the engine's own config, compared with what is asked here, and logged.
    """

    count: PositiveInt = Field(1, description="engines")
    tensor_parallel: PositiveInt = 1
    max_model_len: PositiveInt = Field(4096, description="prompt and completion together, tokens")
    max_num_seqs: PositiveInt = Field(256, description="sequences that decode together")
    max_num_batched_tokens: PositiveInt = Field(8192, description="tokens in one engine step")
    gpu_memory_utilization: Fraction = Field(0.9, description="GPU only")
    kv_cache_mb: PositiveInt | None = Field(
        None, description="fixed KV cache size; required on CPU, on GPU it replaces gpu_memory_utilization"
    )
    enforce_eager: bool = Field(False, description="no torch.compile and no CUDA graphs")
    attention_backend: str | None = Field(None, description="GPU only, e.g. FLASH_ATTN; null = vLLM's choice")
    v2_model_runner: bool | None = Field(None, description="GPU only; null = vLLM's choice (its V2 runner)")

    logprobs_mode: Literal["processed_logprobs", "raw_logprobs"] = Field(
        "processed_logprobs", description="fix 1: logprobs of the distribution that was sampled from"
    )
    prefix_caching: bool = Field(False, description="fix 2: off, or old KV would be reused after an update")
    cache_salt: Literal["none", "version"] = Field(
        "none", description="version: prefix caching shares KV only between requests that one weight version admitted"
    )
    block_size: PositiveInt | None = Field(
        None, description="tokens in a KV block, the unit of prefix caching; null = vLLM's choice for the device"
    )
    async_scheduling: bool = Field(False, description="fix 2")
    chunked_prefill: Literal[True] = Field(True, description="fix 2: V1 cannot run without it")
    generation_config: Literal["vllm", "auto"] = Field(
        "vllm", description="fix 2: auto would let the model's generation_config.json change the sampling"
    )
    update_pause: Literal["keep", "wait", "abort"] = Field(
        "keep", description="fix 3: what a weight update does to running requests"
    )
    update_clear_cache: bool = Field(False, description="fix 3: whether a weight update recomputes the KV cache")

    start_timeout_s: PositiveFloat = 600.0


class TrainerConfig(Section):
    """DeepSpeed through accelerate; one Ray actor per rank."""

    ranks: PositiveInt = Field(1, description="trainer processes, one GPU each")
    lr: NonNegativeFloat = Field(1e-6, description="learning rate after the warm-up")
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95),
        strict=False,  # YAML has lists only
    )
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    zero_stage: Literal[1, 2] = Field(
        1, description="1 shards the optimizer state over ranks, 2 the gradients too; both skip non-finite steps"
    )
    micro_batch_tokens: PositiveInt = Field(16384, description="tokens packed into one forward pass")
    logprob_chunk: PositiveInt = Field(2048, description="tokens whose logits exist at one time")
    gradient_checkpointing: bool = False
    max_skipped_steps: NonNegativeInt = Field(
        3, description="stop (exit 5) after more than this many non-finite steps in a row"
    )
    step_timeout_s: PositiveFloat = 1800.0
    start_timeout_s: PositiveFloat = 600.0


class WeightsConfig(Section):
    """How and when new weights reach the engines."""

    backend: Literal["auto", "gloo", "nccl"] = Field("auto", description="auto: gloo on CPU, nccl on GPU")
    every: PositiveInt = Field(1, description="optimizer steps between two updates")
    bucket_mb: PositiveInt = Field(256, description="size of one broadcast")
    timeout_s: PositiveFloat = Field(120.0, description="for one whole update")


class AsyncConfig(Section):
    """How far generation may run ahead of training."""

    mode: Literal["async", "sync"] = Field("async", description="sync alternates generation and training")
    max_lag: NonNegativeInt | None = Field(
        None, description="bound on the lag of any trained token, in optimizer steps; null = 2 in async, 0 in sync"
    )

    @model_validator(mode="after")
    def _sync_has_no_lag(self) -> "AsyncConfig":
        if self.mode == "sync" and self.max_lag not in (None, 0):
            raise ValueError(f"mode=sync trains on-policy, which contradicts max_lag={self.max_lag}; use max_lag=null")
        return self

    @property
    def lag_bound(self) -> int:
        """The bound in force, in optimizer steps."""
        if self.max_lag is not None:
            return self.max_lag
        return 0 if self.mode == "sync" else 2


class EvalConfig(Section):
    """Evaluation on held-out problems, always at one version."""

    at_start: bool = True
    at_end: bool = True
    every: NonNegativeInt = Field(0, description="optimizer steps between evaluations; 0 = only start and end")
    temperature: Annotated[float, Field(ge=0, le=2.0)] = Field(0.0, description="0 = greedy")
    samples: PositiveInt = Field(1, description="completions per problem")

    @model_validator(mode="after")
    def _greedy_once(self) -> "EvalConfig":
        if self.temperature == 0 and self.samples > 1:
            raise ValueError(f"samples={self.samples} at temperature=0 repeats one greedy completion; use samples=1")
        return self


class ClusterConfig(Section):
    """Where the processes run."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    address: str = Field("local", description="local starts a Ray cluster for this run; otherwise one to join")
    num_cpus: PositiveInt | None = Field(None, description="of a local cluster; null = all cores")
    object_store_mb: Annotated[int, Field(ge=80)] | None = Field(None, description="of a local cluster")
    stall_timeout_s: PositiveFloat = Field(3600.0, description="stop (exit 4) when nothing finished for so long")


class ParityConfig(Section):
    """Whether the engine's logprobs are the trainer's: measured before training, watched while it goes on.

    The limits decide a verdict. A mean ratio near 1 proves nothing (it is 1 in expectation whatever the noise), so
    they bound spread, KL and clip rate.
    """

    preflight: Literal["strict", "warn", "off"] = Field(
        "strict", description="probe before step 1; strict refuses to train when it fails (exit 3)"
    )
    alarm: Literal["stop", "warn", "off"] = Field(
        "warn",
        description="when mismatch leaves the calibrated range or the objective breaks down; stop: exit 3",
    )
    canary: bool = Field(True, description="verify every weight update before the engines sample from it")
    groups: PositiveInt = Field(8, description="prompts per phase of a probe, batch.group_size completions each")
    max_tokens: PositiveInt = Field(256, description="per completion of a probe, at most sampling.max_tokens")
    max_abs_mean: PositiveFloat | None = Field(
        None, description="limit of mean |trainer - engine| logprob, nats; null = 1e-4 in float32, 5e-2 in bfloat16"
    )
    max_k3: PositiveFloat | None = Field(
        None, description="limit of the k3 estimate of KL; null = 1e-7 in float32, 1e-3 in bfloat16"
    )
    max_mult_prob_error: Annotated[float, Field(gt=1)] = Field(1.05, description="limit of mean exp|difference|")
    max_frac_out: Fraction = Field(1e-3, description="limit of the fraction of ratios outside [0.5, 2]")
    max_clip_rate: Fraction = Field(0.02, description="limit of the fraction that the objective would clip at lag 0")


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when logged in, else offline"
    )
    project: str = Field("pipelinerl", min_length=1)
    entity: str | None = None


class MetricsConfig(Section):
    """metrics.jsonl is always written; W&B, console and plots mirror it and can fail without stopping the run."""

    wandb: WandbConfig = WandbConfig()
    console: Literal["auto", "live", "plain"] = Field("auto", description="auto: live in a terminal")
    plots: bool = True
    rollout_groups_per_step: NonNegativeInt | None = Field(
        8, description="groups of each step written to rollouts/; null = all"
    )


class RunConfig(Section):
    """A whole run."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9._-]+$")
    run_dir: str | None = Field(None, min_length=1, description="null = outputs/<name>-<time>")
    seed: NonNegativeInt = 0
    steps: PositiveInt = Field(100, description="optimizer steps")
    model: ModelConfig
    task: TaskConfig
    grading: GradingConfig = GradingConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    algo: AlgoConfig
    engine: EngineConfig = EngineConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    async_: AsyncConfig = Field(AsyncConfig(), alias="async")
    eval: EvalConfig = EvalConfig()
    parity: ParityConfig = ParityConfig()
    cluster: ClusterConfig = ClusterConfig()
    metrics: MetricsConfig = MetricsConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def dump(self) -> dict[str, Any]:
        """The whole configuration as plain data, keys as the user writes them."""
        return self.model_dump(mode="json", by_alias=True)


def _contradictions(config: RunConfig) -> "list[str]":
    """Pairs of settings that cannot both be honoured, each as one line that names both keys."""
    found = []
    if config.async_.lag_bound < config.weights.every - 1:
        found.append(
            f"async.max_lag={config.async_.lag_bound} with weights.every={config.weights.every}: tokens are up to "
            f"{config.weights.every - 1} steps old before an update is due; raise max_lag or lower every"
        )
    if config.eval.every % config.weights.every:
        found.append(
            f"eval.every={config.eval.every} with weights.every={config.weights.every}: version {config.eval.every} "
            f"never reaches the engines, so it cannot be evaluated; use a multiple of weights.every"
        )
    if config.sampling.max_tokens >= config.engine.max_model_len:
        found.append(
            f"sampling.max_tokens={config.sampling.max_tokens} leaves no room for a prompt in "
            f"engine.max_model_len={config.engine.max_model_len}"
        )
    if config.trainer.micro_batch_tokens < config.engine.max_model_len:
        found.append(
            f"trainer.micro_batch_tokens={config.trainer.micro_batch_tokens} is smaller than "
            f"engine.max_model_len={config.engine.max_model_len}: the longest sample would not fit one forward pass"
        )
    if config.engine.cache_salt == "version" and not config.engine.prefix_caching:
        found.append("engine.cache_salt=version does nothing with engine.prefix_caching=false; use cache_salt=none")
    if config.engine.max_num_batched_tokens < config.engine.max_num_seqs:
        found.append(
            f"engine.max_num_batched_tokens={config.engine.max_num_batched_tokens} is smaller than "
            f"engine.max_num_seqs={config.engine.max_num_seqs}"
        )
    if config.cluster.device == "cpu" and config.weights.backend == "nccl":
        found.append("weights.backend=nccl needs GPUs, cluster.device=cpu has none; use weights.backend=auto")
    if config.cluster.device == "cuda" and config.weights.backend == "gloo":
        found.append("weights.backend=gloo is the CPU transport, cluster.device=cuda wants nccl; use backend=auto")
    if config.cluster.device == "cpu":
        for name in ("attention_backend", "v2_model_runner"):
            if getattr(config.engine, name) is not None:
                found.append(f"engine.{name}={getattr(config.engine, name)} needs a GPU, cluster.device=cpu has none")
    if config.cluster.device == "cpu" and config.engine.kv_cache_mb is None:
        found.append(
            "engine.kv_cache_mb=null with cluster.device=cpu: the CPU engine needs a fixed size; use engine=cpu, "
            "or cluster=local_gpu"
        )
    if config.cluster.address != "local":
        for name in ("num_cpus", "object_store_mb"):
            if getattr(config.cluster, name) is not None:
                found.append(
                    f"cluster.{name}={getattr(config.cluster, name)} is for a local cluster, and "
                    f"cluster.address={config.cluster.address} joins one; use cluster=ray or cluster.{name}=null"
                )
    if config.batch.groups_per_step * config.batch.group_size < config.trainer.ranks:
        found.append(
            f"batch.groups_per_step * batch.group_size = {config.batch.groups_per_step * config.batch.group_size} "
            f"samples cannot feed trainer.ranks={config.trainer.ranks}"
        )
    for key, limit in (
        ("trainer.step_timeout_s", config.trainer.step_timeout_s),
        ("weights.timeout_s", config.weights.timeout_s),
    ):
        if limit >= config.cluster.stall_timeout_s:
            found.append(
                f"{key}={limit:g} is not below cluster.stall_timeout_s={config.cluster.stall_timeout_s:g}, "
                "which would end the run first; raise stall_timeout_s"
            )
    return found
