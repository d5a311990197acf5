"""Functions that a model may call: in a request's body, and calls in the response."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NotRequired, TypedDict

from pydantic import AfterValidator, BeforeValidator, Field
from pydantic_core import PydanticCustomError

from vattention.server.protocol import Body, Text, invalid

JSON_TYPES = frozenset({"array", "boolean", "integer", "null", "number", "object", "string"})


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    """What every JSON schema of a function's parameters keeps to."""
    if schema.get("type", "object") != "object":
        raise _wrong("must be the schema of an object")
    try:
        _check_types(schema)
        _check_text(schema)
    except RecursionError as error:
        raise _wrong("is nested too deeply") from error
    return schema


def _check_text(schema: Any) -> None:
    try:
        json.dumps(schema, ensure_ascii=False, allow_nan=False).encode()
    except ValueError as error:
        raise _wrong("must be Unicode without lone surrogates, and have finite numbers") from error


def _check_types(schema: Any) -> None:
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise _wrong(f"has {schema!r:.60} where a JSON schema should be")
    types = schema.get("type", [])
    wrong = set(map(str, types if isinstance(types, list) else [types])) - JSON_TYPES
    if wrong:
        raise _wrong(f"has an unknown type: {min(wrong)}")
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        raise _wrong("has properties that are no object of schemas")
    for inner in properties.values():
        _check_types(inner)
    required = schema.get("required", [])
    if not (isinstance(required, list) and all(isinstance(name, str) for name in required)):
        raise _wrong("has required that is no list of names")


def _wrong(message: str) -> PydanticCustomError:
    return PydanticCustomError("value_error", message)


class FunctionDefinition(Body):
    """A function: its name, what it is for, and the JSON schema of its arguments."""

    name: Annotated[Text, Field(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_check_parameters)] | None = None
    strict: bool | None = None


class Tool(Body):
    """Something that a model may use; this server knows functions only."""

    type: Literal["function"]
    function: FunctionDefinition

    def for_template(self) -> dict[str, Any]:
        return self.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


def check_names(tools: list[Tool]) -> list[Tool]:
    """Every function has a name of its own."""
    names = [tool.function.name for tool in tools]
    twice = next((place for place, name in enumerate(names) if name in names[:place]), None)
    if twice is not None:
        raise invalid(f"tools[{twice}].function.name", f"{names[twice]!r} names another function already")
    return tools


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may call functions, or has to.

    Attributes:
        name: the one function that it has to call; None where it may choose.
    """

    mode: Literal["none", "auto", "required"]
    name: str | None = None


def _choice(value: Any) -> Any:
    """From OpenAI's "none", "auto", "required" or {"type": "function", "function": {"name": ...}}."""
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name), **rest}, **more} if not rest and not more:
            return ToolChoice("required", name)
    raise invalid(
        "tool_choice", 'must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
    )


Choice = Annotated[
    ToolChoice,
    BeforeValidator(_choice, json_schema_input_type=Literal["none", "auto", "required"] | dict[str, Any]),
]


class CallFunction(TypedDict):
    """`arguments` is a JSON object as text."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    id: str
    type: Literal["function"]
    function: CallFunction


class DeltaFunction(TypedDict):
    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """More of the call number `index`; id, type and name come with the first piece."""

    index: int
    function: DeltaFunction
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
