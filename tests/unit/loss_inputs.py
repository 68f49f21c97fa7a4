"""Inputs for losses from rows of plain numbers, and what comes out as lists."""

from typing import get_args

import torch
from hypothesis import strategies as st

from pipelinerl.algo.losses import LossInputs, policy_loss
from pipelinerl.config.schema import (
    CISPO,
    DPPOTV,
    GSPO,
    SAPO,
    TOPR,
    AlgoConfig,
    DualClip,
    GSPOToken,
    PPOClip,
    ReinforceIS,
    TwoSided,
)

# Every objective, with bounds that ratios of everyday size reach.
ALL = [
    PPOClip(clip_low=0.2, clip_high=0.28),
    DualClip(clip_low=0.2, clip_high=0.28, bound=1.7),
    TwoSided(clip_low=0.2, clip_high=0.28, max_ratio=1.7),
    GSPO(clip_low=0.2, clip_high=0.28),
    GSPOToken(clip_low=0.2, clip_high=0.28),
    SAPO(),
    ReinforceIS(max_ratio=2.0),
    CISPO(min_ratio=0.6, max_ratio=2.0),
    TOPR(),
    DPPOTV(),
]
KINDS = {section.model_fields["kind"].default for section in get_args(get_args(AlgoConfig)[0])}
SEQUENCES = 4

# (sequence, new, old, rollout, kept) of a token. Multiples of 1/16 are exact in float32, and no ratio that they make
# comes within rounding of a bound above, but for exactly 1.
logprobs = st.integers(-48, 0).map(lambda k: k / 16)
rows = st.lists(
    st.tuples(st.integers(0, SEQUENCES - 1), logprobs, logprobs, logprobs, st.booleans()), min_size=1, max_size=12
)
advantages = st.tuples(*[st.integers(-6, 6).map(lambda k: k / 2)] * SEQUENCES)


def inputs(new, old, rollout, advantages, mask=None, sequence=None):
    """Without `sequence` every token is one of its own."""
    return LossInputs(
        logprobs_new=torch.tensor(new, dtype=torch.float32, requires_grad=True),
        logprobs_old=torch.tensor(old, dtype=torch.float32),
        logprobs_rollout=torch.tensor(rollout, dtype=torch.float32),
        advantages=torch.tensor(advantages, dtype=torch.float32),
        mask=torch.tensor([True] * len(new) if mask is None else mask, dtype=torch.bool),
        sequence=torch.tensor(list(range(len(new)) if sequence is None else sequence), dtype=torch.int64),
    )


def from_rows(given_rows, advantage_of):
    """Inputs from `rows`; `advantage_of` maps a sequence to its advantage."""
    table = [(new, old, mu, advantage_of[i], kept, i) for i, new, old, mu, kept in given_rows]
    return inputs(*(list(column) for column in zip(*table, strict=True)))


def evaluate(given, config):
    """Per-token loss, side of the active bound, gradient of the sum, as lists."""
    outputs = policy_loss(given, config)
    (gradient,) = torch.autograd.grad(outputs.token_loss.sum(), given.logprobs_new)
    return outputs.token_loss.tolist(), outputs.clipped.tolist(), gradient.tolist()
