"""Conversations as text, through the model's Jinja template or a plain built-in one."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from vattention.errors import RequestError

logger = logging.getLogger(__name__)

PLAIN = (
    "{{ bos_token }}"
    "{% for message in messages %}{{ message.role | capitalize }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For models that bring no template: base models continue such a transcript well enough."""

PLAIN_STOPS = ("\nUser:", "\nSystem:", "\nAssistant:")
"""Where a model goes on to write the transcript's next turn itself."""


class ChatTemplate:
    """Renders conversations. Thread-safe."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._reserved = frozenset(inspect.signature(tokenizer.apply_chat_template).parameters)
        self._warned = False
        self.is_models_own = bool(tokenizer.chat_template)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        template: str | None,
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any],
    ) -> str:
        """The conversation as text, with special tokens spelled out; see `Tokenizer.apply_chat_template`."""
        if add_generation_prompt and continue_final_message:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
            )
        taken = sorted(self._reserved & set(variables))
        if taken:
            raise RequestError(f"a chat template's variable cannot be named {taken[0]!r}", param=taken[0])
        if not messages:
            raise RequestError("messages must hold at least one message", param="messages")
        if template is None and not self.is_models_own:
            template = PLAIN
            if not self._warned:
                self._warned = True
                logger.warning("this model has no chat template; chats are written as plain 'User: ...' lines")
        try:
            text = self._tokenizer.apply_chat_template(
                [_plain(message) for message in messages],
                chat_template=template,
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tokenize=False,
                **variables,
            )
        except (TemplateError, ValueError, TypeError, RecursionError) as error:
            raise RequestError(f"the chat template refused the messages: {error}", param="messages") from error
        return str(text)

    def source(self, template: str | None, *, with_tools: bool) -> str:
        """The Jinja text that conversations go through; see `Tokenizer.chat_template_source`."""
        if template is None and not self.is_models_own:
            return PLAIN
        try:
            return str(self._tokenizer.get_chat_template(template, tools=[] if with_tools else None))
        except ValueError as error:
            raise RequestError(f"this model has no chat template to use: {error}", param="messages") from error

    def stop_strings(self, template: str | None) -> tuple[str, ...]:
        return () if template is not None or self.is_models_own else PLAIN_STOPS


def _plain(message: Mapping[str, Any]) -> dict[str, Any]:
    """The message with its content as one text."""
    if not isinstance(message.get("role"), str):
        raise RequestError('every message needs a "role"', param="messages")
    content = message.get("content")
    if isinstance(content, list | tuple):
        content = "\n".join(_text(part) for part in content)
    elif content is None:
        content = ""
    elif not isinstance(content, str):
        raise RequestError('a message\'s "content" is a text or a list of text parts', param="messages")
    return {**message, "content": content}


def _text(part: object) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RequestError(f"this model takes text only, not a part of type {kind!r}", param="messages")
