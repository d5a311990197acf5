"""The virtual manager over real memory and over bookkeeping, against a model of what each slot holds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from vattention.core import AttentionSpec
from vattention.errors import OutOfMemoryError
from vattention.kv.layout import plan
from vattention.kv.virtual import VirtualManager
from vattention.memory import open_driver

PAGE = 4096
WINDOW = 6
NUM_SLOTS = 4
MAX_LEN = 64
SPECS = [
    AttentionSpec(2, 1, 256, 256, 1.0),  # 1 KiB per token and plane in float32: 4 tokens a page
    AttentionSpec(2, 1, 256, 256, 1.0, window=WINDOW),
    AttentionSpec(2, 1, 256, 128, 1.0),
]


def manager(
    device: str = "cpu", *, sliced: bool = False, limit_nbytes: int = 100 * PAGE, background: bool = False
) -> VirtualManager:
    driver = open_driver(device, PAGE)
    layout = plan(
        SPECS, item_nbytes=4, num_slots=NUM_SLOTS, max_len=MAX_LEN, page_nbytes=driver.page_nbytes, sliced=sliced
    )
    return VirtualManager(driver, layout, dtype=torch.float32, limit_nbytes=limit_nbytes, background=background)


@pytest.fixture(params=[("cpu", False), ("cpu", True), ("meta", False)], ids=["host", "host-sliced", "null"])
def cache(request: pytest.FixtureRequest) -> Iterator[VirtualManager]:
    device, sliced = request.param
    made = manager(device, sliced=sliced)
    yield made
    made.close()


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, grow, shrink and go under a changing limit; what they wrote must stay."""

    slots = Bundle("slots")

    @initialize(sliced=st.booleans(), background=st.booleans())
    def reserve(self, sliced: bool, background: bool) -> None:
        self.cache = manager(sliced=sliced, background=background)
        self.lengths: dict[int, int] = {}
        self.stamps: dict[int, list[float]] = {}
        self.next_stamp = 1.0

    @rule(target=slots, length=st.integers(1, MAX_LEN))
    def take(self, length: int) -> object:
        if self.cache.num_free_slots == 0:
            with pytest.raises(OutOfMemoryError):
                self.cache.take([0] * length)
            return multiple()
        slot = self.cache.take([0] * length).slot
        assert slot not in self.lengths
        self.lengths[slot], self.stamps[slot] = 0, []
        return slot

    @rule(slot=slots, count=st.integers(1, 20))
    def grow(self, slot: int, count: int) -> None:
        start = self.lengths[slot]
        end = min(start + count, self.cache.max_len)
        if end == start:
            return
        try:
            self.cache.ensure(slot, start, end)
        except OutOfMemoryError:
            return
        stamps = [self.next_stamp + i for i in range(end - start)]
        self.next_stamp += len(stamps)
        where = torch.full((end - start,), slot), torch.arange(start, end)
        for layer, spec in enumerate(SPECS):
            values = torch.tensor(stamps)[:, None, None] + layer / 8
            self.cache.layer(layer).append(
                values.expand(-1, 1, spec.key_dim), -values.expand(-1, 1, spec.value_dim), *where
            )
        self.lengths[slot] = end
        self.stamps[slot] += stamps

    @rule(slot=slots, ahead=st.integers(1, 12))
    def prefetch(self, slot: int, ahead: int) -> None:
        start = self.lengths[slot]
        self.cache.prefetch([(slot, start, min(start + ahead, self.cache.max_len))])

    @rule(slot=slots, drop=st.integers(1, 3))
    def trim(self, slot: int, drop: int) -> None:
        length = max(self.lengths[slot] - drop, 0)
        try:
            self.cache.trim(slot, length)
        except ValueError:
            assert self.lengths[slot] > WINDOW
            return
        self.lengths[slot] = length
        del self.stamps[slot][length:]

    @rule(slot=consumes(slots))
    def release(self, slot: int) -> None:
        self.cache.release(slot)
        del self.lengths[slot], self.stamps[slot]

    @rule(pages=st.integers(10, 150))
    def set_limit(self, pages: int) -> None:
        self.cache.set_limit(pages * PAGE)

    @rule()
    def drop_warm(self) -> None:
        self.cache.drop_warm()
        if not self.lengths:
            assert self.cache.accounts().mapped_nbytes == 0

    @invariant()
    def contents_stay(self) -> None:
        for slot, stamps in self.stamps.items():
            length = self.lengths[slot]
            for layer, spec in enumerate(SPECS):
                first = 0 if spec.window is None else max(0, length - spec.window + 1)
                view = self.cache.layer(layer)
                expected = torch.tensor(stamps[first:length]) + layer / 8
                assert torch.equal(view.keys[slot, first:length, 0, -1], expected)
                assert torch.equal(view.values[slot, first:length, 0, 0], -expected)

    @invariant()
    def accounts_add_up(self) -> None:
        accounts = self.cache.accounts()
        assert accounts.token_nbytes <= accounts.live_nbytes <= accounts.mapped_nbytes
        assert accounts.live_nbytes + accounts.warm_nbytes == accounts.mapped_nbytes
        assert accounts.mapped_nbytes <= accounts.limit_nbytes + self.cache.excess_nbytes
        assert accounts.shared_nbytes == 0

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for slot in list(self.lengths):
                self.cache.release(slot)
            self.cache.drop_warm()
            assert self.cache.accounts().mapped_nbytes == 0
            self.cache.close()


