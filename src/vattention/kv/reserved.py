"""Contiguous reservation up front: the baseline that PagedAttention and vAttention measure themselves against.

Orca's memory management as the PagedAttention paper describes it (arXiv 2309.06180, section 6.1): a sequence gets
one contiguous range of tokens when it comes, for all it may grow to, and a buddy allocator decides where. Three
variants differ in how long they take a sequence to become.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch

from vattention.errors import ConfigError, OutOfMemoryError
from vattention.kv.buddy import BuddyAllocator, size_of
from vattention.kv.layout import Layout
from vattention.kv.manager import Accounts, LayerView, Placement
from vattention.kv.virtual import VirtualManager
from vattention.memory.driver import Driver

Reservation = Callable[[int, int, int], int]
"""(tokens of the prompt, tokens in the end, tokens of the longest sequence) → tokens to reserve."""

RESERVATIONS: dict[str, Reservation] = {
    "max": lambda num_prompt_tokens, final, longest: longest,
    "pow2": lambda num_prompt_tokens, final, longest: num_prompt_tokens + size_of(final - num_prompt_tokens),
    "oracle": lambda num_prompt_tokens, final, longest: final,
}
"""By `EngineConfig.reservation`: the paper's Orca (Max), Orca (Pow2) and Orca (Oracle)."""


@dataclass(slots=True)
class Reserved:
    """What a running sequence got.

    Attributes:
        start: where the range begins, by the buddy allocator's count of tokens.
        num_reserved: tokens with memory behind them.
        num_tokens: tokens written or about to be.
    """

    start: int
    num_reserved: int
    num_tokens: int = 0


