"""PagedAttention's memory manager: fixed-size blocks, block tables, reference counts, copy-on-write.

The rival this project measures itself against, after its paper (arXiv 2309.06180, section 4) and vLLM: a prefix
cache over hashed full blocks, and one pool of blocks for each group of layers that see the same part of the past,
in which blocks behind a sliding window are free again.

One thing is as in the rest of this project: the pools' memory is not taken at the start.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch

from vattention.errors import OutOfMemoryError
from vattention.kv.block_memory import BlockMemory
from vattention.kv.block_prefixes import BlockPrefixes
from vattention.kv.block_supply import BlockSupply
from vattention.kv.block_tables import BlockGroup, Held, PagedSequence
from vattention.kv.blocks import BlockPool, salted
from vattention.kv.layout import Layout, TensorPlace
from vattention.kv.manager import Accounts, PagedLayerView, Placement
from vattention.memory.driver import Driver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import as_tensor, strided


class PagedManager:
    """`KVManager` over pools of blocks.

    Args:
        driver: owned from now on: `close` closes it.
        layout: of `plan_blocks`.
        num_slots: most sequences at a time.
        max_len: most tokens of one.
        block_size: tokens of a block.
        dtype: of keys and values.
        limit_nbytes: most physical memory to use; None to follow what the machine can spare.
        prefix_caching: share blocks of common prefixes.
    """

    def __init__(
        self,
        driver: Driver,
        layout: Layout,
        *,
        num_slots: int,
        max_len: int,
        block_size: int,
        dtype: torch.dtype,
        limit_nbytes: int | None,
        prefix_caching: bool = False,
    ) -> None:
        self._driver = driver
        self._num_slots = num_slots
        self._max_len = max_len
        self._block_size = block_size
        self._follows_machine = limit_nbytes is None
        self._pages = PagePool(
            driver, driver.memory_info().available_nbytes if limit_nbytes is None else limit_nbytes
        )
        self._region = Region(driver, self._pages, layout.nbytes)
        self._lock = threading.Lock()
        self._sequences: list[PagedSequence | None] = [None] * num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        device = driver.capabilities.device
        memory = as_tensor(self._region.address, layout.nbytes, device=device, owner=self._region)
        num_blocks, max_blocks = layout.max_len // block_size, -(-max_len // block_size)
        self._groups: list[BlockGroup] = []
        tables: dict[int, torch.Tensor] = {}
        for layers in layout.groups:
            rows = torch.zeros((num_slots, max_blocks), dtype=torch.int32)
            table = rows if device in ("cpu", "meta") else rows.to(device)
            block_memory = BlockMemory(self._region, layers, memory, block_size, num_blocks)
            pool = BlockPool(num_blocks)
            self._groups.append(
                BlockGroup(layers, pool, block_memory, rows.numpy(), table, block_size, prefix_caching)
            )
            tables |= dict.fromkeys(layers.layers, table)
        self._supply = BlockSupply(self._region, self._pages, self._groups)
        self._prefixes = BlockPrefixes(self._groups, block_size, enabled=prefix_caching)

        def tensor(place: TensorPlace) -> torch.Tensor:
            _, token_nbytes, *inner = place.strides_nbytes
            shape = (num_blocks, block_size, *place.shape[2:])
            return strided(
                memory, dtype, place.offset_nbytes, shape, (block_size * token_nbytes, token_nbytes, *inner)
            )

        self._views = tuple(
            PagedLayerView(tensor(key), tensor(value), tables[index])
            for index, (key, value) in enumerate(zip(layout.keys, layout.values, strict=True))
        )

    @property
    def num_slots(self) -> int:
        return self._num_slots

    @property
    def max_len(self) -> int:
        return self._max_len

    @property
    def num_free_slots(self) -> int:
        return len(self._free_slots)

    def layer(self, index: int) -> PagedLayerView:
        return self._views[index]

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        with self._lock:
            slot, sequence = self._open(salted(salt))
            self._prefixes.begin(slot, sequence, token_ids)
            return Placement(slot, sequence.num_tokens)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        with self._lock:
            return self._prefixes.awaits(token_ids, salt)

    def computed(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            self._prefixes.computed(slot, self._live(slot), num_tokens)

    def fork(self, slot: int, num_tokens: int) -> int:
        with self._lock:
            parent = self._live(slot)
            self._check_kept(slot, parent, num_tokens)
            fork, child = self._open(parent.root)
            child.num_tokens = num_tokens
            child.num_registered = min(parent.num_registered, num_tokens // self._block_size)
            child.keys = parent.keys[: child.num_registered]
            for group, theirs, held in zip(self._groups, parent.held, child.held, strict=True):
                group.fork(slot, theirs, fork, held, num_tokens)
            return fork

    def ensure(self, slot: int, start: int, end: int) -> None:
        with self._lock:
            sequence = self._live(slot)
            for held in sequence.held:
                if end > held.capacity or start < held.guarded or start >= held.expires:
                    self._provide(slot, sequence, start, end)
                    break
            sequence.num_tokens = end

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Nothing: `BlockSupply` provides some blocks ahead."""

    def trim(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            sequence = self._live(slot)
            self._check_kept(slot, sequence, num_tokens)
            for group, held in zip(self._groups, sequence.held, strict=True):
                group.cut(slot, held, num_tokens)
            sequence.num_tokens = min(sequence.num_tokens, num_tokens)
            self._prefixes.unlearn(sequence, num_tokens)

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        with self._lock:
            sequence = self._live(slot)
            self._prefixes.end(slot, sequence, token_ids)
            for group, held in zip(self._groups, sequence.held, strict=True):
                group.release(slot, held)
            self._sequences[slot] = None
            self._free_slots.append(slot)
            self._supply.reclaim(self.excess_nbytes)

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        with self._lock:
            self._live(slot)
            return [part for group in self._groups for part in group.parts(slot, num_tokens)]

    def drop_warm(self) -> None:
        with self._lock:
            self._supply.everything()

    def set_limit(self, nbytes: int) -> None:
        with self._lock:
            self._pages.limit_nbytes = nbytes
            self._supply.reclaim(self.excess_nbytes)

    def refresh_limit(self) -> None:
        if self._follows_machine:
            change = self._driver.memory_info().change_nbytes
            self.set_limit(max(self._pages.in_use_nbytes + self._pages.idle_nbytes + change, 0))

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self._max_len and self._nbytes(num_tokens) <= self._pages.limit_nbytes

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        with self._lock:
            left = self._pages.limit_nbytes - self._supply.live_nbytes
            if not self._free_slots or self._nbytes(num_tokens) <= left:
                return bool(self._free_slots)
            hits = self._prefixes.hits(token_ids, salt)
            return bool(hits) and self._nbytes(num_tokens, hits) <= left

    @property
    def excess_nbytes(self) -> int:
        return self._supply.excess_nbytes

    def accounts(self) -> Accounts:
        with self._lock:
            live = self._supply.live_nbytes
            mapped = self._pages.in_use_nbytes + self._pages.idle_nbytes
            tokens = 0
            for sequence in self._running():
                for group, held in zip(self._groups, sequence.held, strict=True):
                    tokens += group.num_read(held, sequence.num_tokens) * group.layers.token_nbytes
            return Accounts(
                reserved_nbytes=self._region.nbytes,
                limit_nbytes=self._pages.limit_nbytes,
                mapped_nbytes=mapped,
                live_nbytes=live,
                token_nbytes=tokens,
                warm_nbytes=mapped - live,
                shared_nbytes=self._supply.shared_nbytes,
            )

    def close(self) -> None:
        with self._lock:
            self._views = ()
            self._supply.unmap_all()
            self._region.close()
            self._pages.release_idle()
            self._driver.close()

    def _live(self, slot: int) -> PagedSequence:
        sequence = self._sequences[slot]
        if sequence is None:
            raise ValueError(f"slot {slot} belongs to no sequence")
        return sequence

    def _running(self) -> Iterator[PagedSequence]:
        return (sequence for sequence in self._sequences if sequence is not None)

    def _open(self, root: bytes) -> tuple[int, PagedSequence]:
        """A new sequence in a free slot, without any blocks."""
        if not self._free_slots:
            raise OutOfMemoryError(1, 0, f"all {self._num_slots} slots are taken; raise max_num_seqs")
        slot = self._free_slots.pop()
        sequence = PagedSequence([Held() for _ in self._groups], root)
        self._sequences[slot] = sequence
        return slot, sequence

    def _nbytes(self, num_tokens: int, hits: Sequence[bytes] = ()) -> int:
        """Memory of one sequence of so many tokens, about to compute its last.

        Args:
            hits: of its first blocks, which the cache can give. Those that others hold need no more memory.
        """
        return sum(
            group.memory.nbytes(group.num_blocks(num_tokens) - self._prefixes.num_held(group, hits, num_tokens))
            for group in self._groups
        )

    def _check_kept(self, slot: int, sequence: PagedSequence, num_tokens: int) -> None:
        """Whether the sequence still has all that a query at position `num_tokens` reads."""
        if num_tokens > sequence.num_tokens:
            raise ValueError(f"slot {slot} has {sequence.num_tokens} tokens, not {num_tokens}")
        for group, held in zip(self._groups, sequence.held, strict=True):
            first = group.begin(held)
            if group.layers.first_needed(num_tokens) < first:
                raise ValueError(
                    f"slot {slot} cannot go back to {num_tokens} tokens: its window of {group.layers.window} "
                    f"tokens begins at token {first} by now"
                )

    def _provide(self, slot: int, sequence: PagedSequence, start: int, end: int) -> None:
        """Drop blocks behind the window, add blocks up to `end`, and replace shared ones that will be written."""
        if end > self._max_len:
            raise ValueError(f"slot {slot} cannot hold {end} tokens; the longest sequence has {self._max_len}")
        parts = list(zip(self._groups, sequence.held, strict=True))
        for group, held in parts:
            group.give_back_behind(slot, held, start)
        wanted = [group.wanted(slot, held, start, end) for group, held in parts]
        claimed = self._supply.claim([len(entries.indices) for entries in wanted])
        for (group, held), entries, blocks in zip(parts, wanted, claimed, strict=True):
            group.put(slot, held, entries, blocks, start=start, end=end, known=sequence.num_tokens)
        if start < sequence.num_registered * self._block_size:
            self._prefixes.unlearn(sequence, start)
