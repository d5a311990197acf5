"""Buddy allocation against a model of which units are taken."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vattention.kv.buddy import BuddyAllocator, size_of


def test_sizes_are_powers_of_two() -> None:
    assert [size_of(n) for n in (1, 2, 3, 4, 5, 8, 9)] == [1, 2, 4, 4, 8, 8, 16]


def test_ranges_split_and_merge() -> None:
    buddy = BuddyAllocator(16)
    assert [buddy.allocate(n) for n in (3, 5, 4)] == [0, 8, 4]
    assert buddy.num_allocated == 16
    assert buddy.allocate(1) is None
    buddy.free(0)
    assert not buddy.has_room(5)
    buddy.free(4)
    assert buddy.has_room(8)
    buddy.free(8)
    assert buddy.allocate(16) == 0


def test_free_space_in_pieces_is_no_room() -> None:
    buddy = BuddyAllocator(8)
    starts = [buddy.allocate(2) for _ in range(4)]
    for start in starts[::2]:
        assert start is not None
        buddy.free(start)
    assert buddy.num_allocated == 4
    assert not buddy.has_room(3)
    assert buddy.fits(8)
    assert not buddy.fits(9)


def test_a_capacity_that_is_no_power_of_two() -> None:
    buddy = BuddyAllocator(13)
    assert [buddy.allocate(n) for n in (8, 4, 1)] == [0, 8, 12]
    assert buddy.allocate(1) is None
    assert not BuddyAllocator(0).has_room(1)


def test_ranges_beyond_a_fallen_capacity_are_lost_when_freed() -> None:
    buddy = BuddyAllocator(16)
    assert [buddy.allocate(8), buddy.allocate(8)] == [0, 8]
    buddy.resize(10)
    buddy.free(8)
    assert buddy.allocate(4) is None
    assert buddy.allocate(2) == 8
    buddy.resize(16)
    assert buddy.allocate(4) == 12
    with pytest.raises(ValueError, match="no range begins at unit 1"):
        buddy.free(1)


actions = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), st.integers(1, 24)),
        st.tuples(st.just("free"), st.integers(0, 30)),
        st.tuples(st.just("resize"), st.integers(0, 70)),
    ),
    max_size=40,
)


@given(st.integers(0, 70), actions)
@settings(deadline=None)
def test_histories(capacity: int, history: list[tuple[str, int]]) -> None:
    buddy = BuddyAllocator(capacity)
    taken: dict[int, int] = {}
    for action, number in history:
        if action == "allocate":
            size = size_of(number)
            units = {unit for start, count in taken.items() for unit in range(start, start + count)}
            places = [
                start
                for start in range(0, capacity - size + 1, size)
                if not units & set(range(start, start + size))
            ]
            assert buddy.has_room(number) == bool(places)
            start = buddy.allocate(number)
            assert (start is not None) == bool(places)
            if start is not None:
                assert start in places
                taken[start] = size
        elif action == "free" and taken:
            start = sorted(taken)[number % len(taken)]
            buddy.free(start)
            del taken[start]
        elif action == "resize":
            capacity = number
            buddy.resize(capacity)
        assert buddy.num_allocated == sum(taken.values())
        assert all(buddy.fits(n) == (size_of(n) <= capacity) for n in (1, 5, 33))
