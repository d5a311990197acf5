"""Bodies of /v1/responses, and what they say in the words of chat completions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from fastapi.exceptions import RequestValidationError
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from vattention.server.protocol import Body, ModelBody, SamplingBody, Text, invalid
from vattention.server.protocol_chat import ChatCompletionRequest
from vattention.server.protocol_messages import check_arguments
from vattention.server.protocol_tools import FunctionDefinition

RENAMED = {"messages": "input", "max_completion_tokens": "max_output_tokens", "response_format": "text.format"}
"""Fields of chat completions, and what holds their contents here."""


class TextPart(Body):
    """Part of a message's content; this server takes text only."""

    ignored: ClassVar[frozenset[str]] = frozenset({"annotations", "logprobs"})

    type: Literal["input_text", "output_text"]
    text: Text


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


Parts = Annotated[list[TextPart], BeforeValidator(_as_parts)]


class InputItem(Body):
    """A message, a call of a function that the model made, or what came of it."""

    ignored: ClassVar[frozenset[str]] = frozenset({"id", "phase", "status"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "async": (False,),
        "caller": ({"type": "direct"},),
        "namespace": (),
    }

    type: Literal["message", "function_call", "function_call_output"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: Parts | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Annotated[Text, AfterValidator(check_arguments)] | None = None
    output: Parts | None = None

    _needs: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "message": ("role", "content"),
        "function_call": ("call_id", "name", "arguments"),
        "function_call_output": ("call_id", "output"),
    }

    @model_validator(mode="after")
    def _check_fields(self) -> InputItem:
        needed = self._needs[self.type]
        missing = next((name for name in needed if getattr(self, name) is None), None)
        if missing is not None:
            raise PydanticCustomError("value_error", "a {type} needs {name}", {"type": self.type, "name": missing})
        other = min(self.model_fields_set - {"type", *needed}, default=None)
        if other is not None:
            raise PydanticCustomError("value_error", "a {type} has no {name}", {"type": self.type, "name": other})
        return self

    def add_to(self, messages: list[dict[str, Any]]) -> None:
        """Put it behind the messages of a chat; calls belong to the assistant's message before them."""
        match self.type:
            case "message":
                messages.append({"role": self.role, "content": _text(self.content)})
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant"})
                function = {"name": self.name, "arguments": self.arguments}
                messages[-1].setdefault("tool_calls", []).append({"id": self.call_id, "function": function})
            case "function_call_output":
                messages.append({"role": "tool", "tool_call_id": self.call_id, "content": _text(self.output)})


def _text(parts: list[TextPart] | None) -> list[dict[str, str]]:
    return [{"type": "text", "text": part.text} for part in parts or ()]


class FunctionTool(FunctionDefinition):
    """A function, as this API has it: with its type beside its name."""

    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "defer_loading": (False,),
        "allowed_callers": (["direct"],),
    }

    type: Literal["function"]

    @model_validator(mode="before")
    @classmethod
    def _check_type(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("type") != "function":
            raise PydanticCustomError(
                "unsupported_parameter", "this server has no tools of its own: tools must be of type function"
            )
        return data

    def for_chat(self) -> dict[str, Any]:
        return {"type": self.type, "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class TextFormat(Body):
    """What the text has to be."""

    ignored: ClassVar[frozenset[str]] = frozenset({"description"})

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _check_schema(self) -> TextFormat:
        if (self.type == "json_schema") != (self.schema_ is not None):
            raise invalid("text.format", "schema must be there for the type json_schema, and for no other")
        return self

    def for_chat(self) -> dict[str, Any]:
        if self.type != "json_schema":
            return {"type": self.type}
        return {
            "type": self.type,
            "json_schema": {"name": self.name, "schema": self.schema_, "strict": self.strict},
        }


class TextOptions(Body):
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"verbosity": ("medium",)}

    format: TextFormat = Field(default_factory=lambda: TextFormat(schema=None))


def _check_choice(value: Any) -> Any:
    match value:
        case "none" | "auto" | "required":
            return value
        case {"type": "function", "name": str(), **rest} if not rest:
            return value
    raise invalid("tool_choice", 'must be "none", "auto", "required" or {"type": "function", "name": ...}')


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


class ResponsesRequest(ModelBody):
    """A request for the next message of a conversation that the client keeps.

    Sampling parameters that chat completions take besides OpenAI's go through to them.
    """

    model_config = ConfigDict(extra="allow")

    ignored: ClassVar[frozenset[str]] = frozenset(
        {"prompt_cache_key", "safety_identifier", "service_tier", "store", "user"}
    )
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "access_programs": (),
        "background": (False,),
        "background_options": (),
        "context_management": (),
        "conversation": (),
        "image": (),
        "include": ([], ["reasoning.encrypted_content"]),
        "max_tool_calls": (),
        "moderation": (),
        "previous_response_id": (),
        "prompt": (),
        "prompt_cache_options": (),
        "prompt_cache_retention": ("in_memory", "in-memory"),
        "reasoning": ({}, {"effort": "none"}),
        "stream_options": ({}, {"include_obfuscation": False}),
        "top_logprobs": (0,),
        "truncation": ("disabled",),
    }

    input: Annotated[list[InputItem], BeforeValidator(_as_items), Field(min_length=1)]
    instructions: Text | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextOptions = TextOptions()
    tools: list[FunctionTool] = Field(default_factory=list)
    tool_choice: Annotated[str | dict[str, Any], BeforeValidator(_check_choice)] = "auto"
    parallel_tool_calls: bool = True
    metadata: dict[str, str] = Field(default_factory=dict)
    stream: bool = False

    _passed: ClassVar[frozenset[str]] = frozenset(SamplingBody._sampling_fields) - {
        "n",
        "best_of",
        "length_penalty",
        "prompt_logprobs",
        "use_beam_search",
    } | {"cache_salt", "chat_template_kwargs", "priority", "request_id", "structured_outputs"}

    @model_validator(mode="after")
    def _check_names(self) -> ResponsesRequest:
        unknown = next(iter((self.model_extra or {}).keys() - self._passed), None)
        if unknown is not None:
            raise invalid(unknown, "unknown", kind="extra_forbidden")
        return self

    def for_chat(self) -> ChatRequest:
        """Raises:
        RequestValidationError: a value is not what it has to be.
        """
        messages: list[dict[str, Any]] = []
        if self.instructions is not None:
            messages.append({"role": "system", "content": self.instructions})
        for item in self.input:
            item.add_to(messages)
        values = {
            **(self.model_extra or {}),
            "messages": messages,
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "response_format": self.text.format.for_chat(),
            "tools": [tool.for_chat() for tool in self.tools],
            "parallel_tool_calls": self.parallel_tool_calls,
            "stream": self.stream,
        }
        if self.tools or self.tool_choice != "auto":
            values["tool_choice"] = _choice_for_chat(self.tool_choice)
        try:
            return ChatRequest.model_validate(values)
        except ValidationError as error:
            raise RequestValidationError([_renamed(problem) for problem in error.errors()]) from error


class ChatRequest(ChatCompletionRequest):
    """A chat completion that was asked for as a response."""

    @property
    def token_limit_param(self) -> str:
        return "max_output_tokens"


def _choice_for_chat(choice: str | dict[str, Any]) -> str | dict[str, Any]:
    return choice if isinstance(choice, str) else {"type": "function", "function": {"name": choice["name"]}}


def _renamed(problem: Any) -> dict[str, Any]:
    """Where FastAPI would have found it in this API's body."""
    field, *rest = problem["loc"] or ("",)
    context = dict(problem.get("ctx", {}))
    if "param" in context:
        context["param"] = RENAMED.get(context["param"], context["param"].replace(".function.", "."))
    return {**problem, "loc": ("body", RENAMED.get(field, field), *rest), "ctx": context}
