"""Prefix hits and forks: which memory slots have in common, and that what each holds is right."""

from __future__ import annotations

import numpy as np
import pytest

from tests.kv.contents import FULL, PAGE, PROMPT, WINDOW, check, compute, finished, holds, sharing_manager, write
from vattention.errors import OutOfMemoryError
from vattention.kv.virtual import VirtualManager
from vattention.memory.host import HostDriver


def test_a_chat_that_goes_on_maps_no_page_it_already_had(cache: VirtualManager) -> None:
    slot = finished(cache, PROMPT)
    groups = cache._layout.groups
    there = np.concatenate([group.pages(slot, 0, len(PROMPT)) for group in groups])
    pages = cache._backing.region.pages(there).tolist()
    mapped = cache.accounts().mapped_nbytes
    turn = [*PROMPT, 1, 2, 3]
    assert cache.take(turn).slot == slot
    assert cache.accounts().mapped_nbytes == mapped
    cache.ensure(slot, len(PROMPT), len(turn))
    write(cache, slot, turn, len(PROMPT))
    new = sum(group.num_pages(0, len(turn)) - group.num_pages(0, len(PROMPT)) for group in groups)
    assert cache.accounts().mapped_nbytes == mapped + new * PAGE
    assert cache._backing.region.pages(there).tolist() == pages
    holds(cache, slot, turn)


def test_two_requests_stand_on_the_same_pages(cache: VirtualManager) -> None:
    first = cache.take(PROMPT).slot
    compute(cache, first, PROMPT, 0)
    alone = cache.accounts()
    other = [*PROMPT[:30], 7, 8, 9]
    placement = cache.take(other)
    assert placement.num_cached_tokens == 30
    assert placement.slot != first
    holds(cache, placement.slot, other[:30])
    compute(cache, placement.slot, other, 30)
    accounts = cache.accounts()
    unshared = alone.mapped_nbytes * 33 // 41
    assert accounts.mapped_nbytes < alone.mapped_nbytes + unshared
    assert accounts.shared_nbytes > 0
    assert accounts.live_nbytes + accounts.warm_nbytes == accounts.mapped_nbytes
    holds(cache, first, PROMPT)
    holds(cache, placement.slot, other)


def test_a_tenant_sees_only_what_its_salt_covers(cache: VirtualManager) -> None:
    finished(cache, PROMPT, "mine")
    assert cache.take([*PROMPT, 1], salt="yours").num_cached_tokens == 0
    placement = cache.take([*PROMPT, 1], salt="mine")
    assert placement.num_cached_tokens == len(PROMPT)
    holds(cache, placement.slot, PROMPT, "mine")


def test_the_last_token_is_always_computed(cache: VirtualManager) -> None:
    slot = finished(cache, PROMPT)
    placement = cache.take(PROMPT)
    assert (placement.slot, placement.num_cached_tokens) == (slot, len(PROMPT) - 1)
    assert cache.take(PROMPT[:20]).num_cached_tokens == 19


def test_tokens_count_as_cached_only_once_they_are_computed(cache: VirtualManager) -> None:
    first = cache.take(PROMPT).slot
    assert cache.take(PROMPT).num_cached_tokens == 0
    assert cache.awaits(PROMPT)
    assert not cache.awaits([*PROMPT[:10], 5])
    assert not cache.awaits(PROMPT, salt="other")
    cache.ensure(first, 0, 20)
    write(cache, first, PROMPT[:20], 0)
    cache.computed(first, 20)
    assert cache.awaits(PROMPT)
    assert not cache.awaits(PROMPT[:22])
    placement = cache.take(PROMPT)
    assert placement.num_cached_tokens == 20
    holds(cache, placement.slot, PROMPT[:20])


def test_nobody_waits_for_a_promise_that_is_kept_or_broken(cache: VirtualManager) -> None:
    first = cache.take(PROMPT).slot
    assert cache.awaits(PROMPT)
    cache.release(first)
    assert not cache.awaits(PROMPT)
    first = cache.take(PROMPT).slot
    assert cache.awaits(PROMPT)
    compute(cache, first, PROMPT, 0)
    assert not cache.awaits(PROMPT)
    assert not cache.awaits([*PROMPT, *range(50)])


def test_release_without_tokens_keeps_what_was_computed(cache: VirtualManager) -> None:
    slot = cache.take(PROMPT).slot
    cache.ensure(slot, 0, 41)
    write(cache, slot, PROMPT, 0)
    cache.computed(slot, 24)
    cache.release(slot)
    placement = cache.take(PROMPT)
    assert placement.num_cached_tokens == 24
    holds(cache, placement.slot, PROMPT[:24])


def test_a_fork_shares_and_then_goes_its_own_way(cache: VirtualManager) -> None:
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    before = cache.accounts().mapped_nbytes
    child = cache.fork(slot, 38)
    assert cache.accounts().mapped_nbytes - before <= len(cache._layout.groups) * 4 * PAGE
    holds(cache, child, PROMPT[:38])
    longer, other = [*PROMPT, *range(20)], [*PROMPT[:38], *range(50, 60)]
    compute(cache, slot, longer, 41)
    compute(cache, child, other, 38)
    holds(cache, slot, longer)
    holds(cache, child, other)
    with pytest.raises(ValueError, match="cannot be forked at 99"):
        cache.fork(slot, 99)


