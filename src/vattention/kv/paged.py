"""PagedAttention's memory manager: fixed-size blocks, block tables, reference counts, copy-on-write.

The rival this project measures itself against, after its paper (arXiv 2309.06180, section 4) and vLLM: a prefix
cache over hashed full blocks, and one pool of blocks for each group of layers that see the same part of the past,
in which blocks behind a sliding window are free again.

One thing is as in the rest of this project: the pools' memory is not taken at the start. It is mapped when a block
is first used, and stays until the limit or somebody else wants it.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.block_memory import BlockMemory
from vattention.kv.blocks import BlockPool, Blocks, block_keys, salted
from vattention.kv.layout import Group, Layout, TensorPlace
from vattention.kv.manager import Accounts, PagedLayerView, Placement
from vattention.memory.driver import Driver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region
from vattention.memory.tensor import as_tensor, strided

logger = logging.getLogger(__name__)

GROWTH = 8
"""Blocks that get memory at a time where the limit allows it: neighbours need no more driver calls than one."""


@dataclass(slots=True)
class Held:
    """The blocks of one sequence in one group: entries [first, last) of its row of the block table.

    Attributes:
        capacity: tokens that the blocks reach to.
        guarded: tokens before this one may lie in blocks that others hold, or that the prefix cache knows.
        expires: from a query at this position on, block `first` lies behind the window.
        begin: tokens before this one may be missing, though their block is held: where tokens were copied in, they
            are just those that the next one reads.
    """

    first: int = 0
    last: int = 0
    capacity: int = 0
    guarded: int = 0
    expires: int = sys.maxsize
    begin: int = 0


@dataclass(slots=True)
class PagedSequence:
    """A running sequence.

    Attributes:
        held: per group.
        keys: of its first full blocks, as far as its tokens are known.
        num_registered: how many of those the prefix cache has been told of.
        num_tokens: tokens written or about to be.
    """

    held: list[Held]
    root: bytes
    keys: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    num_tokens: int = 0


@dataclass(slots=True)
class BlockGroup:
    """Layers that see the same part of the past, their blocks and the table of who has which.

    Attributes:
        rows: [num_slots, max_blocks] int32, the table as the manager writes it.
        table: the same on the layers' device; on the CPU the same memory.
    """

    layers: Group
    pool: BlockPool
    memory: BlockMemory
    rows: NDArray[np.int32]
    table: torch.Tensor

    def write(self, slot: int, first: int, blocks: Blocks) -> None:
        """Set the slot's entries from `first` on."""
        last = first + len(blocks)
        self.rows[slot, first:last] = blocks
        if self.table.device.type != "cpu":
            self.table[slot, first:last] = torch.from_numpy(self.rows[slot, first:last])


