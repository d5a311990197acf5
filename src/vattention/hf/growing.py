"""Tensors that grow in place: addresses for all tokens from the start, memory for those there are."""

from __future__ import annotations

import weakref
from weakref import WeakValueDictionary

import numpy as np
import torch

from vattention.errors import OutOfMemoryError
from vattention.memory import open_driver
from vattention.memory.driver import Driver, IntArray
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import as_tensor, strided

_SMALL_PAGE_NBYTES = 64 * 2**10
"""Up to this page size every head has a row of its own; see `GrowingTensor`."""

_EXTENT_NBYTES = 16 * 2**10
"""Rows grow and shrink by so much at least: a system call for each page of 4 KiB made updates 1.4 times as long."""


class _DeviceMemory:
    """The driver and the pages of one device; closes the driver when nothing needs it any more."""

    def __init__(self, device: torch.device, page_nbytes: int | None, limit_nbytes: int | None) -> None:
        self.device = device
        self.driver: Driver = open_driver(str(device), page_nbytes)
        if limit_nbytes is None:
            limit_nbytes = self.driver.memory_info().available_nbytes
        self.pool = PagePool(self.driver, limit_nbytes)
        # The system takes everything back at exit by itself, when tensors may still be in use.
        weakref.finalize(self, self.driver.close).atexit = False

    def settle(self) -> None:
        """Wait until the device has done what it was told: it must not lose pages that it is reading."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class CacheMemory:
    """Where the tensors of one cache get their memory: a driver and a page pool for each device it uses.

    A copy, deep or pickled, is a new memory with the same options.
    """

    def __init__(self, page_nbytes: int | None, limit_nbytes: int | None) -> None:
        self.page_nbytes = page_nbytes
        self.limit_nbytes = limit_nbytes
        # Weak: with its last tensor a device's memory goes, and with it the traces of former reservations.
        self._devices: WeakValueDictionary[torch.device, _DeviceMemory] = WeakValueDictionary()

    def __reduce__(self) -> tuple[type[CacheMemory], tuple[int | None, int | None]]:
        return CacheMemory, (self.page_nbytes, self.limit_nbytes)

    def on(self, device: torch.device) -> _DeviceMemory:
        memory = self._devices.get(device)
        if memory is None:
            memory = self._devices[device] = _DeviceMemory(device, self.page_nbytes, self.limit_nbytes)
        return memory


class _Reservation:
    """A region that lives as long as a tensor over it does, and takes its memory with it when it goes."""

    def __init__(self, memory: _DeviceMemory, nbytes: int) -> None:
        self.region = Region(memory.driver, memory.pool, nbytes)
        weakref.finalize(self, _Reservation._close, memory, self.region).atexit = False

    @staticmethod
    def _close(memory: _DeviceMemory, region: Region) -> None:
        memory.settle()
        region.close()
        memory.pool.release_idle()


class GrowingTensor:
    """A tensor [batch, heads, max_length, dim] with memory behind tokens [first, end) of each row only.

    With small pages, each (batch row, head) is one row of consecutive tokens, which attention reads as fast as a
    dense tensor: on a CPU, SDPA took up to 2.2 times as long over rows of [max_length, heads, dim]. With a GPU's
    large pages (2 MiB) that would strand part of a page for every head, so there a batch row is one such row.

    Attributes:
        view: the whole tensor. Only tokens [first, end) that were provided may be touched.
    """

    def __init__(
        self, memory: CacheMemory, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """Reserve addresses for `shape`.

        Raises:
            OutOfMemoryError: the system has no such range of addresses.
            ConfigError: this device's memory cannot be mapped on demand.
        """
        batch, heads, max_length, dim = shape
        self._memory = memory.on(device)
        page_nbytes = self._memory.driver.page_nbytes
        self._extent_pages = -(-_EXTENT_NBYTES // page_nbytes)
        self._extent_nbytes = self._extent_pages * page_nbytes
        item = dtype.itemsize
        per_head = page_nbytes <= _SMALL_PAGE_NBYTES
        self._num_rows = batch * heads if per_head else batch
        self._token_nbytes = dim * item if per_head else heads * dim * item
        self._row_extents = self._ceil(max_length)
        row_nbytes = self._row_extents * self._extent_nbytes
        strides = (
            (heads * row_nbytes, row_nbytes, dim * item, item)
            if per_head
            else (row_nbytes, dim * item, heads * dim * item, item)
        )
        reservation = _Reservation(self._memory, self._num_rows * row_nbytes)
        self._region = reservation.region
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            memory_tensor = as_tensor(
                self._region.address, self._region.nbytes, device=str(device), owner=reservation
            )
            self.view = strided(memory_tensor, dtype, 0, shape, strides)
        self._first_extent = self._end_extent = 0

    @property
    def mapped_nbytes(self) -> int:
        return self._region.mapped_nbytes

    @property
    def reserved_nbytes(self) -> int:
        return self._region.nbytes

    def provide(self, first: int, end: int) -> None:
        """Put memory behind tokens [first, end); those in front of the tensor's `end` must have it already.

        Raises:
            OutOfMemoryError: there are not enough pages; the tensor is as it was.
        """
        end_extent = self._ceil(end)
        if self._first_extent == self._end_extent:
            self._first_extent = self._end_extent = self._floor(first)
        if end_extent > self._end_extent:
            try:
                self._region.commit(self._pages(self._end_extent, end_extent))
            except OutOfMemoryError as error:
                raise OutOfMemoryError(
                    error.needed_nbytes,
                    error.available_nbytes,
                    f"VirtualCache has no memory for token {end:,} of {len(self.view)} sequences; use fewer or "
                    "shorter ones, or raise its limit_nbytes if the machine has more",
                ) from error
            self._end_extent = end_extent

    def drop_before(self, first: int) -> None:
        """Give back the extents that hold only tokens before `first`."""
        extent = min(self._floor(first), self._end_extent)
        if extent > self._first_extent:
            self._memory.settle()
            self._region.unmap(self._pages(self._first_extent, extent))
            self._first_extent = extent

    def drop_after(self, end: int) -> None:
        """Give back the extents that hold only tokens from `end` on, but one: drafts are soon replaced."""
        extent = max(self._ceil(end) + 1, self._first_extent)
        if extent < self._end_extent:
            self._memory.settle()
            self._region.unmap(self._pages(extent, self._end_extent))
            self._end_extent = extent

    def _floor(self, tokens: int) -> int:
        return tokens * self._token_nbytes // self._extent_nbytes

    def _ceil(self, tokens: int) -> int:
        return -(-tokens * self._token_nbytes // self._extent_nbytes)

    def _pages(self, first: int, end: int) -> IntArray:
        """The pages of extents [first, end) of each row, as indices into the region."""
        rows = np.arange(self._num_rows, dtype=np.int64)[:, None] * (self._row_extents * self._extent_pages)
        return (rows + np.arange(first * self._extent_pages, end * self._extent_pages, dtype=np.int64)).ravel()
