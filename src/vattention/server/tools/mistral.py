"""Mistral: [TOOL_CALLS][{"name": ..., "arguments": ...}, ...], or since 2025 [TOOL_CALLS]name[ARGS]{...}."""

from __future__ import annotations

import re
import secrets
import string
from collections.abc import Collection

from vattention.server.tools.calls import Call, JsonScan, call_of, json_value
from vattention.server.tools.reading import NO_CALL, Reading, Writing, skip_space

MARKER = "[TOOL_CALLS]"

MAX_HEAD = 600
"""Most characters between the marker and a call's arguments."""

_HEAD = re.compile(r"\s*([^\s\[\]{}]+)\s*(?:\[CALL_ID\][^\[\]{}]*)?(?:\[ARGS\]\s*)?")
_ID_CHARS = string.ascii_letters + string.digits


class Mistral:
    """A list of calls behind the marker, or a marker before each call's name."""

    name = "mistral"
    markers = (MARKER,)
    opening = ""
    separators = ""
    writing = Writing('{"name": NAME, "arguments": ', "}", start=f"{MARKER}[", between=", ", end="]")

    def is_of(self, template: str) -> bool:
        return MARKER in template

    def read(self, text: str, known: Collection[str], scan: JsonScan, *, final: bool) -> Reading | None:
        start = skip_space(text, len(MARKER))
        if text.startswith("[", start):
            return self._read_list(text, start, known, scan, final)
        brace = text.find("{", start, start + MAX_HEAD)
        if brace < 0:
            return NO_CALL if final or len(text) >= start + MAX_HEAD else None
        head = _HEAD.fullmatch(text, start, brace)
        if head is None or head[1] not in known:
            return NO_CALL
        end = scan.end(text, brace)
        if end is None:
            return NO_CALL if final or scan.broken else None
        call = call_of({"name": head[1], "arguments": json_value(text[brace:end])}, known)
        return NO_CALL if call is None else Reading((call,), end)

    def _read_list(
        self, text: str, start: int, known: Collection[str], scan: JsonScan, final: bool
    ) -> Reading | None:
        end = scan.end(text, start)
        if end is None:
            return NO_CALL if final or scan.broken else None
        values = json_value(text[start:end])
        calls = [call_of(value, known) for value in values] if isinstance(values, list) else []
        good: list[Call] = [call for call in calls if call is not None]
        return Reading(tuple(good), end) if good and len(good) == len(calls) else NO_CALL

    def new_id(self) -> str:
        """Nine letters and digits: Mistral's templates take back no others."""
        return "".join(secrets.choice(_ID_CHARS) for _ in range(9))