def _partial(key: bytes) -> bytes:
    """The key of a block that lacks its first tokens, all that a window does not reach from a later block's end."""
    return key + b"partial"


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
        self._caches = prefix_caching
        self._follows_machine = limit_nbytes is None
        self._pages = PagePool(
            driver, driver.memory_info().available_nbytes if limit_nbytes is None else limit_nbytes
        )
        self._region = Region(driver, self._pages, layout.nbytes)
        self._lock = threading.Lock()
        self._sequences: list[PagedSequence | None] = [None] * num_slots
        self._free_slots = list(range(num_slots - 1, -1, -1))
        self._awaited: Counter[bytes] = Counter()
        device = driver.capabilities.device
        memory = as_tensor(self._region.address, layout.nbytes, device=device, owner=self._region)
        num_blocks, max_blocks = layout.max_len // block_size, -(-max_len // block_size)
        self._groups = []
        tables: dict[int, torch.Tensor] = {}
        for layers in layout.groups:
            rows = torch.zeros((num_slots, max_blocks), dtype=torch.int32)
            table = rows if device in ("cpu", "meta") else rows.to(device)
            block_memory = BlockMemory(self._region, layers, memory, block_size, num_blocks)
            self._groups.append(BlockGroup(layers, BlockPool(num_blocks), block_memory, rows.numpy(), table))
            tables |= dict.fromkeys(layers.layers, table)

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
            if self._caches:
                sequence.keys = block_keys(sequence.root, token_ids, self._block_size)
                num_hits = self._num_hits(sequence.keys, len(token_ids))
                self._adopt(slot, sequence, num_hits)
                self._awaited.update(sequence.keys[num_hits:])
            return Placement(slot, sequence.num_tokens)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        if not self._caches:
            return False
        with self._lock:
            keys = block_keys(salted(salt), token_ids, self._block_size)
            usable = keys[: (len(token_ids) - 1) // self._block_size]
            return any(key in self._awaited for key in usable[self._num_hits(keys, len(token_ids)) :])

    def computed(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            sequence = self._live(slot)
            begin = sequence.num_registered
            self._register(slot, sequence, min(num_tokens // self._block_size, len(sequence.keys)))
            self._cease(sequence.keys[begin : sequence.num_registered])

    def fork(self, slot: int, num_tokens: int) -> int:
        with self._lock:
            parent = self._live(slot)
            self._check_kept(slot, parent, num_tokens)
            fork, child = self._open(parent.root)
            child.num_tokens = num_tokens
            child.num_registered = min(parent.num_registered, num_tokens // self._block_size)
            child.keys = parent.keys[: child.num_registered]
            for group, theirs, held in zip(self._groups, parent.held, child.held, strict=True):
                last = -(-num_tokens // self._block_size)
                first = min(max(theirs.first, group.layers.first_needed(num_tokens) // self._block_size), last)
                blocks = group.rows[slot, first:last]
                group.pool.share(blocks)
                group.write(fork, first, blocks)
                self._set(group, held, first, last)
                held.guarded = held.capacity
                held.begin = theirs.begin
                theirs.guarded = max(theirs.guarded, held.capacity)
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
        """Nothing: `GROWTH` is this manager's way of providing ahead."""

    def trim(self, slot: int, num_tokens: int) -> None:
        with self._lock:
            sequence = self._live(slot)
            self._check_kept(slot, sequence, num_tokens)
            for group, held in zip(self._groups, sequence.held, strict=True):
                last = max(min(-(-num_tokens // self._block_size), held.last), held.first)
                group.pool.drop(group.rows[slot, last : held.last])
                self._set(group, held, held.first, last)
            sequence.num_tokens = min(sequence.num_tokens, num_tokens)
            self._unlearn(sequence, num_tokens)

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        with self._lock:
            sequence = self._live(slot)
            if self._caches and token_ids is not None:
                self._cease(sequence.keys[sequence.num_registered :])
                known = sequence.num_registered
                parent = sequence.keys[known - 1] if known else sequence.root
                rest = block_keys(parent, token_ids[known * self._block_size :], self._block_size)
                sequence.keys[known:] = rest
                self._register(slot, sequence, known + len(rest))
            else:
                self._cease(sequence.keys[sequence.num_registered :])
            for group, held in zip(self._groups, sequence.held, strict=True):
                group.pool.drop(group.rows[slot, held.first : held.last])
            self._sequences[slot] = None
            self._free_slots.append(slot)
            self._reclaim(self.excess_nbytes)

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        with self._lock:
            self._live(slot)
            size = self._block_size
            return [
                part
                for group in self._groups
                for i in range(group.layers.first_needed(num_tokens) // size, -(-num_tokens // size))
                for part in group.memory.parts(int(group.rows[slot, i]), min(size, num_tokens - i * size))
            ]

    def drop_warm(self) -> None:
        with self._lock:
            self._reclaim(self._pages.in_use_nbytes)
            try:
                self._pages.release_idle()
            except DriverError:
                logger.exception("idle memory could not be given back; it stays accounted for")

    def set_limit(self, nbytes: int) -> None:
        with self._lock:
            self._pages.limit_nbytes = nbytes
            self._reclaim(self.excess_nbytes)

    def refresh_limit(self) -> None:
        if self._follows_machine:
            available = self._driver.memory_info().available_nbytes
            self.set_limit(self._pages.in_use_nbytes + self._pages.idle_nbytes + available)

    def fits(self, num_tokens: int) -> bool:
        return num_tokens <= self._max_len and self._nbytes(num_tokens) <= self._pages.limit_nbytes

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        with self._lock:
            left = self._pages.limit_nbytes - self._live_nbytes()
            if not self._free_slots or self._nbytes(num_tokens) <= left or not (self._caches and len(token_ids)):
                return bool(self._free_slots) and self._nbytes(num_tokens) <= left
            keys = block_keys(salted(salt), token_ids, self._block_size)
            return self._nbytes(num_tokens, keys[: self._num_hits(keys, len(token_ids))]) <= left

    @property
    def excess_nbytes(self) -> int:
        return max(-self._pages.headroom_nbytes, 0)

    def accounts(self) -> Accounts:
        with self._lock:
            live = self._live_nbytes()
            mapped = self._pages.in_use_nbytes + self._pages.idle_nbytes
            tokens = 0
            for sequence in self._running():
                for group, held in zip(self._groups, sequence.held, strict=True):
                    first = group.layers.first_needed(max(sequence.num_tokens - 1, 0))
                    first = max(first, held.begin, held.first * self._block_size)
                    tokens += max(sequence.num_tokens - first, 0) * group.layers.token_nbytes
            return Accounts(
                reserved_nbytes=self._region.nbytes,
                limit_nbytes=self._pages.limit_nbytes,
                mapped_nbytes=mapped,
                live_nbytes=live,
                token_nbytes=tokens,
                warm_nbytes=mapped - live,
                shared_nbytes=sum(
                    (group.pool.num_references - group.pool.num_live) * group.memory.block_nbytes
                    for group in self._groups
                ),
            )

    def close(self) -> None:
        with self._lock:
            self._views = ()
            for group in self._groups:
                with_memory = group.pool.with_memory()
                self._region.unmap(group.memory.pages_of(np.flatnonzero(with_memory), with_memory))
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

    def _live_nbytes(self) -> int:
        return sum(group.pool.num_live * group.memory.block_nbytes for group in self._groups)

    def _nbytes(self, num_tokens: int, hits: Sequence[bytes] = ()) -> int:
        """Memory of one sequence of so many tokens, about to compute its last.

        Args:
            hits: of its first blocks, which the cache can give. Those that others hold need no more memory.
        """
        size, nbytes = self._block_size, 0
        for group in self._groups:
            first = group.layers.first_needed(num_tokens - 1) // size
            found = (self._find(group, hits, index, len(hits)) for index in range(first, len(hits)))
            blocks = [block for block in found if block is not None]
            num_held = int(np.count_nonzero(group.pool.references(blocks))) if blocks else 0
            nbytes += group.memory.nbytes(-(-num_tokens // size) - first - num_held)
        return nbytes

    def _set(self, group: BlockGroup, held: Held, first: int, last: int) -> None:
        """The sequence holds blocks [first, last) of its row from now on."""
        held.first, held.last = first, last
        held.capacity = last * self._block_size
        window, size = group.layers.window, self._block_size
        if window is not None:
            expires = (first + 1) * size + window - 1
            held.expires = (-(-expires // size) * size if self._caches else expires) if first < last else 0

    def _first_kept(self, group: BlockGroup, start: int) -> int:
        """The first block that a query at position `start` reads.

        With a prefix cache also that of a query at the beginning of `start`'s block: should the sequence end here,
        its last full block is worth nothing without those before it.
        """
        if self._caches:
            start -= start % self._block_size
        return group.layers.first_needed(start) // self._block_size

    def _check_kept(self, slot: int, sequence: PagedSequence, num_tokens: int) -> None:
        """Whether the sequence still has all that a query at position `num_tokens` reads."""
        if num_tokens > sequence.num_tokens:
            raise ValueError(f"slot {slot} has {sequence.num_tokens} tokens, not {num_tokens}")
        for group, held in zip(self._groups, sequence.held, strict=True):
            first = max(held.begin, held.first * self._block_size)
            if group.layers.first_needed(num_tokens) < first:
                raise ValueError(
                    f"slot {slot} cannot go back to {num_tokens} tokens: its window of {group.layers.window} "
                    f"tokens begins at token {first} by now"
                )

    def _num_hits(self, keys: Sequence[bytes], num_tokens: int) -> int:
        """How many first blocks of a sequence of `num_tokens` tokens the cache can give: never all tokens.

        A group with a window needs only the blocks that the next token reads.
        """
        longest = min(len(keys), (num_tokens - 1) // self._block_size)
        found = -1
        while longest > 0 and found != longest:
            found = longest
            for group in self._groups:
                longest = self._reach(group, keys, longest)
        return max(longest, 0)

    def _reach(self, group: BlockGroup, keys: Sequence[bytes], longest: int) -> int:
        """The most blocks, up to `longest`, of which the group has all that the token behind them reads."""
        if group.layers.window is None:
            return next((i for i in range(longest) if group.pool.find(keys[i]) is None), longest)
        end = index = longest
        while index > group.layers.first_needed(end * self._block_size) // self._block_size:
            index -= 1
            if self._find(group, keys, index, end) is None:
                end = index
        return end

    def _find(self, group: BlockGroup, keys: Sequence[bytes], index: int, end: int) -> int | None:
        """A block with the tokens of `keys[index]`, or with those that the token behind `end` blocks reads."""
        block = group.pool.find(keys[index])
        if block is None and group.layers.first_needed(end * self._block_size) > index * self._block_size:
            block = group.pool.find(_partial(keys[index]))
        return block

    def _adopt(self, slot: int, sequence: PagedSequence, num_hits: int) -> None:
        """Begin a new sequence with the first blocks of `sequence.keys`, which the cache can give."""
        sequence.num_tokens = num_hits * self._block_size
        sequence.num_registered = num_hits
        for group, held in zip(self._groups, sequence.held, strict=True):
            needed = group.layers.first_needed(sequence.num_tokens)
            first = needed // self._block_size
            found = (self._find(group, sequence.keys, index, num_hits) for index in range(first, num_hits))
            blocks = [block for block in found if block is not None]
            if first < num_hits and group.pool.find(sequence.keys[first]) is None:
                held.begin = needed
            group.pool.share(blocks)
            group.write(slot, first, blocks)
            self._set(group, held, first, num_hits)
            held.guarded = held.capacity

    def _register(self, slot: int, sequence: PagedSequence, num_blocks: int) -> None:
        """Tell the prefix cache of the sequence's first full blocks."""
        begin = sequence.num_registered
        if num_blocks <= begin:
            return
        size = self._block_size
        for group, held in zip(self._groups, sequence.held, strict=True):
            first, last = max(begin, held.first, held.begin // size), min(num_blocks, held.last)
            keys = sequence.keys[first:last]
            if keys and first * size < held.begin:
                # Only for a hit whose window begins with the first token that was copied in.
                serves_a_hit = (held.begin + (group.layers.window or 0) - 1) % size == 0
                keys[0] = _partial(keys[0]) if serves_a_hit else b""
            for block, key in zip(group.rows[slot, first:last].tolist(), keys, strict=True):
                if key:
                    group.pool.register(block, key)
            held.guarded = max(held.guarded, last * size)
        sequence.num_registered = num_blocks

    def _cease(self, keys: Sequence[bytes]) -> None:
        """These are not being computed any more by a sequence that was taken for them."""
        for key in keys:
            left = self._awaited.pop(key, 0) - 1
            if left > 0:
                self._awaited[key] = left

    def _unlearn(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Only the first tokens of the sequence are known from now on: others will come behind them."""
        known = num_tokens // self._block_size
        self._cease(sequence.keys[max(known, sequence.num_registered) :])
        del sequence.keys[known:]
        sequence.num_registered = min(sequence.num_registered, known)

    def _provide(self, slot: int, sequence: PagedSequence, start: int, end: int) -> None:
        """Drop blocks behind the window, add blocks up to `end`, and replace shared ones that will be written."""
        if end > self._max_len:
            raise ValueError(f"slot {slot} cannot hold {end} tokens; the longest sequence has {self._max_len}")
        size = self._block_size
        self._give_back_behind(slot, sequence, start)
        # Per group, the entries of the table to write, and how many of them hold blocks that others hold as well.
        entries: list[tuple[list[int], int]] = []
        for group, held in zip(self._groups, sequence.held, strict=True):
            written = range(max(start // size, held.first), min(-(-end // size), held.last))
            shared: list[int] = []
            if start < held.guarded and written:
                references = group.pool.references(group.rows[slot, written.start : written.stop])
                shared = (written.start + np.flatnonzero(references > 1)).tolist()
            entries.append(([*shared, *range(held.last, -(-end // size))], len(shared)))
        with ExitStack() as undo:
            claimed: list[list[int]] = []
            for group, (indices, _) in zip(self._groups, entries, strict=True):
                if len(indices) > group.pool.num_free:
                    self._make_free(group, len(indices))
                claimed.append(group.pool.claim(len(indices)))
                undo.callback(group.pool.drop, claimed[-1])
            undo.pop_all()
        for group, held, (indices, num_shared), blocks in zip(
            self._groups, sequence.held, entries, claimed, strict=True
        ):
            if num_shared:
                self._replace(group, slot, indices[:num_shared], blocks, start)
            if indices[num_shared:]:
                group.write(slot, held.last, blocks[num_shared:])
            if start < held.guarded:
                for block in group.rows[slot, start // size : min(-(-end // size), held.last)].tolist():
                    group.pool.forget(block)
                if end >= held.guarded:
                    held.guarded = start // size * size
            self._set(group, held, held.first, max(held.last, -(-end // size)))
            if start > sequence.num_tokens:
                held.begin = group.layers.first_needed(start)
        if start < sequence.num_registered * size:
            self._unlearn(sequence, start)

    def _replace(
        self, group: BlockGroup, slot: int, indices: Sequence[int], blocks: Sequence[int], start: int
    ) -> None:
        """Copy on write: put blocks of its own in the place of shared ones, with the tokens before `start`."""
        for index, block in zip(indices, blocks, strict=False):
            theirs = int(group.rows[slot, index])
            num_kept = start - index * self._block_size
            if num_kept > 0:
                group.memory.copy(theirs, block, num_kept)
            group.write(slot, index, [block])
            group.pool.drop([theirs])

    def _give_back_behind(self, slot: int, sequence: PagedSequence, start: int) -> None:
        """Drop the blocks that lie wholly behind the window of a query at position `start`."""
        for group, held in zip(self._groups, sequence.held, strict=True):
            if start < held.expires:
                continue
            first = self._first_kept(group, start)
            kept = min(first, held.last)
            group.pool.drop(group.rows[slot, held.first : kept])
            # A sequence without any blocks begins where the window does.
            self._set(group, held, *((kept, held.last) if kept < held.last else (first, first)))

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
            if shortage <= 0 or not self._reclaim(shortage, sparing=group):
                break
        try:
            memory.commit(blocks)
        except OutOfMemoryError:
            # The system had less than the limit promised: give it everything nobody uses, then ask once more.
            if not self._reclaim(self._pages.in_use_nbytes, sparing=group):
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

    def _reclaim(self, nbytes: int, sparing: BlockGroup | None = None) -> int:
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
