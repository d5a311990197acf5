"""Pages under a limit: references, recycling, and what a failing driver leaves behind."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.memory.faulty import FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import IntArray
from vattention.memory.null import NullDriver
from vattention.memory.pool import PagePool

PAGE = 4096


class Bench:
    """A pool of up to 8 pages over bookkeeping."""

    def __init__(self, *, recycles: bool = True, limit: int = 8) -> None:
        self.null = NullDriver(PAGE, recycles=recycles)
        self.driver = FaultyDriver(self.null)
        self.start = self.driver.reserve(4096 * PAGE)
        self.pool = PagePool(self.driver, limit * PAGE)

    def create(self, count: int) -> IntArray:
        return self.pool.create(self.start + np.arange(count, dtype=np.int64) * PAGE)

    def accounts(self) -> tuple[int, int, int]:
        """Pages in use, idle, and with the driver."""
        info = self.null.memory_info()
        held = (info.total_nbytes - info.available_nbytes) // PAGE
        return self.pool.in_use_nbytes // PAGE, self.pool.idle_nbytes // PAGE, held


@pytest.fixture(params=[True, False], ids=["recycling", "not recycling"])
def bench(request: pytest.FixtureRequest) -> Bench:
    return Bench(recycles=request.param)


def array(*values: Any) -> IntArray:
    return np.array(values, np.int64)


def test_ids_are_dense_positive_and_used_again(bench: Bench) -> None:
    assert bench.create(3).tolist() == [1, 2, 3]
    bench.pool.drop(array(2))
    assert sorted(bench.create(2).tolist()) == [2, 4]
    assert bench.pool.references(array(0, 1, 2, 3, 4)).tolist() == [0, 1, 1, 1, 1]


def test_a_page_lives_until_its_last_reference_is_dropped(bench: Bench) -> None:
    pages = bench.create(2)
    bench.pool.share(pages[[0, 0, 1]])
    assert bench.pool.references(pages).tolist() == [3, 2]
    bench.pool.drop(pages[[1, 0, 1]])
    assert bench.pool.references(pages).tolist() == [2, 0]
    assert bench.accounts()[0] == 1
    bench.pool.drop(pages[[0, 0]])
    assert bench.accounts()[0] == 0


def test_handles_are_kept_only_where_that_is_cheaper() -> None:
    for recycles in (True, False):
        bench = Bench(recycles=recycles)
        pages = bench.create(3)
        handles = set(bench.pool.handles(pages).tolist())
        bench.pool.drop(pages)
        assert bench.accounts() == ((0, 3, 3) if recycles else (0, 0, 0))
        again = set(bench.pool.handles(bench.create(2)).tolist())
        assert (again <= handles) == recycles
        bench.pool.release_idle()
        assert bench.accounts() == (2, 0, 2)


def test_the_limit_is_kept_and_named(bench: Bench) -> None:
    bench.create(6)
    with pytest.raises(OutOfMemoryError, match="kv_memory") as caught:
        bench.create(3)
    assert (caught.value.needed_nbytes, caught.value.available_nbytes) == (3 * PAGE, 2 * PAGE)
    assert bench.accounts() == (6, 0, 6)
    bench.create(2)
    assert bench.pool.headroom_nbytes == 0


def test_idle_handles_count_against_the_limit() -> None:
    bench = Bench()
    bench.pool.drop(bench.create(8))
    assert bench.accounts() == (0, 8, 8)
    bench.create(8)
    assert bench.accounts() == (8, 0, 8)


def test_a_falling_limit_takes_idle_handles_first_and_leaves_what_is_in_use() -> None:
    bench = Bench()
    pages = bench.create(6)
    bench.pool.drop(pages[:3])
    bench.pool.limit_nbytes = 5 * PAGE + 17
    assert bench.accounts() == (3, 2, 5)
    bench.pool.limit_nbytes = 2 * PAGE
    assert bench.accounts() == (3, 0, 3)
    assert bench.pool.headroom_nbytes == -PAGE
    bench.pool.drop(pages[3:5])
    assert bench.accounts() == (1, 1, 2)  # of the two dropped, one had to go
    bench.pool.limit_nbytes = 8 * PAGE
    bench.create(7)
    assert bench.accounts() == (8, 0, 8)


def test_many_pages_make_the_tables_grow() -> None:
    bench = Bench(limit=4096)
    pages = bench.create(4000)
    assert pages.tolist() == list(range(1, 4001))
    assert bench.pool.references(pages).tolist() == [1] * 4000
    assert len(set(bench.pool.handles(pages).tolist())) == 4000


@pytest.mark.parametrize("pages", [[0], [3], [1, 1]])
def test_a_page_cannot_be_dropped_more_often_than_it_was_taken(bench: Bench, pages: list[int]) -> None:
    bench.create(2)
    with pytest.raises(ValueError, match="page"):
        bench.pool.drop(array(*pages))
    assert bench.pool.references(array(1, 2)).tolist() == [1, 1]
    assert bench.accounts() == (2, 0, 2)


def test_a_page_that_does_not_exist_cannot_be_shared(bench: Bench) -> None:
    pages = bench.create(2)
    bench.pool.drop(pages[:1])
    with pytest.raises(ValueError, match="does not exist"):
        bench.pool.share(pages)
    assert bench.pool.references(pages).tolist() == [0, 1]


@pytest.mark.parametrize("half_way", [False, True])
def test_a_failing_create_changes_nothing(bench: Bench, half_way: bool) -> None:
    bench.pool.drop(bench.create(3))
    before = bench.accounts()
    bench.driver.fail("create", 1, half_way=half_way, shortage=True)
    with pytest.raises(OutOfMemoryError):
        bench.create(6)
    assert bench.accounts() == before
    assert len(set(bench.create(8).tolist())) == 8


def test_a_failing_release_changes_nothing_and_can_be_tried_again(bench: Bench) -> None:
    pages = bench.create(6)
    bench.pool.share(pages[:1])
    bench.pool.limit_nbytes = 2 * PAGE
    bench.driver.fail("release", 1)
    with pytest.raises(DriverError):
        bench.pool.drop(pages)
    assert bench.pool.references(pages).tolist() == [2, 1, 1, 1, 1, 1]
    assert bench.accounts() == (6, 0, 6)
    bench.pool.drop(pages)
    assert bench.accounts()[0] == 1
    assert bench.accounts()[2] <= 2


def test_a_falling_limit_holds_even_where_giving_back_fails() -> None:
    bench = Bench()
    bench.pool.drop(bench.create(6))
    bench.driver.fail("release", 1)
    with pytest.raises(DriverError):
        bench.pool.limit_nbytes = 2 * PAGE
    assert bench.accounts() == (0, 6, 6)
    with pytest.raises(OutOfMemoryError):
        bench.create(3)
    bench.pool.release_idle()
    assert bench.accounts() == (0, 0, 0)