def test_forks_need_no_prefix_cache() -> None:
    cache = sharing_manager(prefix_cache=False, num_rows=4)
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    child = cache.fork(slot, len(PROMPT))
    compute(cache, child, [*PROMPT, 1], 41)
    cache.release(slot, PROMPT)
    check(cache, child, [*PROMPT, 1])
    assert cache.take(PROMPT).num_cached_tokens == 0
    cache.close()


def test_no_write_reaches_a_page_that_another_holds(cache: VirtualManager) -> None:
    """Park, fork, adopt for a shorter prefix, append."""
    slot = finished(cache, PROMPT)
    assert cache.take([*PROMPT, 1]).slot == slot
    child = cache.fork(slot, 40)
    cache.trim(slot, 21)
    other = [*PROMPT[:21], *range(30)]
    compute(cache, slot, other, 21)
    holds(cache, child, PROMPT[:40])
    holds(cache, slot, other)


def test_only_what_a_window_still_reads_is_shared(cache: VirtualManager) -> None:
    first = cache.take(PROMPT).slot
    compute(cache, first, PROMPT, 0)
    slot = cache.take([*PROMPT[:32], 0]).slot
    full, windowed = cache._layout.groups
    assert windowed.window == WINDOW
    regions = cache._backing.region
    assert len(regions.missing(full.pages(slot, 0, 32))) == 0
    assert len(regions.missing(windowed.pages(slot, 32 - WINDOW + 1, 32))) == 0
    behind = windowed.pages_behind(slot, 0, 32 - WINDOW)
    assert len(regions.missing(behind)) == len(behind)


def test_shared_memory_outlives_whoever_had_it_first(cache: VirtualManager) -> None:
    finished(cache, PROMPT)
    other = [*PROMPT[:30], 1]
    slot = cache.take(other).slot
    compute(cache, slot, other, 30)
    cache.drop_warm()
    holds(cache, slot, other)
    placement = cache.take([*PROMPT[:30], 2])
    assert placement.num_cached_tokens == 30
    holds(cache, placement.slot, PROMPT[:30])


def test_where_kernel_mappings_run_out_pages_are_copied() -> None:
    driver = HostDriver(PAGE)
    object.__setattr__(driver.capabilities, "max_mappings", 8)
    cache = sharing_manager(driver)
    first = cache.take(PROMPT).slot
    compute(cache, first, PROMPT, 0)
    other = [*PROMPT[:30], 1]
    slot = cache.take(other).slot
    assert cache.accounts().shared_nbytes == 0
    compute(cache, slot, other, 30)
    check(cache, slot, other)
    check(cache, first, PROMPT)
    cache.close()


def test_what_a_sequence_writes_after_going_back_is_not_taken_for_its_prompt(cache: VirtualManager) -> None:
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    cache.trim(slot, 24)
    compute(cache, slot, [*PROMPT[:24], *range(17)], 24)
    placement = cache.take(PROMPT)
    assert placement.num_cached_tokens == 24
    holds(cache, placement.slot, PROMPT[:24])


def test_accounts_follow_a_slot_that_shares_as_much_with_another_one(cache: VirtualManager) -> None:
    other = [1, *PROMPT]
    finished(cache, other)
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    child = cache.fork(slot, 30)
    assert cache.accounts().shared_nbytes > 0
    cache.release(child, ())
    cache._reclaimer.evict(cache._table.slots[child])
    placement = cache.take([*other[:30], 7])
    assert (placement.slot, placement.num_cached_tokens) == (child, 30)
    assert cache.accounts().shared_nbytes == 0


def test_a_row_is_never_promised_more_than_it_holds(cache: VirtualManager) -> None:
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    with pytest.raises(ValueError, match="holds 41 tokens, not 42"):
        cache.release(slot, [*PROMPT, 1])


def test_there_are_no_more_sequences_than_slots_however_many_rows(cache: VirtualManager) -> None:
    for left in (3, 2, 1, 0):
        slot = cache.take([1]).slot
        assert cache.num_free_slots == left
    with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
        cache.take([1])
    with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
        cache.fork(slot, 0)


def test_a_model_of_one_token_windows() -> None:
    from vattention.core import AttentionSpec

    specs = [FULL[0], AttentionSpec(2, 1, 256, 256, 1.0, window=1)]
    cache = sharing_manager(specs=specs)
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0, specs=specs)
    for length in (30, 32, 41):
        child = cache.fork(slot, length)
        tokens = [*PROMPT[:length], 1]
        compute(cache, child, tokens, length, specs=specs)
        check(cache, child, tokens, specs=specs)
        cache.trim(child, length)
        cache.release(child)
    cache.release(slot)
    cache.drop_warm()
    assert cache.accounts().mapped_nbytes == 0
    cache.close()
