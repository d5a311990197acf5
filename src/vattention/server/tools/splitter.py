"""A reply as it comes, cut into calls and the text around them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

from vattention.server.tools.calls import Call, Content, JsonScan, Piece
from vattention.server.tools.reading import CallFormat

WHITE_SPACE = " \t\r\n"


class CallSplitter:
    """Cuts one sample's text. Where the text is cut on its way in changes nothing about what comes out.

    A call comes out once all of it has come in, because only then is it known to be one: what only looks like a
    call is content, to the last character. White space around calls belongs to them.

    Args:
        known: names of the functions there are.
        only_one: nothing comes out behind the first call.
    """

    def __init__(self, call_format: CallFormat, known: Collection[str], *, only_one: bool = False) -> None:
        self._format = call_format
        self._known = known
        self._only_one = only_one
        self._held = ""
        self._scan = JsonScan()
        self._behind: Literal["start", "text", "call"] = "start"
        self.num_calls = 0

    def feed(self, text: str) -> list[Piece]:
        """Take more text; returns what is decided by it."""
        self._held += text
        return self._cut(final=False)

    def finish(self) -> list[Piece]:
        """No more text will come."""
        return self._cut(final=True)

    def _cut(self, *, final: bool) -> list[Piece]:
        pieces: list[Piece] = []
        while self._held and not (self._only_one and self.num_calls):
            news = self._next(final)
            if news is None:
                break
            pieces += news
        return pieces

    def _next(self, final: bool) -> list[Piece] | None:
        """The pieces that the held text begins with, which is not held any more; None where more has to come."""
        rest = self._held.lstrip(WHITE_SPACE + (self._format.separators if self._behind == "call" else ""))
        gap = self._held[: len(self._held) - len(rest)]
        marker = self._marker_of(rest)
        if marker:
            reading = self._format.read(rest, self._known, self._scan, final=final)
            if reading is None:
                return None
            self._scan = JsonScan()
            if reading.calls:
                return self._pass_on(reading.calls, rest[reading.num_chars :])
            return self._pass_on((Content(gap + marker),), rest[len(marker) :])
        if not final and any(marker.startswith(rest) for marker in self._format.markers):
            return None
        if not rest and not gap.strip() and self._behind == "call":
            return self._pass_on((), "")
        end = self._text_end(rest, final)
        return self._pass_on((Content(gap + rest[:end]),), rest[end:])

    def _pass_on(self, pieces: Sequence[Piece], held: str) -> list[Piece]:
        self._held = held
        if pieces:
            num_calls = sum(isinstance(piece, Call) for piece in pieces)
            self._behind = "call" if num_calls else "text"
            self.num_calls += num_calls
        return list(pieces[:1] if self._only_one else pieces)

    def _marker_of(self, text: str) -> str:
        """What it begins with that calls begin with; "" for nothing."""
        markers = self._format.markers
        if self._behind != "text" and self._format.opening:
            markers = (*markers, self._format.opening)
        return next((marker for marker in markers if text.startswith(marker)), "")

    def _text_end(self, text: str, final: bool) -> int:
        """How much of it is surely content: all before a marker, or what may become one, and its space."""
        found = [place for place in map(text.find, self._format.markers) if place >= 0]
        if found:
            return len(text[: min(found)].rstrip(WHITE_SPACE))
        if final:
            return len(text)
        begun = max(
            (
                length
                for marker in self._format.markers
                for length in range(1, len(marker))
                if text.endswith(marker[:length])
            ),
            default=0,
        )
        return len(text[: len(text) - begun].rstrip(WHITE_SPACE))
