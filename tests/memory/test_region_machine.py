"""Random histories of two regions over one pool, with faults, against a model of what every page holds."""

from __future__ import annotations

import contextlib
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.memory.backends import BACKENDS, opened
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import IntArray
from vattention.memory.pool import PagePool
from vattention.memory.region import Region

SIZES = (24, 8)
LIMIT = 20

indices_of = st.integers(0, len(SIZES) - 1).flatmap(
    lambda which: st.tuples(st.just(which), st.sets(st.integers(0, SIZES[which] - 1), min_size=1, max_size=8))
)


class RegionMachine(RuleBasedStateMachine):
    """The model: for each region, index → page id; for each page id, its value and who holds it."""

    backend_name = "host"

    @initialize()
    def reserve(self) -> None:
        self.undo = ExitStack()
        self.backend = opened(self.backend_name, self.undo)
        self.driver = FaultyDriver(self.backend.driver)
        self.pool = PagePool(self.driver, LIMIT * self.backend.page)
        self.regions = [Region(self.driver, self.pool, size * self.backend.page) for size in SIZES]
        self.limit = LIMIT
        self.mapped: list[dict[int, int]] = [{} for _ in SIZES]
        self.held: list[int] = []
        self.values: dict[int, int] = {}
        self.next_value = 0

    def array(self, values: Any) -> IntArray:
        return np.array(sorted(values), np.int64)

    def addresses(self, which: int, indices: IntArray) -> IntArray:
        return self.regions[which].address + indices * self.backend.page

    def fault(self, fault: tuple[str, bool] | None) -> None:
        if fault is not None:
            self.driver.fail(fault[0], 1, half_way=fault[1])

    faults = st.none() | st.tuples(st.sampled_from(METHODS), st.booleans())

    @rule(where=indices_of, fault=faults)
    def commit(self, where: tuple[int, set[int]], fault: tuple[str, bool] | None) -> None:
        which, chosen = where
        region, mapped = self.regions[which], self.mapped[which]
        missing = region.missing(self.array(chosen))
        assert missing.tolist() == [i for i in sorted(chosen) if i not in mapped]
        self.fault(fault)
        with contextlib.suppress(DriverError):
            try:
                region.commit(missing)
            except OutOfMemoryError:
                assert len(self.alive()) + len(missing) > self.limit
                return
            finally:
                self.driver.heal()
            assert len(self.alive()) + len(missing) <= self.limit
            pages = region.pages(missing).tolist()
            assert not set(pages) & self.alive()
            assert len(set(pages)) == len(pages)
            self.fill(which, missing, pages)

    def fill(self, which: int, indices: IntArray, pages: list[int]) -> None:
        for index, page in zip(indices.tolist(), pages, strict=True):
            self.next_value = self.next_value % 255 + 1
            self.values[page] = self.next_value
            self.mapped[which][index] = page
        self.backend.write(self.addresses(which, indices), [self.values[page] for page in pages])

    @rule(where=indices_of, fault=faults, data=st.data())
    def alias(self, where: tuple[int, set[int]], fault: tuple[str, bool] | None, data: st.DataObject) -> None:
        which, chosen = where
        alive = sorted(self.alive())
        if not alive:
            return
        indices = self.regions[which].missing(self.array(chosen))
        pages = [data.draw(st.sampled_from(alive)) for _ in indices]
        self.fault(fault)
        with contextlib.suppress(DriverError):
            try:
                self.regions[which].alias(indices, np.array(pages, np.int64))
            finally:
                self.driver.heal()
            self.mapped[which].update(zip(indices.tolist(), pages, strict=True))

    @rule(where=indices_of, fault=faults)
    def unmap(self, where: tuple[int, set[int]], fault: tuple[str, bool] | None) -> None:
        which, chosen = where
        indices = self.array(chosen & self.mapped[which].keys())
        self.fault(fault)
        with contextlib.suppress(DriverError):
            try:
                self.regions[which].unmap(indices)
            finally:
                self.driver.heal()
            for index in indices.tolist():
                del self.mapped[which][index]

    @rule(where=indices_of)
    def hold(self, where: tuple[int, set[int]]) -> None:
        which, chosen = where
        pages = [self.mapped[which][i] for i in sorted(chosen) if i in self.mapped[which]]
        self.pool.share(np.array(pages, np.int64))
        self.held += pages

    @rule(data=st.data())
    def let_go(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.held)))
        self.pool.drop(np.array(self.held[:count], np.int64))
        del self.held[:count]

    @rule(limit=st.integers(4, 30))
    def set_limit(self, limit: int) -> None:
        self.limit = limit
        self.pool.limit_nbytes = limit * self.backend.page

    @rule()
    def release_idle(self) -> None:
        self.pool.release_idle()
        assert self.pool.idle_nbytes == 0

    def alive(self) -> set[int]:
        return {page for mapped in self.mapped for page in mapped.values()} | set(self.held)

    @invariant()
    def tables_and_references_match(self) -> None:
        references: dict[int, int] = {}
        for region, mapped, size in zip(self.regions, self.mapped, SIZES, strict=True):
            assert region.pages(np.arange(size)).tolist() == [mapped.get(i, 0) for i in range(size)]
            assert region.mapped_nbytes == len(mapped) * self.backend.page
            for page in mapped.values():
                references[page] = references.get(page, 0) + 1
        for page in self.held:
            references[page] = references.get(page, 0) + 1
        pages = self.array(references)
        assert self.pool.references(pages).tolist() == [references[page] for page in pages.tolist()]
        handles = self.pool.handles(pages).tolist()
        assert len(set(handles)) == len(handles)

    @invariant()
    def memory_matches(self) -> None:
        page, alive, pool = self.backend.page, len(self.alive()), self.pool
        assert pool.in_use_nbytes == alive * page
        assert pool.in_use_nbytes + pool.idle_nbytes <= max(self.limit, alive) * page
        if pool.idle_nbytes:
            assert self.driver.capabilities.recycles
        self.backend.check_used((pool.in_use_nbytes + pool.idle_nbytes) // page)

    @invariant()
    def contents_stay(self) -> None:
        if self.backend.holds_content:
            for which, mapped in enumerate(self.mapped):
                indices = self.array(mapped)
                expected = [self.values[mapped[i]] for i in indices.tolist()]
                assert self.backend.read(self.addresses(which, indices)) == expected

    def teardown(self) -> None:
        if not hasattr(self, "undo"):
            return
        with self.undo:
            for region in self.regions:
                region.close()
            self.pool.drop(np.array(self.held, np.int64))
            self.pool.release_idle()
            assert self.pool.in_use_nbytes == 0
            self.backend.check_used(0)


@pytest.mark.parametrize("name", BACKENDS)
def test_histories(name: str) -> None:
    class Machine(RegionMachine):
        backend_name = name

    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=40, stateful_step_count=30, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
