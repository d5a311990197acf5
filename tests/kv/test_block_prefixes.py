"""Blocks that the prefix cache knows: what hits, what only looks as if it did, and who is waited for."""

from __future__ import annotations

import pytest
import torch

from tests.kv.managers import SPECS, check, grow, meaning, paged


def test_a_prefix_is_found_by_whole_blocks_and_never_the_last_token() -> None:
    cache = paged(caching=True)
    prompt = list(range(20))
    first = cache.take(prompt).slot
    grow(cache, first, prompt, 0)
    assert cache.take(prompt).num_cached_tokens == 0
    cache.computed(first, 10)
    assert cache.take(prompt).num_cached_tokens == 8
    cache.computed(first, 20)
    cache.release(first)
    for length, hits in ((20, 16), (21, 20), (17, 16), (16, 12), (4, 0), (5, 4)):
        placement = cache.take([*prompt, 7][:length])
        assert placement.num_cached_tokens == hits
        check(cache, placement.slot, meaning(prompt[:hits]))
        cache.release(placement.slot)
    other = cache.take([*prompt[:9], 99, *prompt[10:]])
    assert other.num_cached_tokens == 8
    cache.release(other.slot)
    assert cache.take(prompt, salt="tenant").num_cached_tokens == 0
    cache.close()


def test_generated_tokens_are_found_after_release() -> None:
    cache = paged(caching=True)
    tokens = list(range(30))
    slot = cache.take(tokens[:10]).slot
    grow(cache, slot, tokens[:10], 0)
    for end in range(11, 31):
        grow(cache, slot, tokens[:end], end - 1)
    cache.release(slot, tokens)
    placement = cache.take([*tokens, 1, 2])
    assert placement.num_cached_tokens == 28
    check(cache, placement.slot, meaning(tokens[:28]))
    cache.close()


def test_a_window_needs_only_its_own_blocks_to_hit() -> None:
    cache = paged(caching=True)
    tokens = list(range(40))
    slot = cache.take(tokens).slot
    grow(cache, slot, tokens, 0)
    cache.computed(slot, 40)
    cache.release(slot)
    full, windowed = (group.pool for group in cache._groups)
    windowed.evict(3)  # tail first: tokens 28 to 39
    placement = cache.take([*tokens, 0])
    assert placement.num_cached_tokens == 28
    check(cache, placement.slot, meaning(tokens[:28]))
    assert windowed.num_live == 2
    assert full.num_live == 7
    cache.close()


def test_whoever_waits_is_told_when_the_prefix_is_there() -> None:
    cache = paged(caching=True)
    prompt = list(range(20))
    assert not cache.awaits(prompt)
    slot = cache.take(prompt).slot
    assert cache.awaits([*prompt[:8], 99, 98])
    assert not cache.awaits(prompt, salt="other")
    assert not cache.awaits([99, *prompt])
    assert not cache.awaits(prompt[:4])  # its only whole block holds its last token
    grow(cache, slot, prompt, 0)
    cache.computed(slot, 8)
    assert not cache.awaits([*prompt[:8], 99, 98])
    assert cache.awaits(prompt)
    cache.release(slot)
    assert not cache.awaits(prompt)
    cache.close()


def test_cached_blocks_are_not_written_to() -> None:
    cache = paged(caching=True)
    tokens = list(range(12))
    slot = cache.take(tokens).slot
    grow(cache, slot, tokens, 0)
    cache.computed(slot, 12)
    cache.trim(slot, 10)
    grow(cache, slot, [*tokens[:10], 77, 78], 10)
    cache.release(slot, [*tokens[:10], 77, 78])
    again, changed = cache.take([*tokens, 0]), cache.take([*tokens[:10], 77, 78, 0])
    assert (again.num_cached_tokens, changed.num_cached_tokens) == (8, 12)
    check(cache, changed.slot, meaning([*tokens[:10], 77, 78]))
    cache.close()


def test_tokens_that_were_not_copied_in_are_not_there() -> None:
    """A window's first block may be held for the sake of a hit, and yet not be among those copied in."""
    cache = paged(caching=True)
    tokens = list(range(17))
    slot = cache.take(tokens).slot
    grow(cache, slot, tokens, 0)
    image = [run.clone() for run in cache.runs(slot, 17)]
    cache.release(slot)
    cache.drop_warm()
    slot = cache.take([]).slot
    cache.ensure(slot, 17, 17)
    for source, target in zip(image, cache.runs(slot, 17), strict=True):
        target.copy_(source)
    with pytest.raises(ValueError, match="begins at token 12"):
        cache.trim(slot, 16)
    with pytest.raises(ValueError, match="begins at token 12"):
        cache.fork(slot, 16)
    fork = cache.fork(slot, 17)
    check(cache, fork, meaning(tokens))
    cache.release(fork, tokens)
    assert cache.take([*tokens, 99]).num_cached_tokens == 0
    grow(cache, slot, [*tokens, 1, 2, 3, 4], 17)
    cache.release(slot, [*tokens, 1, 2, 3, 4])
    placement = cache.take([*tokens, 1, 2, 3, 4, 99])
    assert placement.num_cached_tokens == 20
    check(cache, placement.slot, meaning([*tokens, 1, 2, 3]))
    cache.close()


@pytest.mark.parametrize("forked", [False, True])
def test_a_block_that_lacks_tokens_serves_only_the_hit_that_needs_none_of_them(forked: bool) -> None:
    cache = paged(caching=True)
    tokens = list(range(16))
    slot = cache.take([]).slot
    cache.ensure(slot, 16, 16)
    # The window at token 16 reads from token 11 on: of the block of tokens 8 to 11 just the last was copied in.
    numbers = torch.tensor(meaning(tokens))[:, None, None].expand(-1, 1, 256)
    everywhere, seen = torch.arange(16), torch.arange(11, 16)
    for index, spec in enumerate(SPECS):
        positions = everywhere if spec.window is None else seen
        keys = numbers[positions] + index / 8
        cache.layer(index).append(keys, -keys[:, :, : spec.value_dim], torch.full_like(positions, slot), positions)
    cache.release(cache.fork(slot, 16) if forked else slot, tokens)

    short = cache.take(tokens[:9]).slot
    grow(cache, short, tokens[:9], 0)
    cache.release(short, tokens[:8])
    placement = cache.take([*tokens[:12], 99])
    assert placement.num_cached_tokens == 8
    check(cache, placement.slot, meaning(tokens[:8]))
    placement = cache.take([*tokens, 99])
    assert placement.num_cached_tokens == 16
    check(cache, placement.slot, meaning(tokens))
    with pytest.raises(ValueError, match="begins at token 11"):
        cache.trim(placement.slot, 15)
    cache.close()


def test_tokens_written_again_are_known_by_what_they_are_now() -> None:
    cache = paged(caching=True)
    tokens, other = list(range(13)), [*range(4), *range(50, 59)]
    slot = cache.take(tokens).slot
    grow(cache, slot, tokens, 0)
    cache.computed(slot, 13)
    grow(cache, slot, other, 4)
    cache.release(slot, other)
    assert cache.take([*tokens, 0]).num_cached_tokens == 4
    placement = cache.take([*other, 0])
    assert placement.num_cached_tokens == 12
    check(cache, placement.slot, meaning(other[:12]))
    cache.close()
