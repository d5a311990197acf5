"""GPU memory through CUDA's virtual memory management (driver API, CUDA 10.2 and later).

Pages are pinned device memory. A page is mapped by a call of its own; access is set, and mappings are taken away,
by one call for each contiguous run, since setting access costs most (36 µs on an A100, against 1.5 µs for mapping:
vAttention, arXiv 2405.04437, table 3).
"""

from __future__ import annotations

import errno
import os
import weakref
from contextlib import ExitStack
from typing import Any

import numpy as np

from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.memory.cuda_calls import CudaCalls, TorchSide, load_bindings
from vattention.memory.driver import Capabilities, IntArray, MemoryInfo
from vattention.memory.runs import runs

_RESERVED_PART = 20
"""One such part of the GPU's memory is left for what forward passes need besides weights and cache."""


class CudaDriver:
    """`Driver` for a GPU's memory.

    Memory is taken away behind an event: whatever the calling thread's current stream was given before `unmap` has
    been computed by then. Work on other streams is their owner's to wait for, as with torch's own memory.

    Args:
        device_index: as torch counts devices.
        page_nbytes: the device's granularity, 2 MiB as a rule and the default, times a power of two.
        api: used instead of `cuda.bindings.driver`.
        torch_side: what torch does on the device; asked of torch by default.

    Raises:
        ConfigError: no such device, no bindings, no virtual memory management, or no such page size.
    """

    def __init__(
        self,
        device_index: int = 0,
        page_nbytes: int | None = None,
        api: Any = None,
        torch_side: TorchSide | None = None,
    ) -> None:
        if api is None:
            api = load_bindings()
            torch_side = TorchSide(device_index)
            torch_side.claim_context()
        self._torch = torch_side or TorchSide(device_index)
        self._calls = calls = CudaCalls(device_index, api)
        with ExitStack() as undo:
            undo.callback(calls.let_go)
            if not calls.attribute("VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED"):
                raise ConfigError(f"cuda:{device_index} has no virtual memory management; use another device")
            exportable = bool(calls.attribute("HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED"))
            self._properties = _properties(api, device_index, exportable)
            granularity = _granularity(calls, self._properties)
            self._page_nbytes = granularity if page_nbytes is None else page_nbytes
            scale, rest = divmod(self._page_nbytes, granularity)
            if rest or scale.bit_count() != 1 or scale < 0:
                raise ConfigError(
                    f"page_size={page_nbytes} must be {granularity} bytes times a power of two on this GPU"
                )
            with calls.context():
                self._event = calls("cuEventCreate", api.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            undo.pop_all()
        self._access = api.CUmemAccessDesc()
        self._access.location = self._properties.location
        self._access.flags = api.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self._capabilities = Capabilities(
            name="cuda",
            device=f"cuda:{device_index}",
            granularity=granularity,
            addressable=True,
            recycles=True,
            faults_unmapped=True,
            max_mappings=None,
            exportable=exportable,
        )
        self._ranges: dict[int, int] = {}
        self._handles: set[int] = set()
        self._mapped: dict[int, int] = {}
        self._unreleased: list[int] = []
        self._give_back = weakref.finalize(
            self, _give_back, calls, self._event, self._page_nbytes, self._ranges, self._handles, self._mapped
        )
        # At exit the system takes everything back by itself, while other threads may still be using it.
        self._give_back.atexit = False

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities

    @property
    def page_nbytes(self) -> int:
        return self._page_nbytes

    def memory_info(self) -> MemoryInfo:
        with self._calls.context():
            free, total = self._calls.memory()
        # What torch keeps for its next tensors serves forward passes already.
        spare = free - max(total // _RESERVED_PART - self._torch.idle_nbytes(), 0)
        return MemoryInfo(max(spare, 0), total, max(-spare, 0))

    def reserve(self, nbytes: int) -> int:
        if nbytes <= 0 or nbytes % self._page_nbytes:
            raise DriverError("reserve", errno.EINVAL, f"{nbytes} bytes are no multiple of {self._page_nbytes}")
        with self._calls.context():
            address = int(self._calls("cuMemAddressReserve", nbytes, self._page_nbytes, 0, 0, nbytes=nbytes))
        self._ranges[address] = nbytes
        return address

    def free(self, address: int) -> None:
        if address not in self._ranges:
            raise DriverError("free", errno.EINVAL, f"no range begins at {address:#x}")
        with self._calls.context():
            self._calls("cuMemAddressFree", address, self._ranges[address])
        del self._ranges[address]

    def create(self, addresses: IntArray) -> IntArray:
        nbytes = len(addresses) * self._page_nbytes
        created: list[int] = []
        with self._calls.context(), ExitStack() as undo:
            for _ in range(len(addresses)):
                handle = int(self._calls("cuMemCreate", self._page_nbytes, self._properties, 0, nbytes=nbytes))
                undo.callback(self._calls, "cuMemRelease", handle)
                created.append(handle)
            undo.pop_all()
        self._handles.update(created)
        # Handles are unsigned in CUDA; all 64 bits survive as a signed number and come back in `_unsigned`.
        return np.array(created, np.uint64).astype(np.int64)

    def map(self, addresses: IntArray, handles: IntArray) -> None:
        new = dict(zip(addresses.tolist(), _unsigned(handles), strict=True))
        with self._calls.context(), ExitStack() as undo:
            for address, handle in new.items():
                self._calls("cuMemMap", address, self._page_nbytes, 0, handle, 0)
                undo.callback(self._calls, "cuMemUnmap", address, self._page_nbytes)
            undo.pop_all()
        self._mapped.update(new)

    def set_access(self, addresses: IntArray) -> None:
        # Nothing to undo: access goes away with the mapping, and having it twice changes nothing.
        with self._calls.context():
            self._set_access(addresses)

    def unmap(self, addresses: IntArray) -> None:
        with self._calls.context(), ExitStack() as undo:
            # Kernels in flight may still use the pages, and cuMemUnmap waits for them only sometimes. Waiting for
            # the whole context would break off a graph that another thread is capturing.
            self._calls("cuEventRecord", self._event, self._torch.stream())
            self._calls("cuEventSynchronize", self._event)
            for start, count in runs(addresses, self._page_nbytes):
                self._calls("cuMemUnmap", int(addresses[start]), count * self._page_nbytes)
                undo.callback(self._map_back, addresses[start : start + count])
            undo.pop_all()
        for address in addresses.tolist():
            del self._mapped[address]

    def release(self, handles: IntArray) -> None:
        with self._calls.context():
            self._release(self._unreleased)
            doomed = _unsigned(handles)
            try:
                self._release(doomed)
            except (DriverError, OutOfMemoryError):
                if len(doomed) == len(handles):
                    raise
                # Some are gone for good, so this call must succeed; the next one meets the error again.
                self._unreleased = doomed

    def export(self, handle: int) -> int:
        kind = self._calls.api.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        with self._calls.context():
            fd = int(self._calls("cuMemExportToShareableHandle", handle % 2**64, kind, 0))
        os.set_inheritable(fd, False)
        return fd

    def close(self) -> None:
        self._give_back()

    def _release(self, handles: list[int]) -> None:
        """Release from the end of the list, and take out what is released."""
        while handles:
            self._calls("cuMemRelease", handles[-1])
            self._handles.remove(handles.pop())

    def _set_access(self, addresses: IntArray) -> None:
        for start, count in runs(addresses, self._page_nbytes):
            nbytes = count * self._page_nbytes
            self._calls("cuMemSetAccess", int(addresses[start]), nbytes, [self._access], 1, nbytes=nbytes)

    def _map_back(self, addresses: IntArray) -> None:
        for address in addresses.tolist():
            self._calls("cuMemMap", address, self._page_nbytes, 0, self._mapped[address], 0)
        self._set_access(addresses)


def _properties(api: Any, device_index: int, exportable: bool) -> Any:
    """Pinned memory of the device."""
    properties = api.CUmemAllocationProp()
    properties.type = api.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
    properties.location.type = api.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
    properties.location.id = device_index
    kinds = api.CUmemAllocationHandleType
    properties.requestedHandleTypes = (
        kinds.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR if exportable else kinds.CU_MEM_HANDLE_TYPE_NONE
    )
    return properties


def _granularity(calls: CudaCalls, properties: Any) -> int:
    smallest = calls.api.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
    return int(calls("cuMemGetAllocationGranularity", properties, smallest))


def _unsigned(handles: IntArray) -> list[int]:
    numbers: list[int] = handles.astype(np.uint64).tolist()
    return numbers


def _give_back(
    calls: CudaCalls,
    event: Any,
    page_nbytes: int,
    ranges: dict[int, int],
    handles: set[int],
    mapped: dict[int, int],
) -> None:
    with calls.context():
        calls("cuCtxSynchronize")
        addresses = np.array(sorted(mapped), np.int64)
        for start, count in runs(addresses, page_nbytes):
            calls("cuMemUnmap", int(addresses[start]), count * page_nbytes)
        for handle in handles:
            calls("cuMemRelease", handle)
        for address, nbytes in ranges.items():
            calls("cuMemAddressFree", address, nbytes)
        calls("cuEventDestroy", event)
    calls.let_go()
