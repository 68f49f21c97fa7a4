"""Evidence made by hand: `by_hand` from given differences, `sampled` from two softmaxes and a sampler."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipelinerl.config.schema import RunConfig
from pipelinerl.parity.results import CONFIGURED, PHASES, CaseResult, Evidence, Layer

VOCABULARY = 32
SEQUENCES, LENGTH = 16, 40  # of each phase; below 2,048 tokens in all, torch starts no threads
BF16_NOISE = 0.03  # of a logit: mean |Delta| 0.02 nats


def run_config(**sections: Mapping[str, Any]) -> RunConfig:
    """A bfloat16 run at temperature 0.7 with PPO-clip, all fixes in force, but for what is given."""
    base: dict[str, dict[str, Any]] = {
        "model": {"path": "a-model", "dtype": "bfloat16"},
        "task": {"kind": "sort"},
        "algo": {"kind": "ppo_clip"},
        "sampling": {"temperature": 0.7},
    }
    return RunConfig.model_validate(base | {name: base.get(name, {}) | dict(given) for name, given in sections.items()})


def by_hand(
    differences: Sequence[float],
    sequence: Sequence[int] | None = None,
    phase: Sequence[int] | None = None,
    engine: float = -1.0,
    flips: Sequence[bool] | None = None,
    **others: Any,
) -> Evidence:
    """Tokens with the given Delta at temperature 1; each a sequence of its own, fresh, unless told otherwise."""
    count = len(differences)
    mu = np.full(count, engine, np.float32)
    fields = {
        "temperature": 1.0,
        "engine": mu,
        "trainer": {1.0: mu + np.array(differences, np.float32)},
        "phase": np.array(phase if phase is not None else [0] * count, np.int32),
        "sequence": np.array(sequence if sequence is not None else range(count), np.int32),
        "versions": np.zeros(count, np.int32),
        "flips": None if flips is None else np.array(flips, np.bool_),
        "completions": count,
        "aborted": 0,
    }
    return Evidence(**(fields | others))


def sampled(
    noise: float | Mapping[str, float] = BF16_NOISE,
    *,
    temperature: float = 0.7,
    returned_at: float | None = None,
    top_p: float = 1.0,
    shift: float = 0.0,
    phases: Sequence[str] = PHASES,
    seed: int = 0,
    **others: Any,
) -> Evidence:
    """An engine that samples at `temperature`, and a trainer whose logits differ by Gaussian noise.

    Args:
        noise: standard deviation of the difference of a logit, for all phases or by phase (0.03 elsewhere).
        returned_at: temperature of the logprobs that the engine returns; None = that of sampling.
        top_p: of the engine's sampler, which renormalises.
        shift: added to the engine's logprobs, nats.
    """
    random = np.random.default_rng(seed)
    per_phase = SEQUENCES * LENGTH
    count = len(phases) * per_phase
    levels = [noise.get(phase, BF16_NOISE) if isinstance(noise, Mapping) else noise for phase in phases]
    logits = random.normal(0, 2, (count, VOCABULARY))
    trainer = logits + np.repeat(levels, per_phase)[:, None] * random.normal(0, 1, logits.shape)
    policy = _truncated(_log_softmax(logits / temperature), top_p)
    token = (policy + random.gumbel(size=policy.shape)).argmax(1)
    returned = policy if returned_at is None else _log_softmax(logits / returned_at)

    def chosen(logprobs: np.ndarray) -> np.ndarray:
        return logprobs[np.arange(count), token].astype(np.float32)

    factors = (0.5, 0.8, 0.9, 1.1, 1.25, 1.5)
    temperatures = {temperature, 1.0, temperature**2, *(temperature * factor for factor in factors)}
    fields = {
        "temperature": temperature,
        "engine": chosen(returned) + np.float32(shift),
        "trainer": {t: chosen(_log_softmax(trainer / t)) for t in sorted(temperatures)},
        "phase": np.repeat([PHASES.index(phase) for phase in phases], per_phase).astype(np.int32),
        "sequence": np.repeat(np.arange(len(phases) * SEQUENCES), LENGTH).astype(np.int32),
        "versions": np.repeat([PHASES.index(phase) for phase in phases], per_phase).astype(np.int32),
        "flips": logits.argmax(1) != trainer.argmax(1),
        "completions": len(phases) * SEQUENCES,
        "aborted": 0,
    }
    return Evidence(**(fields | others))


def case(evidence: Evidence | None, name: str = CONFIGURED, layer: Layer | None = None, reason: str = "") -> CaseResult:
    """A case with nothing but its evidence, and words enough to print."""
    return CaseResult(name, f"what {name} is", f"what {name} shows", f"set.{name}=true", layer, evidence, reason)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def _truncated(logprobs: np.ndarray, top_p: float) -> np.ndarray:
    """Renormalised over the fewest tokens that hold `top_p` of the mass; -inf elsewhere."""
    order = np.argsort(-logprobs, 1)
    mass = np.cumsum(np.exp(np.take_along_axis(logprobs, order, 1)), 1)
    dropped = np.zeros_like(logprobs, np.bool_)
    np.put_along_axis(dropped, order[:, 1:], mass[:, :-1] >= top_p, 1)
    kept = np.where(dropped, -np.inf, logprobs)
    return kept - np.log(np.exp(kept).sum(1, keepdims=True))
