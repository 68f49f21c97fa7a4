"""Random Qwen2 models with a tokenizer of as many words, for benchmarks: speed does not depend on the weights."""

from pathlib import Path


def write_model(
    target: Path, *, hidden: int, layers: int, vocabulary: int, longest: int, dtype: str, heads_of: int = 64
) -> int:
    """Write a model directory; returns the number of parameters. `heads_of`: dimensions of an attention head."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2Tokenizer

    from pipelinerl.tiny.tokenizer import CHAT_TEMPLATE, END, PAD, SPECIALS, byte_symbols

    words = [*SPECIALS, *byte_symbols()]
    assert vocabulary >= len(words), f"{len(words)} words are needed for bytes and markers"
    words += [f"word{index}" for index in range(vocabulary - len(words))]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token=None,
        bos_token=None,
        eos_token=END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
    )
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // heads_of,
        num_key_value_heads=max(1, hidden // heads_of // 3),
        max_position_embeddings=longest,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)
    return sum(parameter.numel() for parameter in model.parameters())
