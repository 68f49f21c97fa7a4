"""The records that flow through a run, in the order in which they come into being.

    Problem -> Completion -> Turn -> Rollout -> RolloutGroup -> (advantages) -> TrainSample -> RankBatch -> StepResult

All are small frozen dataclasses of numpy arrays and scalars: picklable, free of torch, cheap to import.

Shape legend:  P = tokens of a turn's new context, C = tokens of a completion, T = tokens of a whole rollout.

A *version* counts optimizer steps: version 0 is the model the run started from, version v the model after v steps.
The *lag* of a token is the version that trains on it minus the version that sampled it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int32]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]

LAG_BUCKETS = 9  # of metrics by the lag of a token: lag 0 to 7, and 8 or more


class Outcome(StrEnum):
    """How an episode ended. Only a scored outcome carries a reward that means something."""

    OK = "ok"
    TRUNCATED = "truncated"  # ran into the token limit; scored on what there is
    ENV_ERROR = "env_error"  # the environment or the grader raised
    VERIFIER_TIMEOUT = "verifier_timeout"  # grading exceeded its time and was killed
    PROMPT_TOO_LONG = "prompt_too_long"  # engine.max_model_len has no room for a completion; nothing was sampled
    INFRA_ABORT = "infra_abort"  # the engine gave the request up
    BAD_LOGPROB = "bad_logprob"  # the engine returned a logprob that is not a finite number

    scored: bool
    """True when the reward may enter baseline and loss; the others are masked out and counted."""

    def __init__(self, value: str) -> None:
        self.scored = value in ("ok", "truncated")  # kept, because it is asked a dozen times of every rollout


@dataclass(frozen=True, slots=True)
class Problem:
    """One item of a task, e.g. `Problem("train/17", {"digits": "481503", "answer": "013458"})`."""

    id: str
    data: Mapping[str, Any]
    completion_tokens: int | None = None  # benchmarks: so many are sampled, up to the limit, past any end token


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Tokens `[start, end)` of a completion were sampled by the weights of `version`."""

    version: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What the engine sampled for one prompt, stop token included."""

    tokens: IntArray  # [C]
    logprobs: FloatArray  # [C] of the distribution that was sampled from (temperature applied), nats
    spans: tuple[VersionSpan, ...]  # in order, without gaps, covering [0, C)
    finish_reason: str  # "stop", "length" or "abort"
    text: str
    argmax: IntArray | None = None  # [C] the engine's most likely token at each place; only a parity probe asks for it
    kv_from: tuple[int, ...] = ()  # ascending, starts of spans: just before it sampled this token, an update had the KV
    # of all tokens before it made anew

    def __post_init__(self) -> None:
        assert self.tokens.shape == self.logprobs.shape, (self.tokens.shape, self.logprobs.shape)
        ends = [0] + [span.end for span in self.spans]
        assert [span.start for span in self.spans] == ends[:-1] and ends[-1] == len(self.tokens), self.spans
        assert {*self.kv_from} <= {span.start for span in self.spans[1:]}, (self.kv_from, self.spans)


@dataclass(frozen=True, slots=True)
class Turn:
    """New context (the first turn's is the prompt) and the completion that followed it."""

    context: IntArray  # [P]
    completion: Completion


@dataclass(frozen=True, slots=True)
class Rollout:
    """One finished episode. `reward` is the sum that is trained on; `components` are its named parts."""

    turns: tuple[Turn, ...]
    reward: float
    outcome: Outcome
    components: Mapping[str, float] = field(default_factory=dict)
    prompt_text: str = ""
    detail: str = ""  # why, when the outcome is not ok

    @property
    def prompt_len(self) -> int:
        return len(self.turns[0].context) if self.turns else 0

    @property
    def completion_len(self) -> int:
        """Sampled tokens over all turns."""
        return sum(len(turn.completion.tokens) for turn in self.turns)

    @property
    def total_len(self) -> int:
        return sum(len(turn.context) + len(turn.completion.tokens) for turn in self.turns)


@dataclass(frozen=True, slots=True)
class RolloutGroup:
    """The completions of one prompt: the payload that goes from a rollout worker to a trainer rank."""

    id: int  # admission number, counted from 0 over the whole run
    problem_id: str
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class TurnMeta:
    """Who sampled a turn, in run lengths: `runs=((4, 30), (5, 12))` is 30 tokens by version 4 and then 12 by 5."""

    context: int  # P
    runs: tuple[tuple[int, int], ...]  # (version, tokens), in order
    kv_from: tuple[int, ...] = ()  # as of the completion

    @classmethod
    def of(cls, turn: Turn) -> "TurnMeta":
        runs = tuple((span.version, span.end - span.start) for span in turn.completion.spans)
        return cls(len(turn.context), runs, turn.completion.kv_from)


@dataclass(frozen=True, slots=True)
class RolloutMeta:
    """What the driver sees of one rollout: everything but the token arrays."""

    reward: float
    outcome: Outcome
    components: Mapping[str, float]
    total_len: int
    prompt_len: int
    completion_len: int
    tokens_by_version: Mapping[int, int]  # version -> number of tokens it sampled
    detail: str = ""
    turns: tuple[TurnMeta, ...] = ()

    @classmethod
    def of(cls, rollout: Rollout) -> "RolloutMeta":
        counts: dict[int, int] = {}
        for turn in rollout.turns:
            for span in turn.completion.spans:
                counts[span.version] = counts.get(span.version, 0) + span.end - span.start
        return cls(
            reward=rollout.reward,
            outcome=rollout.outcome,
            components=dict(rollout.components),
            total_len=rollout.total_len,
            prompt_len=rollout.prompt_len,
            completion_len=rollout.completion_len,
            tokens_by_version=counts,
            detail=rollout.detail,
            turns=tuple(map(TurnMeta.of, rollout.turns)),
        )


@dataclass(frozen=True, slots=True)
class GroupMeta:
    """What the driver sees of a group."""

    id: int
    problem_id: str
    worker: int  # index of the rollout worker that made it
    rollouts: tuple[RolloutMeta, ...]
    seconds: float  # from the call to the last reward

    @property
    def scored(self) -> int:
        return sum(meta.outcome.scored for meta in self.rollouts)


@dataclass(frozen=True, slots=True)
class FleetEvent:
    """Something that happened to an engine, for a person, the journal and the metrics."""

    kind: str  # "requeued", "suspect", "lost", "restarted", "healthy" or "retired"
    engine: int
    text: str
    group_id: int | None = None  # ticket of a requeued group of training


@dataclass(frozen=True, slots=True)
class TrainSample:
    """One rollout as the trainer sees it. Position t holds token t; logprobs and versions belong to token t."""

    tokens: IntArray  # [T]
    loss_mask: BoolArray  # [T] True where the policy sampled the token
    logprobs: FloatArray  # [T] engine logprob where loss_mask, else 0
    versions: IntArray  # [T] sampling version where loss_mask, else -1
    advantage: float
    weight: float = 1.0  # of the loss of each sampled token in the loss of the step


@dataclass(frozen=True, slots=True)
class SampleRef:
    """Names a rollout (`group` indexes the payloads that are sent along), its advantage and its share in the loss.

    The loss of an optimizer update is the sum over samples of `weight` times the sum of the sample's token losses; what
    it is a mean over, and over all ranks and micro-batches, is in the weights (algo/aggregation.py).
    """

    group: int
    rollout: int
    advantage: float
    length: int  # total_len
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class RankBatch:
    """The work of one trainer rank in one optimizer update. All ranks have the same number of micro-batches."""

    micro_batches: tuple[tuple[SampleRef, ...], ...]  # an empty one is a dummy that only keeps ranks in step
    kl_to_go: float = 0.0  # taken off a token's advantage, times the sum of k1 from that token to its sequence's end


@dataclass(frozen=True, slots=True)
class SampleKL:
    """k1 = log(engine/reference) of the T sampled tokens of a rollout, nats; K_t is its sum from token t to the end.

    What `algo.kl.place=reward` needs: the driver never sees token arrays.
    """

    group: int  # as in SampleRef
    rollout: int
    total: float  # K_0
    to_go_sum: float  # sum of K_t over the tokens
    to_go_squares: float  # sum of K_t^2


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a trainer rank reports of an optimizer step; the same on all ranks."""

    version: int  # after the step
    metrics: Mapping[str, float]
    applied: bool  # False: loss or gradient was not finite and the weights are unchanged


@dataclass(frozen=True, slots=True)
class ScoredSequence:
    """One completion, scored by the engine that sampled it and by the trainer with the weights of each token's version.

    C = its sampled tokens; logprobs are in nats.
    """

    engine: FloatArray  # [C] as the engine returned them
    trainer: Mapping[float, FloatArray]  # temperature -> [C]
    versions: IntArray  # [C] the version that sampled the token
    flips: (
        BoolArray | None
    )  # [C] True where the two have different most likely tokens; None when the engine's is unknown


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """How the trainer is to score completions.

    A probe knows two sets of weights: the trainer's own, and the same nudged (see trainer/nudge.py). `nudged` says for
    each version which of them it was.
    """

    temperatures: tuple[float, ...]
    nudged: Mapping[int, bool]  # version -> True when its weights were the nudged ones
    kv: str = "recorded"  # what updates did to the KV of a running sequence: "recorded" (as `Completion.kv_from` says),
    # or what would have been had they always kept it ("keep") or had it made anew ("recompute")
    head: str = "served"  # "served": the weight the engine has; "checkpoint": that of the checkpoint, in float32
    head_dtype: str | None = None  # of the projection; None = that of the trainer's configuration
