"""A range and its page table over every driver, and after faults at every driver call."""

from __future__ import annotations

import time

import numpy as np
import pytest

from tests.memory.backends import Backend
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import IntArray
from vattention.memory.host import HostDriver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region


class Bench:
    """A region of 64 pages over a driver that can be made to fail, and a pool of 32."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.driver = FaultyDriver(backend.driver)
        self.pool = PagePool(self.driver, 32 * backend.page)
        self.region = Region(self.driver, self.pool, 64 * backend.page)

    def write(self, indices: IntArray, values: list[int]) -> None:
        self.backend.write(self.region.address + indices * self.backend.page, values)

    def check(self, indices: IntArray, values: list[int]) -> None:
        if self.backend.holds_content:
            assert self.backend.read(self.region.address + indices * self.backend.page) == values

    def state(self) -> tuple[object, ...]:
        every = np.arange(self.region.num_pages)
        table = self.region.pages(every)
        return (
            table.tolist(),
            self.pool.references(table).tolist(),
            self.pool.handles(table).tolist(),
            self.pool.in_use_nbytes,
            self.region.mapped_nbytes,
        )


@pytest.fixture
def bench(backend: Backend) -> Bench:
    return Bench(backend)


def at(*indices: int) -> IntArray:
    return np.array(indices, np.int64)


def test_commit_alias_unmap(bench: Bench) -> None:
    page, region, pool = bench.backend.page, bench.region, bench.pool
    region.commit(at(0, 1, 5, 63))
    assert region.missing(at(0, 1, 2, 5, 6, 63)).tolist() == [2, 6]
    bench.write(at(0, 1, 5, 63), [1, 2, 3, 4])
    region.alias(at(10, 11), region.pages(at(63, 1)))
    assert pool.references(region.pages(at(0, 1, 63))).tolist() == [1, 2, 2]
    assert (region.mapped_nbytes, pool.in_use_nbytes) == (6 * page, 4 * page)
    bench.check(at(10, 11), [4, 2])
    region.unmap(at(1, 5, 63))
    assert (region.mapped_nbytes, pool.in_use_nbytes) == (3 * page, 3 * page)
    bench.check(at(0, 10, 11), [1, 4, 2])
    region.commit(at(1, 63))
    bench.write(at(1, 63), [8, 9])
    bench.check(at(0, 1, 10, 11, 63), [1, 8, 4, 2, 9])
    region.close()
    region.close()
    pool.release_idle()
    bench.backend.check_used(0)


def test_a_page_can_outlive_its_mappings(bench: Bench) -> None:
    bench.region.commit(at(3))
    bench.write(at(3), [7])
    held = bench.region.pages(at(3))
    bench.pool.share(held)
    bench.region.unmap(at(3))
    assert bench.region.mapped_nbytes == 0
    assert bench.pool.in_use_nbytes == bench.backend.page
    bench.region.commit(at(3))
    bench.write(at(3), [8])
    bench.region.alias(at(20), held)
    bench.pool.drop(held)
    bench.check(at(3, 20), [8, 7])


def test_regions_share_pages_of_one_pool(bench: Bench) -> None:
    other = Region(bench.driver, bench.pool, 4 * bench.backend.page)
    bench.region.commit(at(1, 2))
    bench.write(at(1, 2), [5, 6])
    other.alias(at(0, 3), bench.region.pages(at(2, 1)))
    bench.region.close()
    if bench.backend.holds_content:
        assert bench.backend.read(other.address + at(0, 3) * bench.backend.page) == [6, 5]
    other.close()
    bench.pool.release_idle()
    bench.backend.check_used(0)


def test_sizes_are_rounded_up_to_pages(bench: Bench) -> None:
    region = Region(bench.driver, bench.pool, 2 * bench.backend.page + 1)
    assert (region.num_pages, region.nbytes) == (3, 3 * bench.backend.page)


def test_a_limit_refuses_the_whole_commit(bench: Bench) -> None:
    bench.region.commit(np.arange(30))
    before = bench.state()
    with pytest.raises(OutOfMemoryError, match="kv_memory"):
        bench.region.commit(np.arange(30, 33))
    assert bench.state() == before


@pytest.mark.parametrize(
    "indices", [(5, 4), (4, 4), (-1, 0), (63, 64), (0, 2)], ids=["order", "twice", "below", "beyond", "mapped"]
)
def test_wrong_indices_are_refused(bench: Bench, indices: tuple[int, ...]) -> None:
    bench.region.commit(at(2))
    before = bench.state()
    with pytest.raises(ValueError, match="page ind"):
        bench.region.commit(at(*indices))
    with pytest.raises(ValueError, match="page ind"):
        bench.region.alias(at(*indices), bench.region.pages(at(2, 2)))
    with pytest.raises(ValueError, match="page ind"):
        bench.region.unmap(at(*indices))
    assert bench.state() == before


def test_alias_of_a_page_that_does_not_exist_is_refused(bench: Bench) -> None:
    before = bench.state()
    with pytest.raises(ValueError, match="does not exist"):
        bench.region.alias(at(1), at(0))
    assert bench.state() == before


@pytest.mark.parametrize("half_way", [False, True], ids=["before", "half-way"])
@pytest.mark.parametrize("shortage", [False, True], ids=["error", "shortage"])
@pytest.mark.parametrize("method", METHODS)
def test_a_fault_at_any_driver_call_changes_nothing(
    bench: Bench, method: str, shortage: bool, half_way: bool
) -> None:
    region, pool = bench.region, bench.pool
    error = OutOfMemoryError if shortage else DriverError

    def fail(action: str) -> None:
        bench.driver.fail(method, 1, half_way=half_way, shortage=shortage)
        before = bench.state()
        try:
            if action == "commit":
                region.commit(at(1, 2, 30))
            elif action == "alias":
                region.alias(at(40, 41, 45), region.pages(at(6, 4, 6)))
            else:
                region.unmap(at(4, 6, 8))
        except error:
            assert bench.state() == before
        else:
            # The call needed no such operation.
            bench.driver.heal()
            if action == "commit":
                region.unmap(at(1, 2, 30))
            elif action == "alias":
                region.unmap(at(40, 41, 45))

    region.commit(at(4, 6, 8, 9))
    region.alias(at(50), region.pages(at(8)))
    bench.write(at(4, 6, 8, 9), [1, 2, 3, 4])
    fail("commit")
    fail("alias")
    bench.check(at(4, 6, 8, 9), [1, 2, 3, 4])
    fail("unmap")
    bench.check(at(9, 50), [4, 3])
    if bench.pool.idle_nbytes == 0:
        bench.backend.check_used(pool.in_use_nbytes // bench.backend.page)
    region.close()
    pool.release_idle()
    bench.backend.check_used(0)


@pytest.mark.parametrize("method", ["unmap", "release"])
def test_unmapping_that_fails_keeps_the_content(bench: Bench, method: str) -> None:
    bench.region.commit(at(3, 4, 9))
    bench.write(at(3, 4, 9), [1, 2, 3])
    bench.pool.limit_nbytes = 0  # nothing may stay idle: unmapping must release
    before = bench.state()
    bench.driver.fail(method, 1)
    with pytest.raises(DriverError):
        bench.region.unmap(at(3, 9))
    assert bench.state() == before
    bench.check(at(3, 4, 9), [1, 2, 3])
    bench.region.unmap(at(3, 4, 9))
    bench.backend.check_used(0)


def test_scattered_pages_cost_little() -> None:
    """A step of the engine maps a page in each of dozens of rows; it must not be felt (a step takes 30 ms)."""
    driver = HostDriver()
    region = Region(driver, PagePool(driver, 2**30), 2**36)
    indices = np.arange(36) * 1000
    times = []
    for step in range(30):
        start = time.perf_counter()
        region.commit(indices + step)
        times.append(time.perf_counter() - start)
    region.close()
    driver.close()
    assert min(times) < 1e-3
