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

from tests.kv.managers import MAX_LEN, PAGE, WINDOW, check, meaning, paged, write
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory import open_driver

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
        slot = self.cache.take([], salt=salt).slot
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
            assert not self.cache._prefixes.awaited
            self.cache.drop_warm()
            assert self.cache.accounts().mapped_nbytes == 0
            self.cache.close()


TestPagedMachine = PagedMachine.TestCase
TestPagedMachine.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck)
)
