"""Blocks under random histories: contents against a model, references against a count, and no memory lost."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.kv.managers import MAX_LEN, PAGE, SPECS, WINDOW, check, grow, meaning, paged, rows, write
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.core import AttentionSpec
from vattention.errors import DriverError, OutOfMemoryError
from vattention.kv.paged import GROWTH, PagedManager
from vattention.memory import open_driver
from vattention.memory.null import NullDriver

BASE = [[i * k % 7 for i in range(48)] for k in (1, 3)]
prompts = st.tuples(st.sampled_from(BASE), st.integers(1, 40), st.lists(st.integers(0, 1), max_size=2)).map(
    lambda drawn: drawn[0][: drawn[1]] + drawn[2]
)
"""Of two kinds, so that prefixes meet."""

salts = st.sampled_from(["", "", "a"])
faults = st.none() | st.tuples(st.sampled_from(METHODS), st.booleans())
which = st.integers(0, 3)


class PagedMachine(RuleBasedStateMachine):
    """Sequences whose prefixes meet, under a changing limit and with failing drivers."""

    @initialize(
        sliced=st.booleans(),
        caching=st.sampled_from([True, True, False]),
        block_size=st.sampled_from([1, 2, 4, 7, 16]),
    )
    def reserve(self, sliced: bool, caching: bool, block_size: int) -> None:
        self.driver = FaultyDriver(open_driver("cpu", PAGE))
        self.cache = paged(self.driver, sliced=sliced, caching=caching, block_size=block_size)
        self.block_size = block_size
        self.tokens: dict[int, list[int]] = {}
        self.written: dict[int, int] = {}
        self.promised: dict[int, int] = {}
        self.salts: dict[int, str] = {}

    @contextlib.contextmanager
    def failing(self, fault: tuple[str, bool] | None) -> Iterator[None]:
        if fault is not None:
            self.driver.fail(fault[0], 1, half_way=fault[1])
        try:
            yield
        finally:
            self.driver.heal()

    def running(self, which: int) -> int | None:
        """One of the running sequences' slots, if there is any."""
        slots = sorted(self.tokens)
        return slots[which % len(slots)] if slots else None

    def compute(self, slot: int, count: int, more: list[int], tells: bool) -> None:
        """The next chunk of the prompt, or new tokens behind it."""
        known, start = self.tokens[slot], self.written[slot]
        if start == len(known):
            known = known + more
        end = min(start + count, len(known), MAX_LEN)
        if end <= start:
            return
        with contextlib.suppress(OutOfMemoryError, DriverError):
            self.cache.ensure(slot, start, end)
            self.tokens[slot], self.written[slot] = known, end
            write(self.cache, slot, start, meaning(known[:end], self.salts[slot])[start:])
            if tells and start < self.promised[slot]:
                self.cache.computed(slot, end)

    @rule(
        prompt=prompts,
        salt=salts,
        count=st.integers(0, 40),
        backs=st.lists(st.integers(0, 3), max_size=2),
        steps=st.integers(0, 4),
    )
    def take(self, prompt: list[int], salt: str, count: int, backs: list[int], steps: int) -> None:
        """A sequence comes and is computed so far, forks, and goes on with all others."""
        if self.cache.num_free_slots == 0:
            with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
                self.cache.take(prompt)
            return
        placement = self.cache.take(prompt, salt=salt)
        slot = placement.slot
        assert slot not in self.tokens
        assert placement.num_cached_tokens < len(prompt)
        assert placement.num_cached_tokens % self.block_size == 0
        self.tokens[slot], self.written[slot] = prompt, placement.num_cached_tokens
        self.promised[slot], self.salts[slot] = len(prompt), salt
        if count:
            self.compute(slot, count, [], tells=True)
        for back in backs:
            self.fork(slot, back)
        self.decode(steps)

    @rule(which=which, more=st.lists(st.integers(0, 1), min_size=1), count=st.integers(1, 20), tells=st.booleans())
    def step(self, which: int, more: list[int], count: int, tells: bool) -> None:
        if (slot := self.running(which)) is not None:
            self.compute(slot, count, more, tells)

    def decode(self, steps: int) -> None:
        """Every sequence computes what is left of its prompt, then some tokens that are its own."""
        for step in range(steps):
            for slot in sorted(self.tokens):
                self.compute(slot, MAX_LEN, [step + slot], tells=True)

    @rule(steps=st.integers(1, 5), fault=faults)
    def decode_all(self, steps: int, fault: tuple[str, bool] | None) -> None:
        with self.failing(fault):
            self.decode(steps)

    @rule(which=which, back=st.integers(0, 12), steps=st.integers(0, 3))
    def fork_some(self, which: int, back: int, steps: int) -> None:
        if (slot := self.running(which)) is not None:
            self.fork(slot, back)
            self.decode(steps)

    def fork(self, slot: int, back: int) -> None:
        length = max(self.written[slot] - back, 0)
        with contextlib.suppress(ValueError):  # a window has passed it
            try:
                fork = self.cache.fork(slot, length)
            except OutOfMemoryError:
                assert self.cache.num_free_slots == 0
                return
            self.tokens[fork], self.written[fork] = self.tokens[slot][:length], length
            self.promised[fork], self.salts[fork] = 0, self.salts[slot]

    @rule(which=which, back=st.integers(1, 12), steps=st.integers(0, 2))
    def trim(self, which: int, back: int, steps: int) -> None:
        if (slot := self.running(which)) is None:
            return
        length = max(self.written[slot] - back, 0)
        with contextlib.suppress(ValueError):
            self.cache.trim(slot, length)
            self.tokens[slot], self.written[slot] = self.tokens[slot][:length], length
            self.promised[slot] = min(self.promised[slot], length)
            self.decode(steps)

    @rule(which=which, tells=st.booleans(), fault=faults)
    def release(self, which: int, tells: bool, fault: tuple[str, bool] | None) -> None:
        if (slot := self.running(which)) is None:
            return
        with self.failing(fault):
            self.cache.release(slot, self.tokens[slot][: self.written[slot]] if tells else None)
        self.forget(slot)

    def forget(self, slot: int) -> None:
        for state in (self.tokens, self.written, self.promised, self.salts):
            del state[slot]

    @rule(which=which)
    def swap(self, which: int) -> None:
        """Out of the cache and into another slot, as a preempted sequence."""
        if (slot := self.running(which)) is None:
            return
        length = self.written[slot]
        known, salt = self.tokens[slot][:length], self.salts[slot]
        image = [run.clone() for run in self.cache.runs(slot, length)]
        self.cache.release(slot)
        self.forget(slot)
        slot = self.cache.take([]).slot
        try:
            self.cache.ensure(slot, length, length)
        except OutOfMemoryError:
            self.cache.release(slot)
            return
        for source, target in zip(image, self.cache.runs(slot, length), strict=True):
            assert source.shape == target.shape
            target.copy_(source)
        # From a cache of another kind come only the tokens that a window reads.
        first = max(0, length - WINDOW + 1)
        missing = torch.arange(first // self.block_size * self.block_size, first)
        nothing = torch.full((len(missing), 1, 256), torch.nan)
        self.cache.layer(1).append(nothing, nothing, torch.full_like(missing, slot), missing)
        self.tokens[slot], self.written[slot], self.promised[slot], self.salts[slot] = known, length, 0, salt

    @rule(pages=st.integers(20, 250), fault=faults)
    def set_limit(self, pages: int, fault: tuple[str, bool] | None) -> None:
        with self.failing(fault), contextlib.suppress(DriverError):
            self.cache.set_limit(pages * PAGE)

    @rule(fault=faults)
    def drop_warm(self, fault: tuple[str, bool] | None) -> None:
        with self.failing(fault):
            self.cache.drop_warm()
        if fault is None:
            accounts = self.cache.accounts()
            # What is left beside whole blocks is the ends of the pages they lie in.
            assert accounts.warm_nbytes <= 2 * PAGE * sum(
                group.pool.num_live * len(group.layers.planes) for group in self.cache._groups
            )

    @invariant()
    def contents_stay(self) -> None:
        for slot, known in self.tokens.items():
            check(self.cache, slot, meaning(known[: self.written[slot]], self.salts[slot]))

    @invariant()
    def references_match_the_tables(self) -> None:
        page = self.cache._region.page_nbytes
        for index, group in enumerate(self.cache._groups):
            pool = group.pool
            count: Counter[int] = Counter()
            for slot in self.tokens:
                sequence = self.cache._sequences[slot]
                assert sequence is not None
                held = sequence.held[index]
                assert held.capacity == held.last * self.block_size
                count.update(group.rows[slot, held.first : held.last].tolist())
            references = pool.references(np.arange(pool.num_used))
            assert {block: int(references[block]) for block in references.nonzero()[0].tolist()} == count
            assert (pool.num_live, pool.num_references) == (len(count), count.total())
            kinds = [*pool._free, *pool._bare, *pool._idle, *count]
            assert sorted(kinds) == list(range(pool.num_used))
            assert {block: key for key, block in pool._block_of.items()} == pool._key_of
            assert pool._idle.keys() <= pool._key_of.keys() <= pool._idle.keys() | count.keys()
            with_memory = np.flatnonzero(pool.with_memory())
            needed, mapped = set(), set()
            for plane in group.layers.planes:
                width = self.block_size * plane.token_nbytes
                for block in with_memory.tolist():
                    first, last = block * width // page, -(-(block + 1) * width // page)
                    needed |= {plane.offset_nbytes // page + i for i in range(first, last)}
                first = plane.offset_nbytes // page
                ever = np.arange(first, first + pool.num_used * width // page + 2)
                mapped |= set(ever[self.cache._region.pages(ever) != 0].tolist())
            assert mapped == needed

    @invariant()
    def accounts_add_up(self) -> None:
        accounts = self.cache.accounts()
        assert accounts.live_nbytes + accounts.warm_nbytes == accounts.mapped_nbytes
        assert accounts.mapped_nbytes <= accounts.limit_nbytes + self.cache.excess_nbytes
        assert accounts.token_nbytes <= accounts.live_nbytes + accounts.shared_nbytes

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            for slot in self.tokens:
                self.cache.release(slot)
            assert not self.cache._awaited
            self.cache.drop_warm()
            assert self.cache.accounts().mapped_nbytes == 0
            self.cache.close()


TestPagedMachine = PagedMachine.TestCase
TestPagedMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)


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
