"""The trainer's half of a bisection: its residual stream for one token sequence."""

from collections.abc import Sequence

import torch

from pipelinerl.parity.residual_stream import ResidualStream
from pipelinerl.trainer.model import PolicyModel
from pipelinerl.types import FloatArray


@torch.no_grad()
def hidden_states(policy: PolicyModel, tokens: Sequence[int]) -> list[FloatArray]:
    """[tokens, hidden] float32 after the embedding, after each block and after the final norm.

    Raises EnvironmentProblem for a model whose blocks are not where they are looked for.
    """
    ids = torch.as_tensor(list(tokens), device=next(policy.parameters()).device)
    stream = ResidualStream(policy.hf.base_model)
    try:
        policy.hidden(ids, torch.arange(len(ids), device=ids.device), [(1, len(ids))])
    finally:
        recorded = stream.take()
    return [part.numpy() for part in recorded]
