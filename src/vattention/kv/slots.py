"""The rows of the cache: which belong to a sequence, what the others hold, and which to take next."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from vattention.kv.layout import Group
from vattention.kv.prefix import Tokens


@dataclass(slots=True)
class Extent:
    """The tokens [first, last) of one slot in one group that have memory behind them."""

    first: int = 0
    last: int = 0


@dataclass(slots=True, eq=False)
class Slot:
    """One row of the cache.

    Attributes:
        num_tokens: tokens written or about to be; 0 where no sequence lives here.
        start: where the latest forward began to write: what it reads must stay.
        live: a sequence owns it.
        tenancy: counts its owners, so that work queued for an earlier one can be told apart.
        extents: per group of the layout, what is mapped.
        shared: no page that holds tokens behind this many first ones stands behind another slot too.
        tokens: first tokens that are known, for which the slot was taken or with which it was released.
        ready: of these, how many are computed. Others may be given those.
        salt: who may be.
        used: when it was last taken, released or shared, on the table's clock.
    """

    index: int
    extents: list[Extent]
    num_tokens: int = 0
    start: int = 0
    live: bool = False
    tenancy: int = 0
    shared: int = 0
    tokens: Tokens = ()
    ready: int = 0
    salt: str = ""
    used: int = 0

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

    def holds(self, num_tokens: int, groups: tuple[Group, ...]) -> bool:
        """Whether a sequence could go on from the first tokens: what its next token reads is all there."""
        for group, extent in zip(groups, self.extents, strict=True):
            first = group.first_needed(num_tokens)
            if first < num_tokens and not extent.first <= first < num_tokens <= extent.last:
                return False
        return True


@dataclass(slots=True)
class SlotTable:
    """All slots. A free one is *parked* while its tokens are known and computed, *warm* while anything else is
    mapped behind it, else *cold*.
    """

    slots: list[Slot]
    _live: dict[int, None] = field(default_factory=dict)
    _parked: dict[int, None] = field(default_factory=dict)
    """Least recently used first, as `_warm`."""
    _warm: dict[int, None] = field(default_factory=dict)
    _cold: dict[int, None] = field(default_factory=dict)
    _clock: Iterator[int] = field(default_factory=lambda: count(1))

    @classmethod
    def of(cls, num_slots: int, num_groups: int) -> SlotTable:
        slots = [Slot(i, [Extent() for _ in range(num_groups)]) for i in range(num_slots)]
        return cls(slots, _cold=dict.fromkeys(reversed(range(num_slots))))

    @property
    def num_live(self) -> int:
        return len(self._live)

    def live(self) -> list[Slot]:
        return [self.slots[i] for i in self._live]

    def parked(self) -> list[Slot]:
        """Released slots with known tokens, least recently used first."""
        return [self.slots[i] for i in self._parked]

    def warm(self) -> list[Slot]:
        """Released slots with memory that is of no worth to anybody, least recently released first."""
        return [self.slots[i] for i in self._warm]

    def for_new(self, num_tokens: int) -> Slot:
        """The free slot that suits a sequence of `num_tokens` of its own best: the smallest warm one that holds it,
        else the largest warm one, which leaves the least to map, else a cold one, else the parked one that was not
        used for longest. There must be a free one.
        """
        warm = {i: n for i in self._warm if (n := self.slots[i].num_warm_tokens)}
        if warm:
            holding = [(n, i) for i, n in warm.items() if n >= num_tokens]
            return self.slots[min(holding)[1] if holding else max(warm, key=lambda i: warm[i])]
        return self.slots[next(i for shelf in (reversed(self._cold), self._warm, self._parked) for i in shelf)]

    def for_shared(self, source: Slot) -> Slot | None:
        """The free slot to hold pages of `source` beside it: one where the least is lost. None if there is none."""
        free = (reversed(self._cold), self._warm, self._parked)
        return next((self.slots[i] for shelf in free for i in shelf if i != source.index), None)

    def take(self, slot: Slot) -> None:
        """A sequence begins in a free slot, with what the slot holds."""
        self._take_off(slot)
        slot.live = True
        slot.tenancy += 1
        self.touch(slot)
        self._live[slot.index] = None

    def release(self, slot: Slot) -> None:
        """The slot's sequence has ended."""
        slot.live = False
        slot.num_tokens = slot.start = 0
        self.touch(slot)
        self.file(slot)

    def touch(self, slot: Slot) -> None:
        """The slot is used now."""
        slot.used = next(self._clock)
        if slot.index in self._parked:
            del self._parked[slot.index]
            self._parked[slot.index] = None

    def file(self, slot: Slot) -> None:
        """Put a free slot where it belongs now, after its tokens or its memory changed."""
        shelf = self._parked if slot.tokens else self._warm if slot.mapped else self._cold
        if slot.index not in shelf:
            self._take_off(slot)
            shelf[slot.index] = None

    def _take_off(self, slot: Slot) -> None:
        for shelf in (self._live, self._parked, self._warm, self._cold):
            shelf.pop(slot.index, None)
