# ruff: noqa: N802 (the functions have the names of the API they stand in for)
"""A stand-in for `cuda.bindings.driver`: the functions this project uses, strict, over the host's memory.

Functions return tuples as the bindings do; enumerations and structures are the bindings' own. Device memory is a
memfd mapped at the "device" addresses, inaccessible where nothing is mapped or access was not set, so that what is
written through one address can be read through another, and a stray access faults as it would on a GPU.
"""

from __future__ import annotations

import os
from typing import Any

from cuda.bindings import driver as real

from vattention.memory import libc
from vattention.memory.cuda_calls import TorchSide

GRANULARITY = 2 * 2**20
STREAM = 7
"""The stream on which a fake GPU's kernels run."""

_EVENT = 4096
_CONTEXT = object()
OK = real.CUresult.CUDA_SUCCESS
INVALID = real.CUresult.CUDA_ERROR_INVALID_VALUE
OUT_OF_MEMORY = real.CUresult.CUDA_ERROR_OUT_OF_MEMORY


class FakeTorch(TorchSide):
    """Torch on a fake GPU."""

    def __init__(self) -> None:
        super().__init__(0)
        self.kept_nbytes = 0

    def stream(self) -> int:
        return STREAM

    def idle_nbytes(self) -> int:
        return self.kept_nbytes


