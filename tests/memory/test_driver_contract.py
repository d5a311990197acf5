"""What every driver promises, whatever is behind it."""

from __future__ import annotations

import os

import numpy as np
import pytest

from tests.memory.backends import Backend
from vattention.errors import DriverError

NOTHING = np.empty(0, np.int64)


def test_the_page_is_a_multiple_of_the_granularity(backend: Backend) -> None:
    assert backend.page % backend.driver.capabilities.granularity == 0


def test_memory_info_is_plausible(backend: Backend) -> None:
    info = backend.driver.memory_info()
    assert 0 < info.available_nbytes <= info.total_nbytes


def test_addresses_cost_no_memory(backend: Backend) -> None:
    start = backend.driver.reserve(2**36)
    assert start % backend.page == 0
    backend.check_used(0)
    backend.driver.free(start)


def test_pages_keep_what_is_written(backend: Backend) -> None:
    start = backend.driver.reserve(64 * backend.page)
    addresses, _ = backend.mapped(start, [0, 1, 2, 7, 20, 21, 63])
    backend.check_used(7)
    if backend.holds_content:
        backend.write(addresses, range(1, 8))
        assert backend.read(addresses) == list(range(1, 8))


def test_one_page_behind_two_addresses(backend: Backend) -> None:
    start = backend.driver.reserve(16 * backend.page)
    first, handles = backend.mapped(start, [1, 2, 5])
    second = backend.addresses(start, [8, 9, 10])
    backend.driver.map(second, handles)
    backend.driver.set_access(second)
    backend.check_used(3)
    if backend.holds_content:
        backend.write(first, [11, 12, 13])
        assert backend.read(second) == [11, 12, 13]
        backend.write(second[1:2], [99])
        assert backend.read(first) == [11, 99, 13]


def test_one_page_twice_in_one_call(backend: Backend) -> None:
    start = backend.driver.reserve(8 * backend.page)
    first, handles = backend.mapped(start, [0])
    more = backend.addresses(start, [1, 2, 3, 6])
    backend.driver.map(more, np.repeat(handles, 4))
    backend.driver.set_access(more)
    backend.check_used(1)
    if backend.holds_content:
        backend.write(first, [42])
        assert backend.read(more) == [42] * 4


def test_unmapped_pages_live_until_they_are_released(backend: Backend) -> None:
    start = backend.driver.reserve(8 * backend.page)
    addresses, handles = backend.mapped(start, [2, 3, 6])
    backend.write(addresses, [1, 2, 3])
    backend.driver.unmap(addresses)
    backend.check_used(3)
    elsewhere = backend.addresses(start, [0, 1, 7])
    backend.driver.map(elsewhere, handles)
    backend.driver.set_access(elsewhere)
    if backend.holds_content:
        assert backend.read(elsewhere) == [1, 2, 3]
    backend.driver.unmap(elsewhere)
    backend.driver.release(handles[[2, 0, 1]])
    backend.check_used(0)


def test_an_address_gets_a_new_page_while_its_old_one_lives_elsewhere(backend: Backend) -> None:
    start = backend.driver.reserve(16 * backend.page)
    first, handles = backend.mapped(start, [0, 1, 2, 3])
    second = backend.addresses(start, [8, 9, 10, 11])
    backend.driver.map(second, handles)
    backend.driver.set_access(second)
    backend.write(first, [1, 2, 3, 4])
    backend.driver.unmap(first[1:3])
    fresh, new_handles = backend.mapped(start, [1, 2])
    assert not set(new_handles.tolist()) & set(handles.tolist())
    backend.check_used(6)
    if backend.holds_content:
        backend.write(fresh, [7, 8])
        assert backend.read(first) == [1, 7, 8, 4]
        assert backend.read(second) == [1, 2, 3, 4]
    backend.driver.unmap(first)
    backend.driver.unmap(second)
    backend.driver.release(np.concatenate((handles, new_handles)))
    backend.check_used(0)


