"""Which blocks a sequence holds: as it grows, as windows pass them, and as it shares them with others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.kv.managers import MAX_LEN, PAGE, SPECS, check, grow, meaning, paged, rows
from vattention.core import AttentionSpec
from vattention.errors import OutOfMemoryError
from vattention.kv.block_supply import GROWTH
from vattention.kv.paged import PagedManager
from vattention.memory import open_driver


@pytest.fixture(params=["cpu", "meta"])
def cache(request: pytest.FixtureRequest) -> Iterator[PagedManager]:
    made = paged(open_driver(request.param, PAGE), caching=True)
    yield made
    made.close()


def test_a_decode_step_adds_a_block_only_where_one_begins(cache: PagedManager) -> None:
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 1)
    full = cache._groups[0].pool
    for token in range(1, 12):
        cache.ensure(slot, token, token + 1)
        assert full.num_live == token // 4 + 1


def test_blocks_behind_the_window_are_free_or_cached(cache: PagedManager) -> None:
    windowed = cache._groups[1]
    assert windowed.layers.window == 6
    prompt = list(range(16))
    slot = cache.take(prompt).slot
    cache.ensure(slot, 0, 16)
    cache.computed(slot, 16)
    for token in range(16, 40):
        cache.ensure(slot, token, token + 1)
        # All that a query at the beginning of the token's block reads, for a hit there.
        assert windowed.pool.num_live == token // 4 - max(0, token // 4 * 4 - 5) // 4 + 1
    assert windowed.pool.num_idle == 4
    assert windowed.pool.num_used <= 4 + 3 + GROWTH


def test_a_fork_shares_blocks_until_one_writes() -> None:
    cache = paged()
    tokens = list(range(10))
    parent = cache.take(tokens).slot
    grow(cache, parent, tokens, 0)
    before = cache.accounts()
    forks = [cache.fork(parent, 10) for _ in range(2)]
    shared = cache.accounts()
    assert shared.live_nbytes == before.live_nbytes
    # The window's query at token 10 reads from token 5 on: two blocks.
    full, windowed = (group.memory.block_nbytes for group in cache._groups)
    assert shared.shared_nbytes == 2 * (3 * full + 2 * windowed)
    for last, slot in enumerate((parent, *forks)):
        grow(cache, slot, [*tokens, last], 10)
    # Tokens 0 to 7 together, of which the window needs one block, and a block of its own each.
    assert cache.accounts().live_nbytes == (2 + 3) * full + (1 + 3) * windowed
    assert cache.accounts().shared_nbytes == 2 * (2 * full + windowed)
    for last, slot in enumerate((parent, *forks)):
        check(cache, slot, meaning([*tokens, last]))
    cache.close()


def test_copy_on_write_is_all_or_nothing() -> None:
    cache = paged()
    tokens = list(range(10))
    parent = cache.take(tokens).slot
    grow(cache, parent, tokens, 0)
    fork = cache.fork(parent, 10)
    cache.drop_warm()
    cache.set_limit(cache.accounts().mapped_nbytes)
    with pytest.raises(OutOfMemoryError, match="kv_memory"):
        cache.ensure(fork, 10, 11)
    check(cache, fork, meaning(tokens))
    assert cache.accounts().shared_nbytes > 0
    cache.release(parent)
    grow(cache, fork, [*tokens, 5], 10)
    check(cache, fork, meaning([*tokens, 5]))
    cache.close()


def test_one_refused_window_leaves_the_sequence_as_it_was(cache: PagedManager) -> None:
    slot = cache.take([0]).slot
    cache.ensure(slot, 0, 8)
    with pytest.raises(ValueError, match="cannot hold 65 tokens"):
        cache.ensure(slot, 8, MAX_LEN + 1)
    for token in range(8, 40):
        cache.ensure(slot, token, token + 1)
    with pytest.raises(ValueError, match="cannot go back to 20 tokens"):
        cache.trim(slot, 20)
    with pytest.raises(ValueError, match="cannot go back to 20 tokens"):
        cache.fork(slot, 20)
    with pytest.raises(ValueError, match="has 40 tokens, not 41"):
        cache.fork(slot, 41)
    assert cache.num_free_slots == cache.num_slots - 1
    with pytest.raises(ValueError, match="belongs to no sequence"):
        cache.ensure(slot + 1 if slot == 0 else 0, 0, 1)


def test_keys_and_values_of_different_sizes() -> None:
    specs = [AttentionSpec(2, 3, 80, 48, 1.0), AttentionSpec(2, 1, 64, 64, 1.0, window=5), *SPECS]
    cache = paged(specs=specs, block_size=7)
    tokens = list(range(50))
    slot, other = cache.take(tokens).slot, cache.take(tokens).slot
    for start in range(0, 50, 5):
        for which in (slot, other):
            grow(cache, which, tokens[: start + 5], start, specs=specs)
    check(cache, slot, meaning(tokens), specs)
    keys, values = rows(cache.layer(0), other, 0, 50)
    assert keys.shape == (50, 3, 80)
    assert values.shape == (50, 3, 48)
    cache.close()
