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


class LengthsTask(_SyntheticTask):
    """For benchmarks: completions of log-normal lengths that are drawn beforehand, with rewards that mean nothing."""

    kind: Literal["lengths"] = "lengths"
    median: PositiveInt = Field(64, description="tokens of a completion; none has more than sampling.max_tokens")
    sigma: NonNegativeFloat = Field(0.0, description="of the length's logarithm; 0 = all are equal, 0.99 = p99/p50 10")
    prompt_chars: PositiveInt = Field(16, description="letters of a prompt")


TaskConfig = Annotated[SortTask | JsonlTask | LengthsTask, Field(discriminator="kind")]


class GradingConfig(Section):
    """Rewards are computed in child processes that are killed when they take too long."""

    processes: PositiveInt = Field(1, description="grader processes per rollout worker")
    timeout_s: PositiveFloat = Field(10.0, description="per completion; beyond it the outcome is verifier_timeout")
    memory_mb: Annotated[int, Field(ge=128)] = Field(
        2048, description="address space of a grader process; beyond it the outcome is env_error"
    )


class BatchConfig(Section):
    """What one optimizer step trains on."""

    groups_per_step: PositiveInt = Field(32, description="prompts per optimizer step")
    group_size: Annotated[int, Field(ge=2)] = Field(
        8, description="completions per prompt; the baseline is the group's"
    )
    zero_variance: Literal["keep", "refill"] = Field(
        "keep", description="groups whose rewards are all equal; refill draws others in their places (DAPO, 2503.14476)"
    )
    updates: PositiveInt = Field(
        1, description="optimizer updates per step, each on its share of the groups (PPO's mini-batches)"
    )
    stream: bool = Field(
        False, description="train on the groups of a step as they become ready; the gradient is that of the whole step"
    )
    max_dropped_groups_in_a_row: PositiveInt = Field(
        64, description="give up (exit 5) when so many groups in a row were unusable"
    )

    @model_validator(mode="after")
    def _updates_share_groups(self) -> "BatchConfig":
        if self.groups_per_step % self.updates:
            raise ValueError(f"updates={self.updates} does not divide groups_per_step={self.groups_per_step}")
        return self

    @model_validator(mode="after")
    def _one_update_while_groups_arrive(self) -> "BatchConfig":
        if self.stream and self.updates > 1:
            raise ValueError(
                f"stream=true with updates={self.updates}: the weights would move while groups of the step are still "
                "arriving; use updates=1 or stream=false"
            )
        return self


class SamplingConfig(Section):
    """How training completions are sampled: temperature only.

    The trainer must be able to reproduce the sampled distribution. top_p, top_k, min_p and penalties change it in
    ways that the trainer does not replay, so their only legal values are the neutral ones.
    """

    temperature: Annotated[float, Field(ge=0.01, le=2.0)] = Field(1.0, description="of training completions")
    max_tokens: PositiveInt = Field(1024, description="per completion")
    seeded: bool | None = Field(
        None,
        description="a seed per completion, from seed and prompt; null = on a CPU, where samples then repeat exactly; "
        "on a GPU it costs a kernel launch per sequence and token",
    )
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


class RewardConfig(Section):
    """From what a task returns to what is trained on. `reward/*` metrics are the task's, `reward/shaped_*` these."""

    weights: dict[str, float] = Field(
        {}, description="component -> weight; the reward is then the weighted sum of these components, {} = the task's"
    )
    overlong_buffer: PositiveInt | None = Field(
        None, description="tokens before sampling.max_tokens over which the reward falls by up to overlong_penalty"
    )
    overlong_penalty: NonNegativeFloat = Field(1.0, description="at sampling.max_tokens and when truncated (DAPO: 1)")
    length_penalty: NonNegativeFloat = Field(0.0, description="times completion length / sampling.max_tokens")


class Coefficient(Section):
    """A weight of a term, constant or changing linearly with the optimizer step."""

    coef: NonNegativeFloat = Field(0.0, description="at the first step; 0 = off")
    final_coef: NonNegativeFloat | None = Field(None, description="after anneal_steps; null = it stays as it is")
    anneal_steps: PositiveInt | None = Field(None, description="steps from coef to final_coef; null = all of the run")

    @model_validator(mode="after")
    def _anneals_to_something(self) -> "Coefficient":
        if self.anneal_steps is not None and self.final_coef is None:
            raise ValueError(f"anneal_steps={self.anneal_steps} without a final_coef; set it, or anneal_steps=null")
        return self

    @property
    def on(self) -> bool:
        """Whether it is above 0 at any step."""
        return self.coef > 0 or (self.final_coef or 0.0) > 0

    def at(self, step: int, steps: int) -> float:
        """Its value at optimizer step `step` (from 1) of `steps`."""
        if self.final_coef is None:
            return self.coef
        span = self.anneal_steps or steps
        done = 1.0 if span == 1 else min(1.0, (step - 1) / (span - 1))
        return self.coef + (self.final_coef - self.coef) * done


