"""The output of /v1/responses: messages and calls of functions, and the events that tell of them piece by piece."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any, Literal

from vattention.server.protocol_chat import Delta
from vattention.server.protocol_tools import ToolCallDelta

Event = dict[str, Any]
Status = Literal["completed", "incomplete"]


class OutputItems:
    """Puts one sample's items together from what a chat's stream says of it.

    Events show items as they are: each is to be sent before the next is asked for.

    Attributes:
        items: those so far; the last one may still grow.
    """

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._is_open = False

    def add(self, delta: Delta) -> Iterator[Event]:
        """More of the sample; the events that say so."""
        if delta.get("content"):
            yield from self._add_text(delta["content"])
        for call in delta.get("tool_calls", ()):
            yield from self._add_call(call)

    def finish(self, status: Status) -> Iterator[Event]:
        """There is no more; with no item so far, there is a message without text."""
        if not self.items:
            yield from self._open_message()
        yield from self._close(status)

    def _add_text(self, text: str) -> Iterator[Event]:
        if not self._is_open or self._last["type"] != "message":
            yield from self._close()
            yield from self._open_message()
        self._last["content"][0]["text"] += text
        yield self._event("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _add_call(self, call: ToolCallDelta) -> Iterator[Event]:
        function = call["function"]
        if "name" in function:
            yield from self._close()
            yield self._open(
                {
                    "id": f"fc_{uuid.uuid4().hex}",
                    "type": "function_call",
                    "status": "in_progress",
                    "call_id": call["id"],
                    "name": function["name"],
                    "arguments": "",
                }
            )
        if function["arguments"]:
            self._last["arguments"] += function["arguments"]
            yield self._event("response.function_call_arguments.delta", delta=function["arguments"])

    def _open_message(self) -> Iterator[Event]:
        yield self._open(
            {
                "id": f"msg_{uuid.uuid4().hex}",
                "type": "message",
                "status": "in_progress",
                "role": "assistant",
                "content": [],
            }
        )
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        self._last["content"].append(part)
        yield self._event("response.content_part.added", content_index=0, part=part)

    def _open(self, item: dict[str, Any]) -> Event:
        self.items.append(item)
        self._is_open = True
        return {"type": "response.output_item.added", "output_index": len(self.items) - 1, "item": item}

    def _close(self, status: Status = "completed") -> Iterator[Event]:
        """End the item that is still growing, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        item = self._last
        item["status"] = status
        if item["type"] == "message":
            [part] = item["content"]
            yield self._event("response.output_text.done", content_index=0, text=part["text"], logprobs=[])
            yield self._event("response.content_part.done", content_index=0, part=part)
        else:
            yield self._event(
                "response.function_call_arguments.done", name=item["name"], arguments=item["arguments"]
            )
        yield {"type": "response.output_item.done", "output_index": len(self.items) - 1, "item": item}

    @property
    def _last(self) -> dict[str, Any]:
        return self.items[-1]

    def _event(self, kind: str, **values: Any) -> Event:
        """About the last item."""
        return {"type": kind, "item_id": self._last["id"], "output_index": len(self.items) - 1, **values}
