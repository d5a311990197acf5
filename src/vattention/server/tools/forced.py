"""Calls that a model has to make: a grammar of calls whose arguments are of the functions' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattention.errors import RequestError
from vattention.server.tools.reading import CallFormat
from vattention.structured_outputs import json_value


@dataclass(frozen=True, slots=True)
class Function:
    """Attributes:
    parameters: JSON schema of the arguments' object; None for a function without any.
    """

    name: str
    parameters: Mapping[str, Any] | None


def forced_calls(
    call_format: CallFormat, functions: Sequence[Function], special: Mapping[str, Sequence[int]], *, only_one: bool
) -> str:
    """A grammar in llguidance's dialect of Lark.

    Args:
        functions: those that may be called.
        special: of the format's markers those that are special tokens, with their ids.
        only_one: one call, and not several.

    Raises:
        RequestError: a function's schema has numbers that JSON has not.
    """
    way = call_format.writing
    between = _terminals(way.between, special)
    rules = [
        f"start: {_terminals(way.start, special)} call {'' if only_one else f'({between} call)*'} "
        f"{_terminals(way.end, special)}",
        f"call: {' | '.join(f'call{i}' for i in range(len(functions)))}",
    ]
    for i, function in enumerate(functions):
        before = way.before.replace(way.NAME, json.dumps(function.name, ensure_ascii=False))
        rules.append(f"call{i}: {_terminals(before, special)} arguments{i} {_terminals(way.after, special)}")
        rules.append(f"arguments{i}: {_arguments(function)}")
    return "\n".join(rules)


def _arguments(function: Function) -> str:
    none: Mapping[str, Any] = {"properties": {}, "additionalProperties": False}
    try:
        return json_value({"type": "object", **(none if function.parameters is None else function.parameters)})
    except ValueError as error:
        raise RequestError(f"parameters of {function.name!r} are no JSON: {error}", param="tools") from error


def _terminals(text: str, special: Mapping[str, Sequence[int]]) -> str:
    """A fixed text as Lark has it; special tokens are no characters, and go by their ids."""
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    terminals: list[str] = []
    for piece in filter(None, pieces):
        ids = special.get(piece)
        terminals += [json.dumps(piece, ensure_ascii=False)] if ids is None else [f"<[{token}]>" for token in ids]
    return " ".join(terminals)
