"""Block tables: which blocks a sequence holds in each group of layers, as PagedAttention's kernels follow them.

Sequences share blocks by holding references to them (arXiv 2309.06180, section 4.4). One that others hold too is
replaced by a copy before it is written to; those behind a sliding window are given back.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from vattention.kv.block_memory import BlockMemory
from vattention.kv.blocks import BlockPool, Blocks
from vattention.kv.layout import Group


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
        root: what stands for the tokens before its first block (`salted`).
        keys: of its first full blocks, as far as its tokens are known.
        num_registered: how many of those the prefix cache has been told of.
        num_tokens: tokens written or about to be.
    """

    held: list[Held]
    root: bytes
    keys: list[bytes] = field(default_factory=list)
    num_registered: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Wanted:
    """Entries of a sequence's row that need blocks before tokens can be written.

    Attributes:
        indices: ascending; the first `num_shared` of them hold blocks that others hold as well.
    """

    indices: list[int]
    num_shared: int


@dataclass(slots=True)
class BlockGroup:
    """Layers that see the same part of the past, their blocks and the table of who has which.

    Attributes:
        rows: [num_slots, max_blocks] int32, the table as the manager writes it.
        table: the same on the layers' device; on the CPU the same memory.
        block_size: tokens of a block.
        caches: a prefix cache knows the blocks. A sequence then keeps what its last full block is worth nothing
            without, should it end there.
    """

    layers: Group
    pool: BlockPool
    memory: BlockMemory
    rows: NDArray[np.int32]
    table: torch.Tensor
    block_size: int
    caches: bool

    def write(self, slot: int, first: int, blocks: Blocks) -> None:
        """Set the slot's entries from `first` on."""
        last = first + len(blocks)
        self.rows[slot, first:last] = blocks
        if self.table.device.type != "cpu":
            self.table[slot, first:last] = torch.from_numpy(self.rows[slot, first:last])

    def hold(self, held: Held, first: int, last: int) -> None:
        """The sequence holds blocks [first, last) of its row from now on."""
        held.first, held.last = first, last
        held.capacity = last * self.block_size
        window, size = self.layers.window, self.block_size
        if window is not None:
            expires = (first + 1) * size + window - 1
            held.expires = (-(-expires // size) * size if self.caches else expires) if first < last else 0

    def first_needed(self, start: int) -> int:
        """The first block that a query at position `start` reads."""
        return self.layers.first_needed(start) // self.block_size

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks of one sequence of so many tokens, about to compute its last."""
        return -(-num_tokens // self.block_size) - self.first_needed(num_tokens - 1)

    def begin(self, held: Held) -> int:
        """The first token that is there."""
        return max(held.begin, held.first * self.block_size)

    def num_read(self, held: Held, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens later forwards read."""
        first = self.layers.first_needed(max(num_tokens - 1, 0))
        return max(num_tokens - max(first, self.begin(held)), 0)

    def wanted(self, slot: int, held: Held, start: int, end: int) -> Wanted:
        """What blocks it lacks to write tokens [start, end), those in the place of shared ones included."""
        size = self.block_size
        written = range(max(start // size, held.first), min(-(-end // size), held.last))
        shared: list[int] = []
        if start < held.guarded and written:
            references = self.pool.references(self.rows[slot, written.start : written.stop])
            shared = (written.start + np.flatnonzero(references > 1)).tolist()
        return Wanted([*shared, *range(held.last, -(-end // size))], len(shared))

    def put(
        self, slot: int, held: Held, wanted: Wanted, blocks: Sequence[int], *, start: int, end: int, known: int
    ) -> None:
        """Let the sequence hold the blocks that it wanted, and write tokens [start, end).

        Args:
            known: tokens it had; those from there to `start` are copied in.
        """
        indices, num_shared, size = wanted.indices, wanted.num_shared, self.block_size
        if num_shared:
            self._replace(slot, indices[:num_shared], blocks, start)
        if indices[num_shared:]:
            self.write(slot, held.last, blocks[num_shared:])
        if start < held.guarded:
            for block in self.rows[slot, start // size : min(-(-end // size), held.last)].tolist():
                self.pool.forget(block)
            if end >= held.guarded:
                held.guarded = start // size * size
        self.hold(held, held.first, max(held.last, -(-end // size)))
        if start > known:
            held.begin = self.layers.first_needed(start)

    def give_back_behind(self, slot: int, held: Held, start: int) -> None:
        """Drop the blocks that lie wholly behind the window of a query at position `start`."""
        if start < held.expires:
            return
        # With a prefix cache a query at the beginning of `start`'s block must find its window too.
        first = self.first_needed(start - start % self.block_size if self.caches else start)
        kept = min(first, held.last)
        self.pool.drop(self.rows[slot, held.first : kept])
        # A sequence without any blocks begins where the window does.
        self.hold(held, *((kept, held.last) if kept < held.last else (first, first)))

    def cut(self, slot: int, held: Held, num_tokens: int) -> None:
        """Drop the blocks that hold none of the first `num_tokens` tokens."""
        last = max(min(-(-num_tokens // self.block_size), held.last), held.first)
        self.pool.drop(self.rows[slot, last : held.last])
        self.hold(held, held.first, last)

    def fork(self, slot: int, theirs: Held, fork: int, held: Held, num_tokens: int) -> None:
        """Let slot `fork`, which has no blocks, hold what the token behind `slot`'s first `num_tokens` reads."""
        last = -(-num_tokens // self.block_size)
        first = min(max(theirs.first, self.first_needed(num_tokens)), last)
        blocks = self.rows[slot, first:last]
        self.pool.share(blocks)
        self.write(fork, first, blocks)
        self.hold(held, first, last)
        held.guarded = held.capacity
        held.begin = theirs.begin
        theirs.guarded = max(theirs.guarded, held.capacity)

    def release(self, slot: int, held: Held) -> None:
        """Drop all blocks."""
        self.pool.drop(self.rows[slot, held.first : held.last])

    def parts(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        """The memory of those of the first `num_tokens` tokens that the next one reads, as uint8 tensors."""
        size = self.block_size
        return [
            part
            for i in range(self.first_needed(num_tokens), -(-num_tokens // size))
            for part in self.memory.parts(int(self.rows[slot, i]), min(size, num_tokens - i * size))
        ]

    def _replace(self, slot: int, indices: Sequence[int], blocks: Sequence[int], start: int) -> None:
        """Copy on write: put blocks of its own in the place of shared ones, with the tokens before `start`."""
        for index, block in zip(indices, blocks, strict=False):
            theirs = int(self.rows[slot, index])
            num_kept = start - index * self.block_size
            if num_kept > 0:
                self.memory.copy(theirs, block, num_kept)
            self.write(slot, index, [block])
            self.pool.drop([theirs])
