"""A sparse file in memory, as pages: which of them are created, and which have memory behind them."""

from __future__ import annotations

import os

import numpy as np

from vattention.memory import libc
from vattention.memory.advice import advice_for, knows_populate
from vattention.memory.driver import IntArray
from vattention.memory.runs import runs
from vattention.memory.shortage import refusal
from vattention.memory.table import Table

_ALIVE, _RESIDENT, _OVERFLOW = 1, 2, 4
"""What is known of a page: created; memory is behind it; not the home of any address."""


class PageFile:
    """A memfd that grows.

    In a process forked from the one that made it nothing is mapped and no memory is given back: both would reach
    the other one.

    Attributes:
        fd: of the file, closed by whoever made this.
        num_pages: its length.
        process: that made it.
    """

    def __init__(self, page_nbytes: int, granularity: int) -> None:
        self._page_nbytes = page_nbytes
        self._granularity = granularity
        self._advice = advice_for(page_nbytes)
        self._populates = knows_populate()
        self.fd = os.memfd_create("vattention", os.MFD_CLOEXEC)
        self.num_pages = 0
        self.process = os.getpid()
        self._state: Table[np.uint8] = Table(1, np.uint8)
        self._free_overflow: list[int] = []
        self._num_overflow = 0

    def extend(self, num_pages: int) -> None:
        """Make the file longer by so many pages; raises OSError."""
        total = self.num_pages + num_pages
        self._state.grow(total)
        os.ftruncate(self.fd, total * self._page_nbytes)
        self.num_pages = total

    def create(self, homes: IntArray) -> IntArray:
        """Pages for addresses with these homes: those, or others where they still stand behind another address."""
        pages = homes
        taken = self._state.values[homes] != 0
        if num_taken := np.count_nonzero(taken):
            pages = homes.copy()
            pages[taken] = self._take_overflow(int(num_taken))
        self._state.values[pages] |= _ALIVE
        return pages

    def release(self, pages: IntArray) -> None:
        """Give back the pages and the memory behind them."""
        pages = np.sort(pages)
        self._punch(pages)
        self._state.values[pages] &= _OVERFLOW
        self._free_overflow += pages[self._state.values[pages] == _OVERFLOW].tolist()

    def map(self, address: int, page: int, count: int) -> None:
        """Put so many pages behind addresses, in the place of what was there; raises OSError."""
        if os.getpid() != self.process:
            return
        nbytes = count * self._page_nbytes
        libc.mmap(
            address,
            nbytes,
            libc.PROT_READ_WRITE,
            libc.MAP_SHARED | libc.MAP_NORESERVE | libc.MAP_FIXED,
            self.fd,
            page * self._page_nbytes,
        )
        # The same advice everywhere, or the kernel could not merge neighbours into one mapping again.
        for advice in self._advice:
            libc.madvise(address, nbytes, advice)

    def commit(self, addresses: IntArray, pages: IntArray) -> None:
        """Get memory behind pages that are mapped at these addresses; all or none."""
        commit = self._populate if self._populates else self._touch
        for start, count in runs(addresses, self._page_nbytes):
            try:
                commit(int(addresses[start]), pages[start : start + count])
            except OSError as error:
                fresh = np.unique(pages[(self._state.values[pages] & _RESIDENT) == 0])
                self._punch(fresh)
                raise refusal("commit", error, len(addresses) * self._page_nbytes) from error
        self._state.values[pages] |= _RESIDENT

    def export(self) -> int:
        """Another descriptor of the file."""
        try:
            return os.dup(self.fd)
        except OSError as error:
            raise refusal("dup", error, 0) from error

    def _take_overflow(self, count: int) -> list[int]:
        """Pages that are no address's home."""
        lacking = count - len(self._free_overflow)
        if lacking > 0:
            first, more = self.num_pages, max(lacking, self._num_overflow, 64)
            try:
                self.extend(more)
            except OSError as error:
                raise refusal("ftruncate", error, more * self._page_nbytes) from error
            self._state.values[first : first + more] = _OVERFLOW
            self._num_overflow += more
            self._free_overflow += range(first, first + more)
        # In the order of the file, so that what is mapped together is a mapping together.
        taken = sorted(self._free_overflow[-count:])
        del self._free_overflow[-count:]
        return taken

    def _populate(self, address: int, pages: IntArray) -> None:
        libc.madvise(address, len(pages) * self._page_nbytes, libc.MADV_POPULATE_WRITE)

    def _touch(self, address: int, pages: IntArray) -> None:
        """What `_populate` does, for kernels before 5.14."""
        in_order = np.unique(pages)
        for start, count in runs(in_order, 1):
            libc.allocate(self.fd, int(in_order[start]) * self._page_nbytes, count * self._page_nbytes)
        libc.touch(address, len(pages) * self._page_nbytes, self._granularity)

    def _punch(self, pages: IntArray) -> None:
        if os.getpid() != self.process:
            return
        for start, count in runs(pages, 1):
            offset, nbytes = int(pages[start]) * self._page_nbytes, count * self._page_nbytes
            try:
                libc.punch_hole(self.fd, offset, nbytes)
            except OSError as error:
                raise refusal("fallocate", error, nbytes) from error
