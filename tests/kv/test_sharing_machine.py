"""Sequences that share whatever they can, against a model that knows what each must hold."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.kv.contents import FULL, MAX_LEN, PAGE, SPECS, check, recount, sharing_manager, write
from vattention.errors import OutOfMemoryError
from vattention.kv.prefix_cache import MIN_SHARED_TOKENS

SALTS = st.sampled_from(["", "", "", "a"])


class SharingMachine(RuleBasedStateMachine):
    """`texts` are all that was ever asked for or made; requests begin like them."""

    @initialize(
        sliced=st.booleans(), windows=st.booleans(), prefix_cache=st.sampled_from([True, True, True, False])
    )
    def reserve(self, sliced: bool, windows: bool, prefix_cache: bool) -> None:
        self.specs = SPECS if windows else FULL
        self.cache = sharing_manager(
            specs=self.specs, sliced=sliced, prefix_cache=prefix_cache, num_rows=6, background=True
        )
        self.prefix_cache = prefix_cache
        self.texts: list[list[int]] = [[i % 7 for i in range(40)]]
        self.written: dict[int, list[int]] = {}
        self.asked: dict[int, list[int]] = {}
        self.computed: dict[int, int] = {}
        self.salts: dict[int, str] = {}

    def request(self, pick: int, length: int, more: list[int]) -> list[int]:
        text = [*self.texts[-1 - pick % len(self.texts)][:length], *more][: MAX_LEN - 10]
        self.texts.append(text)
        return text

    @rule(
        pick=st.integers(0, 6),
        length=st.integers(16, MAX_LEN),
        more=st.lists(st.integers(0, 2), min_size=1, max_size=9),
        salt=SALTS,
        computed=st.booleans(),
    )
    def take(self, pick: int, length: int, more: list[int], salt: str, computed: bool) -> None:
        tokens = self.request(pick, length, more)
        if self.cache.num_free_slots == 0:
            with pytest.raises(OutOfMemoryError):
                self.cache.take(tokens, salt=salt)
            self.release(pick, tells=True)
        awaits = self.cache.awaits(tokens, salt=salt)
        within_limit = self.cache.excess_nbytes == 0
        has_room = self.cache.has_room(len(tokens), tokens, salt=salt)
        placement = self.cache.take(tokens, salt=salt)
        slot, cached = placement.slot, placement.num_cached_tokens
        assert slot not in self.written
        assert cached < len(tokens)
        assert not awaits or self.promised(tokens, salt) >= cached + MIN_SHARED_TOKENS
        self.written[slot], self.asked[slot] = tokens[:cached], tokens
        self.computed[slot], self.salts[slot] = cached, salt
        check(self.cache, slot, tokens[:cached], salt, self.specs)
        if computed:
            got_memory = self.compute(slot, len(tokens) - cached, 0, tells=True)
            # What a chunk reads behind its last token's windows is not promised.
            assert got_memory or not has_room or self.specs is SPECS
            assert has_room or not got_memory or not within_limit

    def promised(self, tokens: list[int], salt: str) -> int:
        """The longest prefix that a running sequence has not computed yet."""
        longest = 0
        for slot, asked in self.asked.items():
            if self.salts[slot] == salt:
                pairs = enumerate(zip(asked, tokens, strict=False))
                common = next((i for i, (x, y) in pairs if x != y), min(len(asked), len(tokens)))
                if self.computed[slot] < common:
                    longest = max(longest, common)
        return longest

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 3), count=st.integers(1, 40), own=st.integers(0, 2), tells=st.booleans())
    def forward(self, pick: int, count: int, own: int, tells: bool) -> None:
        self.compute(self.pick(pick), count, own, tells)

    def compute(self, slot: int, count: int, own: int, tells: bool) -> bool:
        """A forward over the slot's next tokens; False where there is no memory for it."""
        start = len(self.written[slot])
        end = min(start + count, MAX_LEN)
        if end == start:
            return True
        asked = self.asked[slot] if self.asked[slot][:start] == self.written[slot] else []
        tokens = [*self.written[slot], *[*asked, *[own] * MAX_LEN][start:end]]
        try:
            self.cache.ensure(slot, start, end)
        except OutOfMemoryError:
            return False
        region, pool = self.cache._backing.region, self.cache._pool
        for group in self.cache._layout.groups:
            assert (pool.references(region.pages(group.pages(slot, start, end))) == 1).all()
        write(self.cache, slot, tokens, start, self.salts[slot], self.specs)
        self.written[slot] = tokens
        if tells:
            self.cache.computed(slot, end)
            self.computed[slot] = end
        return True

    @precondition(lambda self: self.cache.num_free_slots)
    @rule(pick=st.integers(0, 6), length=st.integers(1, MAX_LEN), salt=SALTS)
    def restore(self, pick: int, length: int, salt: str) -> None:
        """A sequence that was computed elsewhere is copied in."""
        tokens = self.request(pick, length, [])
        slot = self.cache.take((), salt=salt).slot
        try:
            self.cache.ensure(slot, len(tokens), len(tokens))
        except OutOfMemoryError:
            self.cache.release(slot, ())
            return
        for layer, spec in enumerate(self.specs):
            first = 0 if spec.window is None else max(0, len(tokens) - spec.window + 1)
            write(self.cache, slot, tokens, first, salt, self.specs, layer)
        self.written[slot], self.asked[slot], self.computed[slot], self.salts[slot] = tokens, [], 0, salt

    @precondition(lambda self: self.written and self.cache.num_free_slots)
    @rule(pick=st.integers(0, 3), back=st.integers(0, 30))
    def fork(self, pick: int, back: int) -> None:
        slot = self.pick(pick)
        length = max(len(self.written[slot]) - back, 0)
        try:
            child = self.cache.fork(slot, length)
        except OutOfMemoryError:
            return
        except ValueError:
            assert self.specs is SPECS
            return
        self.written[child] = self.asked[child] = self.written[slot][:length]
        self.computed[child], self.salts[child] = length, self.salts[slot]

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 3), back=st.integers(1, 30))
    def trim(self, pick: int, back: int) -> None:
        slot = self.pick(pick)
        length = max(len(self.written[slot]) - back, 0)
        try:
            self.cache.trim(slot, length)
        except ValueError:
            assert self.specs is SPECS
            return
        del self.written[slot][length:]
        self.asked[slot] = self.asked[slot][:length]
        self.computed[slot] = min(self.computed[slot], length)

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 3), tells=st.booleans())
    def release(self, pick: int, tells: bool) -> None:
        slot = self.pick(pick)
        self.texts.append(self.written[slot])
        self.cache.release(slot, self.written[slot] if tells else None)
        del self.written[slot], self.asked[slot], self.computed[slot], self.salts[slot]

    @precondition(lambda self: self.written)
    @rule(pick=st.integers(0, 3), ahead=st.integers(1, 12))
    def prefetch(self, pick: int, ahead: int) -> None:
        slot = self.pick(pick)
        start = len(self.written[slot])
        self.cache.prefetch([(slot, start, min(start + ahead, MAX_LEN))])
        self.wait()

    @rule(pages=st.integers(20, 400))
    def set_limit(self, pages: int) -> None:
        self.cache.set_limit(pages * PAGE)

    @rule(sure=st.integers(0, 3))
    def drop_warm(self, sure: int) -> None:
        if sure:
            return
        self.cache.drop_warm()
        accounts = self.cache.accounts()
        assert accounts.mapped_nbytes == accounts.live_nbytes

    def pick(self, pick: int) -> int:
        return sorted(self.written)[pick % len(self.written)]

    def wait(self) -> None:
        assert self.cache._mapper is not None
        self.cache._mapper.wait_idle()

    @invariant()
    def every_slot_holds_its_tokens(self) -> None:
        for slot, tokens in self.written.items():
            check(self.cache, slot, tokens, self.salts[slot], self.specs)

    @invariant()
    def parked_slots_hold_what_they_are_known_for(self) -> None:
        for slot in self.cache._table.parked():
            assert slot.ready == len(slot.tokens)
            check(self.cache, slot.index, slot.tokens, slot.salt, self.specs)

    @invariant()
    def accounts_are_a_recount(self) -> None:
        cache = self.cache
        recount(cache)
        accounts = cache.accounts()
        assert cache.has_room(1) <= (accounts.live_nbytes < accounts.limit_nbytes)

    def teardown(self) -> None:
        if hasattr(self, "cache"):
            self.wait()
            for slot, tokens in self.written.items():
                self.cache.release(slot, tokens)
            self.cache.drop_warm()
            assert self.cache.accounts().mapped_nbytes == 0
            assert not self.cache._cache._tree
            self.cache.close()


TestSharingMachine = SharingMachine.TestCase
TestSharingMachine.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
