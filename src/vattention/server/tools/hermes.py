"""Hermes, Qwen 2.5, Qwen 3 and others: <tool_call>{"name": ..., "arguments": ...}</tool_call>."""

from __future__ import annotations

from collections.abc import Collection

from vattention.server.tools.calls import JsonScan, call_of, json_value
from vattention.server.tools.reading import NO_CALL, Reading, Writing, call_id, skip_space

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
        start = skip_space(text, len(OPEN))
        if not text.startswith("{", start):
            return NO_CALL if final or start < len(text) else None
        end = scan.end(text, start)
        if end is None:
            return NO_CALL if final or scan.broken else None
        call = call_of(json_value(text[start:end]), known)
        if call is None:
            return NO_CALL
        close = skip_space(text, end)
        if text.startswith(CLOSE, close):
            end = close + len(CLOSE)
        elif not final and CLOSE.startswith(text[close:]):
            return None
        return Reading((call,), end)

    def new_id(self) -> str:
        return call_id()
