"""Messages of a conversation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from vattention.server.protocol import Body, Text, invalid


def check_arguments(text: str) -> str:
    """Of a call: a JSON object as text, or nothing."""
    problem = PydanticCustomError("value_error", "must be a JSON object, as text")
    try:
        value = json.loads(text or "{}")
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise problem from error
    if not isinstance(value, dict):
        raise problem
    return text


class CalledFunction(Body):
    """Which function, with a JSON object as text; no text stands for no arguments."""

    name: Text
    arguments: Annotated[Text, AfterValidator(check_arguments)] = ""


class MessageToolCall(Body):
    """A call that the assistant made. Clients that put it together from a stream may leave its index in."""

    ignored: ClassVar[frozenset[str]] = frozenset({"index"})

    id: Text
    type: Literal["function"] = "function"
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        arguments = json.loads(self.function.arguments or "{}")
        return {"id": self.id, "type": self.type, "function": {"name": self.function.name, "arguments": arguments}}


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class TextPart(Body):
    """Part of a message's content; this server takes text only."""

    type: Literal["text"]
    text: Text


class Message(Body):
    """One message; content is a text or a list of text parts."""

    ignored: ClassVar[frozenset[str]] = frozenset({"annotations", "refusal"})
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = {"audio": (), "function_call": ()}

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Annotated[list[TextPart], BeforeValidator(_as_parts)] = Field(default_factory=list)
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[MessageToolCall] = Field(default_factory=list)

    @model_validator(mode="after")
    def _check_content(self) -> Message:
        if "content" not in self.model_fields_set and self.role != "assistant":
            raise invalid("messages", f"a message of role {self.role} needs content")
        if self.tool_calls and self.role != "assistant":
            raise invalid("messages", f"a message of role {self.role} cannot have tool_calls")
        return self

    @property
    def text(self) -> str:
        return "\n".join(part.text for part in self.content)

    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages: a developer is the system, and arguments of calls are objects."""
        given: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": self.text,
        }
        for name in ("name", "tool_call_id"):
            if getattr(self, name) is not None:
                given[name] = getattr(self, name)
        if self.tool_calls:
            given["tool_calls"] = [call.for_template() for call in self.tool_calls]
        return given
