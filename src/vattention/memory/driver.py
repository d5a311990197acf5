"""The contract between this project and whatever provides virtual memory.

A driver is to this project what an operating system's paging interface is to a kernel: it reserves addresses,
creates physical pages, and puts the one behind the other. Three back ends implement it, one file each: `host`
(Linux, one memfd), `cuda` (CUDA's virtual memory management), `null` (bookkeeping only). What a back end can do
is data (`Capabilities`), never a branch on its name.

All sizes are bytes. One driver has one page size, `page_nbytes`, a multiple of its granularity. Calls are
vectorised, because one step of the engine maps the same page of dozens of rows: `addresses` is always a sorted
int64 array of page-aligned virtual addresses, one per page; `handles` an int64 array of the same length. A driver
finds the contiguous runs in them itself (`runs.py`) and makes one system call per run.

A page's life::

    create ─► map ─► set_access ─► (reads and writes) ─► unmap ─► release
                 └─► map elsewhere too: one page behind several addresses

A driver is not thread-safe; its owner (`Region`, under the manager's lock) serialises calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a back end can do, as data.

    Attributes:
        name: "host", "cuda" or "null".
        device: torch's name of the device whose memory this is; "meta" where there is none.
        granularity: the smallest page, in bytes.
        addressable: the CPU or the device can really read and write the mapped addresses.
        recycles: a handle that is no longer mapped may be mapped again at any address at no extra cost, so that
            keeping it is cheaper than creating a new one. False where pages are tied to a home address.
        faults_unmapped: touching an address that is not mapped is an error. Where False, a read of it gives
            zeros and commits a page unaccounted for, so nothing may read there.
        max_mappings: how many kernel mappings the driver may use, or None for no bound. An alias (a page away from
            its home) costs up to two; beyond the bound `map` raises OutOfMemoryError, and copying is the way out.
        exportable: `export` works.
    """

    name: str
    device: str
    granularity: int
    addressable: bool
    recycles: bool
    faults_unmapped: bool
    max_mappings: int | None
    exportable: bool


@dataclass(frozen=True, slots=True)
class MemoryInfo:
    """Physical memory of the driver's device, in bytes.

    Attributes:
        available_nbytes: what can be had now.
        total_nbytes: all there is.
        shortfall_nbytes: what is wanting of the memory that must stay free, for forward passes: whoever follows the
            device gives so much back.
    """

    available_nbytes: int
    total_nbytes: int
    shortfall_nbytes: int = 0

    @property
    def change_nbytes(self) -> int:
        """By how much a cache that follows the device may grow, or has to shrink where it is negative."""
        return self.available_nbytes - self.shortfall_nbytes


class Driver(Protocol):
    """Virtual memory operations. Every method either does all it was asked or raises and leaves nothing behind.

    Raises (all methods):
        OutOfMemoryError: the system has no more physical memory, addresses or mappings; the call may be
            retried after something was released.
        DriverError: anything else the system refuses.
    """

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def page_nbytes(self) -> int:
        """Bytes of one page, a multiple of `capabilities.granularity`."""
        ...

    def memory_info(self) -> MemoryInfo:
        """Physical memory as it is now, on a host within the limits of this process's control groups."""
        ...

    def reserve(self, nbytes: int) -> int:
        """Reserve a range of addresses with nothing behind it. `nbytes` is a multiple of `page_nbytes`.

        Returns the page-aligned start address.
        """
        ...

    def free(self, address: int) -> None:
        """Give back a range that `reserve` returned. Everything in it must be unmapped already."""
        ...

    def create(self, addresses: IntArray) -> IntArray:
        """Create one physical page per address, and return their handles.

        `addresses` says where the pages will be mapped first; a back end may use it to choose pages for which
        that mapping is free. The content of a new page is undefined (zeros on the host).
        """
        ...

    def map(self, addresses: IntArray, handles: IntArray) -> None:
        """Put page `handles[i]` behind `addresses[i]`. The addresses must have nothing behind them yet.

        A handle may be mapped at any number of addresses, and stand in `handles` more than once.
        """
        ...

    def set_access(self, addresses: IntArray) -> None:
        """Make mapped addresses readable and writable, and resident: no later access faults."""
        ...

    def unmap(self, addresses: IntArray) -> None:
        """Take away what is behind the addresses. The physical pages live on until `release`."""
        ...

    def release(self, handles: IntArray) -> None:
        """Destroy physical pages that are mapped nowhere. Their memory is back with the system on return."""
        ...

    def export(self, handle: int) -> int:
        """A file descriptor through which another process can map the page; the caller closes it.

        On the host it is the whole backing file, and the handle is the page's index in it.
        """
        ...

    def close(self) -> None:
        """Give everything back, mapped or not. Calling it again does nothing."""
        ...