class EntropyConfig(Coefficient):
    """An entropy bonus: the loss gets -coef * entropy of every sampled token's distribution, nats."""


class KLConfig(Coefficient):
    """Distance to a frozen reference policy. Estimators: Schulman's note; their gradients: 2506.09477, 2510.01555."""

    place: Literal["loss", "reward"] = Field("loss", description="a term of the loss, or taken off the reward")
    estimator: Literal["k1", "k2", "k3"] = Field("k2", description="k1 belongs in the reward, k2 and k3 in the loss")
    importance_cap: Annotated[float, Field(ge=1)] | None = Field(
        2.0, description="in the loss: weigh by sg(min(ratio to the engine, this)), null = not (biased off-policy)"
    )
    max_log_ratio: PositiveFloat = Field(10.0, description="clamp of |log(policy/reference)|, nats")
    reference: str | None = Field(None, min_length=1, description="model directory or hub id; null = model.path")
    offload: bool = Field(False, description="keep the reference in host memory and bring it to the GPU when needed")

    @model_validator(mode="after")
    def _estimator_fits_place(self) -> "KLConfig":
        if self.place == "loss" and self.estimator == "k1":
            raise ValueError(
                "estimator=k1 with place=loss: the expected gradient of k1 is zero, so it regularises nothing; "
                "use k2 or k3, or place=reward"
            )
        if self.place == "reward" and self.estimator != "k1":
            raise ValueError(f"estimator={self.estimator} with place=reward is biased; use k1, or place=loss")
        return self


Band = Annotated[tuple[PositiveFloat, PositiveFloat], Field(strict=False)]  # YAML has lists only


class CorrectionConfig(Section):
    """Weights and masks against what the sampling policy differs in; null = off. Named presets: algo/correction=...

    x is the proximal policy over the engine's (`algo.proximal` not rollout) or the current one over the engine's.
    A masked token keeps its place in the denominator of the loss.
    """

    tis_token: Annotated[float, Field(ge=1)] | None = Field(None, description="weigh tokens by min(x, this)")
    tis_sequence: Annotated[float, Field(ge=1)] | None = Field(
        None, description="weigh sequences by min(product of x, this)"
    )
    icepop: Band | None = Field(None, description="mask tokens with x outside (2510.18855); the rest is weighed by x")
    sequence_mis: Band | None = Field(None, description="mask sequences whose product of x is outside")
    geometric: Band | None = Field(None, description="mask sequences whose geometric mean of x is outside")
    k3: PositiveFloat | None = Field(None, description="mask sequences whose mean k3 of x is above, nats")
    veto: PositiveFloat | None = Field(None, description="mask sequences in which any x is below")
    opsm: PositiveFloat | None = Field(
        None, description="mask sequences of negative advantage whose mean log(engine/policy) is above (2512.02556)"
    )
    version_mask: NonNegativeInt | None = Field(None, description="mask tokens with a larger lag, optimizer steps")

    @model_validator(mode="after")
    def _bands_are_bands(self) -> "CorrectionConfig":
        for name in ("icepop", "sequence_mis", "geometric"):
            band = getattr(self, name)
            if band is not None and not band[0] < 1 < band[1]:
                raise ValueError(f"{name}={list(band)} is no band around a ratio of 1")
        return self

    @property
    def weights(self) -> list[str]:
        """The corrections that are on and multiply by x; masks are not among them."""
        return [name for name in ("tis_token", "tis_sequence", "icepop") if getattr(self, name) is not None]


# What an advantage is made from: the group, or all groups of the step.
OF_THE_STEP = ("reinforce_pp", "reinforce_pp_baseline", "batch_std", "gdpo")
Advantage = Literal["rloo", "grpo", "dr_grpo", "reinforce_pp", "reinforce_pp_baseline", "batch_std", "maxrl", "gdpo"]
Aggregation = Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "constant", "prompt_mean"]
Proximal = Literal["rollout", "recompute", "interpolate"]


