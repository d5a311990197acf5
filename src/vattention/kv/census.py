"""What running sequences cannot do without, counted in pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

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


class Census:
    """Counts anew every time, by arithmetic over all slots at once.

    Only pages that slots share are looked at one by one, and again only after anything about them has changed: for
    32 sequences that share 1,024 tokens of a model with 18 layers they are 147,456.
    """

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._counted: dict[int, tuple[object, int]] = {}

    def needs(self, live: Sequence[Slot]) -> Needs:
        if not live:
            return Needs(0, 0, 0)
        columns = np.array([(slot.index, slot.start, slot.num_tokens, slot.shared) for slot in live], np.int64)
        slots, starts, ends, shared = columns.T
        num_pages = num_saved = token_nbytes = 0
        for index, group in enumerate(self._backing.layout.groups):
            read = group.first_needed_each(starts)
            first, last = group.bounds(read, ends)
            num_pages += int(np.maximum(last - first, 0).sum())
            later = group.first_needed_each(np.maximum(starts, ends - 1))
            token_nbytes += int(np.maximum(ends - later, 0).sum()) * group.token_nbytes
            some = np.flatnonzero(shared > read)
            if len(some):
                first, last = group.bounds(read[some], np.minimum(shared, ends)[some])
                num_saved += self._num_saved(index, slots[some], first, last)
        return Needs(num_pages - num_saved, num_saved, token_nbytes)

    def _num_saved(self, index: int, slots: IntArray, first: IntArray, last: IntArray) -> int:
        """By how much the number of mappings exceeds the number of pages."""
        key = (self._backing.version, slots.tobytes(), first.tobytes(), last.tobytes())
        known, num_saved = self._counted.get(index, (None, 0))
        if known != key:
            indices = self._backing.layout.groups[index].expand(slots, first, last)
            pages = self._backing.region.pages(indices)
            num_saved = len(pages) - int(np.count_nonzero(np.bincount(pages)))
            self._counted[index] = key, num_saved
        return num_saved
