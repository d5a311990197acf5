"""The manager this project exists for: contiguous slots in virtual memory, pages mapped as tokens arrive.

After vAttention (arXiv 2405.04437): a slot per running sequence, memory mapped ahead of the iteration
that needs it, while the model computes, released slots kept warm and taken back only under pressure.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import numpy as np
import torch

from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.layout import Layout, TensorPlace
from vattention.kv.manager import Accounts, LayerView, Placement
from vattention.kv.mapper import Mapper
from vattention.kv.slots import Slot, SlotTable
from vattention.memory.driver import Driver, IntArray
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import as_tensor, strided

logger = logging.getLogger(__name__)


class VirtualManager:
    """`KVManager` over one region of virtual memory.

    Args:
        driver: owned from now on: `close` closes it.
        layout: where each token lies; its page size is the driver's.
        dtype: of keys and values.
        limit_nbytes: most physical memory to use; None to follow what the machine can spare.
        background: map ahead on a thread of its own; without it `prefetch` does nothing.
    """

    def __init__(
        self,
        driver: Driver,
        layout: Layout,
        *,
        dtype: torch.dtype,
        limit_nbytes: int | None,
        background: bool = True,
    ) -> None:
        self._driver = driver
        self._layout = layout
        self._follows_machine = limit_nbytes is None
        self._pool = PagePool(
            driver, driver.memory_info().available_nbytes if limit_nbytes is None else limit_nbytes
        )
        self._region = Region(driver, self._pool, layout.nbytes)
        self._table = SlotTable.of(layout.num_slots, len(layout.groups))
        self._lock = threading.Lock()
        self._mapper = Mapper(self._map_ahead) if background else None
        self._memory = as_tensor(
            self._region.address, layout.nbytes, device=driver.capabilities.device, owner=self._region
        )

        def tensor(place: TensorPlace) -> torch.Tensor:
            return strided(self._memory, dtype, place.offset_nbytes, place.shape, place.strides_nbytes)

        self._views = tuple(
            LayerView(tensor(key), tensor(value)) for key, value in zip(layout.keys, layout.values, strict=True)
        )

    @property
    def num_slots(self) -> int:
        return self._layout.num_slots

    @property
    def max_len(self) -> int:
        return self._layout.max_len

    @property
    def num_free_slots(self) -> int:
        return self._table.num_free

    def layer(self, index: int) -> LayerView:
        return self._views[index]

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        with self._lock:
            slot = self._table.take(len(token_ids))
            if slot is None:
                raise OutOfMemoryError(1, 0, f"all {self.num_slots} slots are taken; raise max_num_seqs")
            if slot.stuck and not self._drop_unusable(slot):
                self._table.release(slot)
                raise DriverError("unmap", 0, f"slot {slot.index} still has pages that could not be unmapped")
            return Placement(slot.index, 0)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        return False

    def computed(self, slot: int, num_tokens: int) -> None:
        pass

    def fork(self, slot: int, num_tokens: int) -> int:
        raise OutOfMemoryError(1, 0, "this manager shares no memory yet")

    def ensure(self, slot: int, start: int, end: int) -> None:
        with self._lock:
            self._give_back_behind(self._live(slot), start)
            self._grow(self._live(slot), start, end, reclaim=True)
            self._table.slots[slot].num_tokens = end

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        if self._mapper is not None:
            tenancies = [self._live(slot).tenancy for slot, _, _ in wants]
            self._mapper.submit([(*want, tenancy) for want, tenancy in zip(wants, tenancies, strict=True)])

    def trim(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            record = self._live(slot)
            for group, extent in zip(self._layout.groups, record.extents, strict=True):
                if group.first_needed(num_tokens) < extent.first:
                    raise ValueError(
                        f"slot {slot} cannot go back to {num_tokens} tokens: its window of {group.window} tokens "
                        f"begins at token {extent.first} by now"
                    )
            for group, extent in zip(self._layout.groups, record.extents, strict=True):
                kept = min(num_tokens, extent.last)
                self._unmap(group.pages_beyond(slot, kept, extent.last))
                extent.last = kept
            record.num_tokens = min(record.num_tokens, num_tokens)

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        with self._lock:
            self._live(slot)
        found = []
        for group in self._layout.groups:
            first = group.first_needed(num_tokens)
            for plane in group.planes:
                row = plane.offset_nbytes + slot * plane.row_nbytes
                found.append(self._memory[row + first * plane.token_nbytes : row + num_tokens * plane.token_nbytes])
        return found

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        with self._lock:
            record = self._live(slot)
            self._drop_unusable(record)
            self._table.release(record)
            self._reclaim(self.excess_nbytes)

    def drop_warm(self) -> None:
        with self._lock:
            self._reclaim(self._layout.nbytes)
            try:
                self._pool.release_idle()
            except DriverError:
                logger.exception("idle memory could not be given back; it stays accounted for")

    def set_limit(self, nbytes: int) -> None:
        with self._lock:
            self._pool.limit_nbytes = nbytes
            self._reclaim(self.excess_nbytes)

    def refresh_limit(self) -> None:
        if self._follows_machine:
            available = self._driver.memory_info().available_nbytes
            self.set_limit(self._pool.in_use_nbytes + self._pool.idle_nbytes + available)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_len and self._nbytes(num_tokens) <= self._pool.limit_nbytes

    def has_room(self, num_tokens: int) -> bool:
        with self._lock:
            if self._table.num_free == 0:
                return False
            live = self._pool.in_use_nbytes - self._warm_nbytes()
            return live + self._nbytes(num_tokens) <= self._pool.limit_nbytes

    @property
    def excess_nbytes(self) -> int:
        return max(-self._pool.headroom_nbytes, 0)

    def accounts(self) -> Accounts:
        with self._lock:
            size = self._layout.page_nbytes
            live = tokens = 0
            for record in self._table.live():
                for group in self._layout.groups:
                    first = group.first_needed(max(record.num_tokens - 1, 0))
                    live += group.num_pages(first, record.num_tokens) * size
                    tokens += max(record.num_tokens - first, 0) * group.token_nbytes
            mapped = self._pool.in_use_nbytes
            return Accounts(
                reserved_nbytes=self._layout.nbytes,
                limit_nbytes=self._pool.limit_nbytes,
                mapped_nbytes=mapped,
                live_nbytes=min(live, mapped),
                token_nbytes=tokens,
                warm_nbytes=max(mapped - live, 0) + self._pool.idle_nbytes,
                shared_nbytes=self._region.mapped_nbytes - mapped,
            )

    def close(self) -> None:
        if self._mapper is not None:
            self._mapper.close()
        with self._lock:
            self._views = ()
            self._memory = torch.empty(0, dtype=torch.uint8)
            self._region.close()
            self._pool.release_idle()
            self._driver.close()

    def _nbytes(self, num_tokens: int) -> int:
        """Memory of one sequence of so many tokens, about to compute its last."""
        return self._layout.page_nbytes * sum(
            group.num_pages(group.first_needed(num_tokens - 1), num_tokens) for group in self._layout.groups
        )

    def _warm_nbytes(self) -> int:
        """Memory behind released slots."""
        return self._layout.page_nbytes * sum(
            group.num_pages(extent.first, extent.last)
            for record in self._table.warm()
            for group, extent in zip(self._layout.groups, record.extents, strict=True)
        )

    def _live(self, slot: int) -> Slot:
        record = self._table.slots[slot]
        if not record.live:
            raise ValueError(f"slot {slot} belongs to no sequence")
        return record

    def _map_ahead(self, slot: int, start: int, end: int, tenancy: int) -> None:
        """The mapper thread's work: what the slot's next forward will need, unless memory is short."""
        with self._lock:
            record = self._table.slots[slot]
            if record.live and record.tenancy == tenancy:
                self._grow(record, start, end, reclaim=False)

    def _grow(self, record: Slot, start: int, end: int, *, reclaim: bool) -> None:
        """Map what the slot lacks to hold tokens [start, end) and what they read; all groups or none."""
        wanted = []
        grown = []
        for group, extent in zip(self._layout.groups, record.extents, strict=True):
            if end <= extent.last:
                continue
            last = min(-(-end // group.step) * group.step, self.max_len)
            if extent.last > extent.first:
                wanted.append(group.pages(record.index, extent.last, last))
                grown.append((extent, extent.first, last))
            else:
                first = group.first_needed(start)
                wanted.append(group.pages(record.index, first, last))
                grown.append((extent, first, last))
        if not grown:
            return
        missing = self._region.missing(np.concatenate(wanted))
        if len(missing):
            self._commit(missing, reclaim=reclaim)
        for extent, first, last in grown:
            extent.first, extent.last = first, last

    def _commit(self, indices: IntArray, *, reclaim: bool) -> None:
        shortage = len(indices) * self._layout.page_nbytes - self._pool.headroom_nbytes
        if shortage > 0 and reclaim:
            self._reclaim(shortage)
        try:
            self._region.commit(indices)
        except OutOfMemoryError:
            # The system had less than the limit promised: give it everything nobody uses, then ask once more.
            if not (reclaim and self._reclaim(self._layout.nbytes)):
                raise
            self._region.commit(indices)

    def _give_back_behind(self, record: Slot, start: int) -> None:
        """Unmap what lies wholly behind the window of a query at position `start`."""
        for group, extent in zip(self._layout.groups, record.extents, strict=True):
            first = group.first_needed(start)
            first = min(first, extent.last - 1)  # the page that the extent ends in stays known
            behind = first - extent.first
            if behind >= group.step and self._try_unmap(group.pages_behind(record.index, extent.first, first)):
                extent.first = first

    def _drop_unusable(self, record: Slot) -> bool:
        """Unmap what a new sequence, which begins at token 0, could not use. False if the driver refuses."""
        for group, extent in zip(self._layout.groups, record.extents, strict=True):
            if extent.first > 0 and self._try_unmap(group.pages(record.index, extent.first, extent.last)):
                extent.first = extent.last = 0
        return not record.stuck

    def _reclaim(self, nbytes: int) -> int:
        """Take back at least `nbytes` of warm memory if there is so much; returns how much it was."""
        before = self._pool.in_use_nbytes
        for record in self._table.warm():
            if before - self._pool.in_use_nbytes >= nbytes:
                break
            for group, extent in zip(self._layout.groups, record.extents, strict=True):
                if self._try_unmap(group.pages(record.index, extent.first, extent.last)):
                    extent.first = extent.last = 0
            if not record.mapped:
                self._table.cool(record)
        return before - self._pool.in_use_nbytes

    def _unmap(self, indices: IntArray) -> None:
        """Unmap those of the pages that are mapped."""
        mapped = indices[self._region.pages(indices) != 0]
        if len(mapped):
            self._region.unmap(mapped)

    def _try_unmap(self, indices: IntArray) -> bool:
        """`_unmap` where nothing depends on it now: a driver's refusal is logged, and it is tried again later."""
        try:
            self._unmap(indices)
        except DriverError:
            logger.exception("memory could not be given back; it stays mapped and accounted for")
            return False
        return True
