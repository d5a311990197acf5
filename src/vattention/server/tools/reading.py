"""What the formats of calls have in common."""

from __future__ import annotations

import re
import uuid
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar, Protocol

from vattention.server.tools.calls import Call, JsonScan, call_of, json_value

_SPACE = re.compile(r"\s*")


@dataclass(frozen=True, slots=True)
class Reading:
    """What a text begins with.

    Attributes:
        calls: in the order they are written; none where it only looked like a call.
        num_chars: how much of the text they are.
    """

    calls: tuple[Call, ...] = ()
    num_chars: int = 0


NO_CALL = Reading()


@dataclass(frozen=True, slots=True)
class Writing:
    """How calls are written one after the other.

    Attributes:
        before: what comes before a call's arguments, with `NAME` for its name in quotes.
        after: what comes behind them.
        start, between, end: what comes before the first call, between two, and behind the last.
    """

    before: str
    after: str
    start: str = ""
    between: str = ""
    end: str = ""

    NAME: ClassVar[str] = "NAME"


class CallFormat(Protocol):
    """How a family of models writes calls.

    Attributes:
        name: vLLM's for this format.
        markers: what calls begin with, anywhere in a reply.
        opening: what calls begin with at the start of a reply, or right behind a call; "" for nothing.
        separators: characters that may stand between two calls, besides white space.
        writing: how the model writes them.
    """

    @property
    def name(self) -> str: ...

    @property
    def markers(self) -> tuple[str, ...]: ...

    @property
    def opening(self) -> str: ...

    @property
    def separators(self) -> str: ...

    @property
    def writing(self) -> Writing: ...

    def is_of(self, template: str) -> bool:
        """Whether a chat template writes calls like this."""
        ...

    def read(self, text: str, known: Collection[str], scan: JsonScan, *, final: bool) -> Reading | None:
        """The calls at the beginning of a text that begins with a marker or the opening.

        Args:
            known: names of the functions there are.
            scan: the same one while the text grows.
            final: no more text will come.

        Returns:
            None where more text has to come first, which is never so with `final`. What it says otherwise, it says
            of every longer text too.
        """
        ...

    def new_id(self) -> str:
        """An id for a call, such as the model's chat template takes back."""
        ...


def skip_space(text: str, start: int) -> int:
    """Index of the first character from `start` on that is no white space."""
    match = _SPACE.match(text, start)
    assert match is not None
    return match.end()


def read_object(text: str, start: int, known: Collection[str], scan: JsonScan, *, final: bool) -> Reading | None:
    """The call that one JSON object is, behind white space from `start` on; otherwise as `CallFormat.read`."""
    start = skip_space(text, start)
    if not text.startswith("{", start):
        return NO_CALL if final or start < len(text) else None
    end = scan.end(text, start)
    if end is None:
        return NO_CALL if final or scan.broken else None
    call = call_of(json_value(text[start:end]), known)
    return NO_CALL if call is None else Reading((call,), end)


def call_id() -> str:
    """An id as OpenAI's look."""
    return f"call_{uuid.uuid4().hex[:24]}"