class _AlgoCommon(Section):
    advantage: Advantage = Field("rloo", description="how rewards become advantages; see algo/advantages.py")
    aggregation: Aggregation | None = Field(
        None, description="what the loss is a mean over; null = what the objective was published with"
    )
    mask_truncated: bool = Field(False, description="leave truncated completions out of the loss, not the baseline")
    correction: CorrectionConfig = CorrectionConfig()
    kl: KLConfig = KLConfig()
    entropy: EntropyConfig = EntropyConfig()

    @property
    def mean_over(self) -> Aggregation:
        """The aggregation in force: the configured one, or what the objective was published with."""
        return self.aggregation or "token_mean"


class _OwnRatio(_AlgoCommon):
    """Objectives whose ratio is to the engine's logprobs by definition: it is their importance weight."""

    @model_validator(mode="after")
    def _weighed_once(self) -> "_OwnRatio":
        for name in self.correction.weights:
            if name != "icepop":  # of which only the mask remains where the objective holds x itself
                raise ValueError(
                    f"correction.{name} with an objective that holds the ratio to the engine already would count it "
                    "twice; use a mask (icepop, veto, geometric, ...), or proximal=recompute with algo=decoupled_ppo"
                )
        return self


class _ProximalRatio(_AlgoCommon):
    """Objectives on the ratio to a proximal policy (2110.00641), which is the engine's unless said otherwise."""

    proximal: Proximal = Field(
        "rollout",
        description="rollout: the engine's logprobs; recompute: the trainer's at the start of the step; "
        "interpolate: between the two by lag (A-3PO, 2512.06547)",
    )

    @model_validator(mode="after")
    def _weighed_once(self) -> "_ProximalRatio":
        weights = self.correction.weights
        if self.proximal == "rollout":
            for name in weights:
                if name != "icepop":
                    raise ValueError(
                        f"correction.{name} with proximal=rollout: the objective's ratio holds that weight already and "
                        "it would count twice; use proximal=recompute, or a mask (icepop, veto, geometric, ...)"
                    )
        elif not weights:
            raise ValueError(
                f"proximal={self.proximal} without an importance weight leaves the gap between engine and proximal "
                "policy uncorrected, which is the case that collapses; add algo/correction=tis_token"
            )
        elif len(weights) > 1:
            raise ValueError(f"correction.{weights[0]} and correction.{weights[1]} would count x twice; keep one")
        return self


ClipLow = Annotated[float, Field(gt=0, lt=1)]


class PPOClip(_ProximalRatio):
    """PPO-clip on the ratio of the current policy to the proximal one (1707.06347; bounds of 2503.14476)."""

    kind: Literal["ppo_clip"] = "ppo_clip"
    clip_low: ClipLow = 0.2
    clip_high: PositiveFloat = 0.28


class DualClip(_ProximalRatio):
    """PPO-clip whose loss at a negative advantage is at most `bound` * |advantage| (1912.09729)."""

    kind: Literal["dual_clip"] = "dual_clip"
    clip_low: ClipLow = 0.2
    clip_high: PositiveFloat = 0.28
    bound: Annotated[float, Field(gt=1)] = 3.0


class TwoSided(_ProximalRatio):
    """PPO-clip whose unclipped ratio is at most `max_ratio`, which acts at negative advantages (2505.07291)."""

    kind: Literal["two_sided"] = "two_sided"
    clip_low: ClipLow = 0.2
    clip_high: PositiveFloat = 0.28
    max_ratio: Annotated[float, Field(gt=1)] = 4.0

    @model_validator(mode="after")
    def _beyond_the_clip(self) -> "TwoSided":
        if self.max_ratio <= 1 + self.clip_high:
            raise ValueError(f"max_ratio={self.max_ratio} is not above 1 + clip_high={1 + self.clip_high}")
        return self


class GSPO(_ProximalRatio):
    """PPO-clip on the geometric mean of a sequence's token ratios (2507.18071, and its bounds).

    The mean over tokens takes most of the spread out of the ratio, hence bounds that are so much tighter.
    """

    kind: Literal["gspo"] = "gspo"
    clip_low: ClipLow = 3e-4
    clip_high: PositiveFloat = 4e-4

    @property
    def mean_over(self) -> Aggregation:
        return self.aggregation or "seq_mean_token_mean"


