"""Memory under pressure: what goes first, and what is still found afterwards."""

from __future__ import annotations

from tests.kv.contents import FULL, MAX_LEN, PAGE, PROMPT, compute, finished, holds, sharing_manager
from vattention.kv.virtual import VirtualManager
from vattention.memory.null import NullDriver


def test_what_lies_behind_a_window_is_warm_and_goes_before_a_request_fails(cache: VirtualManager) -> None:
    tokens = list(range(MAX_LEN))
    slot = cache.take(tokens).slot
    for end in range(4, 89, 4):
        compute(cache, slot, tokens[:end], end - 4)
    windowed = cache._layout.groups[1]
    accounts = cache.accounts()
    assert accounts.warm_nbytes >= windowed.num_pages(0, 76) * PAGE - PAGE
    placement = cache.take([*tokens[:40], 0])
    assert placement.num_cached_tokens == 40
    cache.release(placement.slot)
    cache.set_limit(cache.accounts().live_nbytes)
    assert cache.excess_nbytes == 0
    assert cache.accounts().warm_nbytes == 0
    cache.set_limit(10_000 * PAGE)
    assert cache.take([*tokens[:30], 1]).num_cached_tokens == 0
    holds(cache, slot, tokens[:88])
    placement = cache.take([*tokens[:88], 1])
    assert placement.num_cached_tokens == 88
    holds(cache, placement.slot, tokens[:88])


def test_a_sequence_gives_up_what_lies_behind_its_own_window(cache: VirtualManager) -> None:
    tokens = list(range(MAX_LEN))
    windowed = cache._layout.groups[1]
    cache.set_limit(cache._layout.sequence_nbytes(MAX_LEN) + len(windowed.planes) * PAGE)
    assert cache.fits(MAX_LEN)
    slot = cache.take(tokens).slot
    for end in range(1, MAX_LEN + 1):
        compute(cache, slot, tokens[:end], end - 1)
    holds(cache, slot, tokens)
    cache.set_limit(0)
    cache.ensure(slot, MAX_LEN, MAX_LEN)
    assert cache.accounts().warm_nbytes == 0


def test_worthless_memory_goes_before_cached_and_that_by_last_use(cache: VirtualManager) -> None:
    prompts = [[i, *PROMPT] for i in range(3)]
    for prompt in prompts:
        finished(cache, prompt)
    worthless = cache.take([9]).slot
    cache.ensure(worthless, 0, 41)
    cache.release(worthless)
    # Used again, and parked again.
    finished(cache, prompts[0])
    accounts = cache.accounts()
    cache.set_limit(accounts.mapped_nbytes - PAGE)
    assert not cache._table.warm()
    assert [len(slot.tokens) for slot in cache._table.parked()] == [42, 42, 42]
    cache.set_limit(cache._pool.in_use_nbytes - PAGE)
    first, *others = cache._table.parked()
    assert first.tokens[0] == 1
    assert 16 <= len(first.tokens) < 42
    assert [len(slot.tokens) for slot in others] == [42, 42]
    left = len(first.tokens)
    placement = cache.take(prompts[1])
    assert placement.num_cached_tokens == left
    holds(cache, placement.slot, prompts[1][: placement.num_cached_tokens])


def test_a_cached_prefix_loses_an_eighth_or_what_is_lacking() -> None:
    cache = sharing_manager(NullDriver(PAGE), specs=FULL)
    tokens = list(range(80))
    slot = cache.take(tokens).slot
    cache.ensure(slot, 0, 80)
    cache.release(slot, tokens)
    mapped = cache.accounts().mapped_nbytes
    cache.set_limit(mapped - PAGE)
    assert len(cache._table.slots[slot].tokens) == 70
    cache.set_limit(mapped // 2)
    assert 35 <= len(cache._table.slots[slot].tokens) <= 40
    cache.close()


def test_without_room_beside_a_parked_slot_a_request_takes_its_place(cache: VirtualManager) -> None:
    slot = finished(cache, PROMPT)
    cache.set_limit(cache.accounts().mapped_nbytes)
    placement = cache.take([*PROMPT[:38], 1])
    assert (placement.slot, placement.num_cached_tokens) == (slot, 38)
    compute(cache, slot, [*PROMPT[:38], 1], 38)
    holds(cache, slot, [*PROMPT[:38], 1])


def test_rows_run_out_then_the_least_recently_used_goes(cache: VirtualManager) -> None:
    prompts = [[i, *PROMPT] for i in range(9)]
    for prompt in prompts:
        finished(cache, prompt)
    assert cache.take([*prompts[0], 1]).num_cached_tokens == 0
    assert cache.take([*prompts[8], 1]).num_cached_tokens == 42


def test_forgotten_prefixes_are_not_found(cache: VirtualManager) -> None:
    finished(cache, PROMPT)
    cache.drop_warm()
    assert cache.accounts().mapped_nbytes == 0
    assert cache.take(PROMPT).num_cached_tokens == 0
