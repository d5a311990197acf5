"""Buddy allocation: contiguous ranges in powers of two, which split in halves and merge with their other halves.

Knuth, The Art of Computer Programming, volume 1, section 2.5. The PagedAttention paper's baselines choose physical
memory with it (arXiv 2309.06180, section 6.1).
"""

from __future__ import annotations

from bisect import insort


class BuddyAllocator:
    """Ranges of the units [0, capacity). Not thread-safe.

    A range of 2**k units begins at a multiple of 2**k.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._allocated: dict[int, int] = {}
        """Where each allocated range begins, and its order: it has 2**order units."""
        self._free: list[list[int]] = []
        self._rebuild()

    @property
    def num_allocated(self) -> int:
        """Units in ranges that are allocated."""
        return sum(1 << order for order in self._allocated.values())

    def fits(self, count: int) -> bool:
        """Whether `count` units would fit if nothing were allocated."""
        return size_of(count) <= self._capacity

    def has_room(self, count: int) -> bool:
        """Whether `allocate` would succeed now."""
        return any(self._free[_order(count) :])

    def allocate(self, count: int) -> int | None:
        """The beginning of a range of at least `count` units, `size_of(count)` exactly; None if there is none.

        The smallest free range that is large enough is split.
        """
        order = _order(count)
        found = next((larger for larger in range(order, len(self._free)) if self._free[larger]), None)
        if found is None:
            return None
        start = self._free[found].pop(0)
        for smaller in range(found - 1, order - 1, -1):
            insort(self._free[smaller], start + (1 << smaller))
        self._allocated[start] = order
        return start

    def free(self, start: int) -> None:
        """Give an allocated range back; it merges with its buddy where that is free too.

        Raises:
            ValueError: no allocated range begins there.
        """
        if start not in self._allocated:
            raise ValueError(f"no range begins at unit {start}")
        order = self._allocated.pop(start)
        if start + (1 << order) > self._capacity:
            self._rebuild()
            return
        while (buddy := start ^ (1 << order)) in self._free[order]:
            self._free[order].remove(buddy)
            start = min(start, buddy)
            order += 1
        insort(self._free[order], start)

    def resize(self, capacity: int) -> None:
        """Change how many units there are. Ranges beyond a capacity that has fallen stay until they are freed."""
        if capacity != self._capacity:
            self._capacity = capacity
            self._rebuild()

    def _rebuild(self) -> None:
        """Cut the gaps between allocated ranges into the largest pieces that their places allow."""
        largest = max([self._capacity, *(1 << order for order in self._allocated.values())])
        self._free = [[] for _ in range(largest.bit_length() + 1)]
        start = 0
        for end, order in (*sorted(self._allocated.items()), (self._capacity, 0)):
            until = min(end, self._capacity)
            while start < until:
                fitting = (until - start).bit_length() - 1
                aligned = (start & -start).bit_length() - 1 if start else fitting
                piece = min(fitting, aligned)
                self._free[piece].append(start)
                start += 1 << piece
            start = end + (1 << order)


def size_of(count: int) -> int:
    """Units of the range that `count` units get: the next power of two."""
    return 1 << _order(count)


def _order(count: int) -> int:
    return max(count - 1, 0).bit_length()