class FakeCuda:
    """One device with `total_nbytes` of memory.

    Attributes:
        calls: how often each function was called.
        synchronized: no kernel can be running: nothing was made accessible since the last synchronisation.
        taken_nbytes: of memory, by other processes.
        events: those that exist, and the stream each was recorded on last.
        mapped: address → (handle, accessible).
        handles: handle → number of mappings.
        ranges: address → bytes.
    """

    def __init__(self, total_nbytes: int = 64 * GRANULARITY, *, supported: bool = True) -> None:
        self.total_nbytes = total_nbytes
        self.supported = supported
        self.calls: dict[str, int] = {}
        self.contexts: list[object] = []
        self.retained = 0
        self.synchronized = True
        self.taken_nbytes = 0
        self.events: dict[int, int | None] = {}
        self.mapped: dict[int, tuple[int, bool]] = {}
        self.handles: dict[int, int] = {}
        self.ranges: dict[int, int] = {}
        self._failures: dict[str, tuple[int, real.CUresult]] = {}
        self._fd = os.memfd_create("fake-cuda", os.MFD_CLOEXEC)
        self._free_slots = list(range(total_nbytes // GRANULARITY))
        self._slots: dict[int, int] = {}
        # Handles are 64 bits wide and unsigned.
        self._next_handle = 2**63
        os.ftruncate(self._fd, total_nbytes)

    def fail(self, name: str, nth: int, code: real.CUresult = real.CUresult.CUDA_ERROR_UNKNOWN) -> None:
        """Let the nth call of a function from now on fail, without doing anything."""
        self._failures[name] = (self.calls.get(name, 0) + nth, code)

    def heal(self) -> None:
        self._failures.clear()

    @property
    def used_nbytes(self) -> int:
        return len(self.handles) * GRANULARITY

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return super().__getattribute__(name)
        function = super().__getattribute__(name)

        def counted(*arguments: Any) -> Any:
            self.calls[name] = self.calls.get(name, 0) + 1
            nth, code = self._failures.get(name, (0, OK))
            if nth == self.calls[name]:
                return code, *([None] * _NUM_RESULTS.get(name, 0))
            return function(*arguments)

        return counted

    def __getattr__(self, name: str) -> Any:
        return getattr(real, name)

    def cuInit(self, flags: int) -> tuple[real.CUresult]:
        return (OK if flags == 0 else INVALID,)

    def cuDeviceGet(self, ordinal: int) -> tuple[real.CUresult, int | None]:
        return (OK, 0) if ordinal == 0 else (real.CUresult.CUDA_ERROR_INVALID_DEVICE, None)

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[real.CUresult, object]:
        self.retained += 1
        return OK, _CONTEXT

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[real.CUresult]:
        self.retained -= 1
        return (OK,)

    def cuCtxPushCurrent(self, context: object) -> tuple[real.CUresult]:
        self.contexts.append(context)
        return (OK,)

    def cuCtxPopCurrent(self) -> tuple[real.CUresult, object]:
        return OK, self.contexts.pop()

    def cuCtxSynchronize(self) -> tuple[real.CUresult]:
        self._need_context()
        self.synchronized = True
        return (OK,)

    def cuEventCreate(self, flags: object) -> tuple[real.CUresult, real.CUevent]:
        self._need_context()
        assert flags == real.CUevent_flags.CU_EVENT_DISABLE_TIMING
        self.events[_EVENT] = None
        return OK, real.CUevent(_EVENT)

    def cuEventRecord(self, event: real.CUevent, stream: int) -> tuple[real.CUresult]:
        self._need_context()
        self.events[int(event)] = int(real.CUstream(stream))
        return (OK,)

    def cuEventSynchronize(self, event: real.CUevent) -> tuple[real.CUresult]:
        """Kernels run on `STREAM`."""
        self._need_context()
        if self.events[int(event)] == STREAM:
            self.synchronized = True
        return (OK,)

    def cuEventDestroy(self, event: real.CUevent) -> tuple[real.CUresult]:
        del self.events[int(event)]
        return (OK,)

    def cuDeviceGetAttribute(self, attribute: object, device: int) -> tuple[real.CUresult, int]:
        return OK, int(self.supported)

    def cuGetErrorString(self, code: real.CUresult) -> tuple[real.CUresult, bytes]:
        return OK, code.name.encode()

    def cuMemGetInfo(self) -> tuple[real.CUresult, int, int]:
        self._need_context()
        return OK, self.total_nbytes - self.used_nbytes - self.taken_nbytes, self.total_nbytes

    def cuMemGetAllocationGranularity(self, properties: Any, option: object) -> tuple[real.CUresult, int]:
        assert properties.location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        return OK, GRANULARITY

    def cuMemAddressReserve(
        self, nbytes: int, alignment: int, address: int, flags: int
    ) -> tuple[real.CUresult, real.CUdeviceptr | None]:
        self._need_context()
        if nbytes % GRANULARITY or alignment & (alignment - 1) or flags or address:
            return INVALID, None
        start = libc.mmap(None, nbytes + alignment, libc.PROT_NONE, _NOTHING)
        aligned = -(-start // alignment) * alignment
        libc.munmap(start, aligned - start) if aligned > start else None
        libc.munmap(aligned + nbytes, start + alignment - aligned)
        self.ranges[aligned] = nbytes
        return OK, real.CUdeviceptr(aligned)

    def cuMemAddressFree(self, address: int, nbytes: int) -> tuple[real.CUresult]:
        self._need_context()
        if self.ranges.get(address) != nbytes or any(address <= a < address + nbytes for a in self.mapped):
            return (INVALID,)
        libc.munmap(address, nbytes)
        del self.ranges[address]
        return (OK,)

    def cuMemCreate(
        self, nbytes: int, properties: Any, flags: int
    ) -> tuple[real.CUresult, real.CUmemGenericAllocationHandle | None]:
        self._need_context()
        assert properties.type == real.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        if nbytes != GRANULARITY or flags:
            return INVALID, None
        if self.used_nbytes + self.taken_nbytes + nbytes > self.total_nbytes:
            return OUT_OF_MEMORY, None
        handle = self._next_handle
        self._next_handle += 1
        self._slots[handle] = self._free_slots.pop()
        self.handles[handle] = 0
        return OK, real.CUmemGenericAllocationHandle(handle)

    def cuMemRelease(self, handle: int) -> tuple[real.CUresult]:
        self._need_context()
        if self.handles.get(handle) != 0:  # CUDA would wait for the last unmapping; this project never relies on it
            return (INVALID,)
        slot = self._slots.pop(handle)
        libc.punch_hole(self._fd, slot * GRANULARITY, GRANULARITY)
        self._free_slots.append(slot)
        del self.handles[handle]
        return (OK,)

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> tuple[real.CUresult]:
        self._need_context()
        if nbytes != GRANULARITY or offset or flags or handle not in self.handles or address in self.mapped:
            return (INVALID,)
        if not self._reserved(address, nbytes):
            return (INVALID,)
        file_offset = self._slots[handle] * GRANULARITY
        libc.mmap(address, nbytes, libc.PROT_NONE, libc.MAP_SHARED | libc.MAP_FIXED, self._fd, file_offset)
        self.mapped[address] = (handle, False)
        self.handles[handle] += 1
        return (OK,)

    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> tuple[real.CUresult]:
        self._need_context()
        pages = self._pages(address, nbytes)
        if count != 1 or len(access) != 1 or not pages:
            return (INVALID,)
        assert access[0].flags == real.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        assert access[0].location.type == real.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        libc.mprotect(address, nbytes, libc.PROT_READ_WRITE)
        for page in pages:
            self.mapped[page] = (self.mapped[page][0], True)
        self.synchronized = False
        return (OK,)

    def cuMemUnmap(self, address: int, nbytes: int) -> tuple[real.CUresult]:
        self._need_context()
        pages = self._pages(address, nbytes)
        if not pages:
            return (INVALID,)
        if any(self.mapped[page][1] for page in pages):
            assert self.synchronized, "unmapped while kernels may be running"
        libc.mmap(address, nbytes, libc.PROT_NONE, _NOTHING | libc.MAP_FIXED)
        for page in pages:
            handle, _ = self.mapped.pop(page)
            self.handles[handle] -= 1
        return (OK,)

    def cuMemExportToShareableHandle(
        self, handle: int, kind: object, flags: int
    ) -> tuple[real.CUresult, int | None]:
        self._need_context()
        if handle not in self.handles or flags:
            return INVALID, None
        fd = os.dup(self._fd)
        os.set_inheritable(fd, True)
        return OK, fd

    def _need_context(self) -> None:
        assert self.contexts, "called without a context"

    def _reserved(self, address: int, nbytes: int) -> bool:
        return any(start <= address and address + nbytes <= start + size for start, size in self.ranges.items())

    def _pages(self, address: int, nbytes: int) -> list[int]:
        """The pages of a range if all of it is mapped, else none."""
        pages = list(range(address, address + nbytes, GRANULARITY))
        return pages if all(page in self.mapped for page in pages) else []


_NOTHING = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_NORESERVE
_NUM_RESULTS = {
    "cuDeviceGet": 1,
    "cuEventCreate": 1,
    "cuDevicePrimaryCtxRetain": 1,
    "cuCtxPopCurrent": 1,
    "cuDeviceGetAttribute": 1,
    "cuMemGetInfo": 2,
    "cuMemGetAllocationGranularity": 1,
    "cuMemAddressReserve": 1,
    "cuMemCreate": 1,
    "cuMemExportToShareableHandle": 1,
}
