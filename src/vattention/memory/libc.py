"""The Linux system calls behind host memory, as Python functions that raise OSError.

They go through ctypes because Python's `mmap` cannot map at a chosen address. ctypes lets go of the interpreter
lock during each call, so a thread that maps does not stop the others.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

import numpy as np
from numpy.typing import NDArray

PROT_NONE = 0x0
PROT_READ_WRITE = 0x1 | 0x2

MAP_SHARED = 0x01
MAP_PRIVATE = 0x02
MAP_FIXED = 0x10
MAP_ANONYMOUS = 0x20
MAP_NORESERVE = 0x4000

MADV_DONTFORK = 10
MADV_HUGEPAGE = 14
MADV_NOHUGEPAGE = 15
MADV_POPULATE_WRITE = 23

_FALLOC_FL_KEEP_SIZE = 0x1
_FALLOC_FL_PUNCH_HOLE = 0x2

_MAP_FAILED = ctypes.c_void_p(-1).value


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    pointer, size, number, offset = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int64
    libc.mmap.argtypes, libc.mmap.restype = (pointer, size, number, number, number, offset), pointer
    libc.munmap.argtypes, libc.munmap.restype = (pointer, size), number
    libc.madvise.argtypes, libc.madvise.restype = (pointer, size, number), number
    libc.mprotect.argtypes, libc.mprotect.restype = (pointer, size, number), number
    libc.fallocate.argtypes, libc.fallocate.restype = (number, number, offset, offset), number
    return libc


def _check(result: int) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def mmap(address: int | None, nbytes: int, protection: int, flags: int, fd: int = -1, offset: int = 0) -> int:
    """Map, and return where."""
    mapped: int | None = _libc().mmap(address, nbytes, protection, flags, fd, offset)
    if mapped is None or mapped == _MAP_FAILED:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return mapped


def munmap(address: int, nbytes: int) -> None:
    _check(_libc().munmap(address, nbytes))


def madvise(address: int, nbytes: int, advice: int) -> None:
    _check(_libc().madvise(address, nbytes, advice))


def mprotect(address: int, nbytes: int, protection: int) -> None:
    _check(_libc().mprotect(address, nbytes, protection))


def allocate(fd: int, offset: int, nbytes: int) -> None:
    """Put memory behind a part of a file; what is there already stays."""
    _check(_libc().fallocate(fd, 0, offset, nbytes))


def punch_hole(fd: int, offset: int, nbytes: int) -> None:
    """Give the memory behind a part of a file back; it reads as zeros from now on."""
    _check(_libc().fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, offset, nbytes))


class _Bytes:
    """Memory as numpy's array interface describes it."""

    def __init__(self, address: int, nbytes: int, owner: object) -> None:
        self.__array_interface__ = {
            "version": 3,
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (address, False),
        }
        self.owner = owner


def bytes_at(address: int, nbytes: int, owner: object = None) -> NDArray[np.uint8]:
    """Memory of this process as an array [nbytes], which keeps `owner` alive."""
    return np.asarray(_Bytes(address, nbytes, owner))


def touch(address: int, nbytes: int, stride: int) -> None:
    """Read one byte in every `stride`, so that what is there is mapped."""
    bytes_at(address, nbytes)[::stride].sum()
