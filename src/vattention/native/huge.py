"""Memory on huge pages, where the system gives them."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Protocol

import torch
from torch import Tensor

_MADV_HUGEPAGE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_HUGE_PAGE_NBYTES = 2 << 20
_BLOCK_NBYTES = 32 << 20
_LINE_NBYTES = 64


class Empty(Protocol):
    """Makes uninitialised tensors that start at a cache line, as `huge_empty` does."""

    def __call__(self, numel: int, dtype: torch.dtype) -> Tensor: ...


def huge_empty(numel: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised tensor that starts at a cache line; a large one at a huge page, and asks for those.

    Streaming through 4 KiB pages spends a tenth of the bandwidth on misses of the translation buffer.
    """
    nbytes = numel * dtype.itemsize
    advice = _MADV_HUGEPAGE if nbytes >= _HUGE_PAGE_NBYTES else None
    alignment = _LINE_NBYTES if advice is None else _HUGE_PAGE_NBYTES
    buffer = torch.empty(nbytes + alignment, dtype=torch.uint8)
    start = -buffer.data_ptr() % alignment
    if advice is not None:
        # A hint: a system that refuses it is slower, not wrong.
        address = ctypes.c_void_p(buffer.data_ptr() + start)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(nbytes), ctypes.c_int(advice))
    return buffer[start : start + nbytes].view(dtype)


class HugeBlocks:
    """Cuts tensors from blocks of huge pages, one behind the other, for those smaller than a page, too.

    A block is given back when the last of its tensors is.
    """

    def __init__(self) -> None:
        self._block = torch.empty(0, dtype=torch.uint8)
        self._used_nbytes = 0

    def empty(self, numel: int, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor that starts at a cache line."""
        nbytes = numel * dtype.itemsize
        if nbytes >= _BLOCK_NBYTES:
            return huge_empty(numel, dtype)
        start = math.ceil(self._used_nbytes / _LINE_NBYTES) * _LINE_NBYTES
        if start + nbytes > len(self._block):
            self._block, start = huge_empty(_BLOCK_NBYTES, torch.uint8), 0
        self._used_nbytes = start + nbytes
        return self._block[start : start + nbytes].view(dtype)


class Workspace:
    """Memory that a model's layers work in, one after the other, kept for the next batch."""

    def __init__(self) -> None:
        self._memory = huge_empty(0, torch.uint8)
        self._nbytes = 0

    def address(self, nbytes: int) -> int:
        """Of so many bytes, from a cache line on; good until the next call."""
        if self._nbytes < nbytes:
            self._memory, self._nbytes = huge_empty(nbytes, torch.uint8), nbytes
        return self._memory.data_ptr()
