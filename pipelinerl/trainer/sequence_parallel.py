"""Ulysses sequence parallelism (2309.14509): several ranks share each packed row, so that long rows fit.

The ranks of a group get the same rows. Each runs the model on a slice of a row's positions. Only attention needs the
others: DeepSpeed's all-to-all exchanges slices of all heads for whole rows of some heads, our own attention runs on
these, and a second all-to-all takes the outcome back. The logprobs of all slices are put together on every rank, so the
objective sees whole sequences and every rank computes the same loss.

The gradient needs no factor: a rank's backward pass starts from the logprobs of its own slice alone, so the gradients
of a group's ranks add up to that of the row, just as those of data-parallel ranks add up to that of the batch.

DeepSpeed is not told of the groups. To ZeRO all ranks are alike, and it shards over all of them.

N = tokens of a row, M = its scored positions.
"""

from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipelinerl.errors import ConfigError
from pipelinerl.trainer.attention import Segments

if TYPE_CHECKING:
    from pipelinerl.trainer.model import PolicyModel


class SequenceShards:
    """This rank's part in a group of ranks that share rows. Consecutive ranks form a group."""

    def __init__(self, hf: PreTrainedModel, size: int):
        """All ranks together. From here on the model's attention takes the keyword `shards`, and with it slices.

        Raises ConfigError when the model's heads cannot be dealt out.
        """
        from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF

        text = hf.config.get_text_config()
        heads, kv_heads = text.num_attention_heads, text.num_key_value_heads
        if heads % size or (kv_heads % size and size % kv_heads):
            raise ConfigError(
                f"trainer.sequence_parallel={size} cannot deal out the model's {heads} attention heads and {kv_heads} "
                "key-value heads; use a number that divides both, or a multiple of the second that divides the first"
            )
        blocks = [list(range(first, first + size)) for first in range(0, dist.get_world_size(), size)]
        groups = [dist.new_group(block) for block in blocks]  # every rank takes part in making every group
        self.size = size
        self.rank = dist.get_rank() % size
        self._group = groups[dist.get_rank() // size]
        core = ALL_ATTENTION_FUNCTIONS[hf.config._attn_implementation]
        self._exchange = UlyssesSPAttentionHF(
            attn=core,
            batch_size=1,
            attn_head_count=heads,
            attn_head_size=getattr(text, "head_dim", None) or text.hidden_size // heads,
            kv_head_count=kv_heads,
            num_hidden_layers=text.num_hidden_layers,
            process_group=self._group,
            seq_length_is_variable=True,
        )
        _accept_shards(hf, core)

    @property
    def first(self) -> bool:
        """Whether this rank counts what all of its group hold."""
        return self.rank == 0

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, **kwargs: Any) -> Any:
        """Like the model's own attention, of slices: query [1, H, N/size, D] to output [1, N/size, H * D]."""
        places = torch.arange(query.shape[2], device=query.device)[None]
        kwargs["position_ids"] = kwargs.get("position_ids", places)  # DeepSpeed asks for them; our attention does not
        return self._exchange(module, query, key, value, None, **kwargs)

    def forward(
        self,
        policy: "PolicyModel",
        input_ids: Tensor,  # [N]
        position_ids: Tensor,  # [N]
        segments: Segments,
        positions: Tensor,  # [M]
        targets: Tensor,  # [M]
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """What `PolicyModel.forward` gives, the same on all ranks of the group."""
        padding = -len(input_ids) % self.size
        if padding:  # one more sequence, which nothing attends to and nobody scores
            input_ids = F.pad(input_ids, (0, padding))
            position_ids = torch.cat([position_ids, torch.arange(padding, device=position_ids.device)])
            segments = [*segments, (1, padding)]
        share = len(input_ids) // self.size
        start = self.rank * share
        own = slice(start, start + share)
        hidden = policy.hidden(input_ids[own], position_ids[own], segments, shards=self)
        mine = ((positions >= own.start) & (positions < own.stop)).nonzero()[:, 0]
        # Without a position to score, score one with weight zero: the others wait for this rank's backward pass.
        at = positions[mine] - start if len(mine) else positions.new_zeros(1)
        wanted = targets[mine] if len(mine) else targets.new_zeros(1)
        logprobs, entropies = policy.score(hidden[at], wanted, entropy_grad)
        return self._whole(logprobs, mine, len(positions)), self._whole(entropies, mine, len(positions))

    def _whole(self, values: Tensor, mine: Tensor, count: int) -> Tensor:
        """All ranks' values [M], of which this one has those at `mine`."""
        whole = values.new_zeros(count)
        whole = whole.index_add(0, mine, values) if len(mine) else whole + 0.0 * values.sum()
        gathered: Tensor = _Sum.apply(whole, self._group)
        return gathered


class _Sum(torch.autograd.Function):
    """Sum over the group. All its ranks go on to the same loss, whose gradient is therefore counted once."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: Any) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def _accept_shards(hf: PreTrainedModel, core: Any) -> None:
    """Let the model's attention hand slices over. Without the keyword it is what it was: rank 0 scores alone."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        shards: SequenceShards | None = None,
        **kwargs: Any,
    ) -> Any:
        if shards is None:
            return core(module, query, key, value, attention_mask, **kwargs)
        return shards.attend(module, query, key, value, **kwargs)

    name = f"{hf.config._attn_implementation}_ulysses"
    AttentionInterface.register(name, attention)
    hf.config._attn_implementation = name
