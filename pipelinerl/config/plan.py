"""What a configuration comes to, before anything is started: `pipelinerl train --dry-run`."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelinerl.config.device import Device, gpu_count, gpus_needed, resolve_backend, resolve_device
from pipelinerl.config.footprint import Footprint, footprint
from pipelinerl.config.schema import Coefficient, JsonlTask, RunConfig


@dataclass(frozen=True, slots=True)
class ParityFix:
    """One of the four settings that make the engine's logprobs comparable with the trainer's."""

    name: str
    in_force: bool
    settings: str


@dataclass(frozen=True, slots=True)
class Plan:
    """Quantities derived from a configuration. Token counts are upper bounds, lag is in optimizer steps."""

    config: RunConfig
    device: Device
    backend: str
    gpus_needed: int  # 0 on CPU
    gpus_here: int
    samples_per_step: int
    sampled_tokens_per_step: int
    tokens_per_step: int  # prompts included
    lag_steps: int
    lag_samples: int
    groups_in_flight: int
    eval_versions: tuple[int, ...]
    parity: tuple[ParityFix, ...]
    footprint: Footprint | None


def plan(config: RunConfig, gpus: int | None = None) -> Plan:
    """Derive the plan; reads the local model directory's headers, starts nothing. `gpus` replaces what is found here.

    Raises: EnvironmentProblem when the model directory is there but damaged.
    """
    gpus = gpu_count() if gpus is None else gpus
    device = resolve_device(config, gpus)
    samples = config.batch.groups_per_step * config.batch.group_size
    lag = config.async_.lag_bound
    return Plan(
        config=config,
        device=device,
        backend=resolve_backend(config, device, gpus),
        gpus_needed=gpus_needed(config) if device == "cuda" else 0,
        gpus_here=gpus,
        samples_per_step=samples,
        sampled_tokens_per_step=samples * config.sampling.max_tokens,
        tokens_per_step=samples * config.engine.max_model_len,
        lag_steps=lag,
        lag_samples=lag * samples,
        groups_in_flight=(lag + 1) * config.batch.groups_per_step,
        eval_versions=eval_versions(config),
        parity=parity_fixes(config),
        footprint=footprint(config),
    )


def eval_versions(config: RunConfig) -> tuple[int, ...]:
    """The versions that are evaluated, ascending, each once."""
    every = config.eval.every
    due = set(range(every, config.steps + 1, every)) if every else set()
    if config.eval.at_start:
        due.add(0)
    if config.eval.at_end:
        due.add(config.steps)
    return tuple(sorted(due))


def parity_fixes(config: RunConfig) -> tuple[ParityFix, ...]:
    """The four fixes and whether this configuration has them in force."""
    engine, model = config.engine, config.model
    no_old_kv = not engine.prefix_caching or engine.cache_salt == "version"
    defaults = no_old_kv and not engine.async_scheduling and engine.generation_config == "vllm"
    return (
        ParityFix(
            "1 logprob semantics",
            engine.logprobs_mode == "processed_logprobs",
            f"engine.logprobs_mode={engine.logprobs_mode}",
        ),
        ParityFix(
            "2 runtime defaults",
            defaults,
            f"prefix_caching={_on(engine.prefix_caching)}{' (per version)' if engine.cache_salt == 'version' else ''}, "
            f"async_scheduling={_on(engine.async_scheduling)}, "
            f"chunked_prefill={_on(engine.chunked_prefill)}, generation_config={engine.generation_config}",
        ),
        ParityFix(
            "3 in-flight update",
            engine.update_pause == "keep" and not engine.update_clear_cache,
            f"engine.update_pause={engine.update_pause}, update_clear_cache={_on(engine.update_clear_cache)}",
        ),
        ParityFix("4 fp32 lm_head", model.head_dtype == "float32", f"model.head_dtype={model.head_dtype}"),
    )


def render(plan: Plan) -> str:
    """The plan as text for a person."""
    lines = [f"plan of {plan.config.name} (nothing is started)"]
    for title, rows in _tables(plan):
        lines += ["", title, *(f"  {label:<22} {value}" for label, value in rows)]
    return "\n".join(lines)


Rows = list[tuple[str, str]]


def _tables(plan: Plan) -> Iterator[tuple[str, Rows]]:
    yield "run", _run_rows(plan)
    yield "each step", _step_rows(plan)
    yield "objective", _objective_rows(plan.config)
    yield "asynchrony", _lag_rows(plan)
    yield "who sits where", _device_rows(plan)
    yield "memory (without activations)", _memory_rows(plan)
    yield "parity", [(fix.name, f"{'in force' if fix.in_force else 'OFF':<9} {fix.settings}") for fix in plan.parity]


def _run_rows(plan: Plan) -> Rows:
    config = plan.config
    task = f"{config.task.kind}"
    if isinstance(config.task, JsonlTask):
        task += f" {config.task.path}{'' if Path(config.task.path).is_file() else ' (not here)'}"
    versions = plan.eval_versions
    shown = ", ".join(map(str, versions)) if len(versions) <= 6 else f"{versions[0]}, {versions[1]}, ... {versions[-1]}"
    return [
        ("run directory", config.run_dir or f"outputs/{config.name}-<time>"),
        ("model", f"{config.model.path} in {config.model.dtype}"),
        ("task", task),
        ("steps", f"{config.steps:,} at lr {config.trainer.lr:g}"),
        ("checkpoints", _checkpoints(config)),
        ("evaluations", f"{len(versions)} (at version {shown})" if versions else "none"),
    ]


def _checkpoints(config: RunConfig) -> str:
    saved = config.checkpoint
    if not saved.every:
        return "none (checkpoint.every=0): a run that is killed is lost"
    kept = f"the last {saved.keep_last}{f' and the best by {saved.best_metric}' if saved.keep_best else ''}"
    return f"every {saved.every} steps, {kept}; resume={config.resume}"


def _step_rows(plan: Plan) -> Rows:
    batch = plan.config.batch
    return [
        ("samples", f"{plan.samples_per_step:,} = {batch.groups_per_step} groups x {batch.group_size} completions"),
        ("sampled tokens", f"at most {plan.sampled_tokens_per_step:,} = samples x {plan.config.sampling.max_tokens:,}"),
        ("tokens with prompts", f"at most {plan.tokens_per_step:,} = samples x {plan.config.engine.max_model_len:,}"),
        ("weight update", f"every {plan.config.weights.every} step(s) by {plan.backend}"),
    ]


def _objective_rows(config: RunConfig) -> Rows:
    algo, batch = config.algo, config.batch
    proximal = getattr(algo, "proximal", "rollout")
    on = {name: value for name, value in algo.correction.model_dump(mode="json").items() if value is not None}
    shaping = [name for name in ("weights", "overlong_buffer", "length_penalty") if getattr(config.reward, name)]
    rows = [
        ("loss", f"{algo.kind}, aggregated by {algo.mean_over}"),
        ("advantage", f"{algo.advantage} of the task's reward{' with ' if shaping else ''}{', '.join(shaping)}"),
        ("proximal policy", PROXIMAL[proximal]),
        ("corrections", ", ".join(f"{name} {value}" for name, value in on.items()) or "none"),
        ("KL", _kl(config)),
        ("entropy bonus", _coefficient(algo.entropy)),
        ("optimizer updates", f"{batch.updates} per step, of {batch.groups_per_step // batch.updates} groups each"),
    ]
    if batch.zero_variance == "refill":
        rows.append(("equal rewards", "such groups are refilled"))
    if algo.mask_truncated:
        rows.append(("truncated", "in the baseline, not in the loss"))
    return rows


PROXIMAL = {
    "rollout": "the engine's logprobs (no extra forward pass)",
    "recompute": "recomputed at the start of the step (one more forward pass)",
    "interpolate": "interpolated by lag (no extra forward pass)",
}


def _kl(config: RunConfig) -> str:
    kl = config.algo.kl
    if not kl.on:
        return "none"
    where = f", {'in host memory' if kl.offload else 'beside the policy'}"
    return f"{kl.estimator} in the {kl.place}, coef {_coefficient(kl)}; to {kl.reference or config.model.path}{where}"


def _coefficient(term: Coefficient) -> str:
    if not term.on:
        return "none"
    if term.final_coef is None:
        return f"{term.coef:g}"
    return f"{term.coef:g} to {term.final_coef:g} over {term.anneal_steps or 'all'} steps"


def _lag_rows(plan: Plan) -> Rows:
    config = plan.config
    slots = config.engine.count * config.engine.max_num_seqs
    in_flight = plan.groups_in_flight * config.batch.group_size
    return [
        ("mode", config.async_.mode),
        ("lag bound", f"{plan.lag_steps} step(s) = {plan.lag_samples:,} samples"),
        ("groups in flight", f"at most {plan.groups_in_flight:,} = (lag + 1) x {config.batch.groups_per_step}"),
        ("decoding together", f"at most {min(slots, in_flight):,} sequences, the engines have {slots:,} slots"),
    ]


def _device_rows(plan: Plan) -> Rows:
    config = plan.config
    engines, width, ranks = config.engine.count, config.engine.tensor_parallel, config.trainer.ranks
    if plan.device == "cpu":
        return [
            ("device", "cpu"),
            ("engines", f"{engines} process(es) of {width} core group(s), vLLM's CPU build"),
            ("trainer", f"{ranks} rank(s), gloo"),
        ]
    local = config.cluster.address == "local"
    here = f"this machine has {plan.gpus_here}" if local else "of the cluster that is joined"
    return [
        ("device", "cuda"),
        ("engines", f"{engines} x TP {width} = {engines * width} GPU(s)"),
        ("trainer", f"{ranks} rank(s) = {ranks} GPU(s), ZeRO {config.trainer.zero_stage}"),
        ("GPUs needed", f"{plan.gpus_needed}; {here}"),
    ]


def _memory_rows(plan: Plan) -> Rows:
    size = plan.footprint
    if size is None:
        return [("parameters", f"unknown: model not local ({plan.config.model.path})")]
    cache = plan.config.engine.kv_cache_mb
    rows = [
        ("parameters", f"{size.parameters:,}"),
        ("an engine", f"weights {_size(size.engine_weights)}, over {plan.config.engine.tensor_parallel} device(s)"),
        ("KV cache", f"{_size(size.kv_per_token)} a token" if size.kv_per_token else "unknown"),
        (
            "a trainer rank",
            f"{_size(size.trainer_total)} = weights {_size(size.trainer_weights)} + gradients "
            f"{_size(size.trainer_gradients)} + optimizer {_size(size.trainer_optimizer)}",
        ),
    ]
    if cache and size.kv_per_token:
        rows[2] = ("KV cache", f"{rows[2][1]}; {cache} MB hold {cache * 2**20 // size.kv_per_token:,} tokens")
    return rows


def _size(count: int) -> str:
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B"


def _on(value: bool) -> str:
    return "on" if value else "off"
