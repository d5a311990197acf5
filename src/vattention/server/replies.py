"""The message that one sample's text is: all of it content, or calls of functions among it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from vattention.server.protocol import FinishReason
from vattention.server.protocol_chat import Delta
from vattention.server.protocol_tools import ToolCall
from vattention.server.tools import Call, CallFormat, CallSplitter, Content, Piece


class ReplyText(Protocol):
    """Reads one sample: its whole text in pieces, or at once."""

    def deltas(self, text: str, *, finished: bool) -> list[Delta]:
        """What a stream says of more text; with `finished` it is the last."""
        ...

    def message(self, text: str) -> tuple[str | None, list[ToolCall]]:
        """Content and calls of the whole text."""
        ...

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        """Why the message ended, where the text ended for `reason`."""
        ...


class PlainText:
    """Text that is content."""

    def deltas(self, text: str, *, finished: bool) -> list[Delta]:
        return [{"content": text}] if text else []

    def message(self, text: str) -> tuple[str | None, list[ToolCall]]:
        return text, []

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        return reason


class TextWithCalls:
    """Text in which the model may call functions.

    Args:
        known: names of the functions there are.
        only_one: the reply is over with its first call.
    """

    def __init__(self, call_format: CallFormat, known: Collection[str], *, only_one: bool) -> None:
        self._new_id = call_format.new_id
        self._splitter = CallSplitter(call_format, known, only_one=only_one)
        self._num_told = 0

    def deltas(self, text: str, *, finished: bool) -> list[Delta]:
        deltas: list[Delta] = []
        for piece in self._pieces(text, finished=finished):
            match piece:
                case Content(text=content):
                    deltas.append({"content": content})
                case Call(name=name, arguments=arguments):
                    index = self._num_told
                    self._num_told += 1
                    deltas.append(
                        {
                            "tool_calls": [
                                {
                                    "index": index,
                                    "id": self._new_id(),
                                    "type": "function",
                                    "function": {"name": name, "arguments": ""},
                                }
                            ]
                        }
                    )
                    deltas.append({"tool_calls": [{"index": index, "function": {"arguments": arguments}}]})
        return deltas

    def message(self, text: str) -> tuple[str | None, list[ToolCall]]:
        pieces = self._pieces(text, finished=True)
        content = "".join(piece.text for piece in pieces if isinstance(piece, Content))
        calls: list[ToolCall] = [
            {
                "id": self._new_id(),
                "type": "function",
                "function": {"name": piece.name, "arguments": piece.arguments},
            }
            for piece in pieces
            if isinstance(piece, Call)
        ]
        return (content or None) if calls else content, calls

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        return "tool_calls" if reason == "stop" and self._splitter.num_calls else reason

    def _pieces(self, text: str, *, finished: bool) -> Sequence[Piece]:
        pieces = self._splitter.feed(text)
        return [*pieces, *self._splitter.finish()] if finished else pieces
