"""Which slots are live, which are warm, and which to take next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(slots=True)
class Extent:
    """The tokens [first, last) of one slot in one group that have memory behind them."""

    first: int = 0
    last: int = 0


@dataclass(slots=True)
class Slot:
    """One row of the cache.

    Attributes:
        num_tokens: tokens written or about to be; 0 where no sequence lives here.
        live: a sequence owns it.
        tenancy: counts its owners, so that work queued for an earlier one can be told apart.
        extents: per group of the layout, what is mapped.
    """

    index: int
    extents: list[Extent]
    num_tokens: int = 0
    live: bool = False
    tenancy: int = 0

    @property
    def num_warm_tokens(self) -> int:
        """How many first tokens of a new sequence would find memory in every group."""
        return min((e.last if e.first == 0 else 0) for e in self.extents)

    @property
    def stuck(self) -> bool:
        """Whether memory is left here that no new sequence can use, because giving it back failed."""
        return any(extent.first > 0 for extent in self.extents)

    @property
    def mapped(self) -> bool:
        return any(extent.last > extent.first for extent in self.extents)


@dataclass(slots=True)
class SlotTable:
    """All slots. A free one is warm while pages are still mapped behind it, else cold."""

    slots: list[Slot]
    _warm: dict[int, None] = field(default_factory=dict)
    """Released slots with memory, least recently released first."""
    _cold: list[int] = field(default_factory=list)

    @classmethod
    def of(cls, num_slots: int, num_groups: int) -> SlotTable:
        slots = [Slot(i, [Extent() for _ in range(num_groups)]) for i in range(num_slots)]
        return cls(slots, _cold=list(range(num_slots - 1, -1, -1)))

    @property
    def num_free(self) -> int:
        return len(self._warm) + len(self._cold)

    def live(self) -> Iterator[Slot]:
        return (slot for slot in self.slots if slot.live)

    def warm(self) -> list[Slot]:
        """Released slots with memory, least recently released first."""
        return [self.slots[i] for i in self._warm]

    def take(self, num_tokens: int) -> Slot | None:
        """The free slot that suits a sequence of `num_tokens` best: the smallest warm one that holds it, else the
        largest warm one, which leaves the least to map, else a cold one. None if all are live.
        """
        warm = {i: n for i in self._warm if (n := self.slots[i].num_warm_tokens)}
        if warm:
            holding = [(n, i) for i, n in warm.items() if n >= num_tokens]
            index = min(holding)[1] if holding else max(warm, key=lambda i: warm[i])
        elif self._cold or self._warm:
            index = self._cold[-1] if self._cold else next(iter(self._warm))
        else:
            return None
        if index in self._warm:
            del self._warm[index]
        else:
            self._cold.pop()
        slot = self.slots[index]
        slot.live = True
        slot.tenancy += 1
        return slot

    def release(self, slot: Slot) -> None:
        """The slot's sequence has ended; it is warm if anything is mapped there."""
        slot.live = False
        slot.num_tokens = 0
        if slot.mapped:
            self._warm[slot.index] = None
        else:
            self._cold.append(slot.index)

    def cool(self, slot: Slot) -> None:
        """A warm slot has lost all its memory."""
        del self._warm[slot.index]
        self._cold.append(slot.index)
