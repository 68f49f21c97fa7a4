"""A tokenizer of single bytes: one token per ASCII character, and one per role marker.

The chat format is short, because every character of a prompt costs a token here:

    <|system|>Be brief.<|im_end|><|user|>sort 483<|im_end|><|assistant|>348<|im_end|>

Nothing stands between two turns, so a conversation that grows by a turn extends the tokens it had before,
including the `<|im_end|>` that the model sampled.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

PAD = "<|pad|>"
END = "<|im_end|>"  # closes every turn, and the eos of the model
ROLES = ("system", "user", "assistant")

SPECIALS = (PAD, END, *(f"<|{role}|>" for role in ROLES))
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message.role ~ ' is not one of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(max_length: int) -> "Qwen2Tokenizer":
    """The tokenizer, ready for `save_pretrained`. `max_length` is the model's context, in tokens.

    It is Qwen's own byte-level tokenizer without a single merge: transformers loads that class for every Qwen2 model
    whatever tokenizer lies beside it, so anything else would not survive `AutoTokenizer.from_pretrained`.
    """
    from transformers import Qwen2Tokenizer

    alphabet = [*SPECIALS, *byte_symbols()]
    return Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(alphabet)},
        merges=[],
        unk_token=None,
        bos_token=None,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def byte_symbols() -> list[str]:
    """The 256 symbols that stand for the bytes in a byte-level vocabulary, in a fixed order."""
    from tokenizers import pre_tokenizers

    return sorted(pre_tokenizers.ByteLevel.alphabet())
