"""Which rows of a batch to copy when beam search gives them other parents, and from which token on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

SPARE = -1
"""The row beside the batch that `moves` parks one row in, where rows change places in a circle."""


def moves(parents: Sequence[int]) -> list[tuple[int, int]]:
    """Order single-row copies (destination, source) so that in the end each row is what `parents[row]` was.

    No row is overwritten while another still needs it. Rows that stay as they are do not appear; `SPARE` appears,
    once as a destination and once as a source, for every circle. (A parallel move, as compilers call it.)
    """
    pending = {row: parent for row, parent in enumerate(parents) if row != parent}
    readers = Counter(pending.values())
    ready = [row for row in pending if not readers[row]]
    order = []
    while pending:
        if not ready:
            row = next(iter(pending))
            reader = next(reader for reader, parent in pending.items() if parent == row)
            order.append((SPARE, row))
            pending[reader] = SPARE
            ready.append(row)
        row = ready.pop()
        parent = pending.pop(row)
        order.append((row, parent))
        readers[parent] -= 1
        if parent in pending and not readers[parent]:
            ready.append(parent)
    return order


class Lineage:
    """How many first tokens each two rows of a batch share, as far as the cache's own copying tells.

    Beams that descend from one parent are equal up to the step at which they parted, so a beam that replaces
    another is copied from there on only.
    """

    def __init__(self, num_rows: int) -> None:
        self._shared = np.zeros((num_rows, num_rows), dtype=np.int64)

    def shared(self, row: int, other: int) -> int:
        """Tokens at the beginning of both rows that are known to be equal."""
        return int(self._shared[row, other])

    def take(self, parents: Sequence[int], num_tokens: int) -> None:
        """Row i is now a copy of row `parents[i]` as it was, with `num_tokens` tokens."""
        index = np.asarray(parents, dtype=np.int64)
        self._shared = self._shared[np.ix_(index, index)]
        self._shared[index[:, None] == index] = num_tokens

    def crop(self, num_tokens: int) -> None:
        """All rows keep their first `num_tokens` tokens only."""
        np.minimum(self._shared, num_tokens, out=self._shared)
