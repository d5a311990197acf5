"""Llama 3: {"name": ..., "parameters": ...}, as the whole reply or behind <|python_tag|>."""

from __future__ import annotations

from collections.abc import Collection

from vattention.server.tools.calls import JsonScan, call_of, json_value
from vattention.server.tools.reading import NO_CALL, Reading, Writing, call_id, skip_space

TAG = "<|python_tag|>"


class Llama:
    """JSON objects, several with semicolons between them. In mid-text only the tag makes an object a call."""

    name = "llama3_json"
    markers = (TAG,)
    opening = "{"
    separators = ";,"
    writing = Writing('{"name": NAME, "parameters": ', "}", between="; ")

    def is_of(self, template: str) -> bool:
        return TAG in template or ("<|start_header_id|>" in template and '"parameters"' in template)

    def read(self, text: str, known: Collection[str], scan: JsonScan, *, final: bool) -> Reading | None:
        start = skip_space(text, len(TAG) if text.startswith(TAG) else 0)
        if not text.startswith("{", start):
            return NO_CALL if final or start < len(text) else None
        end = scan.end(text, start)
        if end is None:
            return NO_CALL if final or scan.broken else None
        call = call_of(json_value(text[start:end]), known)
        return NO_CALL if call is None else Reading((call,), end)

    def new_id(self) -> str:
        return call_id()
