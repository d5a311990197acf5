"""Contiguous runs in sorted arrays of addresses or page numbers: the unit of one system call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def runs(values: NDArray[np.int64], stride: int) -> Iterator[tuple[int, int]]:
    """Yield (start index, count) for every maximal run in which each value is the one before plus `stride`."""
    if not len(values):
        return
    breaks = (np.flatnonzero(np.diff(values) != stride) + 1).tolist()
    for start, end in zip([0, *breaks], [*breaks, len(values)], strict=True):
        yield start, end - start
