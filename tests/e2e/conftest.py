"""Models for runs of the real command."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def random_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A very small model with random weights: enough where nothing has to be learned."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from pipelinerl.tiny.tokenizer import build_tokenizer

    path = tmp_path_factory.mktemp("models") / "random"
    tokenizer = build_tokenizer(256)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
