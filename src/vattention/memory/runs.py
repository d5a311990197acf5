"""Contiguous runs in sorted arrays of addresses or page numbers: the unit of one system call."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray


def runs(
    values: NDArray[np.int64], stride: int, constant: NDArray[np.int64] | None = None
) -> Iterator[tuple[int, int]]:
    """Yield (start index, count) for every maximal run in which each value is the one before plus `stride`.

    With `constant`, an array of the same length, a run also ends where that changes.
    """
    if not len(values):
        return
    broken = values[1:] - values[:-1] != stride
    if constant is not None:
        broken |= constant[1:] != constant[:-1]
    breaks = (broken.nonzero()[0] + 1).tolist()
    for start, end in zip([0, *breaks], [*breaks, len(values)], strict=True):
        yield start, end - start
