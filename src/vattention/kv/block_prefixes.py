"""The prefix cache over blocks: which full blocks hold which tokens, and who is just computing some.

After vLLM's automatic prefix caching: a block is found by the hash of its tokens and of all before them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vattention.kv.block_tables import BlockGroup, PagedSequence
from vattention.kv.blocks import block_keys, salted


def _partial(key: bytes) -> bytes:
    """The key of a block that lacks its first tokens, all that a window does not reach from a later block's end."""
    return key + b"partial"


class BlockPrefixes:
    """What the blocks of all groups, live and idle, are known to hold. Not thread-safe.

    Args:
        groups: not owned.
        enabled: without it nothing is ever known.
    """

    def __init__(self, groups: Sequence[BlockGroup], block_size: int, *, enabled: bool) -> None:
        self._groups = groups
        self._block_size = block_size
        self._enabled = enabled
        self.awaited: Counter[bytes] = Counter()
        """Keys of blocks that running sequences are computing, and how many do."""

    def hits(self, token_ids: Sequence[int], salt: str) -> list[bytes]:
        """The keys of the first blocks of `token_ids` that the cache can give, never all tokens."""
        if not self._enabled:
            return []
        keys = block_keys(salted(salt), token_ids, self._block_size)
        return keys[: self._num_hits(keys, len(token_ids))]

    def num_held(self, group: BlockGroup, hits: Sequence[bytes], num_tokens: int) -> int:
        """How many of a group's blocks that a sequence of `num_tokens` tokens would get by `hits`, and would still
        need to compute its last token, others hold already.
        """
        indices = range(group.first_needed(num_tokens - 1), len(hits))
        blocks = [block for i in indices if (block := self._find(group, hits, i, len(hits))) is not None]
        return int(np.count_nonzero(group.pool.references(blocks))) if blocks else 0

    def begin(self, slot: int, sequence: PagedSequence, token_ids: Sequence[int]) -> None:
        """A new sequence gets the longest prefix of `token_ids` that the cache knows, and computes the rest."""
        if not self._enabled:
            return
        sequence.keys = block_keys(sequence.root, token_ids, self._block_size)
        num_hits = self._num_hits(sequence.keys, len(token_ids))
        self._adopt(slot, sequence, num_hits)
        self.awaited.update(sequence.keys[num_hits:])

    def awaits(self, token_ids: Sequence[int], salt: str) -> bool:
        """Whether a running sequence is computing more of `token_ids` than the cache can give now."""
        if not self._enabled:
            return False
        keys = block_keys(salted(salt), token_ids, self._block_size)
        usable = keys[: (len(token_ids) - 1) // self._block_size]
        return any(key in self.awaited for key in usable[self._num_hits(keys, len(token_ids)) :])

    def computed(self, slot: int, sequence: PagedSequence, num_tokens: int) -> None:
        """The first `num_tokens` of the tokens that the sequence began with are in its blocks."""
        begin = sequence.num_registered
        self._register(slot, sequence, min(num_tokens // self._block_size, len(sequence.keys)))
        self._cease(sequence.keys[begin : sequence.num_registered])

    def unlearn(self, sequence: PagedSequence, num_tokens: int) -> None:
        """Only the first tokens of the sequence are known from now on: others will come behind them."""
        known = num_tokens // self._block_size
        self._cease(sequence.keys[max(known, sequence.num_registered) :])
        del sequence.keys[known:]
        sequence.num_registered = min(sequence.num_registered, known)

    def end(self, slot: int, sequence: PagedSequence, token_ids: Sequence[int] | None) -> None:
        """The sequence is about to give up its blocks, which hold these tokens; None: what is known is all."""
        self._cease(sequence.keys[sequence.num_registered :])
        if not self._enabled or token_ids is None:
            return
        known = sequence.num_registered
        parent = sequence.keys[known - 1] if known else sequence.root
        rest = block_keys(parent, token_ids[known * self._block_size :], self._block_size)
        sequence.keys[known:] = rest
        self._register(slot, sequence, known + len(rest))

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
        while index > group.first_needed(end * self._block_size):
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
            first = group.first_needed(sequence.num_tokens)
            found = (self._find(group, sequence.keys, index, num_hits) for index in range(first, num_hits))
            blocks = [block for block in found if block is not None]
            if first < num_hits and group.pool.find(sequence.keys[first]) is None:
                held.begin = group.layers.first_needed(sequence.num_tokens)
            group.pool.share(blocks)
            group.write(slot, first, blocks)
            group.hold(held, first, num_hits)
            held.guarded = held.capacity

    def _register(self, slot: int, sequence: PagedSequence, num_blocks: int) -> None:
        """Make the sequence's first full blocks known."""
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
            left = self.awaited.pop(key, 0) - 1
            if left > 0:
                self.awaited[key] = left