class GSPOToken(_ProximalRatio):
    """GSPO with the sequence ratio as a constant and a gradient for each token of its own (2507.18071)."""

    kind: Literal["gspo_token"] = "gspo_token"
    clip_low: ClipLow = 3e-4
    clip_high: PositiveFloat = 4e-4

    @property
    def mean_over(self) -> Aggregation:
        return self.aggregation or "seq_mean_token_mean"


class SAPO(_ProximalRatio):
    """A soft gate 4/tau * sigmoid(tau (ratio - 1)) instead of a clip (2511.20347)."""

    kind: Literal["sapo"] = "sapo"
    tau_positive: PositiveFloat = Field(1.0, description="temperature of the gate where the advantage is positive")
    tau_negative: PositiveFloat = Field(1.05, description="and where it is negative")


class ReinforceIS(_OwnRatio):
    """REINFORCE with a truncated importance weight, capped at `max_ratio` (2505.24034)."""

    kind: Literal["reinforce_is"] = "reinforce_is"
    max_ratio: Annotated[float, Field(ge=1)] = 2.0


class CISPO(_OwnRatio):
    """REINFORCE with the ratio clipped to [min_ratio, max_ratio] as a constant (2506.13585; bounds of 2510.13786)."""

    kind: Literal["cispo"] = "cispo"
    min_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(0.0, description="the bound itself, not an offset from 1")
    max_ratio: Annotated[float, Field(gt=1)] = Field(5.0, description="the bound itself, not an offset from 1")


class TOPR(_OwnRatio):
    """Weight 1 where the advantage is positive, the completion's ratio up to max_ratio where negative (2503.14286)."""

    kind: Literal["topr"] = "topr"
    max_ratio: PositiveFloat = 1.0


class DPPOTV(_OwnRatio):
    """Ratio times advantage, without the tokens whose probability has moved too far already (2602.04879)."""

    kind: Literal["dppo_tv"] = "dppo_tv"
    max_rise: Fraction = Field(0.2, description="probability gained since sampling, where the advantage is positive")
    max_fall: Fraction = Field(0.2, description="probability lost since sampling, where it is negative")
    squared_log_ratio: NonNegativeFloat = Field(0.0, description="weight of (log ratio)^2 of all tokens")


AlgoConfig = Annotated[
    PPOClip | DualClip | TwoSided | GSPO | GSPOToken | SAPO | ReinforceIS | CISPO | TOPR | DPPOTV,
    Field(discriminator="kind"),
]


class EngineConfig(Section):
    """vLLM V1 engines, one Ray actor each. The four parity fixes are settings here and on by default.

    Each resolved value is read back from the engine's own config, compared with what is asked here, and logged.
    """

    count: PositiveInt = Field(1, description="engines")
    tensor_parallel: PositiveInt = Field(1, description="workers that share every layer of an engine")
    pipeline_parallel: PositiveInt = Field(1, description="workers that share the layers of an engine; GPU only")
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
    kv_policy: Literal["keep", "recompute", "recompute_at_lag"] = Field(
        "keep",
        description="fix 3: what a weight update does to the KV of running sequences; recompute: made anew by the new "
        "weights; recompute_at_lag: only when some of it is kv_max_lag versions old",
    )
    kv_max_lag: PositiveInt | None = Field(
        None, description="optimizer steps; with kv_policy=recompute_at_lag all KV in use is younger than this"
    )

    start_timeout_s: PositiveFloat = 600.0
    heartbeat_s: PositiveFloat = Field(2.0, description="seconds between two heartbeats of an engine")
    hang_timeout_s: PositiveFloat = Field(
        60.0, description="an engine that answers no heartbeat for so long is killed; after half of it, it gets no work"
    )
    max_restarts: NonNegativeInt = Field(3, description="of each engine; after that the run goes on without it")
    min_count: PositiveInt = Field(1, description="with fewer engines left the run ends (exit 4)")
    max_requeues: NonNegativeInt = Field(
        3, description="a group that one engine more than this has died of is dropped as errored"
    )

    @model_validator(mode="after")
    def _enough_engines(self) -> "EngineConfig":
        if self.min_count > self.count:
            raise ValueError(f"min_count={self.min_count} is more than count={self.count}")
        return self

    @model_validator(mode="after")
    def _kv_lag_is_for_its_policy(self) -> "EngineConfig":
        if self.kv_policy == "recompute_at_lag" and self.kv_max_lag is None:
            raise ValueError("kv_policy=recompute_at_lag needs kv_max_lag, the age in steps that KV never reaches")
        if self.kv_policy != "recompute_at_lag" and self.kv_max_lag is not None:
            raise ValueError(
                f"kv_max_lag={self.kv_max_lag} does nothing with kv_policy={self.kv_policy}; use recompute_at_lag"
            )
        return self

    @property
    def workers(self) -> int:
        """Processes of one engine that hold a part of the model, each with a GPU of its own where there are GPUs."""
        return self.tensor_parallel * self.pipeline_parallel


