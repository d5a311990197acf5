"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopChecker:
    """Finds the first stop string, and holds back text that may turn out to be the beginning of one.

    Args:
        stop_strings: non-empty strings.
        include: leave the found stop string in the text.

    Attributes:
        found: the stop string that ended the text, or None. Text that comes after it is dropped.
    """

    def __init__(self, stop_strings: Sequence[str], include: bool = False) -> None:
        self._stops = tuple(stop_strings)
        self._include = include
        self._held = ""
        self.found: str | None = None

    def add(self, text: str) -> str:
        """Take the next piece; returns the text that can be shown, which never holds a part of a stop string.

        Of several stop strings the one that is complete first counts, and of those the longest: how the text is cut
        into pieces makes no difference.
        """
        if self.found is not None:
            return ""
        if not self._stops:
            return text
        text = self._held + text
        hits = [(text.find(stop) + len(stop), -len(stop), stop) for stop in self._stops if stop in text]
        if hits:
            end, _, self.found = min(hits)
            self._held = ""
            return text[:end] if self._include else text[: end - len(self.found)]
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def pass_by(self, text: str) -> str:
        """Take a piece in which no stop string counts, nor any that began before it; returns all text so far."""
        text, self._held = self._held + text, ""
        return text if self.found is None else ""

    def flush(self) -> str:
        """The text held back, once no more will come."""
        return self.pass_by("")


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
