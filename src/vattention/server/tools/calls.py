"""A call of a function, read from JSON as models write it."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Content:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True, slots=True)
class Call:
    """Attributes:
    arguments: a JSON object, as text.
    """

    name: str
    arguments: str


Piece = Content | Call

MOST_DEPTH = 200
"""Of objects and arrays within one another: how much deeper Python reads and writes them differs by version."""


def call_of(value: Any, known: Collection[str]) -> Call | None:
    """The call that a JSON value stands for: {"name", and "arguments" or "parameters"}; None where it is none.

    Args:
        known: names of the functions there are.
    """
    if not isinstance(value, dict):
        return None
    name = value.get("name")
    arguments = value.get("arguments", value.get("parameters", {}))
    if not (isinstance(name, str) and name in known and isinstance(arguments, dict)):
        return None
    try:
        text = json.dumps(arguments, ensure_ascii=False, allow_nan=False)
        text.encode()
    except ValueError:
        return None  # an infinite number, or half of a surrogate pair
    return Call(name, text)


def json_value(text: str) -> Any:
    """The value of a JSON text, which may have line breaks within strings; None where it is broken."""
    try:
        return json.loads(text, strict=False)
    except ValueError:
        return None


class JsonScan:
    """Finds where a JSON object or array ends in a text that grows, looking at each character once.

    Attributes:
        broken: it has no end, because a character came that no JSON has outside of strings, or it is nested deeper
            than `MOST_DEPTH`.
    """

    _MARKS = re.compile(r'\\.|["{}\[\]]|[^\\\s\w,:.+-]', re.DOTALL)

    def __init__(self) -> None:
        self.broken = False
        self._end: int | None = None
        self._position = 0
        self._depth = 0
        self._in_string = False

    def end(self, text: str, start: int) -> int | None:
        """Index behind the object or array that begins at `start`; None while it goes on, and where it is broken.

        Args:
            text: the one of the last call, or a longer one that begins with it.
        """
        if self._end is None and not self.broken:
            self._look(text, max(self._position, start))
        return self._end

    def _look(self, text: str, position: int) -> None:
        for match in self._MARKS.finditer(text, position):
            position, mark = match.end(), match[0]
            if mark == '"':
                self._in_string = not self._in_string
            elif self._in_string:
                continue
            elif mark in "{[" and self._depth < MOST_DEPTH:
                self._depth += 1
            elif mark in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end = position
                    return
            else:
                self.broken = True
                return
        # A backslash at the end belongs to the character that comes next.
        self._position = max(position, len(text) - text.endswith("\\"))
