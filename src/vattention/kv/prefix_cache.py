"""What slots hold that others could use: finding the longest prefix, and who is just computing a longer one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vattention.kv.layout import Group
from vattention.kv.prefix import PrefixTree
from vattention.kv.slots import Slot, SlotTable

MIN_SHARED_TOKENS = 16
"""Sharing fewer costs more than computing them: each plane's last page is copied, however few tokens there are."""


@dataclass(frozen=True, slots=True)
class Hit:
    """The first `num_tokens` tokens of a request, all of them in `source`.

    Attributes:
        whole: no sequence lives in `source`, and it holds nothing but what the request begins with: the request can
            go on right there.
    """

    source: Slot
    num_tokens: int
    whole: bool


class PrefixCache:
    """The tokens of slots, live and parked.

    Args:
        enabled: without it no token is ever known.
    """

    def __init__(self, table: SlotTable, groups: tuple[Group, ...], *, enabled: bool) -> None:
        self.enabled = enabled
        self._table = table
        self._groups = groups
        self._tree = PrefixTree()

    def know(self, slot: Slot, tokens: Sequence[int], salt: str, *, ready: int) -> None:
        """The slot will hold these first tokens, and holds the first `ready` of them."""
        if self.enabled:
            slot.tokens, slot.ready, slot.salt = tuple(tokens), ready, salt
            self._tree.insert(slot.index, slot.tokens, salt)

    def shorten(self, slot: Slot, num_tokens: int) -> None:
        """The slot's tokens are known no further than this."""
        if num_tokens < len(slot.tokens):
            self.know(slot, slot.tokens[:num_tokens], slot.salt, ready=min(slot.ready, num_tokens))

    def find(self, tokens: Sequence[int], salt: str) -> Hit | None:
        """The longest prefix of all but the last token; among equals a slot that the request can go on in."""
        most = len(tokens) - 1
        best = None
        best_length = 0
        for row, common in self._tree.matches(tuple(tokens), salt):
            if min(common, most) <= best_length:
                break
            slot = self._table.slots[row]
            length = min(common, slot.ready, most)
            whole = not slot.live and common == len(slot.tokens)
            if length > best_length and (whole or length >= MIN_SHARED_TOKENS) and slot.holds(length, self._groups):
                best, best_length = Hit(slot, length, whole), length
        return best

    def awaits(self, tokens: Sequence[int], salt: str) -> bool:
        """Whether a live slot is to hold more than what can be had now, by so much that it is worth the wait."""
        most = len(tokens) - 1
        cached = promised = 0
        for row, common in self._tree.matches(tuple(tokens), salt):
            reach = min(common, most)
            if reach <= cached or reach + MIN_SHARED_TOKENS <= promised:
                break
            slot = self._table.slots[row]
            if slot.live and slot.ready < reach:
                promised = max(promised, reach)
            length = min(slot.ready, reach)
            if slot.holds(length, self._groups):
                cached = max(cached, length)
        return promised >= cached + MIN_SHARED_TOKENS
