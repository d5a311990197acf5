"""Keys and values outside the cache: what a sequence that lost its slot needs to go on without computing again.

An image is a copy of a slot's memory as it is, byte for byte and in the layout of its cache, so it goes back into
that cache only. With the sliced layout that is one linear copy; with a plane for each layer's keys and values, or
with blocks, it is many smaller ones.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.kv.manager import KVManager

_IOV_MAX = os.sysconf("SC_IOV_MAX")
"""Most buffers of one vectored read or write."""

_CHUNK_NBYTES = 2**25
"""Of page-locked memory: large enough that copies run at the bus's speed."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.ENOMEM)


class Storage(Protocol):
    """Room for the bytes of one image. Any call but `close` may raise OSError."""

    def write(self, runs: Sequence[torch.Tensor]) -> None:
        """Store the bytes of `runs`, uint8 tensors on any device."""
        ...

    def read(self, runs: Sequence[torch.Tensor]) -> None:
        """Fill `runs`, of the same sizes as those written, with what was stored."""
        ...

    def close(self) -> None: ...


class Image(Protocol):
    """The keys and values of a sequence's first tokens, kept outside the cache until they are freed."""

    @property
    def num_tokens(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept of them: behind a sliding window nothing is."""
        ...

    def load(self, manager: KVManager, slot: int) -> None:
        """Copy them into a slot taken for them alone, which has memory for them: `ensure(slot, n, n)`.

        Raises:
            DriverError: they could not be read; what is in the slot now means nothing.
        """
        ...

    def free(self) -> None:
        """Give the memory back to the system. Freed images cannot be loaded."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class SwappedImage:
    """An `Image` in a swap space."""

    num_tokens: int
    nbytes: int
    space: SwapSpace
    storage: Storage

    def load(self, manager: KVManager, slot: int) -> None:
        runs = manager.runs(slot, self.num_tokens)
        nbytes = sum(run.nbytes for run in runs)
        if nbytes != self.nbytes:
            raise ValueError(f"an image of {self.nbytes:,} bytes does not go into {nbytes:,} bytes")
        try:
            self.storage.read(runs)
        except OSError as error:
            raise DriverError("reading swapped memory back", error.errno or 0, str(error)) from error

    def free(self) -> None:
        self.space.forget(self)
        self.storage.close()


class SwapSpace:
    """A budget of host memory, or of a file system, for images. Used by one thread; its figures are for any.

    Args:
        capacity_nbytes: most bytes to keep.
        allocate: makes room for so many bytes; may raise OSError.

    Attributes:
        used_nbytes: bytes kept now.
    """

    def __init__(self, capacity_nbytes: int, allocate: Callable[[int], Storage]) -> None:
        self.capacity_nbytes = capacity_nbytes
        self.used_nbytes = 0
        self._allocate = allocate
        self._images: set[SwappedImage] = set()

    @property
    def num_images(self) -> int:
        """Images kept now."""
        return len(self._images)

    def save(self, runs: Sequence[torch.Tensor], num_tokens: int) -> SwappedImage:
        """Copy the memory of a slot's first tokens (`KVManager.runs`) out of the cache.

        Raises:
            OutOfMemoryError: the budget or the file system is full; nothing is kept.
            DriverError: the system refused; nothing is kept.
        """
        nbytes = sum(run.nbytes for run in runs)
        left = self.capacity_nbytes - self.used_nbytes
        if nbytes > left:
            raise OutOfMemoryError(nbytes, left, "the swap space is full; raise swap_space")
        try:
            storage = self._allocate(nbytes)
        except OSError as error:
            raise _translated(error, nbytes) from error
        try:
            storage.write(runs)
        except OSError as error:
            storage.close()
            raise _translated(error, nbytes) from error
        except BaseException:
            storage.close()
            raise
        image = SwappedImage(num_tokens, nbytes, self, storage)
        self.used_nbytes += nbytes
        self._images.add(image)
        return image

    def forget(self, image: SwappedImage) -> None:
        """An image is being freed."""
        self._images.remove(image)
        self.used_nbytes -= image.nbytes

    def close(self) -> None:
        """Free all images."""
        for image in list(self._images):
            image.free()


def memory_space(capacity_nbytes: int, device: str) -> SwapSpace:
    """Images in this process's memory; for a GPU's in page-locked memory, which copies faster."""
    return SwapSpace(capacity_nbytes, _PinnedMemory if torch.device(device).type == "cuda" else _HostMemory)


def file_space(folder: str | Path, capacity_nbytes: int | None) -> SwapSpace:
    """Images in nameless files in `folder`, which are gone with the process whatever ends it.

    Args:
        capacity_nbytes: None for what is free there now.

    Raises:
        ConfigError: no files can be written there.
    """
    try:
        tempfile.TemporaryFile(dir=folder).close()
        free_nbytes = shutil.disk_usage(folder).free
    except OSError as error:
        raise ConfigError(f"swap_space: no file can be written in {str(folder)!r}: {error.strerror}") from error
    return SwapSpace(free_nbytes if capacity_nbytes is None else capacity_nbytes, lambda _: _File(folder))


class _HostMemory:
    """A private mapping, in huge pages where there are any: touching small ones first costs more than the copy.

    The copies are numpy's, which one thread makes: torch's wait for all of its threads, one of which is late
    whenever another process wants a core.
    """

    def __init__(self, nbytes: int) -> None:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with suppress(OSError):  # advice: a kernel without huge pages gives small ones
            memory.madvise(mmap.MADV_HUGEPAGE)
        self._bytes = np.frombuffer(memory, np.uint8)

    def write(self, runs: Sequence[torch.Tensor]) -> None:
        end = 0
        for run in runs:
            begin, end = end, end + run.nbytes
            self._bytes[begin:end] = run.view(-1).numpy()

    def read(self, runs: Sequence[torch.Tensor]) -> None:
        end = 0
        for run in runs:
            begin, end = end, end + run.nbytes
            run.view(-1).numpy()[:] = self._bytes[begin:end]

    def close(self) -> None:
        self._bytes = np.empty(0, np.uint8)


class _PinnedMemory:
    """Memory that a GPU copies to and from by itself, in chunks of one size.

    torch rounds what is asked for up to a power of two, which for a whole image could be twice its bytes, and keeps
    what is freed for the next that asks for as much.
    """

    def __init__(self, nbytes: int) -> None:
        sizes = [min(_CHUNK_NBYTES, nbytes - begin) for begin in range(0, nbytes, _CHUNK_NBYTES)]
        try:
            self._chunks = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for size in sizes]
        except RuntimeError as error:
            raise OSError(str(error)) from error

    def write(self, runs: Sequence[torch.Tensor]) -> None:
        for piece, there in self._pieces(runs):
            piece.copy_(there, non_blocking=True)
        self._wait(runs)

    def read(self, runs: Sequence[torch.Tensor]) -> None:
        for piece, there in self._pieces(runs):
            there.copy_(piece, non_blocking=True)
        self._wait(runs)

    def close(self) -> None:
        self._chunks = []

    @staticmethod
    def _wait(runs: Sequence[torch.Tensor]) -> None:
        """Once for all copies: what they took is learned from, and the memory may be used for something else."""
        for device in {run.device for run in runs if run.is_cuda}:
            torch.cuda.synchronize(device)

    def _pieces(self, runs: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Parts of chunks, and what of the runs they hold."""
        chunks = iter(self._chunks)
        left = torch.empty(0, dtype=torch.uint8)
        for run in runs:
            there = run.view(-1)
            while len(there):
                if not len(left):
                    left = next(chunks)
                count = min(len(left), len(there))
                yield left[:count], there[:count]
                left, there = left[count:], there[count:]


class _File:
    """A file without a name."""

    def __init__(self, folder: str | Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  # `close` closes it

    def write(self, runs: Sequence[torch.Tensor]) -> None:
        buffers = [run.view(-1).cpu().numpy().data for run in runs]
        self._transfer(os.writev, buffers)

    def read(self, runs: Sequence[torch.Tensor]) -> None:
        self._file.seek(0)
        here = [run if run.device.type == "cpu" else torch.empty_like(run, device="cpu") for run in runs]
        self._transfer(os.readv, [tensor.view(-1).numpy().data for tensor in here])
        for tensor, run in zip(here, runs, strict=True):
            if tensor is not run:
                run.copy_(tensor)

    def close(self) -> None:
        self._file.close()

    def _transfer(self, call: Callable[[int, list[memoryview]], int], buffers: list[memoryview]) -> None:
        """Read or write all of `buffers`, however little the system moves at a time."""
        pending = [buffer for buffer in buffers if buffer.nbytes][::-1]
        while pending:
            moved = call(self._file.fileno(), pending[: -_IOV_MAX - 1 : -1])
            if moved == 0:
                raise OSError("the swap file ends early")
            while moved:
                buffer = pending.pop()
                if moved < buffer.nbytes:
                    pending.append(buffer[moved:])
                moved -= min(moved, buffer.nbytes)


def _translated(error: OSError, nbytes: int) -> OutOfMemoryError | DriverError:
    """The package's own error for one that stopped an image from being kept."""
    if error.errno in _FULL:
        return OutOfMemoryError(nbytes, 0, f"no room for a swapped sequence ({error.strerror}); lower swap_space")
    return DriverError("keeping swapped memory", error.errno or 0, str(error))
