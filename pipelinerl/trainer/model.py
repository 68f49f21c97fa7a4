"""The policy as the trainer sees it: a transformers model, an fp32 head and chunked logprobs.

The engine multiplies its stored (bf16) head weights in fp32, so the trainer upcasts the same rounded weights
instead of using an fp32 master copy. Logits exist for at most `chunk` tokens at a time, forward and backward.

N = tokens of the packed row, M = the positions of it that predict a sampled token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache

from pipelinerl.config.schema import ModelConfig
from pipelinerl.errors import EnvironmentProblem, first_line
from pipelinerl.trainer.attention import ATTENTION, Segments


class PolicyModel(nn.Module):
    """`forward` gives the logprob of the sampled tokens and the entropy of the distributions they came from."""

    def __init__(self, hf: PreTrainedModel, temperature: float, head_dtype: torch.dtype, chunk: int):
        super().__init__()
        self.hf = hf
        self.temperature = temperature
        self.head_dtype = head_dtype
        self.chunk = chunk
        head = hf.get_output_embeddings()
        if not isinstance(head, nn.Linear):
            raise EnvironmentProblem(f"{type(hf).__name__} has no linear lm_head, so its logits cannot be made in fp32")

    def forward(
        self,
        input_ids: Tensor,  # [N]
        position_ids: Tensor,  # [N], restarting at every sequence
        segments: Segments,
        positions: Tensor,  # [M] where a sampled token is predicted
        targets: Tensor,  # [M] that token
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [M] (with gradient) and entropies [M] (without), both fp32, in nats, at the sampling temperature."""
        return self.score(self.hidden(input_ids, position_ids, segments)[positions], targets)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, segments: Segments) -> Tensor:
        """Hidden states [N, H] that the head reads."""
        hidden: Tensor = self.hf.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            attention_mask=None,
            use_cache=False,
            segments=segments,
        ).last_hidden_state[0]
        return hidden

    def extend(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states [N, H] of the tokens that follow those in the cache, whose keys and values they attend to and
        to which theirs are added. The cache may come from other weights than the present ones.

        Runs in eval mode: in train mode gradient checkpointing leaves the cache out.
        """
        past, count = cache.get_seq_length(), len(input_ids)
        with _eval_mode(self.hf):
            hidden: Tensor = self.hf.base_model(
                input_ids=input_ids[None],
                position_ids=torch.arange(past, past + count, device=input_ids.device)[None],
                attention_mask=None,
                past_key_values=cache,
                use_cache=True,
                segments=[(1, count)],
            ).last_hidden_state[0]
        return hidden

    def score(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Like `forward`, from hidden states [M, H] on."""
        weight, bias = self._head(None)
        parts = [
            checkpoint(_score_chunk, h, t, weight, bias, self.temperature, use_reentrant=False)
            for h, t in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        ]
        logprobs, entropies = zip(*parts, strict=True)
        return torch.cat(logprobs), torch.cat(entropies)

    @torch.no_grad()
    def score_at(
        self, hidden: Tensor, targets: Tensor, temperatures: Sequence[float], head_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [temperatures, M] as `score` computes them, and the most likely tokens [M]; without gradient.

        `head_weight` takes the place of the model's, in its own dtype.
        """
        weight, bias = self._head(head_weight)
        logprobs, argmax = [], []
        for h, t in zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True):
            logits = _logits(h, weight, bias)
            logprobs.append(torch.stack([_logprobs(logits / temperature, t)[0] for temperature in temperatures]))
            argmax.append(logits.argmax(-1))
        return torch.cat(logprobs, dim=1), torch.cat(argmax)

    def _head(self, weight: Tensor | None) -> tuple[Tensor, Tensor | None]:
        head = self.hf.get_output_embeddings()
        weight = head.weight.to(self.head_dtype) if weight is None else weight
        return weight, None if head.bias is None else head.bias.to(weight.dtype)


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(hidden.to(weight.dtype), weight, bias).float()


def _logprobs(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Logprob of each target, and the logarithm of the partition sum."""
    log_z = torch.logsumexp(logits, dim=-1)
    return logits.gather(-1, targets[:, None])[:, 0] - log_z, log_z


def _score_chunk(
    hidden: Tensor, targets: Tensor, weight: Tensor, bias: Tensor | None, temperature: float
) -> tuple[Tensor, Tensor]:
    logits = _logits(hidden, weight, bias) / temperature
    logprobs, log_z = _logprobs(logits, targets)
    with torch.no_grad():
        entropy = log_z - (torch.softmax(logits, dim=-1) * logits).sum(-1)
    return logprobs, entropy.detach()


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def load_policy(config: ModelConfig, temperature: float, chunk: int, gradient_checkpointing: bool) -> PolicyModel:
    """The model at `config.path` in `config.dtype`, ready to train.

    Raises EnvironmentProblem when the path holds no causal language model, or one that wants to run its own code.
    """
    try:
        hf_config = AutoConfig.from_pretrained(config.path)
        hf = AutoModelForCausalLM.from_pretrained(
            config.path, config=hf_config, dtype=getattr(torch, config.dtype), attn_implementation=ATTENTION
        )
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"model.path={config.path}: {first_line(error)}") from error
    hf.config.use_cache = False
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf.train()
    return PolicyModel(hf, temperature, getattr(torch, config.head_dtype), chunk)


def export_policy(model: PolicyModel, tokenizer_source: str, target: Path) -> None:
    """Write the weights, config and tokenizer to `target` so that `from_pretrained` and vLLM load them."""
    from transformers import AutoTokenizer

    staging = target.with_name(target.name + ".partial")
    attention: Any = model.hf.config._attn_implementation
    model.hf.save_pretrained(staging, safe_serialization=True)
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(staging)
    model.hf.config._attn_implementation = attention
    staging.rename(target)