TestCacheMachine = CacheMachine.TestCase
TestCacheMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_growth_maps_only_what_the_tokens_need(cache: VirtualManager) -> None:
    slot = cache.take([0]).slot
    start = 0
    for end in (1, 2, 5, 6, 9):
        cache.ensure(slot, start, end)
        accounts = cache.accounts()
        pages = 0
        for group in cache._layout.groups:
            first = group.first_needed(start) // group.step * group.step
            pages += group.num_pages(first, -(-end // group.step) * group.step)
        assert accounts.mapped_nbytes <= pages * PAGE
        assert accounts.token_nbytes <= accounts.live_nbytes <= accounts.mapped_nbytes
        start = end


def test_windowed_layers_give_back_what_lies_behind(cache: VirtualManager) -> None:
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 8)
    for token in range(8, 60):
        cache.ensure(slot, token, token + 1)
    windowed = cache._layout.groups[1]
    assert windowed.window == WINDOW
    mapped = windowed.pages(slot, 0, MAX_LEN)
    mapped = mapped[cache._backing.region.pages(mapped) != 0]
    assert len(mapped) <= windowed.num_pages(53 - windowed.step, 60) + len(windowed.planes)


def test_shortage_leaves_the_slot_as_it_was(cache: VirtualManager) -> None:
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 4)
    before = cache.accounts()
    cache.set_limit(before.mapped_nbytes)
    with pytest.raises(OutOfMemoryError, match="kv_memory"):
        cache.ensure(slot, 4, 40)
    assert cache.accounts().mapped_nbytes == before.mapped_nbytes
    cache.set_limit(1000 * PAGE)
    cache.ensure(slot, 4, 40)


def test_released_memory_stays_warm_until_somebody_needs_it(cache: VirtualManager) -> None:
    first = cache.take([0]).slot
    cache.ensure(first, 0, 5)
    mapped = cache.accounts().mapped_nbytes
    cache.release(first)
    assert cache.accounts().warm_nbytes == mapped
    again = cache.take([0] * 5).slot
    assert again == first
    cache.ensure(again, 0, 5)
    assert cache.accounts().mapped_nbytes == mapped
    cache.release(again)

    slots = [cache.take([0]).slot for _ in range(2)]
    cache.set_limit(mapped)
    cold = next(slot for slot in slots if slot != first)
    cache.release(first)
    cache.ensure(cold, 0, 5)
    assert cache.accounts().mapped_nbytes == mapped
    assert cache.accounts().warm_nbytes == 0


def test_a_falling_limit_takes_warm_memory_and_reports_the_excess(cache: VirtualManager) -> None:
    kept, gone = cache.take([0]).slot, cache.take([0]).slot
    cache.ensure(kept, 0, 10)
    live = cache.accounts().mapped_nbytes
    cache.ensure(gone, 0, 10)
    cache.release(gone)
    cache.set_limit(live - PAGE)
    assert cache.accounts().mapped_nbytes == live
    assert cache.excess_nbytes == PAGE
    cache.release(kept)
    assert cache.excess_nbytes == 0


def test_room_counts_warm_memory_as_free(cache: VirtualManager) -> None:
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 32)
    cache.set_limit(cache.accounts().mapped_nbytes)
    assert not cache.has_room(1)
    cache.release(slot)
    assert cache.has_room(32)
    assert not cache.has_room(64)
    assert cache.fits(32)
    assert not cache.fits(64)
    assert not cache.fits(cache.max_len + 1)


def test_the_mapper_maps_ahead_and_not_for_a_later_owner() -> None:
    cache = manager(background=True)
    try:
        slot = cache.take([0]).slot
        cache.ensure(slot, 0, 4)
        before = cache.accounts().mapped_nbytes
        cache.prefetch([(slot, 4, 12)])
        assert cache._mapper is not None
        cache._mapper.wait_idle()
        ahead = cache.accounts().mapped_nbytes
        assert ahead > before
        cache.ensure(slot, 4, 12)
        assert cache.accounts().mapped_nbytes == ahead
        tenancy = cache._table.slots[slot].tenancy
        cache.release(slot)
        cache.drop_warm()
        cache._map_ahead(slot, 12, 20, tenancy)
        assert cache.accounts().mapped_nbytes == 0
    finally:
        cache.close()


def test_the_mapper_sleeps_where_everything_is_mapped() -> None:
    cache = manager(background=True)
    asked: list[tuple[int, ...]] = []
    try:
        slots = [cache.take([0]).slot for _ in range(2)]
        for slot in slots:
            cache.ensure(slot, 0, 4)
        assert cache._mapper is not None
        cache._mapper._provide = lambda *want: asked.append(want)
        cache.prefetch([(slot, 3, 4) for slot in slots])
        cache._mapper.wait_idle()
        assert asked == []
        cache.prefetch([(slots[0], 3, 4), (slots[1], 4, 40)])
        cache._mapper.wait_idle()
        assert [want[:3] for want in asked] == [(slots[1], 4, 40)]
    finally:
        cache.close()


def test_the_mapper_reports_a_broken_driver_at_the_next_call() -> None:
    cache = manager(background=True)

    def broken(*_: object) -> None:
        raise RuntimeError("broken")

    try:
        slot = cache.take([0]).slot
        assert cache._mapper is not None
        cache._mapper._provide = broken
        cache.prefetch([(slot, 0, 4)])
        cache._mapper.wait_idle()
        with pytest.raises(RuntimeError, match="broken"):
            cache.prefetch([(slot, 0, 4)])
    finally:
        cache.close()


def test_slots_without_an_owner_are_refused(cache: VirtualManager) -> None:
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.ensure(0, 0, 1)
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.release(0)
