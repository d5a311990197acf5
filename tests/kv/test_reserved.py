"""Reservation up front: how much each variant takes, and what the buddy allocator makes of it."""

from __future__ import annotations

import pytest

from tests.kv.managers import MAX_LEN, PAGE, check, grow, meaning, reserved
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.kv.reserved import ReservedManager
from vattention.memory import open_driver
from vattention.memory.null import NullDriver


def bookkeeping(reservation: str, num_tokens: int) -> ReservedManager:
    """A manager without memory, with a limit of so many tokens."""
    driver = NullDriver(PAGE)
    made = reserved(driver, reservation=reservation)
    made.set_limit(num_tokens * made._layout.token_nbytes)
    return made


def live_tokens(cache: ReservedManager) -> float:
    return cache.accounts().live_nbytes / cache._layout.token_nbytes


@pytest.mark.parametrize(
    ("reservation", "prompt", "final", "tokens"),
    [
        ("max", 3, 5, MAX_LEN),
        ("max", 3, None, MAX_LEN),
        ("pow2", 7, 7 + 25, 64),  # 32 for the output, and 39 in all are a range of 64
        ("pow2", 3, 8, 16),
        ("oracle", 7, 32, 32),
        ("oracle", 7, 33, 64),
        ("oracle", 7, None, MAX_LEN),
        ("oracle", 7, 1000, MAX_LEN),
    ],
)
def test_each_variant_takes_what_the_paper_says(
    reservation: str, prompt: int, final: int | None, tokens: int
) -> None:
    cache = bookkeeping(reservation, 200)
    slot = cache.take([0] * prompt, max_tokens=final).slot
    assert live_tokens(cache) == tokens
    cache.ensure(slot, 0, prompt)
    assert live_tokens(cache) == tokens
    assert cache.accounts().token_nbytes < cache.accounts().live_nbytes
    cache.release(slot)
    assert live_tokens(cache) == 0


def test_an_unknown_variant_is_refused() -> None:
    with pytest.raises(ConfigError, match="there are max, pow2, oracle"):
        reserved(NullDriver(PAGE), reservation="half")


def test_free_memory_in_pieces_is_of_no_use() -> None:
    cache = bookkeeping("oracle", 64)
    slots = [cache.take([0], max_tokens=16).slot for _ in range(4)]
    assert live_tokens(cache) == 64
    for slot in (slots[0], slots[2]):
        cache.release(slot)
    assert live_tokens(cache) == 32
    assert cache.has_room(16)
    assert not cache.has_room(17)
    with pytest.raises(OutOfMemoryError, match=r"32 tokens in one piece .* kv_memory"):
        cache.take([0], max_tokens=17)
    assert cache.num_free_slots == 2
    cache.release(slots[1])
    cache.take([0], max_tokens=17)


def test_growing_beyond_the_reservation_is_the_callers_mistake() -> None:
    cache = bookkeeping("oracle", 64)
    slot = cache.take([0], max_tokens=16).slot
    cache.ensure(slot, 0, 16)
    with pytest.raises(ValueError, match="memory for 16 tokens, not for 17"):
        cache.ensure(slot, 16, 17)


def test_windows_are_reserved_like_everything() -> None:
    cache = reserved(reservation="oracle")
    tokens = list(range(32))
    slot = cache.take(tokens, max_tokens=32).slot
    grow(cache, slot, tokens, 0)
    mapped = cache.accounts().mapped_nbytes
    assert mapped == 32 * cache._layout.token_nbytes
    for end in range(30, 33):
        grow(cache, slot, tokens[:end], end - 1)
    assert cache.accounts().mapped_nbytes == mapped
    cache.trim(slot, 3)
    check(cache, slot, meaning(tokens[:3]))
    cache.close()


def test_a_fork_is_a_copy_with_a_reservation_of_its_own() -> None:
    cache = reserved(reservation="oracle")
    tokens = list(range(10))
    slot = cache.take(tokens, max_tokens=16).slot
    grow(cache, slot, tokens, 0)
    live = cache.accounts().live_nbytes
    fork = cache.fork(slot, 9)
    assert cache.accounts().live_nbytes == 2 * live
    assert cache.accounts().shared_nbytes == 0
    check(cache, fork, meaning(tokens[:9]))
    with pytest.raises(ValueError, match="has 10 tokens, not 11"):
        cache.fork(slot, 11)
    cache.set_limit(cache.accounts().mapped_nbytes)
    with pytest.raises(OutOfMemoryError):
        cache.fork(slot, 9)
    cache.close()


def test_a_falling_limit_takes_room_and_gives_it_back() -> None:
    cache = bookkeeping("oracle", 64)
    slots = [cache.take([0], max_tokens=32).slot for _ in range(2)]
    nbytes = cache._layout.token_nbytes
    cache.set_limit(32 * nbytes)
    assert cache.excess_nbytes == 32 * nbytes
    cache.release(slots[1])
    assert cache.excess_nbytes == 0
    assert not cache.has_room(1)
    cache.set_limit(64 * nbytes)
    assert cache.has_room(32)


def test_a_limit_that_follows_the_machine() -> None:
    driver = NullDriver(PAGE, total_nbytes=100 * PAGE)
    cache = reserved(driver, limit_nbytes=None, reservation="oracle")
    tokens = 100 * PAGE // cache._layout.token_nbytes
    assert cache.fits(16)
    assert not cache.fits(tokens + 1)
    driver._total_nbytes = 10 * PAGE
    cache.refresh_limit()
    assert not cache.fits(16)


@pytest.mark.parametrize("method", METHODS)
def test_a_failing_driver_loses_nothing(method: str) -> None:
    driver = FaultyDriver(open_driver("cpu", PAGE))
    cache = reserved(driver, reservation="oracle")
    tokens = list(range(16))
    slot = cache.take(tokens, max_tokens=16).slot
    grow(cache, slot, tokens, 0)
    driver.fail(method, 1)
    try:
        other = cache.take(tokens, max_tokens=32).slot
    except DriverError:
        assert cache.num_free_slots == 3
        assert live_tokens(cache) == 16
        driver.heal()
        other = cache.take(tokens, max_tokens=32).slot
    driver.fail(method, 1)
    cache.release(other)
    cache.drop_warm()
    driver.heal()
    check(cache, slot, meaning(tokens))
    cache.release(slot)
    cache.drop_warm()
    assert cache.accounts().mapped_nbytes == 0
    cache.close()