def test_access_may_be_set_again_and_keeps_the_content(backend: Backend) -> None:
    start = backend.driver.reserve(4 * backend.page)
    addresses, _ = backend.mapped(start, [0, 1])
    backend.write(addresses, [5, 6])
    backend.driver.set_access(addresses)
    if backend.holds_content:
        assert backend.read(addresses) == [5, 6]


def test_pages_can_be_shared_between_ranges(backend: Backend) -> None:
    one = backend.driver.reserve(4 * backend.page)
    two = backend.driver.reserve(8 * backend.page)
    here, handles = backend.mapped(one, [1, 3])
    there = backend.addresses(two, [0, 7])
    backend.driver.map(there, handles)
    backend.driver.set_access(there)
    backend.write(here, [3, 4])
    if backend.holds_content:
        assert backend.read(there) == [3, 4]
    backend.driver.unmap(here)
    backend.driver.free(one)
    three = backend.driver.reserve(4 * backend.page)
    mine, my_handles = backend.mapped(three, [0, 1, 2, 3])
    backend.write(mine, [6, 7, 8, 9])
    if backend.holds_content:
        assert backend.read(there) == [3, 4]
        assert backend.read(mine) == [6, 7, 8, 9]
    backend.driver.unmap(there)
    backend.driver.release(handles)
    backend.driver.unmap(mine)
    backend.driver.release(my_handles)
    backend.check_used(0)


def test_one_call_may_span_ranges(backend: Backend) -> None:
    starts = sorted(backend.driver.reserve(4 * backend.page) for _ in range(3))
    addresses = np.concatenate([backend.addresses(start, [0, 2, 3]) for start in starts])
    handles = backend.driver.create(addresses)
    backend.driver.map(addresses, handles)
    backend.driver.set_access(addresses)
    backend.write(addresses, range(10, 19))
    if backend.holds_content:
        assert backend.read(addresses) == list(range(10, 19))
    backend.driver.unmap(addresses)
    backend.driver.release(handles)
    backend.check_used(0)


def test_empty_arrays_are_fine(backend: Backend) -> None:
    backend.driver.reserve(backend.page)
    assert len(backend.driver.create(NOTHING)) == 0
    backend.driver.map(NOTHING, NOTHING)
    backend.driver.set_access(NOTHING)
    backend.driver.unmap(NOTHING)
    backend.driver.release(NOTHING)


def test_exported_pages_can_be_opened_elsewhere(backend: Backend) -> None:
    start = backend.driver.reserve(4 * backend.page)
    addresses, handles = backend.mapped(start, [2])
    if not backend.driver.capabilities.exportable:
        with pytest.raises(DriverError):
            backend.driver.export(int(handles[0]))
        return
    backend.write(addresses, [77])
    fd = backend.driver.export(int(handles[0]))
    try:
        assert not os.get_inheritable(fd)
        if backend.driver.capabilities.name == "host":
            assert os.pread(fd, 1, int(handles[0]) * backend.page) == bytes([77])
    finally:
        os.close(fd)


@pytest.mark.parametrize("nbytes", [0, -1, 1])
def test_a_range_is_whole_pages(backend: Backend, nbytes: int) -> None:
    with pytest.raises(DriverError, match="reserve"):
        backend.driver.reserve(nbytes * backend.page + (nbytes == 1))


def test_only_a_reserved_range_can_be_freed(backend: Backend) -> None:
    start = backend.driver.reserve(4 * backend.page)
    with pytest.raises(DriverError, match="free"):
        backend.driver.free(start + backend.page)
    backend.driver.free(start)
    with pytest.raises(DriverError, match="free"):
        backend.driver.free(start)


def test_close_gives_everything_back_and_may_be_called_again(backend: Backend) -> None:
    start = backend.driver.reserve(8 * backend.page)
    _, handles = backend.mapped(start, [0, 1, 5])
    backend.driver.map(backend.addresses(start, [6]), handles[:1])
    backend.driver.close()
    backend.driver.close()
    if backend.fake is not None:
        assert not backend.fake.handles
        assert not backend.fake.mapped
        assert not backend.fake.ranges
        assert backend.fake.retained == 0
