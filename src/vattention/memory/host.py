"""Host memory on Linux: one sparse memfd, mapped whole over each reserved range.

Every page of a range has a *home* in the file: file offset and address differ by one constant. A page created at
home is mapped there already, so committing is one call (`MADV_POPULATE_WRITE`), releasing is one (punching a hole),
and a range of any number of slots is a single kernel mapping. Only sharing maps anything: a page of the file at an
address that is not its home, an *alias*. Kernel mappings are scarce (`vm.max_map_count`; at the limit even starting
a thread fails), so they are counted, and `map` refuses before they run out.

A forked process has the file, but not the ranges. There whatever gives memory back leaves the file and the
addresses alone, and whatever asks for memory is refused.
"""

from __future__ import annotations

import errno
import os
import sys
import weakref
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.memory import budget, libc
from vattention.memory.driver import Capabilities, IntArray, MemoryInfo
from vattention.memory.page_file import PageFile
from vattention.memory.runs import runs
from vattention.memory.shortage import mapping_refusal, refusal, reservation_refusal
from vattention.memory.table import Table

_MAPPINGS_FRACTION = 0.8
"""Of `vm.max_map_count`; the rest is for libraries, thread stacks and everybody else in the process."""


class HostDriver:
    """`Driver` for the CPU's memory.

    Args:
        page_nbytes: a multiple of the system's page size, which is the default. Multiples of the huge page size
            ask for huge pages, which the system gives where `transparent_hugepage/shmem_enabled` allows it.

    Raises:
        ConfigError: this is not Linux, or no such page size can be.
    """

    def __init__(self, page_nbytes: int | None = None) -> None:
        if sys.platform != "linux":
            raise ConfigError(f"a KV cache in the CPU's memory needs Linux; this system is {sys.platform}")
        granularity = os.sysconf("SC_PAGE_SIZE")
        self._page_nbytes = granularity if page_nbytes is None else page_nbytes
        if self._page_nbytes <= 0 or self._page_nbytes % granularity:
            raise ConfigError(
                f"page_size={page_nbytes} must be a positive multiple of this system's page, {granularity} bytes"
            )
        max_map_count = int(Path("/proc/sys/vm/max_map_count").read_text())
        self._capabilities = Capabilities(
            name="host",
            device="cpu",
            granularity=granularity,
            addressable=True,
            recycles=False,
            faults_unmapped=False,
            max_mappings=int(max_map_count * _MAPPINGS_FRACTION),
            exportable=True,
        )
        self._file = PageFile(self._page_nbytes, granularity)
        self._shift: Table[np.int64] = Table(1, np.int64)  # per home: page of the file mapped there, minus home
        self._num_mappings = 0
        self._ranges: dict[int, int] = {}
        self._first_pages: dict[int, int] = {}
        self._starts = np.empty(0, np.int64)
        self._homes = np.empty(0, np.int64)
        self._give_back = weakref.finalize(self, _give_back, self._file.fd, self._ranges, self._file.process)
        # At exit the system takes everything back by itself, while other threads may still be using it.
        self._give_back.atexit = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def page_nbytes(self) -> int:
        return self._page_nbytes

    @property
    def num_mappings(self) -> int:
        """Kernel mappings in use for the reserved ranges."""
        return self._num_mappings

    def memory_info(self) -> MemoryInfo:
        return budget.memory_info()

    def reserve(self, nbytes: int) -> int:
        if nbytes <= 0 or nbytes % self._page_nbytes:
            raise DriverError("reserve", errno.EINVAL, f"{nbytes} bytes are no multiple of {self._page_nbytes}")
        self._check_process("reserve")
        slack = self._page_nbytes - self._capabilities.granularity
        first = self._file.num_pages
        with ExitStack() as undo:
            try:
                start = libc.mmap(
                    None,
                    nbytes + slack,
                    libc.PROT_NONE,
                    libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE,
                )
                undo.callback(libc.munmap, start, nbytes + slack)
                num_pages = nbytes // self._page_nbytes + 1  # one that stays unused: see `_count_edges`
                self._shift.grow(first + num_pages)
                self._file.extend(num_pages)
                address = -(-start // self._page_nbytes) * self._page_nbytes
                self._file.map(address, first, nbytes // self._page_nbytes)
                if address > start:
                    libc.munmap(start, address - start)
                if start + slack > address:
                    libc.munmap(address + nbytes, start + slack - address)
            except OSError as error:
                raise reservation_refusal(nbytes, error) from error
            undo.pop_all()
        self._ranges[address] = nbytes
        self._first_pages[address] = first
        self._num_mappings += 1
        self._index_ranges()
        return address

    def free(self, address: int) -> None:
        if address not in self._ranges:
            raise DriverError("free", errno.EINVAL, f"no range begins at {address:#x}")
        try:
            _munmap(address, self._ranges[address], self._file.process)
        except OSError as error:
            raise refusal("munmap", error, self._ranges[address]) from error
        del self._ranges[address], self._first_pages[address]
        self._num_mappings -= 1
        self._index_ranges()

    def create(self, addresses: IntArray) -> IntArray:
        self._check_process("create")
        # A page may outlive its mapping at home, behind other addresses.
        return self._file.create(self._home(addresses))

    def map(self, addresses: IntArray, handles: IntArray) -> None:
        self._check_process("map")
        shifts = handles - self._home(addresses)
        away = shifts != 0
        if np.count_nonzero(away):
            self._remap(addresses[away], shifts[away])

    def set_access(self, addresses: IntArray) -> None:
        self._check_process("set_access")
        homes = self._home(addresses)
        self._file.commit(addresses, homes + self._shift.values[homes])

    def unmap(self, addresses: IntArray) -> None:
        aliases = self._shift.values[self._home(addresses)] != 0
        if np.count_nonzero(aliases):
            there = addresses[aliases]
            self._remap(there, np.zeros_like(there))

    def release(self, handles: IntArray) -> None:
        self._file.release(handles)

    def export(self, handle: int) -> int:
        return self._file.export()

    def close(self) -> None:
        self._give_back()

    def _check_process(self, operation: str) -> None:
        if os.getpid() != self._file.process:
            raise DriverError(
                operation,
                errno.EPERM,
                f"the memory is that of process {self._file.process}, from which this one was forked; make the "
                "cache in the process that uses it, or start processes with the method 'spawn'",
            )

    def _home(self, addresses: IntArray) -> IntArray:
        """The pages of the file that belong to the addresses."""
        which = self._starts.searchsorted(addresses, side="right") - 1
        homes: IntArray = addresses // self._page_nbytes + self._homes[which]
        return homes

    def _index_ranges(self) -> None:
        self._starts = np.array(sorted(self._ranges), np.int64)
        first_pages = np.array([self._first_pages[address] for address in sorted(self._ranges)], np.int64)
        self._homes = first_pages - self._starts // self._page_nbytes

    def _remap(self, addresses: IntArray, shifts: IntArray) -> None:
        """Map the pages of the file `shifts` away from home behind the addresses; all or none."""
        homes = self._home(addresses)
        before = self._shift.values[homes]
        run_ends = np.ones(len(homes), bool)
        np.not_equal(homes[1:] - homes[:-1], 1, out=run_ends[:-1])
        edges = np.concatenate((homes, homes[run_ends] + 1))
        num_edges = self._count_edges(edges)
        with ExitStack() as undo:
            undo.callback(self._shift.values.__setitem__, homes, before)
            self._shift.values[homes] = shifts
            added = self._count_edges(edges) - num_edges
            self._check_mappings(added, len(addresses))
            undo.callback(self._map_back, addresses, before)
            for start, count in runs(homes, 1, shifts):
                try:
                    self._file.map(int(addresses[start]), int(homes[start] + shifts[start]), count)
                except OSError as error:
                    raise mapping_refusal(len(addresses) * self._page_nbytes, error) from error
            undo.pop_all()
        self._num_mappings += added

    def _map_back(self, addresses: IntArray, shifts: IntArray) -> None:
        homes = self._home(addresses)
        for start, count in runs(homes, 1, shifts):
            self._file.map(int(addresses[start]), int(homes[start] + shifts[start]), count)

    def _count_edges(self, pages: IntArray) -> int:
        """At how many of these pages a kernel mapping ends and another begins: where the shift changes.

        Behind every range stands a page of the file that is never mapped, so that no two ranges are neighbours. An
        alias on the first or last page of a range counts one too many.
        """
        shift = self._shift.values
        return int(np.count_nonzero(shift[pages] != shift[pages - 1]))

    def _check_mappings(self, added: int, num_pages: int) -> None:
        allowed = self._capabilities.max_mappings
        if added > 0 and allowed is not None and self._num_mappings + added > allowed:
            raise OutOfMemoryError(
                num_pages * self._page_nbytes,
                0,
                f"sharing {num_pages} pages needs {added} more kernel mappings, and {self._num_mappings} of "
                f"{allowed} are in use; raise the system's vm.max_map_count (sysctl), of which a KV cache takes "
                f"{_MAPPINGS_FRACTION:.0%}",
            )


def _give_back(fd: int, ranges: dict[int, int], process: int) -> None:
    for address, nbytes in ranges.items():
        _munmap(address, nbytes, process)
    ranges.clear()
    os.close(fd)


def _munmap(address: int, nbytes: int, process: int) -> None:
    """Unmap a range of a process; in one forked from it something else may be there."""
    if os.getpid() == process:
        libc.munmap(address, nbytes)
