"""Hermes, Qwen 2.5, Qwen 3 and others: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

from collections.abc import Collection

from vattention.server.tools.calls import JsonScan
from vattention.server.tools.reading import Reading, Writing, call_id, read_object, skip_space

OPEN, CLOSE = "<tool_call>", "</tool_call>"

OTHERS = ("<function=", "<arg_key>")
"""What templates have between the same tags that write no JSON there: Qwen 3 Coder's, GLM's."""


class Hermes:
    """JSON between tags. Where a reply ends, the one that closes may be missing."""

    name = "hermes"
    markers = (OPEN,)
    opening = ""
    separators = ""
    writing = Writing(f'{OPEN}\n{{"name": NAME, "arguments": ', f"}}\n{CLOSE}", between="\n")

    def is_of(self, template: str) -> bool:
        return OPEN in template and not any(other in template for other in OTHERS)

    def read(self, text: str, known: Collection[str], scan: JsonScan, *, final: bool) -> Reading | None:
        reading = read_object(text, len(OPEN), known, scan, final=final)
        if reading is None or not reading.calls:
            return reading
        close = skip_space(text, reading.num_chars)
        if text.startswith(CLOSE, close):
            return Reading(reading.calls, close + len(CLOSE))
        return None if not final and CLOSE.startswith(text[close:]) else reading

    def new_id(self) -> str:
        return call_id()
