"""Between conversations and tokens: what the policy sampled is never tokenised again.

A turn's new context is appended to the tokens so far. To find it, the chat template is rendered with a marker in the
place of the completion's end; what follows the marker is tokenised, what comes before stays as it was sampled.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Protocol
from uuid import uuid4

import jinja2
import numpy as np

from pipelinerl.errors import EnvironmentProblem, TokenPrefixError
from pipelinerl.tasks.base import Message
from pipelinerl.types import IntArray

REMEMBERED = 16  # conversations whose text and tokens are kept


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any: ...
    def encode(self, text: str, **kwargs: Any) -> list[int]: ...
    def decode(self, token_ids: list[int], **kwargs: Any) -> Any: ...


class ChatRenderer:
    """Renders conversations with the model's chat template. `enable_thinking` is passed to it when it is not None.

    Raises EnvironmentProblem when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: Tokenizer, enable_thinking: bool | None = None) -> None:
        if not tokenizer.chat_template:
            raise EnvironmentProblem(
                "the model's tokenizer has no chat template: use an instruction-tuned model, or put a "
                "chat_template.jinja into the model directory"
            )
        self._tokenizer = tokenizer
        self._options = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        # The episodes of a group start one after the other, and all with the same conversation.
        self._rendered = lru_cache(maxsize=REMEMBERED)(self._render)
        self._encoded = lru_cache(maxsize=REMEMBERED)(self._encode)
        self._marker = f"completion-ends-{uuid4().hex}"  # new for each renderer: no completion can contain it

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation as the template writes it, special tokens included, up to the assistant's turn.

        Raises EnvironmentProblem when the template refuses the conversation (e.g. a role it does not know).
        """
        return self._rendered(tuple(messages))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of `prompt_text(messages)`."""
        return list(self._encoded(self.prompt_text(messages)))

    def decode(self, tokens: Sequence[int] | IntArray) -> str:
        """The text of `tokens` without special tokens."""
        return str(self._tokenizer.decode(np.asarray(tokens).tolist(), skip_special_tokens=True))

    def extension(
        self, history: Sequence[Message], completion: Sequence[int] | IntArray, messages: Sequence[Message]
    ) -> list[int]:
        """Tokens to append after `completion`, sampled as the answer to `history`, so that `messages` follow.

        They start with the end of the assistant's turn, unless the completion already ends with it, and end where the
        policy speaks again. Raises TokenPrefixError when the template would not leave history and completion as the
        policy saw them.
        """
        text = self.decode(completion)
        rendered = self.prompt_text([*history, Message("assistant", text + self._marker), *messages])
        before, marker, after = rendered.partition(self._marker)
        if not marker:
            raise TokenPrefixError(
                "the model's chat template drops or changes what the assistant said once another message follows, so "
                "a further turn cannot extend the sampled tokens; use a template that keeps it for multi-turn tasks"
            )
        self._check_unchanged(self.prompt_text(history), text, before)
        tokens = self._encode(after)
        ended = len(completion) > 0 and tokens[:1] == [int(completion[-1])]
        return tokens[1:] if ended else tokens

    def _check_unchanged(self, prompt: str, text: str, rendered: str) -> None:
        """`rendered` must be prompt and text; white space that a template trims off the text's start is forgiven,
        since the sampled tokens stay as they are."""
        if rendered in (prompt + text, prompt + text.lstrip()):
            return
        seen = prompt + text
        at = next((i for i, (a, b) in enumerate(zip(seen, rendered, strict=False)) if a != b), len(rendered))
        raise TokenPrefixError(
            "the model's chat template rewrites earlier turns (does it strip thinking?), so a further turn cannot "
            f"extend the sampled tokens: the policy saw ...{seen[max(0, at - 20) : at + 40]!r}, the template now "
            f"writes ...{rendered[max(0, at - 20) : at + 40]!r}; use a template that keeps them for multi-turn tasks"
        )

    def _render(self, messages: tuple[Message, ...]) -> str:
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            text = self._tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True, **self._options
            )
        except jinja2.TemplateError as error:
            roles = ", ".join(message.role for message in messages)
            raise EnvironmentProblem(
                f"the model's chat template refuses a conversation of roles {roles}: {error}"
            ) from error
        return str(text)

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))