class LoraConfig(Section):
    """Low-rank adapters through peft instead of full weights; merged into the weights that engines get."""

    rank: NonNegativeInt = Field(0, description="0 = train all weights")
    alpha: PositiveFloat = Field(32.0, description="the adapters are scaled by alpha / rank")
    targets: list[str] = Field(["all-linear"], description="module names, or all-linear (all but the head)")


class TrainerConfig(Section):
    """DeepSpeed through accelerate; one Ray actor per rank."""

    ranks: PositiveInt = Field(1, description="trainer processes, one GPU each")
    lr: NonNegativeFloat = Field(1e-6, description="learning rate after the warm-up")
    warmup_steps: NonNegativeInt = 0
    schedule: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up")
    optimizer: Literal["adamw", "adam", "sgd"] = Field("adamw", description="sgd: momentum is betas[0]")
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.95),
        strict=False,  # YAML has lists only
    )
    eps: PositiveFloat = 1e-8
    max_grad_norm: PositiveFloat = 1.0
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="sharded over ranks: 1 optimizer state, 2 also gradients, 3 also weights; 0 nothing"
    )
    offload_optimizer: bool = Field(False, description="keep the optimizer state in host memory (ZeRO 1 to 3)")
    offload_parameters: bool = Field(False, description="keep the weights in host memory (ZeRO 3)")
    sequence_parallel: PositiveInt = Field(1, description="ranks that share each sequence (DeepSpeed Ulysses)")
    lora: LoraConfig = LoraConfig()
    micro_batch_tokens: PositiveInt = Field(16384, description="tokens packed into one forward pass")
    logprob_chunk: PositiveInt = Field(2048, description="tokens whose logits exist at one time")
    gradient_checkpointing: bool = False
    attention: Literal["auto", "sdpa", "varlen"] = Field(
        "auto", description="sdpa: sequence by sequence; varlen: torch's flash attention over packed rows, GPU only"
    )
    compile: bool = Field(False, description="torch.compile the decoder layers")
    max_skipped_steps: NonNegativeInt = Field(
        3, description="stop (exit 5) after more than this many non-finite steps in a row"
    )
    step_timeout_s: PositiveFloat = 1800.0
    start_timeout_s: PositiveFloat = 600.0
    pulse_s: PositiveFloat = Field(2.0, description="seconds between two looks at every rank's pulse")
    hang_timeout_s: PositiveFloat = Field(60.0, description="ranks are killed when one shows no pulse for so long")
    max_restarts: NonNegativeInt = Field(
        2, description="of the group of ranks, from the newest checkpoint; after that the run ends (exit 4)"
    )


class WeightsConfig(Section):
    """How and when new weights reach the engines."""

    backend: Literal["auto", "gloo", "nccl", "ipc"] = Field(
        "auto", description="auto: gloo on CPU, nccl between GPUs, ipc where trainer and engine share the only GPU"
    )
    every: PositiveInt = Field(1, description="optimizer steps between two updates")
    sync_mode: Literal["overlap", "blocking"] = Field(
        "overlap",
        description="overlap: the next step begins when the transport has a copy of the weights; blocking: when the "
        "engines serve them",
    )
    bucket_mb: PositiveInt = Field(256, description="size of one broadcast")
    shared_memory: bool = Field(
        True, description="gloo: engines of the trainer's node map the copy it sends from; false: broadcast to each"
    )
    timeout_s: PositiveFloat = Field(120.0, description="for one attempt at an update")
    attempts: PositiveInt = Field(3, description="at an update, each without the engines that died in the one before")


