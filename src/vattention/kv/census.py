"""What running sequences cannot do without, counted in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vattention.kv.backing import Backing
from vattention.kv.slots import Slot
from vattention.memory.driver import IntArray


@dataclass(frozen=True, slots=True)
class Needs:
    """What the tokens of running sequences take.

    Attributes:
        num_pages: pages behind them, each once.
        num_saved: how many more there would be if nothing were shared.
        token_nbytes: bytes of their tokens that later forwards read, once per sequence.
    """

    num_pages: int
    num_saved: int
    token_nbytes: int


@dataclass(frozen=True, slots=True)
class _Counted:
    """What was found behind the slots of one group that share pages.

    Attributes:
        key: of what was counted, so that it is counted once.
        num_saved: by how much the number of mappings exceeds the number of pages.
        needed: per page of the pool, whether it is among these.
    """

    key: object
    num_saved: int
    needed: NDArray[np.bool_]


class Census:
    """Counts anew every time, by arithmetic over all slots at once.

    Only pages that slots share are looked at one by one, and again only after anything about them has changed: for
    32 sequences that share 1,024 tokens of a model with 18 layers they are 147,456.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._counted: dict[int, _Counted] = {}

    def needs(self, live: Sequence[Slot]) -> Needs:
        if not live:
            return Needs(0, 0, 0)
        columns = _columns(live)
        _, starts, ends, _ = columns
        num_pages = num_saved = token_nbytes = 0
        for index, group in enumerate(self._backing.layout.groups):
            read = group.first_needed_each(starts)
            first, last = group.bounds(read, ends)
            num_pages += int(np.maximum(last - first, 0).sum())
            later = group.first_needed_each(np.maximum(starts, ends - 1))
            token_nbytes += int(np.maximum(ends - later, 0).sum()) * group.token_nbytes
            num_saved += self._count(index, columns).num_saved
        return Needs(num_pages - num_saved, num_saved, token_nbytes)

    def num_common(self, live: Sequence[Slot], source: Slot, num_shared: int, num_tokens: int) -> int:
        """Of the pages that a sequence of `num_tokens` tokens would need, about to compute its last, how many it
        would have in common with running sequences if it began with the first `num_shared` tokens of `source`.
        """
        num_common, columns = 0, _columns(live)
        for index, group in enumerate(self._backing.layout.groups):
            first = group.first_needed(num_tokens - 1)
            if first >= num_shared:
                continue
            own = max(first, group.first_needed(source.start)) if source.live else num_shared
            if own < num_shared:
                num_common += len(group.pages_behind(source.index, own, num_shared))
            needed = self._count(index, columns).needed
            others = self._backing.region.pages(group.pages_behind(source.index, first, min(own, num_shared)))
            num_common += int(np.count_nonzero(needed[others[others < len(needed)]]))
        return num_common

    def _count(self, index: int, columns: IntArray) -> _Counted:
        """Look at the pages that running sequences may share in one group."""
        group = self._backing.layout.groups[index]
        slots, starts, ends, shared = columns
        read = group.first_needed_each(starts)
        some = np.flatnonzero(shared > read)
        if not len(some):
            return _NOTHING
        first, last = group.bounds(read[some], np.minimum(shared, ends)[some])
        key = (self._backing.version, slots[some].tobytes(), first.tobytes(), last.tobytes())
        known = self._counted.get(index, _NOTHING)
        if known.key != key:
            pages = self._backing.region.pages(group.expand(slots[some], first, last))
            needed = np.bincount(pages) > 0
            known = self._counted[index] = _Counted(key, len(pages) - int(np.count_nonzero(needed)), needed)
        return known


_NOTHING = _Counted(None, 0, np.zeros(0, np.bool_))


def _columns(live: Sequence[Slot]) -> IntArray:
    """Per slot [4, n]: its index, where its latest forward began, its tokens, and how many of them it may share."""
    columns = np.array([(slot.index, slot.start, slot.num_tokens, slot.shared) for slot in live], np.int64)
    return columns.T