class ReservedManager:
    """`KVManager` that takes a sequence's whole memory at once, and shares none.

    The buddy allocator decides over physical memory: the limit is an array of tokens, in which a sequence gets a
    contiguous range of a power of two. The memory is mapped behind rows of virtual addresses, as everywhere in this
    project, so that kernels are the same. What the range holds beyond the longest sequence is not mapped, and lost
    to everybody like the gaps between ranges.

    Args:
        driver, layout, dtype, limit_nbytes: as for `VirtualManager`.
        reservation: a key of `RESERVATIONS`.
    """

    def __init__(
        self,
        driver: Driver,
        layout: Layout,
        *,
        dtype: torch.dtype,
        limit_nbytes: int | None,
        reservation: str = "max",
    ) -> None:
        if reservation not in RESERVATIONS:
            raise ConfigError(f"reservation={reservation!r} is not known; there are {', '.join(RESERVATIONS)}")
        self._layout = layout
        self._tokens_for = RESERVATIONS[reservation]
        self._rows = VirtualManager(driver, layout, dtype=dtype, limit_nbytes=limit_nbytes, background=False)
        self._buddy = BuddyAllocator(self._rows.accounts().limit_nbytes // layout.token_nbytes)
        self._lock = threading.Lock()
        self._sequences: dict[int, Reserved] = {}

    @property
    def num_slots(self) -> int:
        return self._rows.num_slots

    @property
    def max_len(self) -> int:
        return self._rows.max_len

    @property
    def num_free_slots(self) -> int:
        return self._rows.num_free_slots

    def layer(self, index: int) -> LayerView:
        return self._rows.layer(index)

    def take(self, token_ids: Sequence[int], *, salt: str = "", max_tokens: int | None = None) -> Placement:
        with self._lock:
            final = self.max_len if max_tokens is None else min(max(max_tokens, len(token_ids)), self.max_len)
            return Placement(self._open(self._wanted(len(token_ids), final)), 0)

    def awaits(self, token_ids: Sequence[int], *, salt: str = "") -> bool:
        return False

    def computed(self, slot: int, num_tokens: int) -> None:
        """Nothing: there is no prefix cache."""

    def fork(self, slot: int, num_tokens: int) -> int:
        """As `KVManager.fork`, but everything is copied: contiguous memory cannot be shared."""
        with self._lock:
            parent = self._live(slot)
            if num_tokens > parent.num_tokens:
                raise ValueError(f"slot {slot} has {parent.num_tokens} tokens, not {num_tokens}")
            fork = self._open(parent.num_reserved)
            self._sequences[fork].num_tokens = num_tokens
            for index in range(len(self._layout.keys)):
                view = self._rows.layer(index)
                for rows in (view.keys, view.values):
                    rows[fork, :num_tokens].copy_(rows[slot, :num_tokens])
            return fork

    def ensure(self, slot: int, start: int, end: int) -> None:
        """As `KVManager.ensure`: the memory is there since `take`.

        Raises:
            ValueError: the sequence grows beyond what `take` was told.
        """
        sequence = self._live(slot)
        if end > sequence.num_reserved:
            raise ValueError(f"slot {slot} has memory for {sequence.num_reserved} tokens, not for {end}")
        sequence.num_tokens = end

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Nothing: the memory is there since `take`."""

    def trim(self, slot: int, num_tokens: int) -> None:
        sequence = self._live(slot)
        sequence.num_tokens = min(sequence.num_tokens, num_tokens)

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        with self._lock:
            sequence = self._live(slot)
            self._rows.release(slot)
            del self._sequences[slot]
            self._buddy.free(sequence.start)

    def runs(self, slot: int, num_tokens: int) -> list[torch.Tensor]:
        return self._rows.runs(slot, num_tokens)

    def drop_warm(self) -> None:
        self._rows.drop_warm()

    def set_limit(self, nbytes: int) -> None:
        with self._lock:
            self._rows.set_limit(nbytes)
            self._follow_limit()

    def refresh_limit(self) -> None:
        with self._lock:
            self._rows.refresh_limit()
            self._follow_limit()

    def fits(self, num_tokens: int) -> bool:
        with self._lock:
            if num_tokens > self.max_len:
                return False
            wanted = self._wanted(num_tokens, num_tokens)
            limit_nbytes = self._rows.accounts().limit_nbytes
            return self._buddy.fits(wanted) and self._nbytes(self._mapped_for(wanted)) <= limit_nbytes

    def has_room(self, num_tokens: int, token_ids: Sequence[int] = (), *, salt: str = "") -> bool:
        """As `KVManager.has_room`; a sequence that will grow to more than `num_tokens` may need more at once."""
        with self._lock:
            wanted = self._wanted(num_tokens, num_tokens)
            return self._rows.num_free_slots > 0 and self._buddy.has_room(wanted)

    @property
    def excess_nbytes(self) -> int:
        return self._rows.excess_nbytes

    def accounts(self) -> Accounts:
        with self._lock:
            rows = self._rows.accounts()
            live = sum(self._nbytes(sequence.num_reserved) for sequence in self._running())
            return Accounts(
                reserved_nbytes=rows.reserved_nbytes,
                limit_nbytes=rows.limit_nbytes,
                mapped_nbytes=rows.mapped_nbytes,
                live_nbytes=live,
                token_nbytes=sum(
                    (sequence.num_tokens - group.first_needed(max(sequence.num_tokens - 1, 0))) * group.token_nbytes
                    for sequence in self._running()
                    for group in self._layout.groups
                ),
                warm_nbytes=rows.mapped_nbytes - live,
                shared_nbytes=0,
            )

    def close(self) -> None:
        self._rows.close()

    def _live(self, slot: int) -> Reserved:
        if slot not in self._sequences:
            raise ValueError(f"slot {slot} belongs to no sequence")
        return self._sequences[slot]

    def _running(self) -> Iterator[Reserved]:
        return iter(self._sequences.values())

    def _wanted(self, num_prompt_tokens: int, final: int) -> int:
        """Tokens to reserve for a sequence that grows from `num_prompt_tokens` to `final`."""
        return min(self._tokens_for(num_prompt_tokens, final, self.max_len), self.max_len)

    def _open(self, num_tokens: int) -> int:
        """Reserve memory for at least `num_tokens` tokens in a free slot."""
        start = self._buddy.allocate(num_tokens)
        if start is None:
            capacity = self._rows.accounts().limit_nbytes // self._layout.token_nbytes
            free = (capacity - self._buddy.num_allocated) * self._layout.token_nbytes
            raise OutOfMemoryError(
                size_of(num_tokens) * self._layout.token_nbytes,
                free,
                f"no {size_of(num_tokens):,} tokens in one piece are free, which one of {num_tokens:,} tokens "
                "reserves; raise kv_memory, lower max_model_len, or choose another reservation",
            )
        with ExitStack() as undo:
            undo.callback(self._buddy.free, start)
            slot = self._rows.take(range(num_tokens)).slot
            undo.callback(self._rows.release, slot)
            num_reserved = self._mapped_for(num_tokens)
            self._rows.ensure(slot, 0, num_reserved)
            undo.pop_all()
        self._sequences[slot] = Reserved(start, num_reserved)
        return slot

    def _mapped_for(self, num_tokens: int) -> int:
        """The tokens of the range for `num_tokens`, as far as a row reaches."""
        return min(size_of(num_tokens), self.max_len)

    def _nbytes(self, num_tokens: int) -> int:
        """Memory behind the first tokens of a row."""
        return self._layout.page_nbytes * sum(
            group.num_pages(0, min(-(-num_tokens // group.step) * group.step, self.max_len))
            for group in self._layout.groups
        )

    def _follow_limit(self) -> None:
        self._buddy.resize(self._rows.accounts().limit_nbytes // self._layout.token_nbytes)
