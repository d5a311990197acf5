"""The memory behind blocks of tokens: which pages a block needs, and which no block needs any more."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from vattention.core import AttentionSpec
from vattention.kv.layout import MAX_TOKENS, Group, Layout, plan
from vattention.memory.driver import Driver, IntArray
from vattention.memory.region import Region
from vattention.memory.runs import runs
from vattention.memory.tensor import strided


def plan_blocks(
    specs: Sequence[AttentionSpec], driver: Driver, *, item_nbytes: int, block_size: int, sliced: bool
) -> Layout:
    """Lay out blocks: one endless row of them for each plane, block b at token b * block_size.

    There are numbers for as many blocks as the device's whole memory holds: memory comes with their first use.
    """

    def laid_out(num_tokens: int) -> Layout:
        return plan(
            specs,
            item_nbytes=item_nbytes,
            num_slots=1,
            max_len=num_tokens,
            page_nbytes=driver.page_nbytes,
            sliced=sliced,
        )

    smallest = laid_out(block_size)
    narrowest = min(group.token_nbytes for group in smallest.groups)
    wanted = driver.memory_info().total_nbytes // narrowest
    return laid_out(max(block_size, min(wanted, MAX_TOKENS - smallest.max_len - 1)))


class BlockMemory:
    """Memory of one group's blocks.

    Args:
        region: not owned.
        group: of `plan_blocks`' layout.
        memory: the region as uint8.
    """

    def __init__(
        self, region: Region, group: Group, memory: torch.Tensor, block_size: int, num_blocks: int
    ) -> None:
        self._region = region
        self._group = group
        self._block_size = block_size
        self._widths = [block_size * plane.token_nbytes for plane in group.planes]
        self._planes = [
            strided(memory, torch.uint8, plane.offset_nbytes, (num_blocks, width), (width, 1))
            for plane, width in zip(group.planes, self._widths, strict=True)
        ]
        self.block_nbytes = sum(self._widths)
        self.most_nbytes = region.page_nbytes * sum(-(-(n - 1) // region.page_nbytes) + 1 for n in self._widths)

    def nbytes(self, num_blocks: int) -> int:
        """Whole pages behind so many neighbouring blocks, from number 0 on."""
        return self._group.num_pages(0, num_blocks * self._block_size) * self._region.page_nbytes

    def commit(self, blocks: Sequence[int]) -> None:
        """Put memory behind ascending block numbers where there is none; all of them or none.

        Raises:
            OutOfMemoryError, DriverError: as `Region.commit` says.
        """
        missing = self._missing(blocks)
        if len(missing):
            self._region.commit(missing)

    def missing_nbytes(self, blocks: Sequence[int]) -> int:
        """What `commit` would take."""
        return len(self._missing(blocks)) * self._region.page_nbytes

    def _missing(self, blocks: Sequence[int]) -> IntArray:
        size = self._block_size
        pages = [
            self._group.pages(0, blocks[start] * size, (blocks[start] + count) * size)
            for start, count in runs(np.array(blocks, np.int64), 1)
        ]
        return self._region.missing(pages[0] if len(pages) == 1 else np.unique(np.concatenate(pages)))

    def pages_of(self, blocks: IntArray, with_memory: IntArray) -> IntArray:
        """The pages that lie in `blocks` and in no other block that has memory, ascending.

        Args:
            with_memory: per block number, 1 if there is memory behind it.
        """
        if not len(blocks):
            return blocks
        kept = with_memory.copy()
        kept[blocks] = 0
        num_kept = np.concatenate(([0], np.cumsum(kept)))
        page_nbytes = self._region.page_nbytes
        found = []
        for plane, width in zip(self._group.planes, self._widths, strict=True):
            first, last = blocks * width // page_nbytes, -(-(blocks + 1) * width // page_nbytes)
            counts = last - first
            ends = np.cumsum(counts)
            pages = np.unique(np.repeat(first - (ends - counts), counts) + np.arange(ends[-1]))
            before = np.minimum(pages * page_nbytes // width, len(kept))
            after = np.minimum(-(-(pages + 1) * page_nbytes // width), len(kept))
            found.append(pages[num_kept[after] == num_kept[before]] + plane.offset_nbytes // page_nbytes)
        every = np.concatenate(found)
        mapped: IntArray = every[self._region.pages(every) != 0]
        return mapped

    def copy(self, source: int, target: int, num_tokens: int) -> None:
        """Copy the first tokens of one block to another."""
        for plane, width in zip(self._planes, self._widths, strict=True):
            nbytes = width // self._block_size * num_tokens
            plane[target, :nbytes].copy_(plane[source, :nbytes])

    def parts(self, block: int, num_tokens: int) -> list[torch.Tensor]:
        """The first tokens of a block, as one uint8 tensor for each plane."""
        return [
            plane[block, : width // self._block_size * num_tokens]
            for plane, width in zip(self._planes, self._widths, strict=True)
        ]
