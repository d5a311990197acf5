"""Bodies of /v1/chat/completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NotRequired, TypedDict

from pydantic import AfterValidator, Field, model_validator

from vattention.server.protocol import FinishReason, ModelBody, PromptLogprobs, SamplingBody, Usage, invalid
from vattention.server.protocol_messages import Message
from vattention.server.protocol_tools import Choice, Tool, ToolCall, ToolCallDelta, ToolChoice, check_names

RENDERING_ARGUMENTS = frozenset(
    {"messages", "template", "tools", "add_generation_prompt", "continue_final_message"}
)
"""Names that chat_template_kwargs may not set: they belong to the renderer, not to the template."""


class Conversation(ModelBody):
    """Messages, and how the chat template turns them into a prompt."""

    # A template is a program: one from a client could keep the server busy for as long as it likes.
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "add_special_tokens": (False,),
        "chat_template": (),
        "documents": ([],),
        "functions": ([],),
        "media_io_kwargs": ({},),
        "mm_processor_kwargs": ({},),
    }

    messages: Annotated[list[Message], Field(min_length=1)]
    tools: Annotated[list[Tool], AfterValidator(check_names)] = Field(default_factory=list)
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check_template(self) -> Conversation:
        if self.continue_final_message and self.add_generation_prompt:
            raise invalid(
                "continue_final_message", "cannot be combined with add_generation_prompt: choose one of them"
            )
        reserved = sorted(RENDERING_ARGUMENTS & self.chat_template_kwargs.keys())
        if reserved:
            raise invalid("chat_template_kwargs", f"may not set {reserved[0]}")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        """Functions that the prompt tells of."""
        return self.tools

    @property
    def opens_reply(self) -> bool:
        """Whether the prompt ends with the beginning of the assistant's message."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    @property
    def reply_role(self) -> str:
        return "assistant" if self.opens_reply else self.messages[-1].role


class ChatCompletionRequest(SamplingBody, Conversation):
    """A request for the next message of a conversation."""

    ignored: ClassVar[frozenset[str]] = SamplingBody.ignored | {
        "metadata",
        "prompt_cache_key",
        "safety_identifier",
        "store",
    }
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **SamplingBody.unsupported,
        **Conversation.unsupported,
        "audio": (),
        "function_call": ("none", "auto"),
        "include_reasoning": (True,),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "reasoning_effort": ("none",),
        "return_prompt_text": (False,),
        "thinking_token_budget": (),
        "verbosity": (),
        "web_search_options": (),
    }

    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] = 0
    echo: bool = False
    tool_choice: Choice = ToolChoice("auto")
    parallel_tool_calls: bool = True

    @model_validator(mode="after")
    def _check(self) -> ChatCompletionRequest:
        if "tool_choice" in self.model_fields_set and self.tool_choice.mode != "none" and not self.tools:
            raise invalid("tool_choice", "there are no tools to choose from")
        if self.tool_choice.name not in {None, *(tool.function.name for tool in self.tools)}:
            raise invalid("tool_choice", f"names {self.tool_choice.name!r}, which is none of the tools")
        if self.tool_choice.mode == "required" and (self.use_beam_search or self.ignore_eos):
            other = "use_beam_search" if self.use_beam_search else "ignore_eos"
            raise invalid("tool_choice", f"{other} does not go with calls that are forced")
        if self.top_logprobs and not self.logprobs:
            raise invalid("top_logprobs", "needs logprobs=true")
        if (
            None not in (self.max_tokens, self.max_completion_tokens)
            and self.max_tokens != self.max_completion_tokens
        ):
            raise invalid("max_tokens", "says another number than max_completion_tokens; send one of them")
        return self

    @property
    def shown_tools(self) -> list[Tool]:
        return [] if self.tool_choice.mode == "none" else self.tools

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def token_limit_param(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"


class ChatLogprob(TypedDict):
    """`bytes` is the token's UTF-8, or None for a token that holds only a part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatTokenLogprob(ChatLogprob):
    top_logprobs: list[ChatLogprob]


class ChatLogprobs(TypedDict):
    content: list[ChatTokenLogprob]
    refusal: None


class ReplyMessage(TypedDict):
    """`content` is None where there is nothing but calls."""

    role: str
    content: str | None
    refusal: None
    tool_calls: NotRequired[list[ToolCall]]


class Delta(TypedDict, total=False):
    role: str
    content: str
    tool_calls: list[ToolCallDelta]


class ChatChoice(TypedDict):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs | None]


class ChatChunkChoice(TypedDict):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: NotRequired[int | str | None]
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]
