"""Physical pages under a limit: who holds how many references, and which handles can be used again."""

from __future__ import annotations

import numpy as np

from vattention.errors import OutOfMemoryError
from vattention.memory.driver import Driver, IntArray

_FIRST_CAPACITY = 1024


class PagePool:
    """Pages by id: dense positive integers, which are used again. 0 is no page.

    A page lives while somebody holds a reference to it: a mapping (`Region` takes those) or anybody else, such as
    a prefix cache. Handles of dropped pages are kept for the next `create` where the driver says that this is
    cheaper (creating one takes 190 µs on an A100, mapping one 1.5 µs: vAttention, arXiv 2405.04437, table 3); they
    count against the limit, and go back to the system where the limit falls.

    Not thread-safe, as drivers.

    Args:
        limit_nbytes: most physical memory to hold, idle handles included.
    """

    def __init__(self, driver: Driver, limit_nbytes: int) -> None:
        self._driver = driver
        self._page_nbytes = driver.page_nbytes
        self._limit_nbytes = limit_nbytes
        self._handles = np.zeros(_FIRST_CAPACITY, np.int64)
        self._references = np.zeros(_FIRST_CAPACITY, np.int64)
        self._free_ids: list[int] = []
        self._next_id = 1
        self._num_in_use = 0
        self._idle_handles: list[int] = []

    @property
    def limit_nbytes(self) -> int:
        """May be set at any time. Lowering it releases idle handles; pages in use stay, above the limit if so."""
        return self._limit_nbytes

    @limit_nbytes.setter
    def limit_nbytes(self, nbytes: int) -> None:
        self._limit_nbytes = nbytes
        excess = self.in_use_nbytes + self.idle_nbytes - nbytes
        if excess > 0:
            self._release_idle(-(-excess // self._page_nbytes))

    @property
    def in_use_nbytes(self) -> int:
        """Memory of pages that somebody holds a reference to, each counted once."""
        return self._num_in_use * self._page_nbytes

    @property
    def idle_nbytes(self) -> int:
        """Memory behind handles that wait to be used again."""
        return len(self._idle_handles) * self._page_nbytes

    @property
    def headroom_nbytes(self) -> int:
        """What `create` can still give; negative while a limit that has fallen is exceeded."""
        return self._limit_nbytes - self.in_use_nbytes

    def create(self, addresses: IntArray) -> IntArray:
        """Pages [n] with one reference each, for the n addresses where they will be mapped first.

        Raises:
            OutOfMemoryError: the limit is reached, or the system has less than the limit allows.
        """
        count = len(addresses)
        if self.in_use_nbytes + count * self._page_nbytes > self._limit_nbytes:
            raise OutOfMemoryError(
                count * self._page_nbytes,
                self.headroom_nbytes,
                f"the KV cache's limit of {self._limit_nbytes:,} bytes is reached; raise kv_memory",
            )
        recycled = self._idle_handles[max(len(self._idle_handles) - count, 0) :]
        created = self._driver.create(addresses[len(recycled) :]) if len(recycled) < count else ()
        del self._idle_handles[len(self._idle_handles) - len(recycled) :]
        pages = self._take_ids(count)
        self._handles[pages[: len(recycled)]] = recycled
        self._handles[pages[len(recycled) :]] = created
        self._references[pages] = 1
        self._num_in_use += count
        return pages

    def share(self, pages: IntArray) -> None:
        """Take one more reference to each page, as often as it stands there."""
        self._check_alive(pages)
        np.add.at(self._references, pages, 1)

    def drop(self, pages: IntArray) -> None:
        """Give one reference to each page back, as often as it stands there.

        Pages nobody holds any more must be mapped nowhere: their memory becomes idle, or returns to the system.
        """
        np.subtract.at(self._references, pages, 1)
        left = self._references[pages]
        if np.count_nonzero(left < 0):
            np.add.at(self._references, pages, 1)
            self._check_alive(pages)
            raise ValueError("a page was dropped more often than it was taken")
        dead = np.unique(pages[left == 0])
        if not len(dead):
            return
        try:
            self._retire(self._handles[dead])
        except BaseException:
            np.add.at(self._references, pages, 1)
            raise
        self._num_in_use -= len(dead)
        self._free_ids += dead.tolist()

    def references(self, pages: IntArray) -> IntArray:
        """How many references each page has; 0 for one that does not exist."""
        return self._references[pages]

    def handles(self, pages: IntArray) -> IntArray:
        """The driver's handles of pages that exist."""
        return self._handles[pages]

    def release_idle(self) -> None:
        """Return all memory that nobody uses to the system."""
        self._release_idle(len(self._idle_handles))

    def _retire(self, handles: IntArray) -> None:
        """Keep as many handles as fit under the limit beside everything else, and release the rest."""
        kept = 0
        if self._driver.capabilities.recycles:
            room = self._limit_nbytes - self.in_use_nbytes - self.idle_nbytes + len(handles) * self._page_nbytes
            kept = min(max(room // self._page_nbytes, 0), len(handles))
        if kept < len(handles):
            self._driver.release(handles[kept:])
        self._idle_handles += handles[:kept].tolist()

    def _release_idle(self, count: int) -> None:
        released = self._idle_handles[max(len(self._idle_handles) - count, 0) :]
        if released:
            self._driver.release(np.array(released, np.int64))
            del self._idle_handles[len(self._idle_handles) - len(released) :]

    def _take_ids(self, count: int) -> IntArray:
        reused = self._free_ids[max(len(self._free_ids) - count, 0) :]
        del self._free_ids[len(self._free_ids) - len(reused) :]
        fresh = count - len(reused)
        while self._next_id + fresh > len(self._references):
            self._handles = np.concatenate((self._handles, np.zeros_like(self._handles)))
            self._references = np.concatenate((self._references, np.zeros_like(self._references)))
        pages = np.empty(count, np.int64)
        pages[: len(reused)] = reused
        pages[len(reused) :] = np.arange(self._next_id, self._next_id + fresh)
        self._next_id += fresh
        return pages

    def _check_alive(self, pages: IntArray) -> None:
        dead = pages[self._references[pages] <= 0]
        if len(dead):
            raise ValueError(f"page {dead[0]} does not exist")