class AsyncConfig(Section):
    """How far generation may run ahead of training."""

    mode: Literal["async", "sync", "one_step_off"] = Field(
        "async",
        description="sync alternates generation and training; one_step_off generates a batch while the one before it "
        "trains, and updates weights between batches",
    )
    max_lag: NonNegativeInt | None = Field(
        None,
        description="bound on the lag of any trained token, in optimizer steps; null = 2 in async, 0 in sync, 1 in "
        "one_step_off",
    )

    @model_validator(mode="after")
    def _sync_has_no_lag(self) -> "AsyncConfig":
        if self.mode == "sync" and self.max_lag not in (None, 0):
            raise ValueError(f"mode=sync trains on-policy, which contradicts max_lag={self.max_lag}; use max_lag=null")
        if self.mode == "one_step_off" and self.max_lag not in (None, 1):
            raise ValueError(
                f"mode=one_step_off has a lag of 1, which contradicts max_lag={self.max_lag}; use max_lag=null"
            )
        return self

    @property
    def lag_bound(self) -> int:
        """The bound in force, in optimizer steps."""
        if self.max_lag is not None:
            return self.max_lag
        return {"sync": 0, "one_step_off": 1, "async": 2}[self.mode]

    @property
    def drains(self) -> bool:
        """Whether a weight update waits until no completion is being sampled."""
        return self.mode == "one_step_off"


class EvalConfig(Section):
    """Evaluation on held-out problems, always at one version."""

    at_start: bool = True
    at_end: bool = True
    every: NonNegativeInt = Field(0, description="optimizer steps between evaluations; 0 = only start and end")
    temperature: Annotated[float, Field(ge=0, le=2.0)] = Field(0.0, description="0 = greedy")
    samples: PositiveInt = Field(1, description="completions per problem; the largest k of pass@k")
    pass_reward: Annotated[float, Field(allow_inf_nan=False)] = Field(
        1.0, description="a completion with at least this reward passes"
    )
    engine: Literal["shared", "dedicated"] = Field(
        "shared",
        description="shared: by the engines that sample for training, no update happens meanwhile; dedicated: by one "
        "more engine, while training goes on",
    )

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
    pin_cores: bool = Field(
        False, description="CPU only, local cluster only: each engine and each trainer rank on cores of its own"
    )
    placement_timeout_s: PositiveFloat = Field(60.0, description="to wait for room for all processes (else exit 3)")
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


class CheckpointConfig(Section):
    """What a run can be resumed from: `<run_dir>/checkpoints/step_N`."""

    every: NonNegativeInt = Field(50, description="optimizer steps between checkpoints; 0 = none")
    sigterm_s: NonNegativeFloat = Field(
        20.0, description="seconds that SIGTERM leaves for the step in hand and a last checkpoint (exit 143); 0 = none"
    )
    keep_last: PositiveInt = Field(2, description="checkpoints that are kept")
    keep_best: bool = Field(False, description="keep the one with the best metric too")
    best_metric: str = Field("reward/mean", min_length=1, description="of the checkpoint's step, higher is better")
    export_every: NonNegativeInt = Field(
        0, description="optimizer steps between Hugging Face exports to <run_dir>/exports/step_N; 0 = at the end only"
    )


class WandbConfig(Section):
    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online when logged in, else offline"
    )
    project: str = Field("pipelinerl", min_length=1)
    entity: str | None = None


