"""Memory for blocks where none is free: new memory, then the prefix cache's, then what other groups do not use.

It is mapped when a block is first used, and stays until the limit or somebody else wants it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np

from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.block_tables import BlockGroup
from vattention.memory.pool import PagePool
from vattention.memory.region import Region

logger = logging.getLogger(__name__)

GROWTH = 8
"""Blocks that get memory at a time where the limit allows it: neighbours need no more driver calls than one."""


class BlockSupply:
    """The memory of all groups' blocks, under one limit. Not thread-safe.

    Args:
        region, pages: not owned.
    """

    def __init__(self, region: Region, pages: PagePool, groups: Sequence[BlockGroup]) -> None:
        self._region = region
        self._pages = pages
        self._groups = groups

    @property
    def live_nbytes(self) -> int:
        """Of blocks that sequences hold, each once."""
        return sum(group.pool.num_live * group.memory.block_nbytes for group in self._groups)

    @property
    def shared_nbytes(self) -> int:
        """What sequences would hold besides that if nothing were shared."""
        return sum(
            (group.pool.num_references - group.pool.num_live) * group.memory.block_nbytes for group in self._groups
        )

    @property
    def excess_nbytes(self) -> int:
        """Memory in use above the limit."""
        return max(-self._pages.headroom_nbytes, 0)

    def claim(self, counts: Sequence[int]) -> list[list[int]]:
        """So many blocks of each group, with one reference each.

        Raises:
            OutOfMemoryError, DriverError: there is not enough memory, the cache's included; nobody has got any.
        """
        with ExitStack() as undo:
            claimed: list[list[int]] = []
            for group, count in zip(self._groups, counts, strict=True):
                if count > group.pool.num_free:
                    self._make_free(group, count)
                claimed.append(group.pool.claim(count))
                undo.callback(group.pool.drop, claimed[-1])
            undo.pop_all()
        return claimed

    def reclaim(self, nbytes: int, sparing: BlockGroup | None = None) -> int:
        """Take back at least `nbytes` of memory that no sequence holds, if there is so much: free blocks' first.

        Args:
            sparing: a group to take nothing from.

        Returns:
            How much it was.
        """
        before = self._pages.in_use_nbytes
        target = before - nbytes
        groups = [group for group in self._groups if group is not sparing]
        for group in groups:
            self._strip(group, self._pages.in_use_nbytes - target)
        while self._pages.in_use_nbytes > target and (full := [group for group in groups if group.pool.num_idle]):
            group = min(full, key=lambda group: group.pool.idle_since)
            excess = self._pages.in_use_nbytes - target
            group.pool.evict(max(-(-excess // group.memory.block_nbytes), GROWTH))
            self._strip(group, excess)
        return before - self._pages.in_use_nbytes

    def everything(self) -> None:
        """Take back all that no sequence holds, and give it to the system."""
        self.reclaim(self._pages.in_use_nbytes)
        try:
            self._pages.release_idle()
        except DriverError:
            logger.exception("idle memory could not be given back; it stays accounted for")

    def unmap_all(self) -> None:
        """Unmap what is mapped, whoever holds it."""
        for group in self._groups:
            with_memory = group.pool.with_memory()
            self._region.unmap(group.memory.pages_of(np.flatnonzero(with_memory), with_memory))

    def _make_free(self, group: BlockGroup, count: int) -> None:
        """See that the group has `count` free blocks: with new memory, or from the cache, the oldest first.

        Raises:
            OutOfMemoryError, DriverError: there is not enough memory, the cache's included.
        """
        pool, memory = group.pool, group.memory
        lacking = count - pool.num_free
        headroom = self._pages.headroom_nbytes // memory.most_nbytes
        if lacking <= headroom and self._grow(group, min(max(lacking, GROWTH), headroom)):
            return
        pool.evict(count - pool.num_free)
        if (lacking := count - pool.num_free) <= 0:
            return
        while True:
            blocks = pool.bare(lacking)
            if len(blocks) < lacking:
                raise OutOfMemoryError(
                    lacking * memory.block_nbytes, 0, "there are no more numbers for blocks; raise block_size"
                )
            shortage = memory.missing_nbytes(blocks) - self._pages.headroom_nbytes
            if shortage <= 0 or not self.reclaim(shortage, sparing=group):
                break
        try:
            memory.commit(blocks)
        except OutOfMemoryError:
            # The system had less than the limit promised: give it everything nobody uses, then ask once more.
            if not self.reclaim(self._pages.in_use_nbytes, sparing=group):
                raise
            memory.commit(blocks)
        pool.supply(blocks)

    def _grow(self, group: BlockGroup, count: int) -> bool:
        """Put memory behind `count` more blocks; False where the system has less than the limit promised."""
        blocks = group.pool.bare(count)
        if not blocks:
            return False
        try:
            group.memory.commit(blocks)
        except OutOfMemoryError:
            return False
        group.pool.supply(blocks)
        return len(blocks) == count

    def _strip(self, group: BlockGroup, nbytes: int) -> None:
        """Take at least `nbytes` of free blocks' memory back, if there is so much and the driver allows it."""
        target = self._pages.in_use_nbytes - nbytes
        count = GROWTH
        while (excess := self._pages.in_use_nbytes - target) > 0 and group.pool.num_free:
            blocks = group.pool.last_free(max(-(-excess // group.memory.block_nbytes), count))
            pages = group.memory.pages_of(blocks, group.pool.with_memory())
            try:
                if len(pages):
                    self._region.unmap(pages)
            except DriverError:
                logger.exception("memory could not be given back; it stays mapped and accounted for")
                return
            group.pool.strip(blocks)
            count *= 2
