"""The trainer's logprobs of completions, each token with the weights of the version that sampled it.

When an update to other weights falls into a completion, the engine either went on with the keys and values that it had,
or computed all of them anew. So a completion falls into *segments*, each of which starts with a prefill of everything
before it: at the start of the turn, and wherever the KV was made anew. `ScoreRequest.kv` says where that is:

    recorded    where the engine did so (`Completion.kv_from`)
    keep        nowhere
    recompute   at every update: a token's logprob is that of a full forward pass with its version's weights

A segment is replayed exactly: the old weights run the positions before an update, the new ones the rest, on the old
ones' KV. Position p predicts token p + 1, so the first token of a span comes from the position before it, which the
span's own weights ran. The whole context of a segment, earlier turns included, counts as prefilled by the weights that
sampled its first token. Two rare things that an engine may do are not replayed: an update
between the chunks of a chunked prefill, and a sequence that is preempted and recomputed after an update.

T = tokens of a rollout, C = those of them that were sampled, K = temperatures.
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.cache_utils import DynamicCache

from pipelinerl.batch.samples import train_sample
from pipelinerl.trainer.head_weight import HeadWeight
from pipelinerl.trainer.model import PolicyModel
from pipelinerl.trainer.nudge import Weights
from pipelinerl.types import Completion, Rollout, ScoredSequence, ScoreRequest

AT_ONCE = 32  # sequences in replay, whose KV is held while the weights change

Indices = NDArray[np.int64]


@torch.no_grad()
def score_completions(
    policy: PolicyModel, rollouts: Iterable[Rollout], request: ScoreRequest, weights: Weights
) -> list[ScoredSequence]:
    """One result for each rollout that has a sampled token, in their order, computed as training computes it.

    `weights` belongs to the policy; it is left as it was. Raises EnvironmentProblem when the head that the request
    names cannot be had.
    """
    assert request.kv in ("recorded", "keep", "recompute"), request.kv
    sequences = [_Sequence(rollout, request) for rollout in rollouts if rollout.completion_len]
    scorer = _Scorer(policy, request)
    before = weights.nudged
    try:
        for nudged in (before, not before):
            for sequence in sequences:
                targets = sequence.in_one_pass(nudged)
                if len(targets):
                    weights.use(nudged)
                    scorer.forward(sequence, targets)
        replays = [replay for sequence in sequences for replay in sequence.replays()]
        for first in range(0, len(replays), AT_ONCE):
            _replay(replays[first : first + AT_ONCE], scorer, weights)
    finally:
        weights.use(before)
    return [sequence.result() for sequence in sequences]


class _Sequence:
    """One rollout: what was sampled, by which weights, and the scores found so far."""

    def __init__(self, rollout: Rollout, request: ScoreRequest):
        self._rollout = rollout
        self._temperatures = request.temperatures
        self._kv = request.kv
        self._sample = train_sample(rollout, 0.0)
        self.tokens = torch.as_tensor(self._sample.tokens, dtype=torch.long)  # [T]
        # [T] whether the nudged weights sampled the token; False in the context
        self.nudged = np.array([v >= 0 and request.nudged[v] for v in self._sample.versions.tolist()], np.bool_)
        self._logprobs = np.full((len(request.temperatures), len(self.tokens)), np.nan, np.float32)
        self._argmax = np.full(len(self.tokens), -1, np.int64)

    def in_one_pass(self, nudged: bool) -> Indices:
        """The tokens whose logprobs a plain forward pass with these weights gives, as indices into [T]."""
        segments = [
            start + np.flatnonzero(self.nudged[start:stop] == nudged)
            for start, stop in self._segments()
            if not self._straddles(start, stop)
        ]
        return np.concatenate([np.empty(0, np.int64), *segments])

    def replays(self) -> "list[_Replay]":
        """The segments into which an update fell."""
        return [_Replay(self, start, stop) for start, stop in self._segments() if self._straddles(start, stop)]

    def note(self, targets: Indices, logprobs: Tensor, argmax: Tensor) -> None:
        """Keep the scores of some tokens: logprobs [K, M] and most likely tokens [M]."""
        self._logprobs[:, targets] = logprobs.cpu().numpy()
        self._argmax[targets] = argmax.cpu().numpy()

    def result(self) -> ScoredSequence:
        sampled = self._sample.loss_mask
        assert (self._argmax[sampled] >= 0).all(), "a token was not scored"
        engine = [turn.completion.argmax for turn in self._rollout.turns if len(turn.completion.tokens)]
        known = [argmax for argmax in engine if argmax is not None]
        return ScoredSequence(
            engine=self._sample.logprobs[sampled],
            trainer={t: row[sampled] for t, row in zip(self._temperatures, self._logprobs, strict=True)},
            versions=self._sample.versions[sampled],
            flips=self._argmax[sampled] != np.concatenate(known) if len(known) == len(engine) else None,
        )

    def _segments(self) -> Iterator[tuple[int, int]]:
        """Where the sampled tokens of each segment start and end in [T]."""
        start = 0
        for turn in self._rollout.turns:
            start += len(turn.context)
            cuts = [start + cut for cut in self._anew(turn.completion)]
            stop = start + len(turn.completion.tokens)
            yield from pairwise([start, *cuts, stop])
            start = stop

    def _anew(self, completion: Completion) -> Sequence[int]:
        """The sampled tokens [C] before which all KV was made anew."""
        if self._kv == "recorded":
            return completion.kv_from
        return [span.start for span in completion.spans[1:]] if self._kv == "recompute" else ()

    def _straddles(self, start: int, stop: int) -> bool:
        return len(set(self.nudged[start:stop].tolist())) > 1


class _Scorer:
    """The policy, the temperatures and the head of one request."""

    def __init__(self, policy: PolicyModel, request: ScoreRequest):
        self.policy = policy
        self._temperatures = request.temperatures
        self._head = HeadWeight(policy, request)
        self.device = next(policy.parameters()).device

    def forward(self, sequence: _Sequence, targets: Indices) -> None:
        """Score tokens by the forward pass that training makes, of this sequence alone."""
        tokens = sequence.tokens.to(self.device)
        hidden = self.policy.hidden(tokens, torch.arange(len(tokens), device=self.device), [(1, len(tokens))])
        self.score(sequence, targets, hidden[torch.as_tensor(targets - 1, device=self.device)])

    def score(self, sequence: _Sequence, targets: Indices, hidden: Tensor) -> None:
        """Score tokens from the hidden states [M, H] that predict them."""
        ids = sequence.tokens[targets].to(self.device)
        sequence.note(targets, *self.policy.score_at(hidden, ids, self._temperatures, self._head.get()))


class _Replay:
    """A segment whose sampled tokens are [start, stop), run piece by piece as the engine ran it."""

    def __init__(self, sequence: _Sequence, start: int, stop: int):
        self._sequence = sequence
        self._start = start
        self._cache = DynamicCache()
        # [stop - 1] the weights that ran each position: those of the token it predicts, or, in the prompt, of the first
        ran = np.concatenate([np.repeat(sequence.nudged[start], start - 1), sequence.nudged[start:stop]])
        self._pieces: list[tuple[bool, int]] = [(nudged, len(list(run))) for nudged, run in groupby(ran.tolist())]

    @property
    def done(self) -> bool:
        return not self._pieces

    @property
    def nudged(self) -> bool:
        """The weights that the next piece needs."""
        return self._pieces[0][0]

    def advance(self, scorer: _Scorer) -> None:
        """Run one piece with the present weights and score the sampled tokens that it predicts."""
        begin = self._cache.get_seq_length()
        end = begin + self._pieces.pop(0)[1]
        hidden = scorer.policy.extend(self._sequence.tokens[begin:end].to(scorer.device), self._cache)
        first = max(begin, self._start - 1)
        scorer.score(self._sequence, np.arange(first, end) + 1, hidden[first - begin :])


def _replay(replays: Sequence[_Replay], scorer: _Scorer, weights: Weights) -> None:
    """Bring all to their end, with as few changes of weights as their pieces allow."""
    waiting = list(replays)
    while waiting:
        if all(replay.nudged != weights.nudged for replay in waiting):
            weights.use(not weights.nudged)
        for replay in waiting:
            if replay.nudged == weights.nudged:
                replay.advance(scorer)
        waiting = [replay for replay in waiting if not replay.done]
