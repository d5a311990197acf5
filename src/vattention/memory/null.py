"""A driver without memory behind it: bookkeeping only, and strict about the contract.

It makes tests of schedulers and managers instant, and finds what the others would let pass: mapping over a mapped
page, releasing one that is still mapped, arrays that are not sorted.
"""

from __future__ import annotations

import errno
from collections import Counter
from typing import NoReturn

import numpy as np

from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import Capabilities, IntArray, MemoryInfo

_FIRST_ADDRESS = 2**40
_PAGE_NBYTES = 4096
_TOTAL_NBYTES = 2**40


class NullDriver:
    """`Driver` for torch's device "meta".

    Args:
        page_nbytes: any positive number.
        total_nbytes: `create` raises OutOfMemoryError beyond it.
        recycles: as in `Capabilities`.
    """

    def __init__(
        self, page_nbytes: int | None = None, total_nbytes: int = _TOTAL_NBYTES, recycles: bool = True
    ) -> None:
        self._page_nbytes = _PAGE_NBYTES if page_nbytes is None else page_nbytes
        self._total_nbytes = total_nbytes
        self._capabilities = Capabilities(
            name="null",
            device="meta",
            granularity=1,
            addressable=False,
            recycles=recycles,
            faults_unmapped=True,
            max_mappings=None,
            exportable=False,
        )
        self._next_address = -(-_FIRST_ADDRESS // self._page_nbytes) * self._page_nbytes
        self._next_handle = 1
        self._ranges: dict[int, int] = {}
        self._handles: set[int] = set()
        self._mapped: dict[int, int] = {}
        self._mappings: Counter[int] = Counter()

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def page_nbytes(self) -> int:
        return self._page_nbytes

    def memory_info(self) -> MemoryInfo:
        used = len(self._handles) * self._page_nbytes
        return MemoryInfo(self._total_nbytes - used, self._total_nbytes)

    def reserve(self, nbytes: int) -> int:
        if nbytes <= 0 or nbytes % self._page_nbytes:
            _refuse("reserve", f"{nbytes} bytes are no multiple of {self._page_nbytes}")
        address = self._next_address
        self._next_address += nbytes + self._page_nbytes  # a gap, so that overruns are found
        self._ranges[address] = nbytes
        return address

    def free(self, address: int) -> None:
        if address not in self._ranges:
            _refuse("free", f"no range begins at {address:#x}")
        end = address + self._ranges[address]
        if any(address <= mapped < end for mapped in self._mapped):
            _refuse("free", f"pages are still mapped in the range at {address:#x}")
        del self._ranges[address]

    def create(self, addresses: IntArray) -> IntArray:
        self._check("create", addresses)
        needed, available = len(addresses) * self._page_nbytes, self.memory_info().available_nbytes
        if needed > available:
            raise OutOfMemoryError(needed, available, "the null driver's total_nbytes is used up; lower kv_memory")
        handles = np.arange(self._next_handle, self._next_handle + len(addresses), dtype=np.int64)
        self._next_handle += len(addresses)
        self._handles.update(handles.tolist())
        return handles

    def map(self, addresses: IntArray, handles: IntArray) -> None:
        self._check("map", addresses)
        if len(handles) != len(addresses):
            _refuse("map", f"{len(addresses)} addresses for {len(handles)} handles")
        where, what = addresses.tolist(), handles.tolist()
        for address, handle in zip(where, what, strict=True):
            if address in self._mapped:
                _refuse("map", f"a page is mapped at {address:#x} already")
            if handle not in self._handles:
                _refuse("map", f"handle {handle} does not exist")
        self._mapped.update(zip(where, what, strict=True))
        self._mappings.update(what)

    def set_access(self, addresses: IntArray) -> None:
        self._check_mapped("set_access", addresses)

    def unmap(self, addresses: IntArray) -> None:
        self._check_mapped("unmap", addresses)
        self._mappings.subtract(self._mapped.pop(address) for address in addresses.tolist())

    def release(self, handles: IntArray) -> None:
        doomed = set(handles.tolist())
        if len(doomed) != len(handles):
            _refuse("release", "a handle stands there twice")
        for handle in doomed:
            if handle not in self._handles:
                _refuse("release", f"handle {handle} does not exist")
            if self._mappings[handle] > 0:
                _refuse("release", f"handle {handle} is still mapped")
        self._handles -= doomed
        for handle in doomed:
            del self._mappings[handle]

    def export(self, handle: int) -> int:
        _refuse("export", "there is no memory to export")

    def close(self) -> None:
        self._ranges.clear()
        self._handles.clear()
        self._mapped.clear()
        self._mappings.clear()

    def _check(self, operation: str, addresses: IntArray) -> None:
        if addresses.dtype != np.int64:
            _refuse(operation, f"addresses are {addresses.dtype}, not int64")
        if (addresses[1:] <= addresses[:-1]).any():
            _refuse(operation, "addresses are not sorted, or one stands there twice")
        if (addresses % self._page_nbytes).any():
            _refuse(operation, f"an address is no multiple of {self._page_nbytes}")
        reserved = np.zeros(len(addresses), bool)
        for start, nbytes in self._ranges.items():
            reserved |= (addresses >= start) & (addresses < start + nbytes)
        if not reserved.all():
            _refuse(operation, f"{addresses[~reserved][0]:#x} is not reserved")

    def _check_mapped(self, operation: str, addresses: IntArray) -> None:
        self._check(operation, addresses)
        for address in addresses.tolist():
            if address not in self._mapped:
                _refuse(operation, f"nothing is mapped at {address:#x}")


def _refuse(operation: str, detail: str) -> NoReturn:
    raise DriverError(operation, errno.EINVAL, detail)
