from __future__ import annotations

from vattention.kv.slots import Slot, SlotTable


def released(table: SlotTable, *lengths: int) -> list[Slot]:
    """Take as many slots at once, give them extents of these lengths, release them in order."""
    slots = [table.take(1) for _ in lengths]
    kept = [slot for slot in slots if slot is not None]
    for slot, length in zip(kept, lengths, strict=True):
        slot.extents[0].last = length
    for slot in kept:
        table.release(slot)
    return kept


def test_best_fit_takes_the_smallest_warm_slot_that_holds_the_sequence() -> None:
    table = SlotTable.of(4, 1)
    large, small, fitting = released(table, 100, 10, 40)
    assert table.take(30) is fitting
    assert table.take(30) is large
    assert table.take(30) is small


def test_nothing_holds_it_then_the_largest_leaves_the_least_to_map() -> None:
    table = SlotTable.of(4, 1)
    _, large = released(table, 10, 50)
    assert table.take(80) is large


def test_cold_slots_come_last_and_none_when_all_are_live() -> None:
    table = SlotTable.of(2, 1)
    (warm,) = released(table, 10)
    assert table.take(5) is warm
    cold = table.take(5)
    assert cold is not None
    assert not cold.mapped
    assert table.take(5) is None


def test_a_slot_without_memory_is_cold_when_released() -> None:
    table = SlotTable.of(1, 1)
    released(table, 0)
    assert table.warm() == []
    assert table.num_free == 1


def test_tenancy_changes_with_the_owner() -> None:
    table = SlotTable.of(1, 1)
    (slot,) = released(table, 5)
    before = slot.tenancy
    table.take(1)
    assert slot.tenancy == before + 1


def test_memory_counts_as_warm_only_where_every_group_has_it_from_token_0() -> None:
    slot = SlotTable.of(1, 2).slots[0]
    slot.extents[0].last = 40
    assert slot.num_warm_tokens == 0
    slot.extents[1].last = 8
    assert slot.num_warm_tokens == 8
    slot.extents[1].first = 4
    assert slot.num_warm_tokens == 0
