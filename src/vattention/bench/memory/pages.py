"""Internal fragmentation: memory that the last page or block of a sequence wastes, by its size.

No manager is needed: which lengths run together is taken from one simulation, and what each page size makes of them
is `Layout`'s arithmetic, the same that the manager follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from vattention.bench.memory.shapes import ITEM_NBYTES, ModelShape
from vattention.kv.layout import Layout, plan

KIB = 2**10
PAGE_NBYTES = tuple(k * KIB for k in (4, 16, 64, 128, 256, 512, 2048))
BLOCK_SIZES = (1, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True)
class Lengths:
    """How often sequences of each length were running.

    Attributes:
        lengths: [k] tokens, ascending.
        counts: [k].
    """

    lengths: NDArray[np.int64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, samples: Iterable[Sequence[int]]) -> Lengths:
        lengths, counts = np.unique(np.concatenate([np.asarray(s, np.int64) for s in samples]), return_counts=True)
        return cls(lengths, counts)


def layout_of(model: ModelShape, page_nbytes: int, *, sliced: bool) -> Layout:
    return plan(
        model.specs,
        item_nbytes=ITEM_NBYTES,
        num_slots=1,
        max_len=model.max_len,
        page_nbytes=page_nbytes,
        sliced=sliced,
    )


def page_share(running: Lengths, layout: Layout, *, ahead: int = 0) -> float:
    """Token bytes in the pages that hold the sequences.

    Args:
        ahead: tokens for which memory is mapped beyond those that are there.
    """
    tokens = pages = 0
    for length, count in zip(running.lengths.tolist(), running.counts.tolist(), strict=True):
        for group in layout.groups:
            first = group.first_needed(length - 1)
            tokens += count * (length - first) * group.token_nbytes
            pages += count * group.num_pages(first, min(length + ahead, layout.max_len))
    return tokens / (pages * layout.page_nbytes)


def block_share(running: Lengths, block_size: int) -> float:
    """Tokens in the blocks that hold the sequences."""
    blocks = -(-running.lengths // block_size)
    return float((running.lengths * running.counts).sum() / (blocks * running.counts).sum() / block_size)


def worst_nbytes(layout: Layout) -> int:
    """The most that one sequence can waste in pages not full: one page, almost empty, in every plane."""
    return layout.page_nbytes * sum(len(group.planes) for group in layout.groups)
