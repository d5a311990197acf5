"""What the engine and the model ask of a KV cache, whoever manages its memory.

The engine talks in slots and tokens, the model in layers' tensors; bytes, pages and blocks stay below. One forward
pass asks for its room first (`ensure`), writes keys and values through `layer(i).append`, and reads them in the
attention kernel. A sequence's life::

    take ─► (ensure ─► forward ─► computed)* ─► release
      └ finds a known prefix in the cache        └ leaves its tokens in the cache

    fork: a second sequence goes on from the first tokens of a running one
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a sequence was put, and how many of its first tokens the slot already holds."""

    slot: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class Accounts:
    """The cache's memory at one moment, in bytes.

    Attributes:
        reserved_nbytes: virtual addresses, with or without memory behind them.
        limit_nbytes: most physical memory it may use.
        mapped_nbytes: physical memory in use, each page counted once: live and warm.
        live_nbytes: of that, what running sequences cannot do without; a page behind several counts once.
        token_nbytes: bytes of tokens that running sequences' later forwards read, counted once per sequence: with
            sharing it may exceed `live_nbytes`.
        warm_nbytes: the rest of the mapped memory: cached prefixes and released slots, kept until it is needed.
        shared_nbytes: memory saved: what running sequences would need besides `live_nbytes` if nothing were shared.
    """

    reserved_nbytes: int
    limit_nbytes: int
    mapped_nbytes: int
    live_nbytes: int
    token_nbytes: int
    warm_nbytes: int
    shared_nbytes: int


