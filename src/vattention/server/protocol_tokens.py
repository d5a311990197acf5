"""Bodies of /tokenize and /detokenize, as vLLM has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, NotRequired, TypedDict

from pydantic import Field, model_validator

from vattention.server.protocol import ModelBody, Text, TokenId, invalid
from vattention.server.protocol_chat import Conversation
from vattention.server.protocol_messages import Message


class TokenizeRequest(Conversation):
    """A text or a conversation."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        name: values for name, values in Conversation.unsupported.items() if name != "add_special_tokens"
    }

    prompt: Text | None = None
    messages: list[Message] = Field(default_factory=list)
    add_special_tokens: bool | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (not self.messages):
            raise invalid("prompt", "either prompt or messages must be there, and only one of them")
        if self.messages and self.add_special_tokens:
            raise invalid("add_special_tokens", "has no meaning for messages: the chat template adds them")
        return self


class TokenizeResponse(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: NotRequired[list[str]]


class DetokenizeRequest(ModelBody):
    tokens: list[TokenId]


class DetokenizeResponse(TypedDict):
    prompt: str
