"""Keys and values that are copied into a slot: they are there, and nobody takes them for more than they are."""

from __future__ import annotations

from tests.kv.contents import PROMPT, WINDOW, compute, holds
from vattention.kv.virtual import VirtualManager


def test_runs_are_all_that_a_slot_has_to_give(cache: VirtualManager) -> None:
    slot = cache.take(PROMPT).slot
    compute(cache, slot, PROMPT, 0)
    runs = cache.runs(slot, 41)
    size = sum(min(41, WINDOW - 1 if g.window else 41) * g.token_nbytes for g in cache._layout.groups)
    assert sum(len(run) for run in runs) == size
    assert len(runs) == sum(len(group.planes) for group in cache._layout.groups)
    swapped = [run.clone() for run in runs]
    other = cache.take([]).slot
    cache.ensure(other, 41, 41)
    for run, content in zip(cache.runs(other, 41), swapped, strict=True):
        run.copy_(content)
    holds(cache, other, PROMPT)


def test_a_restored_sequence_can_begin_anew(cache: VirtualManager) -> None:
    slot = cache.take(()).slot
    cache.ensure(slot, WINDOW, WINDOW)
    cache.trim(slot, 0)
    compute(cache, slot, PROMPT[:1], 0)
    holds(cache, slot, PROMPT[:1])
    for group in cache._layout.groups:
        assert len(cache._backing.region.missing(group.pages(slot, 0, 1))) == 0


def test_a_restored_sequence_keeps_no_page_that_its_windows_have_left(cache: VirtualManager) -> None:
    """It begins inside a page: that page goes when the next begins, not a page's tokens later."""
    slot = cache.take(()).slot
    cache.ensure(slot, 8, 8)
    for start in range(8, 16):
        cache.ensure(slot, start, start + 1)
        cache.drop_warm()
        accounts = cache.accounts()
        assert accounts.mapped_nbytes == accounts.live_nbytes


def test_a_restored_sequence_serves_no_prefix_that_its_windows_never_held(cache: VirtualManager) -> None:
    warm = cache.take([9]).slot
    cache.ensure(warm, 0, 41)
    cache.release(warm)
    slot = cache.take(()).slot
    assert slot == warm
    cache.ensure(slot, 41, 41)
    cache.release(slot, PROMPT)
    assert cache.take([*PROMPT[:30], 5]).num_cached_tokens == 0
    assert cache.take([*PROMPT, 5]).num_cached_tokens == 41


def test_what_is_copied_into_a_slot_reaches_no_other(cache: VirtualManager) -> None:
    first = cache.take(PROMPT).slot
    compute(cache, first, PROMPT, 0)
    second = cache.take([*PROMPT, 1]).slot
    cache.ensure(second, 60, 60)
    for run in cache.runs(second, 60):
        run.fill_(0)
    holds(cache, first, PROMPT)
