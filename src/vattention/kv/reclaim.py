"""Taking memory back from those who can do without it, the most useless first."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import TypeVar

from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.backing import Backing
from vattention.kv.prefix_cache import MIN_SHARED_TOKENS, PrefixCache
from vattention.kv.slots import Slot, SlotTable

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SMALLEST_CUT = 1 / 8
"""Of a cached prefix: each cut costs more calls than memory, so that the next step shall not need another."""


class Reclaimer:
    """Warm memory first that is of no worth, then cached prefixes and what lies behind windows, least recently used
    first, in the end what running sequences have mapped ahead.
    """

    def __init__(self, table: SlotTable, cache: PrefixCache, backing: Backing) -> None:
        self._table = table
        self._cache = cache
        self._backing = backing
        self._everything = backing.layout.nbytes

    def provide(self, operation: Callable[[], Result], keep: tuple[Slot, ...] = ()) -> Result:
        """Do what takes memory, and take back as much as it lacks but for that of `keep`.

        Args:
            operation: does all it should, or raises OutOfMemoryError and changes nothing.
        """
        try:
            return operation()
        except OutOfMemoryError as error:
            if not self.reclaim(max(error.needed_nbytes - error.available_nbytes, 1), keep):
                raise
        try:
            return operation()
        except OutOfMemoryError:
            # The system had less than the limit promised: give it everything nobody uses, then ask once more.
            if not self.reclaim(self._everything, keep):
                raise
        return operation()

    def reclaim(self, nbytes: int, keep: tuple[Slot, ...] = ()) -> int:
        """Take back at least `nbytes` of memory, but for that of `keep`, if there is so much; returns how much."""
        pool = self._backing.pool
        before = pool.in_use_nbytes
        if nbytes <= 0:
            return 0
        for slot, take_back in self._offers():
            if pool.in_use_nbytes <= before - nbytes:
                break
            if slot not in keep:
                self.attempt(partial(take_back, slot, before - nbytes))
        return before - pool.in_use_nbytes

    def attempt(self, give_back: Callable[[], None]) -> None:
        """Give memory back where nothing depends on it: what the driver refuses is tried again another time."""
        try:
            give_back()
        except DriverError:
            logger.exception("memory could not be given back; it stays mapped and accounted for")

    def everything(self) -> None:
        """Take back all that running sequences can do without, and give it to the system."""
        self.reclaim(self._everything)
        self.attempt(self._backing.pool.release_idle)

    def evict(self, slot: Slot) -> None:
        """Take all a free slot has; its tokens are forgotten even where the driver refuses."""
        self._cache.shorten(slot, 0)
        try:
            self._backing.clear(slot)
        finally:
            self._table.file(slot)

    def _offers(self) -> Iterator[tuple[Slot, Callable[[Slot, int], None]]]:
        """Who could give memory, and how: (slot, bytes in use to come down to) is what that is called with."""
        for slot in self._table.warm():
            yield slot, lambda slot, _: self.evict(slot)
        for slot in sorted(self._table.parked() + self._table.live(), key=lambda slot: slot.used):
            yield slot, self._give_back_behind if slot.live else self._shrink
        for slot in self._table.live():
            yield slot, lambda slot, _: self._backing.cut(slot, slot.num_tokens)

    def _give_back_behind(self, slot: Slot, goal: int) -> None:
        self._backing.give_back_behind(slot, slot.start)

    def _shrink(self, slot: Slot, goal: int) -> None:
        """Take a parked slot's memory from the end: the beginning is what most requests have in common."""
        layout, pool = self._backing.layout, self._backing.pool
        smallest = max(int(len(slot.tokens) * _SMALLEST_CUT), 1)
        self._backing.cut(slot, len(slot.tokens))
        while slot.tokens and (lacking := pool.in_use_nbytes - goal) > 0:
            left = len(slot.tokens) - max(-(-lacking // layout.token_nbytes), smallest)
            if left < MIN_SHARED_TOKENS or not slot.holds(left, layout.groups):
                self.evict(slot)
            else:
                self._cache.shorten(slot, left)
                self._backing.cut(slot, left)
