"""Llama 3: {"name": ..., "parameters": ...}, as the whole reply or behind <|python_tag|>."""

from __future__ import annotations

from collections.abc import Collection

from vattention.server.tools.calls import JsonScan
from vattention.server.tools.reading import Reading, Writing, call_id, read_object

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
        return read_object(text, len(TAG) if text.startswith(TAG) else 0, known, scan, final=final)

    def new_id(self) -> str:
        return call_id()
