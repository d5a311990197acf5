"""Blocks by number: who holds how many references, which are free, and which the prefix cache knows.

PagedAttention (arXiv 2309.06180, sections 4.2 to 4.4) with vLLM's automatic prefix caching: a full block is known
by a hash of its tokens and of all before them. A block nobody holds any more stays in the cache until its memory is
needed; the least recently used goes first, and of one sequence the last block before the first, since a block is
worth nothing without those before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vattention.memory.driver import IntArray

Blocks = Sequence[int] | NDArray[np.integer[Any]]
"""Block numbers."""

_DIGEST_NBYTES = 16
_FIRST_CAPACITY = 1024


def salted(salt: str) -> bytes:
    """What stands for the tokens before the first block: different for each salt."""
    return blake2b(salt.encode(), digest_size=_DIGEST_NBYTES).digest()


def block_keys(parent: bytes, token_ids: Sequence[int], block_size: int) -> list[bytes]:
    """A key per full block of `token_ids`: a hash of the key before it and the block's tokens.

    Args:
        parent: key of the block before the first, or `salted`.
    """
    num_blocks = len(token_ids) // block_size
    tokens = np.array(token_ids[: num_blocks * block_size], np.int64).tobytes()
    step = block_size * 8
    keys = []
    for start in range(0, len(tokens), step):
        parent = blake2b(parent + tokens[start : start + step], digest_size=_DIGEST_NBYTES).digest()
        keys.append(parent)
    return keys


class BlockPool:
    """The blocks of one group of layers. It knows their numbers, not their memory.

    A block is *bare* (no memory behind it), *free* (memory, and nobody's), *live* (sequences hold references to
    it) or *idle* (only the prefix cache knows it). Not thread-safe.

    Args:
        num_blocks: how many numbers there are, from 0.
    """

    def __init__(self, num_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._references = np.zeros(_FIRST_CAPACITY, np.int64)
        self._free: list[int] = []
        self._bare: list[int] = []
        """Numbers below `num_used` without memory, descending."""
        self._num_used = 0
        self._block_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}
        self._idle: dict[int, int] = {}
        """Block to the time it was dropped, least recently used first."""
        self._clock = 0
        self.num_live = 0
        self.num_references = 0

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        """All blocks that ever had memory have numbers below this one."""
        return self._num_used

    @property
    def idle_since(self) -> int:
        """When the least recently used idle block, of which there must be one, was dropped: counts `drop`s."""
        return next(iter(self._idle.values()))

    def references(self, blocks: Blocks) -> IntArray:
        return self._references[blocks]

    def is_cached(self, block: int) -> bool:
        return block in self._key_of

    def bare(self, count: int) -> list[int]:
        """The `count` lowest block numbers without memory, ascending; fewer where there are no more."""
        again = self._bare[: -count - 1 : -1]
        fresh = range(self._num_used, min(self._num_used + count - len(again), self._num_blocks))
        return [*again, *fresh]

    def supply(self, blocks: Sequence[int]) -> None:
        """There is memory behind these now, which `bare` returned last: they are free."""
        again = sum(block < self._num_used for block in blocks)
        if again:
            del self._bare[-again:]
        self._num_used = max(self._num_used, blocks[-1] + 1)
        while len(self._references) < self._num_used:
            self._references = np.concatenate((self._references, np.zeros_like(self._references)))
        self._free += reversed(blocks)

    def last_free(self, count: int) -> IntArray:
        """The free blocks with the highest numbers, at most `count`, ascending: those to take memory from."""
        self._free.sort(reverse=True)
        return np.array(self._free[:count][::-1], np.int64)

    def strip(self, blocks: IntArray) -> None:
        """There is no memory behind these any more, which `last_free` returned last."""
        del self._free[: len(blocks)]
        self._bare = sorted((*self._bare, *blocks.tolist()), reverse=True)

    def with_memory(self) -> IntArray:
        """Per number below `num_used`: 1 if there is memory behind it, else 0."""
        mask = np.ones(self._num_used, np.int64)
        mask[self._bare] = 0
        return mask

    def claim(self, count: int) -> list[int]:
        """Take `count` blocks, of which there must be so many free, with one reference each."""
        if count > len(self._free):
            raise ValueError(f"{count} blocks wanted, {len(self._free)} are free")
        if count == 0:
            return []
        blocks = self._free[: -count - 1 : -1]
        del self._free[-count:]
        self._references[blocks] = 1
        self.num_live += count
        self.num_references += count
        return blocks

    def share(self, blocks: Blocks) -> None:
        """Take one more reference to each of these live or idle blocks; none stands there twice."""
        numbers = np.asarray(blocks, np.int64)
        self.num_references += len(numbers)
        idle = numbers[self._references[numbers] == 0].tolist()
        self._references[numbers] += 1
        self.num_live += len(idle)
        for block in idle:
            del self._idle[block]

    def drop(self, blocks: Blocks) -> None:
        """Give back one reference to each block; none stands there twice. In the order of a sequence's tokens."""
        numbers = np.asarray(blocks, np.int64)
        left = self._references[numbers] - 1
        if len(left) and left.min() < 0:
            raise ValueError(f"block {numbers[left.argmin()]} was dropped more often than it was taken")
        self._references[numbers] = left
        dead = numbers[left == 0][::-1].tolist()
        self.num_references -= len(numbers)
        self.num_live -= len(dead)
        self._clock += 1
        if not self._key_of:
            self._free += dead
            return
        for block in dead:
            if block in self._key_of:
                self._idle[block] = self._clock
            else:
                self._free.append(block)

    def register(self, block: int, key: bytes) -> None:
        """Let the prefix cache know a live block, unless it knows one with the same tokens already."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def find(self, key: bytes) -> int | None:
        """The live or idle block with these tokens."""
        return self._block_of.get(key)

    def forget(self, block: int) -> None:
        """Take a live block out of the prefix cache, because its holder is going to write to it."""
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def evict(self, count: int) -> None:
        """Make the `count` least recently used idle blocks free, or all if there are fewer."""
        for _ in range(min(count, len(self._idle))):
            block = next(iter(self._idle))
            del self._idle[block]
            self.forget(block)
            self._free.append(block)
