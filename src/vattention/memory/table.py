"""Flat tables over very many pages, of which only the entries in use cost memory."""

from __future__ import annotations

import mmap
import sys
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

Scalar = TypeVar("Scalar", bound=np.generic)

# Python's mmap module has no name for it before 3.13.
_MAP_NORESERVE = 0x4000 if sys.platform == "linux" else 0


class Table(Generic[Scalar]):
    """A zeroed array whose memory comes with the first write to each of its parts.

    A table for every page of terabytes of addresses is gigabytes itself. `np.zeros` would ask for huge pages
    (so that one entry costs 2 MiB) and be refused where the system does not overcommit.

    Attributes:
        values: the array. Keep neither it nor a view of it across `grow`.
    """

    values: NDArray[Scalar]

    def __init__(self, count: int, scalar: type[Scalar]) -> None:
        self._dtype = np.dtype(scalar)
        self._memory = mmap.mmap(
            -1, self._nbytes(count), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        )
        self._view()

    def grow(self, count: int) -> None:
        """Make room for `count` entries in all; the new ones are zero."""
        del self.values
        try:
            self._memory.resize(self._nbytes(count))
        finally:
            self._view()

    def _view(self) -> None:
        self.values = np.frombuffer(self._memory, self._dtype)

    def _nbytes(self, count: int) -> int:
        return max(count, 1) * self._dtype.itemsize
