"""What a parity probe found: the records between the probe, the verdict and the report.

A *case* is one configuration that was probed: the user's own (`CONFIGURED`), or one setting away from it. Its tokens
come from up to three *phases*, because an update can break what held before it:

    fresh        sampled and scored at version 0
    straddling   sequences in which an in-flight weight update fell; each token against the weights of its version
    after        the same prompts again, sampled after the update

N = tokens of a case, over all its phases.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from pipelinerl.types import BoolArray, FloatArray, IntArray

PHASES = ("fresh", "straddling", "after")
CONFIGURED = "configured"  # name of the case that is the user's own configuration
REFERENCE = "all_fixes"  # name of the case with all four fixes in force

Layer = Literal["semantic", "inference_path", "objective"]


@dataclass(frozen=True, slots=True, eq=False)
class Evidence:
    """The tokens of one case. Logprobs are in nats; differences are trainer minus engine throughout."""

    temperature: float  # of the configuration: sampling, and the trainer's scores
    engine: FloatArray  # [N]
    trainer: Mapping[float, FloatArray]  # temperature -> [N]; holds `temperature` at least
    phase: IntArray  # [N] index into PHASES
    sequence: IntArray  # [N] index of the completion, counted over all phases
    versions: IntArray  # [N] the version that sampled the token
    flips: BoolArray | None  # [N] engine and trainer have different most likely tokens; None when not asked
    completions: int  # sampled, whether they can be scored or not
    aborted: int  # of them, given up by the engine because of the update
    pause_s: float | None = None  # how long the update made generation stand still


@dataclass(frozen=True, slots=True)
class LagEvidence:
    """Tokens sampled at version 0, after `lag` real optimizer steps. The metrics are means over the tokens."""

    lag: int
    abs_log_ratio: float
    k3: float
    clip_rate: float

    @property
    def mean_abs(self) -> float:
        """`abs_log_ratio`, under its name in `Statistics`."""
        return self.abs_log_ratio


@dataclass(frozen=True, slots=True, eq=False)
class CaseResult:
    """One case: what it is, what it should show, and what it showed."""

    name: str
    what: str  # one line: what differs from the reference
    expect: str  # one line: what that should show
    setting: str  # the override that brings it about, e.g. "engine.logprobs_mode=raw_logprobs"; "" when there is none
    layer: Layer | None  # of the fault that the case puts in; None for the reference and the user's own
    evidence: Evidence | None  # None: it did not run
    reason: str = ""  # why it did not run
