"""Layer 2: the logprobs mean the same, but engine and trainer do not compute the same. Told apart by phase.

fresh fails        precision or kernels: no update has happened yet.
after fails        the weights did not arrive as they were sent, or the KV cache outlived them.
straddling fails   only what happens inside a sequence is wrong: how the update treats running requests.
aborted            an update threw sampled tokens away, however good the logprobs of the others are.
"""

from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.findings import Finding, Gain, percent
from pipelinerl.parity.limits import Limits, exceeded
from pipelinerl.parity.results import Evidence
from pipelinerl.parity.statistics import Measurement


def execution(
    measured: Measurement, reference: Measurement | None, config: RunConfig, limits: Limits
) -> Finding | None:
    """The first phase beyond the limits, and what is to blame; None when all phases that have tokens are within them.

    `reference` is the same configuration with all fixes in force, where it was measured. A deviating setting is blamed
    only if the reference does better, and without a reference on suspicion.
    """
    for phase, blame in (("fresh", _kernels), ("after", _update), ("straddling", _running_requests)):
        found = measured.phases.get(phase)
        if found is None or not (beyond := exceeded(found, limits)):
            continue
        cause, advice = blame(config)
        fixed = reference.phases.get(phase) if reference else None
        if fixed and exceeded(fixed, limits):
            cause, advice = f"with all four fixes in force it is {fixed.mean_abs:.2g} too", LOOK_CLOSER
        better = fixed or (None if phase == "fresh" else measured.phases.get("fresh"))
        text = f"{phase}: {', '.join(beyond.values())}: {cause}"
        return Finding("inference_path", text, advice, Gain(found, better) if better else None)
    return None


def thrown_away(evidence: Evidence, config: RunConfig) -> Finding | None:
    """Completions that the update aborted; None when there are none."""
    if not evidence.aborted:
        return None
    share = percent(evidence.aborted / evidence.completions)
    text = f"the update aborted {evidence.aborted} of {evidence.completions} completions ({share}): their work is lost"
    if config.engine.update_pause == "keep":
        return Finding("inference_path", text, f"see logs/engine_0.log: {share} aborted despite update_pause=keep")
    return Finding("inference_path", text, f"engine.update_pause=keep: {share} -> 0% of the completions aborted")


LOOK_CLOSER = "pipelinerl parity --ablate switches one setting at a time, --bisect names the first layer that differs"


def _kernels(config: RunConfig) -> tuple[str, str]:
    """Cause and advice. A deviation from the fixes comes first; then whatever else computes in another way."""
    engine, model = config.engine, config.model
    if model.head_dtype != "float32":
        return f"model.head_dtype={model.head_dtype} rounds the logits", "model.head_dtype=float32"
    if engine.async_scheduling:
        return "engine.async_scheduling=true", "engine.async_scheduling=false"
    suspects = [f"model.dtype={model.dtype}", f"engine.attention_backend={engine.attention_backend or 'null'}"]
    if not engine.enforce_eager:
        suspects.append("compilation and CUDA graphs (engine.enforce_eager=false)")
    if engine.tensor_parallel > 1:
        suspects.append(f"engine.tensor_parallel={engine.tensor_parallel}")
    return f"precision or kernels before any update; suspects: {', '.join(suspects)}", LOOK_CLOSER


def _update(config: RunConfig) -> tuple[str, str]:
    if config.engine.prefix_caching and config.engine.cache_salt == "none":
        return (
            "fresh holds, so prompts attend to KV of old weights (engine.prefix_caching=true without a salt)",
            "engine.prefix_caching=false, or engine.cache_salt=version",
        )
    return (
        "fresh holds, so the engine does not hold the weights that were sent (a tied lm_head, a fused parameter)",
        "look at the update path (weights.backend, parameters of the manifest)"
        if config.parity.canary
        else "parity.canary=true names what did not arrive",
    )


def _running_requests(config: RunConfig) -> tuple[str, str]:
    engine = config.engine
    cause = "only sequences in which an update fell differ"
    if engine.kv_policy != "keep":
        return f"{cause}: their KV is recomputed (engine.kv_policy={engine.kv_policy})", "engine.kv_policy=keep"
    if engine.update_pause != "keep":
        return f"{cause} (engine.update_pause={engine.update_pause})", "engine.update_pause=keep"
    if engine.async_scheduling:
        return f"{cause}: a step in flight may bear the new version", "engine.async_scheduling=false"
    return (
        f"{cause}: their versions or their KV are not what engine.update_pause=keep promises",
        "look at the update path; until then engine.update_pause=wait lets no update fall into a sequence",
    )
