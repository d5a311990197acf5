"""What the engine and the model ask of a KV cache, whoever manages its memory.

The engine talks in slots and token counts, the model in layers' tensors; bytes and pages stay below. One forward
pass asks for its room first (`ensure`), writes keys and values through `layer(i).append`, and reads them in the
attention kernel.
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
        mapped_nbytes: physical memory in use: live and warm, each page counted once.
        live_nbytes: behind slots of running sequences.
        token_nbytes: of those, the bytes that hold tokens a later forward reads.
        warm_nbytes: behind released slots, kept until somebody needs it.
        shared_nbytes: saved by pages that stand behind more than one slot.
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
    """One layer's keys and values, as the kernels see them: plain strided tensors over the virtual range.

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


class KVManager(Protocol):
    """Slots and the memory behind them. Thread-safe: the engine's thread and the mapper's both call in."""

    @property
    def num_slots(self) -> int: ...

    @property
    def max_len(self) -> int:
        """Tokens a slot can hold."""
        ...

    @property
    def num_free_slots(self) -> int: ...

    def take(self, token_ids: Sequence[int]) -> Placement:
        """Give a slot to a new sequence that will begin with `token_ids`.

        Raises:
            OutOfMemoryError: no slot is free.
        """
        ...

    def ensure(self, slot: int, start: int, end: int) -> None:
        """Provide memory for a forward that writes tokens [start, end) and reads all those before.

        Layers with a sliding window give back what lies behind token start's window. Warm memory is taken back
        where that is needed to stay under the limit.

        Raises:
            OutOfMemoryError: not enough memory, warm slots included; the slot is as it was.
        """
        ...

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Begin to provide memory for (slot, start, end)s behind the caller's back; shortage is no error here."""
        ...

    def trim(self, slot: int, num_tokens: int) -> None:
        """Forget all but the first tokens, and give back the pages that held only forgotten ones."""
        ...

    def release(self, slot: int) -> None:
        """End a sequence. Its pages may stay mapped, as warm ones, until somebody needs the memory."""
        ...

    def drop_warm(self) -> None:
        """Give all warm memory back to the system now."""
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

    def has_room(self, num_tokens: int) -> bool:
        """Whether one more sequence of so many tokens would fit now, beside those that run."""
        ...

    @property
    def excess_nbytes(self) -> int:
        """Memory of running sequences above a limit that has fallen; 0 while they fit."""
        ...

    def layer(self, index: int) -> LayerView: ...

    def accounts(self) -> Accounts: ...

    def close(self) -> None:
        """Give everything back. The tensors of `layer` must not be used any more."""
        ...
