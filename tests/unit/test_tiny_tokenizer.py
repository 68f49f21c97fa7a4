"""The tiny model's tokenizer: characters, roles, and conversations that only ever grow."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.exceptions import TemplateError
from transformers import AutoTokenizer

from pipelinerl.tiny.tokenizer import SPECIALS, build_tokenizer

TOKENIZER = build_tokenizer(max_length=1024)
ASCII = st.text(alphabet=[c for c in string.printable if c not in "\t\r\x0b\x0c"])


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def render(*turns: tuple[str, str], prompt: bool = False) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt))


def test_every_ascii_character_is_one_token_of_its_own() -> None:
    assert len(TOKENIZER) == 256 + len(SPECIALS)
    characters = string.printable
    assert len({*ids(characters)}) == len(ids(characters)) == len(characters)


@pytest.mark.parametrize("text", ["sort 483", "a b  c\n", "<|user|>x y<|im_end|><|assistant|>", "\u00e9 \u4e2d"])
def test_auto_tokenizer_loads_the_same_tokenizer(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "qwen2"}')  # by which AutoTokenizer chooses the class
    loaded = AutoTokenizer.from_pretrained(folder)
    assert loaded.encode(text, add_special_tokens=False) == ids(text)
    assert loaded.decode(ids(text)) == text
    assert loaded.eos_token_id == TOKENIZER.eos_token_id and loaded.chat_template == TOKENIZER.chat_template


@given(ASCII)
def test_decode_gives_back_exactly_what_was_encoded(text: str) -> None:
    assert TOKENIZER.decode(ids(text)) == text


@given(ASCII, ASCII)
def test_a_character_costs_one_token_wherever_it_stands(first: str, second: str) -> None:
    if "<" not in first + second:  # "<|us" + "er|>" would join to a role marker
        assert ids(first + second) == ids(first) + ids(second)


def test_text_outside_ascii_is_its_bytes_and_decodes_to_itself() -> None:
    assert len(ids("a\u00e9b")) == 4
    assert TOKENIZER.decode(ids("a\u00e9b")) == "a\u00e9b"


def test_a_prompt_is_its_characters_and_three_markers() -> None:
    prompt = render(("user", "sort 483"), prompt=True)
    assert prompt == "<|user|>sort 483<|im_end|><|assistant|>"
    assert len(ids(prompt)) == len("sort 483") + 3


def test_decoding_without_special_tokens_leaves_the_answer_alone() -> None:
    assert TOKENIZER.decode([*ids(" 4 48\n348"), TOKENIZER.eos_token_id], skip_special_tokens=True) == " 4 48\n348"


@given(ASCII, ASCII, ASCII, ASCII)
def test_a_conversation_that_grows_by_a_turn_extends_its_tokens(system: str, user: str, answer: str, more: str) -> None:
    start = [("system", system), ("user", user)]
    sampled = ids(render(*start, prompt=True)) + ids(answer) + [TOKENIZER.eos_token_id]
    grown = render(*start, ("assistant", answer), ("user", more), prompt=True)
    assert ids(grown)[: len(sampled)] == sampled
    assert grown.endswith(f"<|user|>{more}<|im_end|><|assistant|>")


def test_an_unknown_role_is_an_error() -> None:
    with pytest.raises(TemplateError, match="role tool is not one of"):
        render(("tool", "x"))
