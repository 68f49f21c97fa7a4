"""A character-level tokenizer: one token per printable ASCII character, and one per role marker.

The chat format is short, because every character of a prompt costs a token here:

    <|system|>Be brief.<|im_end|><|user|>sort 483<|im_end|><|assistant|>348<|im_end|>

Nothing stands between two turns, so a conversation that grows by a turn extends the tokens it had before,
including the `<|im_end|>` that the model sampled.
"""

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = "<unk>"
PAD = "<|pad|>"
END = "<|im_end|>"  # closes every turn, and the eos of the model
ROLES = ("system", "user", "assistant")

SPECIALS = (PAD, UNKNOWN, END, *(f"<|{role}|>" for role in ROLES))
CHARACTERS = ("\n", " ", *sorted(string.digits + string.ascii_letters + string.punctuation))

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('role ' ~ message.role ~ ' is not one of system, user, assistant') -}}"
    "{%- endif -%}"
    "{{- '<|' + message.role + '|>' + message.content + '<|im_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tokenizer(max_length: int) -> "PreTrainedTokenizerFast":
    """The tokenizer, ready for `save_pretrained`. Characters outside ASCII become `<unk>`.

    `max_length` is the model's context, in tokens. Text of known characters survives encode and decode unchanged.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIALS, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it, decoding puts spaces between characters
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_length,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
