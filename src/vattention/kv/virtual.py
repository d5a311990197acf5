"""The manager this project exists for: contiguous slots in virtual memory, pages mapped as tokens arrive.

After vAttention (arXiv 2405.04437): a slot per running sequence, memory mapped ahead of the iteration
that needs it, while the model computes, released slots kept warm and taken back only under pressure. Released slots
are also the prefix cache: rows of the virtual range cost nothing, so there are more of them than sequences, and the
pages of one can stand behind another.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.backing import Backing
from vattention.kv.census import Census
from vattention.kv.layout import Layout, TensorPlace
from vattention.kv.manager import Accounts, LayerView, Placement
from vattention.kv.mapper import Mapper
from vattention.kv.prefix_cache import Hit, PrefixCache
from vattention.kv.reclaim import Reclaimer
from vattention.kv.slots import Slot, SlotTable
from vattention.memory.driver import Driver
from vattention.memory.pool import PagePool
from vattention.memory.tensor import strided


class VirtualManager:
    """`KVManager` over one region of virtual memory.

    Args:
        driver: owned from now on: `close` closes it.
        layout: where each token lies; its page size is the driver's. Slots beyond `num_slots` are for prefixes.
        dtype: of keys and values.
        limit_nbytes: most physical memory to use; None to follow what the machine can spare.
        num_slots: most sequences at a time; by default as many as the layout has.
        prefix_cache: keep the tokens of released slots for sequences that begin with them.
        background: map ahead on a thread of its own; without it `prefetch` does nothing.
    """

    def __init__(
        self,
        driver: Driver,
        layout: Layout,
        *,
        dtype: torch.dtype,
        limit_nbytes: int | None,
        num_slots: int | None = None,
        prefix_cache: bool = False,
        background: bool = True,
    ) -> None:
        self._driver = driver
        self._layout = layout
        self._follows_machine = limit_nbytes is None
        self._pool = PagePool(
            driver, driver.memory_info().available_nbytes if limit_nbytes is None else limit_nbytes
        )
        self._num_slots = layout.num_slots if num_slots is None else num_slots
        self._table = SlotTable.of(layout.num_slots, len(layout.groups))
        self._backing = Backing(driver, self._pool, layout)
        self._cache = PrefixCache(self._table, layout.groups, enabled=prefix_cache)
        self._reclaimer = Reclaimer(self._table, self._cache, self._backing)
        self._census = Census(self._backing)
        self._lock = threading.Lock()
        self._mapper = Mapper(self._map_ahead) if background else None

        def tensor(place: TensorPlace) -> torch.Tensor:
            return strided(self._backing.memory, dtype, place.offset_nbytes, place.shape, place.strides_nbytes)

        self._views = tuple(
            LayerView(tensor(key), tensor(value)) for key, value in zip(layout.keys, layout.values, strict=True)
        )

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def max_len(self) -> int:
        return self._layout.max_len

    @property
    def num_free_slots(self) -> int:
        return self._num_slots - self._table.num_live

    def layer(self, index: int) -> LayerView:
        return self._views[index]

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        with self._lock:
            self._check_room_for_one()
            slot, num_cached = self._place(self._cache.find(token_ids, salt), len(token_ids))
            slot.num_tokens = slot.start = num_cached
            self._cache.know(slot, token_ids, salt, ready=num_cached)
            return Placement(slot.index, num_cached)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        with self._lock:
            return self._cache.awaits(token_ids, salt)

    def computed(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            record = self._live(slot)
            record.ready = min(num_tokens, len(record.tokens), record.num_tokens)

    def fork(self, slot: int, num_tokens: int) -> int:
        with self._lock:
            record = self._live(slot)
            if not 0 <= num_tokens <= record.num_tokens:
                raise ValueError(
                    f"slot {slot} has {record.num_tokens} tokens, which cannot be forked at {num_tokens}"
                )
            self._check_reach(record, num_tokens)
            self._check_room_for_one()
            child = self._share(record, num_tokens)
            child.num_tokens = child.start = num_tokens
            self._cache.know(child, record.tokens[:num_tokens], record.salt, ready=min(record.ready, num_tokens))
            return child.index

    def ensure(self, slot: int, start: int, end: int) -> None:
        with self._lock:
            record = self._live(slot)
            record.ready = min(record.ready, start)
            if not self._cache.enabled:
                self._reclaimer.attempt(lambda: self._backing.give_back_behind(record, start))
            record.start = start
            written = start
            if start > record.num_tokens:
                # Tokens will be copied in (`runs`): in windows just those that a query at `start` reads.
                self._backing.clear_windows(record)
                written = 0
            if written < record.shared:
                self._reclaimer.provide(lambda: self._backing.own(record, written))
            if self._backing.lacks(record, end):
                # Its own memory behind the window counts as well: alone, a sequence has nobody else's.
                self._reclaimer.provide(lambda: self._backing.grow(record, start, end))
            record.num_tokens = end
            self._reclaimer.reclaim(self.excess_nbytes)

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        if self._mapper is not None:
            records = [self._live(slot) for slot, _, _ in wants]
            # Without the lock: what the mapper has not mapped yet, it is asked for again.
            lacking = [
                (*want, record.tenancy)
                for want, record in zip(wants, records, strict=True)
                if self._backing.lacks(record, want[2])
            ]
            if lacking:
                self._mapper.submit(lacking)

    def trim(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            record = self._live(slot)
            self._check_reach(record, num_tokens)
            self._backing.cut(record, num_tokens)
            self._cache.shorten(record, num_tokens)
            record.num_tokens = min(record.num_tokens, num_tokens)
            record.start = min(record.start, num_tokens)

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        with self._lock:
            self._live(slot)
            return self._backing.runs(slot, num_tokens)

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        with self._lock:
            record = self._live(slot)
            known = record.tokens[: record.ready] if token_ids is None else token_ids
            if len(known) > record.num_tokens:
                raise ValueError(f"slot {slot} holds {record.num_tokens} tokens, not {len(known)}")
            if not record.holds(len(known), self._layout.groups):
                known = ()
            self._cache.know(record, known, record.salt, ready=len(known))
            if not known:
                self._drop_unusable(record)
            self._table.release(record)
            self._reclaimer.reclaim(self.excess_nbytes)

    def drop_warm(self) -> None:
        with self._lock:
            self._reclaimer.everything()

    def set_limit(self, nbytes: int) -> None:
        with self._lock:
            self._pool.limit_nbytes = nbytes
            self._reclaimer.reclaim(self.excess_nbytes)

    def refresh_limit(self) -> None:
        if self._follows_machine:
            change = self._driver.memory_info().change_nbytes
            self.set_limit(max(self._pool.in_use_nbytes + self._pool.idle_nbytes + change, 0))

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self.max_len and self._layout.sequence_nbytes(num_tokens) <= self._pool.limit_nbytes

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        with self._lock:
            if self.num_free_slots == 0:
                return False
            live, size = self._table.live(), self._layout.page_nbytes
            needed = self._census.needs(live).num_pages * size + self._layout.sequence_nbytes(num_tokens)
            hit = self._cache.find(token_ids, salt) if live and needed > self._pool.limit_nbytes else None
            if hit is not None:
                needed -= self._census.num_common(live, hit.source, hit.num_tokens, num_tokens) * size
            return needed <= self._pool.limit_nbytes

    @property
    def excess_nbytes(self) -> int:
        return max(-self._pool.headroom_nbytes, 0)

    def accounts(self) -> Accounts:
        with self._lock:
            size = self._layout.page_nbytes
            needs = self._census.needs(self._table.live())
            live, mapped = needs.num_pages * size, self._pool.in_use_nbytes + self._pool.idle_nbytes
            return Accounts(
                reserved_nbytes=self._layout.nbytes,
                limit_nbytes=self._pool.limit_nbytes,
                mapped_nbytes=mapped,
                live_nbytes=live,
                token_nbytes=needs.token_nbytes,
                warm_nbytes=mapped - live,
                shared_nbytes=needs.num_saved * size,
            )

    def close(self) -> None:
        if self._mapper is not None:
            self._mapper.close()
        with self._lock:
            self._views = ()
            self._backing.close()
            self._pool.release_idle()
            self._driver.close()

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
                self._backing.grow(record, start, end)

    def _place(self, hit: Hit | None, num_tokens: int) -> tuple[Slot, int]:
        """A slot for a sequence of so many tokens, and how many it holds already."""
        if hit is None:
            return self._fresh(num_tokens), 0
        if not hit.whole:
            self._table.touch(hit.source)
            try:
                return self._share(hit.source, hit.num_tokens), hit.num_tokens
            except OutOfMemoryError:
                if hit.source.live:
                    return self._fresh(num_tokens), 0
        # Whoever has no room beside a parked slot takes its place.
        self._table.take(hit.source)
        return hit.source, hit.num_tokens

    def _fresh(self, num_tokens: int) -> Slot:
        """A slot without known tokens, perhaps with memory."""
        slot = self._table.for_new(num_tokens)
        self._cache.shorten(slot, 0)
        self._table.take(slot)
        if slot.stuck:
            self._drop_unusable(slot)
        if slot.stuck:
            self._table.release(slot)
            raise DriverError("unmap", 0, f"slot {slot.index} still has pages that could not be unmapped")
        return slot

    def _share(self, source: Slot, num_tokens: int) -> Slot:
        """Another slot that holds the first tokens of `source` too."""
        target = self._table.for_shared(source)
        if target is None:
            raise OutOfMemoryError(1, 0, f"all {self._layout.num_slots} slots are in use; raise max_num_seqs")
        self._cache.shorten(target, 0)
        self._table.take(target)
        with ExitStack() as undo:
            undo.callback(self._table.release, target)
            self._backing.clear(target)
            self._reclaimer.provide(lambda: self._backing.share(source, target, num_tokens), (source, target))
            undo.pop_all()
        return target

    def _check_room_for_one(self) -> None:
        if self.num_free_slots == 0:
            raise OutOfMemoryError(1, 0, f"all {self.num_slots} slots are taken; raise max_num_seqs")

    def _check_reach(self, record: Slot, num_tokens: int) -> None:
        if not record.holds(num_tokens, self._layout.groups):
            raise ValueError(
                f"slot {record.index} cannot go back to {num_tokens} tokens: memory behind its windows is gone"
            )

    def _drop_unusable(self, record: Slot) -> None:
        """Unmap what a new sequence, which begins at token 0, could not use."""
        self._reclaimer.attempt(lambda: self._backing.clear_unusable(record))
