"""What a text has to be, in vLLM's words, and as a grammar in llguidance's dialect of Lark. A leaf."""

from __future__ import annotations

import json as json_format
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from vattention.errors import RequestError

_AS_MODELS_WRITE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""llguidance's options for JSON. White space that is free is where a model may get stuck."""


def json_value(schema: Mapping[str, Any]) -> str:
    """What stands in a grammar for a value of a JSON schema, which is spaced as models write JSON.

    Raises:
        TypeError, ValueError: the schema cannot be written as JSON.
    """
    spaced = {"x-guidance": _AS_MODELS_WRITE, **schema}
    return f"%json {json_format.dumps(spaced, ensure_ascii=False, allow_nan=False)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputsParams:
    """One of these, with vLLM's names and meanings.

    Attributes:
        json: a JSON schema, as a mapping or written as JSON: the text is a value that it describes.
        regex: a regular expression that the whole text matches, without assertions about what lies around.
        choice: the text is one of these.
        grammar: a grammar in llguidance's dialect of Lark, whose rule `start` the text follows.
        json_object: the text is any JSON object.

    Raises:
        RequestError: there is none of them, or more than one, or it cannot be what it says.
    """

    json: str | Mapping[str, Any] | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def __post_init__(self) -> None:
        self.lark()

    def lark(self) -> str:
        """The grammar."""
        names = [field.name for field in fields(self)]
        given = [name for name in names if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            raise _invalid(f"take one of {', '.join(names)}, not {' and '.join(given) or 'none'}")
        if self.json is not None:
            return _json(self.json)
        if self.regex is not None:
            return f"start: /{_slashes_escaped(_text(self.regex, 'regex'))}/"
        if self.choice is not None:
            return _choice(self.choice)
        return _json({"type": "object"}) if self.grammar is None else _text(self.grammar, "grammar")


def _json(schema: object) -> str:
    if isinstance(schema, str):
        try:
            schema = json_format.loads(schema)
        except ValueError as error:
            raise _invalid(f"json is no JSON: {error}") from error
    if not isinstance(schema, Mapping):
        raise _invalid(f"json must be a schema, which is an object, not {schema!r}")
    try:
        return f"start: {json_value(schema)}"
    except (TypeError, ValueError) as error:
        raise _invalid(f"json cannot be written as JSON: {error}") from error


def _choice(choice: object) -> str:
    if isinstance(choice, str) or not isinstance(choice, Sequence) or not choice:
        raise _invalid(f"choice must be a list of texts, not {choice!r}")
    return f"start: {' | '.join(json_format.dumps(_text(one, 'choice'), ensure_ascii=False) for one in choice)}"


def _text(value: object, name: str) -> str:
    if not isinstance(value, str) or not value:
        raise _invalid(f"{name} must be text, not {value!r}")
    return value


def _slashes_escaped(regex: str) -> str:
    """For between two slashes; and without anchors at its ends, which say what holds anyway."""
    regex = regex.removeprefix("^")
    if re.search(r"(?<!\\)(\\\\)*\$$", regex):
        regex = regex[:-1]
    return re.sub(r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), regex)


def _invalid(message: str) -> RequestError:
    return RequestError(f"structured_outputs: {message}", param="structured_outputs")
