"""A reserved range of addresses and its page table."""

from __future__ import annotations

from contextlib import ExitStack

import numpy as np

from vattention.memory.driver import Driver, IntArray
from vattention.memory.pool import PagePool
from vattention.memory.table import Table


class Region:
    """Addresses for `nbytes`, and the pages that are mapped there.

    Pages of the range are numbered from 0; `indices` are always such numbers, an ascending int64 array without
    repetitions. The page table holds the pool's page id for each, 0 for nothing. Every method does all it was
    asked, or raises and leaves everything as it was. Not thread-safe, as drivers.

    Args:
        driver, pool: not owned; many regions may share them.
        nbytes: rounded up to whole pages.

    Raises (all methods):
        OutOfMemoryError, DriverError: as `Driver` and `PagePool.create` say.
        ValueError: the indices are not in order or not in the range, or are (not) mapped already.
    """

    def __init__(self, driver: Driver, pool: PagePool, nbytes: int) -> None:
        self._driver = driver
        self._pool = pool
        self._page_nbytes = driver.page_nbytes
        self._num_pages = -(-nbytes // self._page_nbytes)
        self._table: Table[np.int64] = Table(self._num_pages, np.int64)
        self._address = driver.reserve(self.nbytes)
        self._num_mapped = 0
        self._closed = False

    @property
    def address(self) -> int:
        """Where the range begins."""
        return self._address

    @property
    def nbytes(self) -> int:
        return self._num_pages * self._page_nbytes

    @property
    def num_pages(self) -> int:
        """How many pages the range has room for."""
        return self._num_pages

    @property
    def page_nbytes(self) -> int:
        return self._page_nbytes

    @property
    def mapped_nbytes(self) -> int:
        """Addresses with a page behind them; a page behind two addresses counts twice."""
        return self._num_mapped * self._page_nbytes

    def pages(self, indices: IntArray) -> IntArray:
        """The page ids behind `indices`, 0 where there is nothing."""
        return self._table.values[indices]

    def missing(self, indices: IntArray) -> IntArray:
        """Those of `indices` with nothing behind them."""
        lacking: IntArray = indices[self._table.values[indices] == 0]
        return lacking

    def commit(self, indices: IntArray) -> None:
        """Put a new page behind each index: readable, writable and resident."""
        addresses = self._addresses(indices, mapped=False)
        with ExitStack() as undo:
            pages = self._pool.create(addresses)
            undo.callback(self._pool.drop, pages)
            self._map(addresses, pages, undo)
            undo.pop_all()
        self._enter(indices, pages)

    def alias(self, indices: IntArray, pages: IntArray) -> None:
        """Put pages that exist already behind `indices` too, with a reference more to each."""
        addresses = self._addresses(indices, mapped=False)
        with ExitStack() as undo:
            self._pool.share(pages)
            undo.callback(self._pool.drop, pages)
            self._map(addresses, pages, undo)
            undo.pop_all()
        self._enter(indices, pages)

    def unmap(self, indices: IntArray) -> None:
        """Take away what is behind `indices`; pages that nobody else holds go back to the pool."""
        addresses = self._addresses(indices, mapped=True)
        pages = self._table.values[indices]
        with ExitStack() as undo:
            self._driver.unmap(addresses)
            undo.callback(self._map_back, addresses, pages)
            self._pool.drop(pages)
            undo.pop_all()
        self._table.values[indices] = 0
        self._num_mapped -= len(indices)

    def close(self) -> None:
        """Unmap everything and give the addresses back. Calling it again does nothing."""
        if self._closed:
            return
        if self._num_mapped:
            self.unmap(np.flatnonzero(self._table.values))
        self._driver.free(self._address)
        self._closed = True

    def _map(self, addresses: IntArray, pages: IntArray, undo: ExitStack) -> None:
        self._driver.map(addresses, self._pool.handles(pages))
        undo.callback(self._driver.unmap, addresses)
        self._driver.set_access(addresses)

    def _map_back(self, addresses: IntArray, pages: IntArray) -> None:
        self._driver.map(addresses, self._pool.handles(pages))
        self._driver.set_access(addresses)

    def _enter(self, indices: IntArray, pages: IntArray) -> None:
        self._table.values[indices] = pages
        self._num_mapped += len(indices)

    def _addresses(self, indices: IntArray, *, mapped: bool) -> IntArray:
        """Addresses of `indices`, all of which must be mapped, or none."""
        if len(indices):
            if np.count_nonzero(indices[1:] <= indices[:-1]) or indices[0] < 0 or indices[-1] >= self._num_pages:
                raise ValueError(f"page indices must ascend within [0, {self._num_pages})")
            if np.count_nonzero(self._table.values[indices]) != (len(indices) if mapped else 0):
                raise ValueError(f"a page index is {'not mapped' if mapped else 'mapped already'}")
        return self._address + indices * self._page_nbytes
