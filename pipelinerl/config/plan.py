"""What a configuration comes to, before anything is started. `pipelinerl plan` shows it with the hardware."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipelinerl.config.quantity import in_bytes
from pipelinerl.config.schema import Coefficient, EngineConfig, JsonlTask, RunConfig


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
    backend: str
    samples_per_step: int
    sampled_tokens_per_step: int
    tokens_per_step: int  # prompts included
    lag_steps: int
    lag_samples: int
    groups_in_flight: int
    eval_versions: tuple[int, ...]
    parity: tuple[ParityFix, ...]


def plan(config: RunConfig, backend: str) -> Plan:
    """Derive the plan, where weights travel by `backend`."""
    samples = config.batch.groups_per_step * config.batch.group_size
    lag = config.async_.lag_bound
    return Plan(
        config=config,
        backend=backend,
        samples_per_step=samples,
        sampled_tokens_per_step=samples * config.sampling.max_tokens,
        tokens_per_step=samples * config.engine.max_model_len,
        lag_steps=lag,
        lag_samples=lag * samples,
        groups_in_flight=(lag + 1) * config.batch.groups_per_step,
        eval_versions=eval_versions(config),
        parity=parity_fixes(config),
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
            engine.update_pause == "keep" and engine.kv_policy == "keep",
            f"engine.update_pause={engine.update_pause}, kv_policy={_kv_policy(engine)}",
        ),
        ParityFix("4 fp32 lm_head", model.head_dtype == "float32", f"model.head_dtype={model.head_dtype}"),
    )


def _kv_policy(engine: EngineConfig) -> str:
    return engine.kv_policy if engine.kv_max_lag is None else f"{engine.kv_policy} {engine.kv_max_lag}"


Rows = list[tuple[str, str]]


def tables(plan: Plan) -> Iterator[tuple[str, Rows]]:
    """Titles, and rows of a label and a text."""
    yield "run", _run_rows(plan)
    yield "each step", _step_rows(plan)
    yield "objective", _objective_rows(plan.config)
    yield "asynchrony", _lag_rows(plan)
    yield "parity", [(fix.name, f"{'in force' if fix.in_force else 'OFF':<9} {fix.settings}") for fix in plan.parity]


def _run_rows(plan: Plan) -> Rows:
    config = plan.config
    task = f"{config.task.kind}"
    if isinstance(config.task, JsonlTask):
        task += f" {config.task.path}{'' if Path(config.task.path).is_file() else ' (not here)'}"
    versions = plan.eval_versions
    shown = ", ".join(map(str, versions)) if len(versions) <= 6 else f"{versions[0]}, {versions[1]}, ... {versions[-1]}"
    by = ", beside training on one more engine" if config.eval.engine == "dedicated" else ""
    return [
        ("run directory", config.run_dir or f"outputs/{config.name}-<time>"),
        ("model", f"{config.model.path} in {config.model.dtype}"),
        ("task", task),
        ("steps", f"{config.steps:,} at lr {config.trainer.lr:g}"),
        ("checkpoints", _checkpoints(config)),
        ("recorded batches", _recorded(plan)),
        ("evaluations", f"{len(versions)} (at version {shown}){by}" if versions else "none"),
    ]


def _recorded(plan: Plan) -> str:
    if not plan.config.journal.batches:
        return "none (journal.batches=false): the run cannot be replayed"
    most = 4 * plan.tokens_per_step + 4 * plan.sampled_tokens_per_step
    return f"at most {in_bytes(most)} a step, never pruned (4 bytes a token, 4 more a sampled one)"


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
        *([("training", "of a step begins with the groups that are ready")] if batch.stream else []),
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


def _on(value: bool) -> str:
    return "on" if value else "off"