class JournalConfig(Section):
    """journal.jsonl, which is always written, and batches/: what a run can be checked against and replayed from."""

    batches: bool = Field(
        True,
        description="write what every trainer rank trains on to batches/, for pipelinerl replay: 4 bytes a token and 4 "
        "more for a sampled one, never pruned",
    )
    selection: Literal["stop", "warn", "off"] = Field(
        "warn", description="when trained samples part from generated ones in length or reward; stop: exit 5"
    )
    selection_window: PositiveInt = Field(16, description="optimizer steps that are compared")


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
    resume: str = Field(
        "auto",
        min_length=1,
        description="auto: go on from the newest checkpoint in run_dir, if there is one; never; or a checkpoint's path",
    )
    model: ModelConfig
    task: TaskConfig
    grading: GradingConfig = GradingConfig()
    reward: RewardConfig = RewardConfig()
    batch: BatchConfig = BatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    algo: AlgoConfig
    engine: EngineConfig = EngineConfig()
    trainer: TrainerConfig = TrainerConfig()
    weights: WeightsConfig = WeightsConfig()
    async_: AsyncConfig = Field(AsyncConfig(), alias="async")
    eval: EvalConfig = EvalConfig()
    parity: ParityConfig = ParityConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    cluster: ClusterConfig = ClusterConfig()
    metrics: MetricsConfig = MetricsConfig()
    journal: JournalConfig = JournalConfig()

    @model_validator(mode="after")
    def _sections_agree(self) -> "RunConfig":
        problems = list(_contradictions(self))
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def engines(self) -> int:
        """Engines of a training run: those that sample for training, and the one that only evaluates."""
        return self.engine.count + int(self.eval.engine == "dedicated")

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
    if config.async_.drains and config.weights.every > 1:
        found.append(
            f"async.mode={config.async_.mode} with weights.every={config.weights.every}: batches would be up to "
            f"{config.weights.every} steps old, not one; use every=1 or mode=async"
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
    if (config.engine.kv_max_lag or 0) > config.async_.lag_bound:
        found.append(
            f"engine.kv_max_lag={config.engine.kv_max_lag} is above async.max_lag={config.async_.lag_bound}: no KV in "
            "use gets that old; lower it, or use engine.kv_policy=keep and kv_max_lag=null"
        )
    if config.engine.cache_salt == "version" and not config.engine.prefix_caching:
        found.append("engine.cache_salt=version does nothing with engine.prefix_caching=false; use cache_salt=none")
    if config.engine.max_num_batched_tokens < config.engine.max_num_seqs:
        found.append(
            f"engine.max_num_batched_tokens={config.engine.max_num_batched_tokens} is smaller than "
            f"engine.max_num_seqs={config.engine.max_num_seqs}"
        )
    if config.cluster.device == "cpu" and config.weights.backend in ("nccl", "ipc"):
        found.append(
            f"weights.backend={config.weights.backend} needs GPUs, cluster.device=cpu has none; "
            "use weights.backend=auto"
        )
    if config.cluster.device == "cpu" and config.engine.pipeline_parallel > 1:
        found.append(
            f"engine.pipeline_parallel={config.engine.pipeline_parallel} with cluster.device=cpu: the CPU engine has "
            "no pipeline stages; use engine.pipeline_parallel=1, and tensor_parallel to use more cores"
        )
    if config.cluster.device == "cuda" and config.weights.backend == "gloo":
        found.append("weights.backend=gloo is the CPU transport, cluster.device=cuda wants nccl; use backend=auto")
    if config.cluster.device == "cpu":
        for name in ("attention_backend", "v2_model_runner"):
            if getattr(config.engine, name) is not None:
                found.append(f"engine.{name}={getattr(config.engine, name)} needs a GPU, cluster.device=cpu has none")
    if config.trainer.attention == "varlen":
        for key, value, needed in (
            ("cluster.device", config.cluster.device, "cuda"),
            ("model.dtype", config.model.dtype, "bfloat16"),
        ):
            if value not in (needed, "auto"):
                found.append(f"trainer.attention=varlen needs {key}={needed}, not {value}; use trainer.attention=sdpa")
    if config.trainer.compile and config.trainer.zero_stage == 3:
        found.append(
            "trainer.compile=true with trainer.zero_stage=3: weights are gathered by hooks inside the layers, which "
            "cannot be compiled; use zero_stage=2 or compile=false"
        )
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
    if config.batch.stream and config.algo.advantage in OF_THE_STEP:
        found.append(
            f"batch.stream=true with algo.advantage={config.algo.advantage}, which is made from the rewards of all "
            "groups of the step; use an advantage of the group (rloo, grpo, dr_grpo, maxrl) or stream=false"
        )
    if config.cluster.pin_cores and config.cluster.device == "cuda":
        found.append("cluster.pin_cores=true is for CPU runs, cluster.device=cuda; use pin_cores=false")
    if config.cluster.pin_cores and config.cluster.address != "local":
        found.append(
            f"cluster.pin_cores=true shares out the cores of one machine, cluster.address={config.cluster.address} "
            "may have more; use pin_cores=false"
        )
    found += _share_contradictions(config)
    found += _reward_contradictions(config)
    found += _offload_contradictions(config)
    found += _evaluation_contradictions(config)
    for key, limit in (
        ("trainer.step_timeout_s", config.trainer.step_timeout_s),
        ("weights.timeout_s", config.weights.timeout_s),
        ("engine.hang_timeout_s", config.engine.hang_timeout_s),
        ("trainer.hang_timeout_s", config.trainer.hang_timeout_s),
        ("engine.start_timeout_s", config.engine.start_timeout_s),  # of a restart
        ("trainer.start_timeout_s", config.trainer.start_timeout_s),
        ("grading.timeout_s", config.grading.timeout_s),
    ):
        if limit >= config.cluster.stall_timeout_s:
            found.append(
                f"{key}={limit:g} is not below cluster.stall_timeout_s={config.cluster.stall_timeout_s:g}, "
                "which would end the run first; raise stall_timeout_s"
            )
    return found


def _share_contradictions(config: RunConfig) -> "list[str]":
    """Ranks that could not be given their share of every update."""
    trainer, batch, found = config.trainer, config.batch, []
    if trainer.ranks % trainer.sequence_parallel:
        found.append(
            f"trainer.sequence_parallel={trainer.sequence_parallel} does not divide trainer.ranks={trainer.ranks}"
        )
    samples = batch.groups_per_step // batch.updates * batch.group_size
    if samples < trainer.ranks // trainer.sequence_parallel:
        of_updates = f" / batch.updates={batch.updates}" if batch.updates > 1 else ""
        found.append(
            f"batch.groups_per_step * batch.group_size{of_updates} = {samples} samples cannot feed "
            f"trainer.ranks={trainer.ranks}"
        )
    return found


def _reward_contradictions(config: RunConfig) -> "list[str]":
    """Shaping and KL that would do nothing, or that the advantage cannot take."""
    reward, kl, advantage, found = config.reward, config.algo.kl, config.algo.advantage, []
    if reward.overlong_buffer is not None and reward.overlong_buffer >= config.sampling.max_tokens:
        found.append(
            f"reward.overlong_buffer={reward.overlong_buffer} is not below sampling.max_tokens="
            f"{config.sampling.max_tokens}: completions of every length would be penalised"
        )
    if reward.overlong_buffer is None and reward.overlong_penalty != RewardConfig().overlong_penalty:
        found.append(
            f"reward.overlong_penalty={reward.overlong_penalty:g} does nothing with reward.overlong_buffer=null; "
            "set the buffer"
        )
    for name in ("reference", "offload"):
        if getattr(kl, name) and not kl.on:
            found.append(f"algo.kl.{name} does nothing with algo.kl.coef=0; set the coefficient")
    taken_off = {
        f"reward.overlong_buffer={reward.overlong_buffer}": reward.overlong_buffer is not None,
        f"reward.length_penalty={reward.length_penalty:g}": reward.length_penalty > 0,
        "algo.kl.place=reward": kl.on and kl.place == "reward",
    }
    why = {
        "maxrl": "makes rewards negative, and it needs rewards of 0 or more",
        "gdpo": "is no reward component of the task, and it reads nothing else",
    }
    if advantage in why:
        found += [f"{key} with algo.advantage={advantage} {why[advantage]}" for key, on in taken_off.items() if on]
    return found


def _offload_contradictions(config: RunConfig) -> "list[str]":
    """What DeepSpeed cannot keep in host memory, or not rightly."""
    trainer, found = config.trainer, []
    if trainer.offload_parameters and trainer.zero_stage != 3:
        found.append(
            f"trainer.offload_parameters=true with trainer.zero_stage={trainer.zero_stage}: only sharded weights "
            "can be kept in host memory; use zero_stage=3"
        )
    if trainer.offload_optimizer and trainer.zero_stage == 0:
        found.append(
            "trainer.offload_optimizer=true with trainer.zero_stage=0: only a sharded optimizer state can be kept in "
            "host memory; use zero_stage=3, or 1 or 2 in float32"
        )
    elif trainer.offload_optimizer and trainer.zero_stage != 3 and config.model.dtype == "bfloat16":
        found.append(
            f"trainer.offload_optimizer=true with trainer.zero_stage={trainer.zero_stage} and model.dtype=bfloat16: "
            "DeepSpeed then adds up gradients in bfloat16 and skips every step after a non-finite one; use zero_stage=3"
        )
    return found


def _evaluation_contradictions(config: RunConfig) -> "list[str]":
    """An engine for evaluations that has nothing to do, or whose results come too late."""
    evaluation, saved, found = config.eval, config.checkpoint, []
    if evaluation.engine == "shared":
        return []
    if not evaluation.at_start and not 0 < evaluation.every < config.steps:
        found.append(
            f"eval.engine=dedicated with eval.at_start=false and eval.every={evaluation.every}: no evaluation is due "
            "while training goes on, and the last version is evaluated by all engines; use eval.engine=shared"
        )
    if saved.every and saved.keep_best and saved.best_metric.startswith("eval/"):
        found.append(
            f"checkpoint.best_metric={saved.best_metric} with eval.engine=dedicated: the evaluation of a step ends "
            "after its checkpoint was made; use eval.engine=shared, or a metric of training"
        )
    return found
