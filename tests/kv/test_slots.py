from __future__ import annotations

from vattention.kv.slots import Slot, SlotTable


def taken(table: SlotTable, num_tokens: int) -> Slot:
    slot = table.for_new(num_tokens)
    table.take(slot)
    return slot


def released(table: SlotTable, *lengths: int, tokens: tuple[int, ...] = ()) -> list[Slot]:
    """Take as many slots at once, give them extents of these lengths, release them in order."""
    slots = [taken(table, 1) for _ in lengths]
    for slot, length in zip(slots, lengths, strict=True):
        slot.extents[0].last = length
        slot.tokens = tokens
    for slot in slots:
        table.release(slot)
    return slots


def test_best_fit_takes_the_smallest_warm_slot_that_holds_the_sequence() -> None:
    table = SlotTable.of(4, 1)
    large, small, fitting = released(table, 100, 10, 40)
    assert taken(table, 30) is fitting
    assert taken(table, 30) is large
    assert taken(table, 30) is small


def test_nothing_holds_it_then_the_largest_leaves_the_least_to_map() -> None:
    table = SlotTable.of(4, 1)
    _, large = released(table, 10, 50)
    assert taken(table, 80) is large


def test_cold_slots_come_after_warm_ones() -> None:
    table = SlotTable.of(2, 1)
    (warm,) = released(table, 10)
    assert taken(table, 5) is warm
    assert not taken(table, 5).mapped
    assert table.num_live == 2


def test_a_parked_slot_goes_last_and_the_least_recently_used_first() -> None:
    table = SlotTable.of(4, 1)
    first, second, third = released(table, 10, 10, 10, tokens=(1, 2, 3))
    assert table.warm() == []
    assert not taken(table, 5).mapped
    table.touch(first)
    assert table.parked() == [second, third, first]
    assert taken(table, 5) is second
    assert table.for_shared(third) is first
    table.take(first)
    assert table.for_shared(third) is None


def test_pages_are_shared_where_the_least_is_lost() -> None:
    table = SlotTable.of(3, 1)
    (parked,) = released(table, 10, tokens=(1, 2, 3))
    warm = taken(table, 1)
    warm.extents[0].last = 5
    table.release(warm)
    cold = table.for_shared(parked)
    assert cold is not None
    assert not cold.mapped
    table.take(cold)
    assert table.for_shared(parked) is warm


def test_a_slot_without_memory_is_cold_when_released() -> None:
    table = SlotTable.of(1, 1)
    released(table, 0)
    assert table.warm() == []
    assert table.num_live == 0


def test_a_slot_is_filed_anew_when_it_loses_tokens_or_memory() -> None:
    table = SlotTable.of(1, 1)
    (slot,) = released(table, 5, tokens=(1, 2, 3))
    assert table.parked() == [slot]
    slot.tokens = ()
    table.file(slot)
    assert (table.parked(), table.warm()) == ([], [slot])
    slot.extents[0].last = 0
    table.file(slot)
    assert (table.parked(), table.warm()) == ([], [])


def test_tenancy_changes_with_the_owner() -> None:
    table = SlotTable.of(1, 1)
    (slot,) = released(table, 5)
    before = slot.tenancy
    table.take(slot)
    assert slot.tenancy == before + 1


def test_memory_counts_as_warm_only_where_every_group_has_it_from_token_0() -> None:
    slot = SlotTable.of(1, 2).slots[0]
    slot.extents[0].last = 40
    assert slot.num_warm_tokens == 0
    slot.extents[1].last = 8
    assert slot.num_warm_tokens == 8
    slot.extents[1].first = 4
    assert slot.num_warm_tokens == 0