@dataclass(frozen=True, slots=True)
class LayerView:
    """One layer's keys and values, contiguous per slot: plain strided tensors over the virtual range.

    Attributes:
        keys: [num_slots, max_len, num_kv_heads, key_dim].
        values: [num_slots, max_len, num_kv_heads, value_dim].

    Only tokens that `ensure` provided and a forward wrote may be read: elsewhere there may be no memory, or NaN.
    """

    keys: torch.Tensor
    values: torch.Tensor

    def append(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Write tokens: `key` is [T, num_kv_heads, key_dim], row t goes to (slots[t], positions[t])."""
        self.keys[slots, positions] = key
        self.values[slots, positions] = value

    def read(self, slot: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a slot's keys [T, num_kv_heads, key_dim] and values at `positions`."""
        return self.keys[slot, positions], self.values[slot, positions]


@dataclass(frozen=True, slots=True)
class PagedLayerView:
    """One layer's keys and values in blocks, as PagedAttention (arXiv 2309.06180, section 4.1) stores them.

    Attributes:
        keys: [num_blocks, block_size, num_kv_heads, key_dim].
        values: [num_blocks, block_size, num_kv_heads, value_dim].
        tables: [num_slots, max_blocks] int32: entry (s, i) is the block of slot s's tokens [i * block_size,
            (i + 1) * block_size). The manager rewrites it in place; entries of tokens that `ensure` did not
            provide, or that lie behind a sliding window, mean nothing.
    """

    keys: torch.Tensor
    values: torch.Tensor
    tables: torch.Tensor

    @property
    def block_size(self) -> int:
        return self.keys.shape[1]

    def append(self, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, positions: torch.Tensor) -> None:
        """Write tokens: `key` is [T, num_kv_heads, key_dim], row t goes to (slots[t], positions[t])."""
        blocks = self.tables[slots, positions // self.block_size].long()
        offsets = positions % self.block_size
        self.keys[blocks, offsets] = key
        self.values[blocks, offsets] = value

    def read(self, slot: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies of a slot's keys [T, num_kv_heads, key_dim] and values at `positions`."""
        blocks, offsets = self.tables[slot, positions // self.block_size].long(), positions % self.block_size
        return self.keys[blocks, offsets], self.values[blocks, offsets]


CacheView = LayerView | PagedLayerView


class KVManager(Protocol):
    """Slots and the memory behind them. Thread-safe: the engine's thread and the mapper's both call in."""

    @property
    def num_slots(self) -> int:
        """Most sequences at a time. Slots are numbered from 0; their numbers may go beyond `num_slots`."""
        ...

    @property
    def max_len(self) -> int:
        """Tokens a slot can hold."""
        ...

    @property
    def num_free_slots(self) -> int:
        """Sequences that could still be taken."""
        ...

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        """Give a slot to a new sequence that will begin with `token_ids`.

        With a prefix cache, the slot holds the keys and values of the longest prefix of `token_ids` that the cache
        knows under the same `salt`, at most all but the last token. The tokens are known as being computed here
        from now on (`awaits`), and as cached as far as `computed` says.

        Args:
            salt: separates prefix caches: a tenant sees only what was computed under the same salt.
            max_tokens: the most the sequence will grow to, where a manager reserves memory up front.

        Raises:
            OutOfMemoryError: no slot is free, or no memory for the copies that sharing needs.
        """
        ...

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        """Whether a running sequence is just computing more of `token_ids` than the cache can give now.

        Whoever waits for it to say so through `computed` computes the common prefix once. False without a cache.
        """
        ...

    def computed(self, slot: int, num_tokens: int) -> None:
        """The first `num_tokens` of the tokens the slot was taken for are in it now: others may share them."""
        ...

    def fork(self, slot: int, num_tokens: int) -> int:
        """Give another slot that begins with the first `num_tokens` tokens of `slot`'s, sharing their memory.

        Works with and without a prefix cache. Neither slot's later writes reach what both hold.

        Raises:
            OutOfMemoryError: no slot is free, or no memory for what cannot be shared; nothing has changed.
        """
        ...

    def ensure(self, slot: int, start: int, end: int) -> None:
        """Provide memory for a forward that writes tokens [start, end) and reads all those before.

        Layers with a sliding window may lose what lies behind token start's window. Warm memory is taken back where
        that is needed to stay under the limit.

        Raises:
            OutOfMemoryError: not enough memory, warm slots included; the slot is as it was.
        """
        ...

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Begin to provide memory for (slot, start, end)s behind the caller's back; shortage is no error here."""
        ...

    def trim(self, slot: int, num_tokens: int) -> None:
        """Forget all but the first tokens, and give back the memory that held only forgotten ones."""
        ...

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        """End a sequence. Its memory may stay, as warm, until somebody needs it.

        Args:
            token_ids: all tokens whose keys and values the slot holds, which a prefix cache keeps for those to
                come; None where only what `computed` said is sure.
        """
        ...

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        """The memory that holds the slot's first `num_tokens` tokens, or those of them that the next token still
        reads, as uint8 tensors to copy out of, or into after `ensure(slot, num_tokens, num_tokens)` on a new slot.

        How many there are and their sizes depend on nothing but `num_tokens`.
        """
        ...

    def drop_warm(self) -> None:
        """Give all warm memory back to the system now, and forget cached prefixes."""
        ...

    def set_limit(self, nbytes: int) -> None:
        """Change the most physical memory to use; warm memory above it goes back at once."""
        ...

    def refresh_limit(self) -> None:
        """Follow what the machine can spare now; does nothing where the limit was fixed."""
        ...

    def fits(self, num_tokens: int) -> bool:
        """Whether one sequence of so many tokens would fit if it were alone."""
        ...

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        """Whether one more sequence of so many tokens would fit now, beside those that run.

        Args:
            token_ids: what `take` would be given with this `salt`. Memory of running sequences that it would share
                is not needed a second time; what else the cache gives counts as needed.
        """
        ...

    @property
    def excess_nbytes(self) -> int:
        """Memory of running sequences above a limit that has fallen; 0 while they fit."""
        ...

    def layer(self, index: int) -> CacheView:
        """Keys and values of a layer. All layers of one manager have the same kind of view."""
        ...

    def accounts(self) -> Accounts: ...

    def close(self) -> None:
        """Give everything back. The tensors of `layer` must not be used any more."""
        ...
