"""The policy as the trainer sees it: a transformers model, an fp32 head and chunked logprobs.

The engine multiplies its stored (bf16) head weights in fp32, so the trainer upcasts the same rounded weights
instead of using an fp32 master copy. Logits exist for one block at a time, forward and backward (logprobs.py).

N = tokens of the packed row, M = the positions of it that predict a sampled token.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from pipelinerl.config.schema import ModelConfig
from pipelinerl.errors import EnvironmentProblem, first_line
from pipelinerl.trainer.attention import OpaqueSegments, Segments, attention_name
from pipelinerl.trainer.logprobs import Projection, most_likely_tokens, token_logprobs
from pipelinerl.trainer.sharding import gathered

if TYPE_CHECKING:
    from pipelinerl.trainer.sequence_parallel import SequenceShards


CPU = torch.device("cpu")


class PolicyModel(nn.Module):
    """`forward` gives the logprob of the sampled tokens and the entropy of the distributions they came from."""

    def __init__(self, hf: PreTrainedModel, temperature: float, head_dtype: torch.dtype, chunk: int):
        super().__init__()
        self.hf = hf
        self.temperature = temperature
        self.head_dtype = head_dtype
        self.chunk = chunk
        self.compiled = False  # see compile_layers
        self.shards: SequenceShards | None = None  # with sequence parallelism: this rank's part in every row
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
        entropy_grad: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [M] and entropies [M], both fp32, in nats, at the sampling temperature.

        Logprobs have a gradient, entropies only with `entropy_grad`, which costs a little more.
        """
        if self.shards is not None:
            return self.shards.forward(self, input_ids, position_ids, segments, positions, targets, entropy_grad)
        return self.score(self.hidden(input_ids, position_ids, segments)[positions], targets, entropy_grad)

    def hidden(
        self, input_ids: Tensor, position_ids: Tensor, segments: Segments, shards: "SequenceShards | None" = None
    ) -> Tensor:
        """Hidden states [N, H] that the head reads. With `shards`, of a slice of the row that `segments` describe."""
        hidden: Tensor = self.hf.base_model(
            input_ids=input_ids[None],
            position_ids=position_ids[None],
            attention_mask=None,
            use_cache=False,
            segments=OpaqueSegments(segments),
            shards=shards,
        ).last_hidden_state[0]
        return hidden

    def extend(self, input_ids: Tensor, cache: Cache) -> Tensor:
        """Hidden states [N, H] of the tokens that follow those in the cache, whose keys and values they attend to and
        to which theirs are added. The cache may come from other weights than the present ones.

        Runs in eval mode: in train mode gradient checkpointing leaves the cache out. Layers are not compiled for it.
        """
        past, count = cache.get_seq_length(), len(input_ids)
        eager = torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()
        with _eval_mode(self.hf), eager:
            hidden: Tensor = self.hf.base_model(
                input_ids=input_ids[None],
                position_ids=torch.arange(past, past + count, device=input_ids.device)[None],
                attention_mask=None,
                past_key_values=cache,
                use_cache=True,
                segments=[(1, count)],
            ).last_hidden_state[0]
        return hidden

    def score(self, hidden: Tensor, targets: Tensor, entropy_grad: bool = False) -> tuple[Tensor, Tensor]:
        """Like `forward`, from hidden states [M, H] on."""
        head = self.hf.get_output_embeddings()
        projection = Projection(self.temperature, self.head_dtype, self.chunk)
        return token_logprobs(hidden, head.weight, head.bias, targets, projection, entropy_grad)

    @torch.no_grad()
    def score_at(
        self, hidden: Tensor, targets: Tensor, temperatures: Sequence[float], head_weight: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Logprobs [temperatures, M] as `score` computes them, and the most likely tokens [M]; without gradient.

        `head_weight` takes the place of the model's, in its own dtype.
        """
        head = self.hf.get_output_embeddings()
        with gathered(head.parameters()):
            weight = head.weight if head_weight is None else head_weight
            dtype = self.head_dtype if head_weight is None else head_weight.dtype
            logprobs = [
                token_logprobs(hidden, weight, head.bias, targets, Projection(temperature, dtype, self.chunk))[0]
                for temperature in temperatures
            ]
            argmax = most_likely_tokens(hidden, weight, head.bias, Projection(1.0, dtype, self.chunk))
        return torch.stack(logprobs), argmax


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


def load_policy(
    config: ModelConfig,
    temperature: float,
    chunk: int,
    gradient_checkpointing: bool,
    attention: str = "auto",
    device: torch.device = CPU,
) -> PolicyModel:
    """The model at `config.path` in `config.dtype`, ready to train; it will be moved to `device` by the caller.

    Raises EnvironmentProblem when the path holds no causal language model, or one that wants to run its own code, and
    ConfigError when `trainer.attention` cannot run on the device.
    """
    implementation = attention_name(attention, device, getattr(torch, config.dtype))
    try:
        hf_config = AutoConfig.from_pretrained(config.path)
        hf = AutoModelForCausalLM.from_pretrained(
            config.path, config=hf_config, dtype=getattr(torch, config.dtype), attn_implementation=implementation
        )
    except (OSError, ValueError) as error:
        raise EnvironmentProblem(f"model.path={config.path}: {first_line(error)}") from error
    hf.config.use_cache = False
    if gradient_checkpointing:
        hf.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    hf.train()
    return PolicyModel(hf, temperature, getattr(torch, config.head_dtype), chunk)


def compile_layers(policy: PolicyModel) -> None:
    """Compile the decoder layers, in place, for rows of any length. Attention stays as it is, between compiled parts.

    Comes last, after whatever changes the layers or their attention. Raises EnvironmentProblem for a model whose layers
    are not where they are looked for.
    """
    layers = getattr(policy.hf.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise EnvironmentProblem(f"{type(policy.hf).__name__} has no list of decoder layers; use trainer.compile=false")
    name: Any = policy.hf.config._attn_implementation
    eager = f"{name}_eager"
    AttentionInterface.register(eager, torch.compiler.disable(ALL_ATTENTION_FUNCTIONS[name]))
    policy.hf.config._attn_implementation = eager
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=True)  # not the hooks around it, which come and go
    policy.compiled = True


def export_policy(model: PolicyModel, weights: dict[str, Tensor], tokenizer_source: str, target: Path) -> None:
    """Write `weights`, config and tokenizer to `target` so that `from_pretrained` and vLLM load them."""
    from transformers import AutoTokenizer

    staging = target.with_name(target.name + ".partial")
    attention: Any = model.hf.config._attn_implementation
    model.hf.save_pretrained(staging, state_dict=weights, safe_serialization=True)
    AutoTokenizer.from_pretrained(tokenizer_source).save_pretrained(staging)
    model.hf.config._attn_implementation = attention
    staging.rename(target)
