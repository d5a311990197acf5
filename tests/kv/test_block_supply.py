"""Memory behind blocks: where it comes from under a limit, and what is lost when drivers fail (nothing)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from tests.kv.managers import MAX_LEN, PAGE, check, grow, meaning, paged
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.paged import PagedManager
from vattention.memory import open_driver
from vattention.memory.null import NullDriver


@pytest.fixture(params=["cpu", "meta"])
def cache(request: pytest.FixtureRequest) -> Iterator[PagedManager]:
    made = paged(open_driver(request.param, PAGE), caching=True)
    yield made
    made.close()


def test_memory_of_the_cache_is_taken_oldest_first(cache: PagedManager) -> None:
    prompts = [list(range(start, start + 16)) for start in (0, 100)]
    for prompt in prompts:
        slot = cache.take(prompt).slot
        cache.ensure(slot, 0, 16)
        cache.computed(slot, 16)
        cache.release(slot)
    cache.set_limit(cache.accounts().mapped_nbytes)
    for group in cache._groups:
        group.pool.claim(group.pool.num_free)
    slot = cache.take([7] * 8).slot
    cache.ensure(slot, 0, 8)
    hits = [cache.take([*prompt, 0]).num_cached_tokens for prompt in prompts]
    assert hits == [8, 16]


def test_one_group_takes_what_another_keeps(cache: PagedManager) -> None:
    prompt = list(range(32))
    slot = cache.take(prompt).slot
    cache.ensure(slot, 0, 32)
    cache.computed(slot, 32)
    cache.release(slot)
    full, windowed = (group.pool for group in cache._groups)
    cache.set_limit(cache.accounts().mapped_nbytes)
    slot = cache.take([99]).slot
    for token in range(40):
        cache.ensure(slot, token, token + 1)
    assert full.num_live == 10
    assert full.num_idle + windowed.num_idle < 16
    assert cache.accounts().mapped_nbytes <= cache.accounts().limit_nbytes


def test_room_counts_cached_blocks_as_free(cache: PagedManager) -> None:
    slot = cache.take(list(range(32))).slot
    cache.ensure(slot, 0, 32)
    cache.computed(slot, 32)
    cache.set_limit(cache.accounts().mapped_nbytes)
    assert not cache.has_room(12)
    cache.release(slot)
    assert cache.has_room(32)
    assert cache.fits(32)
    assert not cache.fits(64)
    assert not cache.fits(MAX_LEN + 1)


def test_a_falling_limit_takes_the_cache_and_reports_the_excess(cache: PagedManager) -> None:
    kept, gone = cache.take(list(range(16))).slot, cache.take(list(range(50, 66))).slot
    for slot in (kept, gone):
        cache.ensure(slot, 0, 16)
        cache.computed(slot, 16)
    cache.release(gone)
    live = cache.accounts().live_nbytes
    cache.set_limit(live - PAGE)
    assert cache.accounts().mapped_nbytes == live
    assert cache.excess_nbytes == PAGE
    cache.release(kept)
    assert cache.excess_nbytes == 0


def test_a_limit_that_follows_the_machine() -> None:
    driver = NullDriver(PAGE, total_nbytes=64 * PAGE)
    cache = paged(driver, limit_nbytes=None)
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 8)
    driver._total_nbytes = 60 * PAGE
    cache.refresh_limit()
    assert cache.accounts().limit_nbytes == 60 * PAGE
    with pytest.raises(OutOfMemoryError):
        cache.ensure(slot, 8, 60)
    cache.close()


def test_what_the_system_refuses_comes_from_the_cache() -> None:
    driver = NullDriver(PAGE, total_nbytes=64 * PAGE)
    cache = paged(driver, limit_nbytes=1000 * PAGE, caching=True)
    slot = cache.take(list(range(32))).slot
    cache.ensure(slot, 0, 32)
    cache.computed(slot, 32)
    cache.release(slot)
    slot = cache.take([99]).slot
    for token in range(40):
        cache.ensure(slot, token, token + 1)
    cache.close()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("half_way", [False, True])
def test_a_failing_driver_loses_nothing(method: str, half_way: bool) -> None:
    driver = FaultyDriver(open_driver("cpu", PAGE))
    cache = paged(driver, caching=True)
    tokens = list(range(8))
    slot = cache.take(tokens).slot
    grow(cache, slot, tokens, 0)
    cache.computed(slot, 8)
    driver.fail(method, 1, half_way=half_way)
    with contextlib.suppress(DriverError):
        cache.ensure(slot, 8, 64)
    driver.fail(method, 1, half_way=half_way)
    cache.drop_warm()
    driver.heal()
    check(cache, slot, meaning(tokens))
    cache.ensure(slot, 8, 64)
    cache.release(slot)
    cache.drop_warm()
    assert cache.accounts().mapped_nbytes == 0
    cache.close()
