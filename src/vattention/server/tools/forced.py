"""Calls that a model has to make: a grammar of calls whose arguments are of the functions' schemas."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vattention.server.tools.reading import CallFormat
from vattention.structured_outputs import AS_MODELS_WRITE


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
        rules.append(f"arguments{i}: %json {json.dumps(_schema(function.parameters), ensure_ascii=False)}")
    return "\n".join(rules)


def _schema(parameters: Mapping[str, Any] | None) -> dict[str, Any]:
    schema = {"properties": {}, "additionalProperties": False} if parameters is None else parameters
    return {"type": "object", **schema, "x-guidance": AS_MODELS_WRITE}


def _terminals(text: str, special: Mapping[str, Sequence[int]]) -> str:
    """A fixed text as Lark has it; special tokens are no characters, and go by their ids."""
    pieces = re.split(f"({'|'.join(map(re.escape, special))})", text) if special else [text]
    terminals: list[str] = []
    for piece in filter(None, pieces):
        ids = special.get(piece)
        terminals += [json.dumps(piece, ensure_ascii=False)] if ids is None else [f"<[{token}]>" for token in ids]
    return " ".join(terminals)
