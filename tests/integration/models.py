"""Small random models and run configurations, and logprobs of them that share no code with the project."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from pipelinerl.config.schema import RunConfig
from pipelinerl.tiny.tokenizer import build_tokenizer

MAX_LENGTH = 256


def write_model(target: Path, *, tied: bool, seed: int = 0, hidden_size: int = 128, large_logits: bool = False) -> Path:
    """A random Qwen2 model directory with the project's tokenizer: 2 layers, grouped-query attention.

    Heads of 32: the CPU attention of vLLM knows none of 16.

    Its weights are large enough for distributions that are far from uniform, so that temperature and a stale head show.
    With `large_logits` the largest reach 15 to 20, as in real models, and in the same way: by a component that all
    tokens share. It cancels in the softmax, but not in the rounding of a bf16 head.
    """
    tokenizer = build_tokenizer(MAX_LENGTH)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=hidden_size // 32,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=tied,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):  # zero after construction, where a bias that is lost would not show
                parameter.normal_(0, 0.1)
        if large_logits:
            for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
                weight.normal_(0, 0.15)
                weight[:, 0] = 3.8
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return target


def run_config(path: Path, dtype: str = "float32", **sections: Any) -> RunConfig:
    """A configuration of the CPU kind; `sections` are merged into it, e.g. `trainer={"lr": 0.0}`."""
    data: dict[str, Any] = {
        "model": {"path": str(path), "dtype": dtype},
        "task": {"kind": "sort", "digits": 4},
        "algo": {"kind": "ppo_clip"},
        "sampling": {"max_tokens": 200},
        "engine": {
            "max_model_len": MAX_LENGTH,
            "max_num_seqs": 64,
            "max_num_batched_tokens": 1024,
            "kv_cache_mb": 64,
            "enforce_eager": True,
        },
        "trainer": {"micro_batch_tokens": 1024},
        "weights": {"timeout_s": 60.0, "bucket_mb": 16},
        "cluster": {"device": "cpu"},
    }
    for name, values in sections.items():
        data[name] = data.get(name, {}) | values
    return RunConfig.model_validate(data)


def load_reference(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model as transformers alone runs it, with torch's own causal attention."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def reference_logprobs(model: PreTrainedModel, tokens: Sequence[int], temperature: float) -> Tensor:
    """Logprob [len(tokens) - 1] of every token but the first, of the sequence alone and with its head in fp32."""
    ids = torch.as_tensor(list(tokens))
    hidden = model.base_model(ids[None]).last_hidden_state[0, :-1]
    logits = hidden.float() @ model.get_output_embeddings().weight.float().T / temperature
    return torch.log_softmax(logits, dim=-1).gather(-1, ids[1:, None])[:, 0]
