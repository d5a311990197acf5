"""Bodies of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

from pydantic import BeforeValidator, Field, model_validator

from vattention.server.protocol import ChoiceExtras, FinishReason, SamplingBody, Usage, check_unicode, invalid

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, for completions."""


def _prompts(value: Any) -> list[str | list[int]]:
    """One or many prompts, each a text or token ids, as a list of prompts."""
    many: Any = [value] if isinstance(value, str) or _is_tokens(value) else value
    if not isinstance(many, list) or not many:
        raise invalid("prompt", "must be a string, a list of token ids, or a list of either")
    if not (all(isinstance(item, str) for item in many) or all(_is_tokens(item) for item in many)):
        raise invalid("prompt", "must be a string, a list of token ids, or a list of either")
    for item in many:
        if isinstance(item, str):
            check_unicode(item)
    return many


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


class CompletionRequest(SamplingBody):
    """A request for completions of one prompt or several."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        "prompt_embeds": (),
        "suffix": ("",),
    }

    prompt: Annotated[
        list[str | list[int]],
        BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
    ]
    max_tokens: Annotated[int, Field(ge=0)] = DEFAULT_MAX_TOKENS
    logprobs: int | None = None
    echo: bool = False
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise invalid("max_tokens", "must be at least 1, or 0 with echo=true")
        return self


class CompletionLogprobs(TypedDict):
    """One entry per token; `text_offset` counts characters of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None] | None


class CompletionChoice(ChoiceExtras):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class CompletionResponse(TypedDict):
    """A response, or one chunk of a stream; in a stream the usage is there only where asked for."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]
