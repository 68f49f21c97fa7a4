"""Conversations to tokens, with the project's character tokenizer and with other chat templates on it."""

import string
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelinerl.errors import EnvironmentProblem, TokenPrefixError
from pipelinerl.rollout.tokens import ChatRenderer
from pipelinerl.tasks.base import Message
from pipelinerl.tiny.tokenizer import CHAT_TEMPLATE, build_tokenizer

if TYPE_CHECKING:
    from transformers import Qwen2Tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMMING = CHATML.replace("{{ m.content }}", "{{ m.content | trim }}")
STRIPS_THINKING = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
# with enable_thinking=false the generation prompt has an empty thought, which earlier turns do not keep
EMPTY_THOUGHT = CHATML.replace(
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}",
)
DROPS_ASSISTANT = "{% for m in messages if m.role != 'assistant' %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

USER = Message("user", "2+2?")
MORE = Message("user", "sure?")


@pytest.fixture(scope="module")
def tokenizer() -> "Qwen2Tokenizer":
    return build_tokenizer(max_length=4096)


def renderer(tokenizer: "Qwen2Tokenizer", template: str | None, enable_thinking: bool | None = None) -> ChatRenderer:
    tokenizer.chat_template = template
    return ChatRenderer(tokenizer, enable_thinking)


def encode(tokenizer: "Qwen2Tokenizer", text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def test_a_prompt_is_the_rendered_template(tokenizer: "Qwen2Tokenizer") -> None:
    chat = renderer(tokenizer, CHATML)
    text = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_text([USER]) == text
    assert chat.prompt([USER]) == encode(tokenizer, text)


def test_enable_thinking_reaches_the_template_only_when_set(tokenizer: "Qwen2Tokenizer") -> None:
    assert renderer(tokenizer, EMPTY_THOUGHT, enable_thinking=False).prompt_text([USER]).endswith("<think></think>")
    assert renderer(tokenizer, EMPTY_THOUGHT).prompt_text([USER]).endswith("assistant\n")


def test_decoding_leaves_special_tokens_out(tokenizer: "Qwen2Tokenizer") -> None:
    assert renderer(tokenizer, CHATML).decode(encode(tokenizer, "4 or\n5<|im_end|>")) == "4 or\n5"


def test_an_extension_closes_the_turn_unless_the_completion_did(tokenizer: "Qwen2Tokenizer") -> None:
    chat = renderer(tokenizer, CHATML)
    rest = "\n<|im_start|>user\nsure?<|im_end|>\n<|im_start|>assistant\n"
    stopped, cut = encode(tokenizer, "4<|im_end|>"), encode(tokenizer, "4")
    assert chat.extension([USER], stopped, [MORE]) == encode(tokenizer, rest)
    assert chat.extension([USER], cut, [MORE]) == encode(tokenizer, "<|im_end|>" + rest)
    assert chat.extension([USER], [], [MORE]) == encode(tokenizer, "<|im_end|>" + rest)


TEXTS = st.text(st.sampled_from(string.digits + string.ascii_letters + string.punctuation + " \n"), max_size=20)


@given(TEXTS, TEXTS, TEXTS, TEXTS, st.sampled_from([CHAT_TEMPLATE, CHATML]))
def test_turn_by_turn_tokens_equal_the_whole_conversation(
    tokenizer: "Qwen2Tokenizer", first: str, answer: str, second: str, answer2: str, template: str
) -> None:
    """For a tokenizer with one token per character, growing by extensions is rendering the whole at once."""
    chat = renderer(tokenizer, template)
    history = [Message("user", first)]
    tokens = chat.prompt(history)
    for reply in (answer, answer2):
        completion = encode(tokenizer, reply + "<|im_end|>")
        tokens += completion + chat.extension(history, completion, [Message("user", second)])
        history += [Message("assistant", reply), Message("user", second)]
    assert tokens == chat.prompt(history)


def test_a_template_that_trims_is_no_obstacle(tokenizer: "Qwen2Tokenizer") -> None:
    """The sampled tokens stay as they are, so trimming their start in the rendering changes nothing."""
    completion = encode(tokenizer, " \n4<|im_end|>")
    extension = renderer(tokenizer, TRIMMING).extension([USER], completion, [MORE])
    assert extension == renderer(tokenizer, CHATML).extension([USER], completion, [MORE])


@pytest.mark.parametrize(
    ("template", "thinking", "completion", "words"),
    [
        (STRIPS_THINKING, None, "<think>hm</think>4", r"saw .*<think>hm</think>4.* now writes .*\\n4"),
        (EMPTY_THOUGHT, False, "4", "rewrites earlier turns"),
        (DROPS_ASSISTANT, None, "4", "drops or changes what the assistant said"),
    ],
)
def test_a_template_that_rewrites_history_is_refused(
    tokenizer: "Qwen2Tokenizer", template: str, thinking: bool | None, completion: str, words: str
) -> None:
    chat = renderer(tokenizer, template, thinking)
    with pytest.raises(TokenPrefixError, match=words):
        chat.extension([USER], encode(tokenizer, completion), [MORE])


def test_a_template_that_could_strip_thinking_is_fine_without_any(tokenizer: "Qwen2Tokenizer") -> None:
    chat = renderer(tokenizer, STRIPS_THINKING)
    assert chat.extension([USER], encode(tokenizer, "4"), [MORE])[:1] == encode(tokenizer, "<|im_end|>")


def test_a_tokenizer_without_template_is_refused(tokenizer: "Qwen2Tokenizer") -> None:
    with pytest.raises(EnvironmentProblem, match=r"no chat template.*chat_template\.jinja"):
        renderer(tokenizer, None)


def test_a_role_that_the_template_refuses_is_named(tokenizer: "Qwen2Tokenizer") -> None:
    with pytest.raises(EnvironmentProblem, match=r"roles user, tool: .*role tool is not one of"):
        renderer(tokenizer, CHAT_TEMPLATE).prompt([USER, Message("tool", "4")])
