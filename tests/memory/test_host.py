"""Host memory as the kernel sees it: blocks of the file, kernel mappings, forks, limits, failing system calls."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.memory.backends import Backend
from vattention.errors import ConfigError, DriverError, OutOfMemoryError
from vattention.memory import libc
from vattention.memory.driver import IntArray
from vattention.memory.host import HostDriver
from vattention.memory.pool import PagePool
from vattention.memory.region import Region

PAGE = os.sysconf("SC_PAGE_SIZE")

OWN = libc.MAP_PRIVATE | libc.MAP_ANONYMOUS | libc.MAP_FIXED


def kernel_mappings(name: str = "vattention") -> list[str]:
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if f"memfd:{name}" in line]


def status_nbytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def resident_nbytes() -> int:
    """Memory behind this process's mappings of the file; unlike RssShmem, exact on every kernel."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = "memfd:vattention" in line
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def at(*indices: int) -> IntArray:
    return np.array(indices, np.int64)


class Bench:
    """A region of 256 pages."""

    def __init__(self) -> None:
        self.driver = HostDriver()
        self.backend = Backend(self.driver, lambda: os.fstat(self.driver._file.fd).st_blocks * 512)
        self.pool = PagePool(self.driver, 256 * PAGE)
        self.region = Region(self.driver, self.pool, 256 * PAGE)

    def addresses(self, indices: IntArray) -> IntArray:
        return self.region.address + indices * PAGE

    def write(self, indices: IntArray, values: list[int]) -> None:
        self.backend.write(self.addresses(indices), values)

    def read(self, indices: IntArray) -> list[int]:
        return self.backend.read(self.addresses(indices))


@pytest.fixture
def bench() -> Iterator[Bench]:
    gc.collect()
    made = Bench()
    yield made
    made.driver.close()


def test_new_pages_are_zero_and_resident(bench: Bench) -> None:
    bench.region.commit(np.arange(64))
    bench.write(np.arange(64), [7] * 64)
    bench.region.unmap(np.arange(64))
    before = resident_nbytes()
    bench.region.commit(np.arange(64))
    assert resident_nbytes() - before == 64 * PAGE
    assert bench.read(np.arange(64)) == [0] * 64


def test_all_memory_is_back_after_the_last_page(bench: Bench) -> None:
    before = resident_nbytes()
    rng = np.random.default_rng(1)
    for _ in range(20):
        chosen = np.sort(rng.choice(128, 60, replace=False))
        bench.region.commit(chosen)
        bench.region.alias(chosen + 128, bench.region.pages(chosen))
        bench.backend.check_used(60)
        bench.region.unmap(chosen)
        bench.backend.check_used(60)
        bench.region.commit(chosen[::2].copy())
        bench.region.unmap(chosen + 128)
        bench.region.unmap(chosen[::2].copy())
        bench.backend.check_used(0)
    assert resident_nbytes() == before
    assert len(kernel_mappings()) == 1


def test_a_range_without_sharing_is_one_kernel_mapping(bench: Bench) -> None:
    bench.region.commit(np.arange(0, 256, 2))
    bench.region.unmap(np.arange(0, 256, 4))
    bench.region.commit(np.arange(1, 256, 2))
    bench.region.commit(np.arange(0, 256, 8))
    assert len(kernel_mappings()) == bench.driver.num_mappings == 1


def test_kernel_mappings_are_counted_exactly(bench: Bench) -> None:
    rng = np.random.default_rng(2)
    bench.region.commit(np.arange(100))
    for _ in range(60):
        free = bench.region.missing(np.arange(255))  # an alias on the last page counts one too many
        chosen = np.sort(rng.choice(free, min(len(free), 40), replace=False))
        bench.region.alias(chosen, bench.region.pages(rng.integers(0, 100, len(chosen))))
        assert len(kernel_mappings()) == bench.driver.num_mappings
        aliases = np.arange(100, 256)
        mapped = aliases[bench.region.pages(aliases) != 0]
        bench.region.unmap(np.sort(rng.choice(mapped, len(mapped) // 2, replace=False)))
        assert len(kernel_mappings()) == bench.driver.num_mappings
    run = np.arange(100, 256)
    bench.region.unmap(run[bench.region.pages(run) != 0])
    assert bench.driver.num_mappings == 1
    bench.region.alias(run[:50], bench.region.pages(np.arange(20, 70)))
    assert bench.driver.num_mappings == 3
    other = Region(bench.driver, bench.pool, 64 * PAGE)
    assert bench.driver.num_mappings == 4
    other.close()
    assert bench.driver.num_mappings == 3


def test_pages_that_outlive_their_home_leave_it_in_one_piece(bench: Bench) -> None:
    first, second, third = np.arange(1, 64), np.arange(64, 127), np.arange(192, 255)
    for _ in range(3):
        bench.region.commit(first)
        bench.region.alias(second, bench.region.pages(first))
        bench.region.unmap(first)
        bench.region.commit(first)  # its own pages are behind the second still
        bench.region.alias(third, bench.region.pages(first))
        assert len(kernel_mappings()) == bench.driver.num_mappings == 6
        for part in (first, second, third):
            bench.region.unmap(part)


def test_neighbours_in_memory_need_not_be_neighbours_in_the_file() -> None:
    driver = HostDriver()
    backend = Backend(driver, None)
    nbytes = 16 * PAGE
    starts = [driver.reserve(nbytes) for _ in range(32)]  # range k begins at page 17 k of the file
    lower = next(k for k in range(31) if starts[k] + nbytes in starts)  # the kernel places most side by side
    upper = starts.index(starts[lower] + nbytes)
    _, there = backend.mapped(starts[lower + 1], [0])
    _, here = backend.mapped(starts[upper], [2])
    backend.write(np.array([starts[lower + 1], starts[upper] + 2 * PAGE]), [1, 2])
    both = np.array([starts[upper] - PAGE, starts[upper]])  # each gets the page of the file 2 behind its home
    driver.map(both, np.concatenate((there, here)))
    driver.set_access(both)
    assert backend.read(both) == [1, 2]
    driver.close()


def test_sharing_stops_before_kernel_mappings_run_out(bench: Bench) -> None:
    bench.driver._capabilities = replace(bench.driver.capabilities, max_mappings=11)
    bench.region.commit(at(0, 10))
    page = bench.region.pages(at(10))
    for index in range(100, 110, 2):
        bench.region.alias(at(index), page)
    assert bench.driver.num_mappings == 11
    with pytest.raises(OutOfMemoryError, match=r"vm\.max_map_count"):
        bench.region.alias(at(110), page)
    assert bench.pool.references(page).tolist() == [6]
    bench.region.commit(at(110))  # at home: no mapping needed
    bench.region.unmap(at(100))
    bench.region.alias(at(120), page)
    assert len(kernel_mappings()) == bench.driver.num_mappings == 11


def test_a_forked_child_does_not_have_the_memory(bench: Bench) -> None:
    bench.region.commit(at(0, 1))
    bench.region.alias(at(9), bench.region.pages(at(0)))
    bench.write(at(0, 1), [3, 4])
    for index in (0, 9):
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            libc.bytes_at(bench.region.address + index * PAGE, 1)[0] = 99
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGSEGV
    assert bench.read(at(0, 1, 9)) == [3, 4, 3]


def test_what_a_forked_child_gives_back_stays_where_it_is(bench: Bench) -> None:
    bench.region.commit(at(0, 1))
    bench.region.alias(at(9), bench.region.pages(at(0)))
    bench.write(at(0, 1), [3, 4])
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with pytest.raises(DriverError, match=r"was forked; .*'spawn'"):
                bench.region.commit(at(2))
            with pytest.raises(DriverError, match="was forked"):
                bench.driver.reserve(PAGE)
            # Something of the child's own where the range was.
            libc.mmap(bench.region.address, PAGE, libc.PROT_READ_WRITE, OWN, -1, 0)
            bench.region.unmap(at(1, 9))
            bench.region.close()
            bench.driver.close()
            libc.bytes_at(bench.region.address, 1)[0] = 99
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0
    assert bench.read(at(0, 1, 9)) == [3, 4, 3]


def test_the_file_is_closed_in_programs_that_are_started(bench: Bench) -> None:
    assert not os.get_inheritable(bench.driver._file.fd)


def test_without_addresses_the_error_names_ulimit() -> None:
    program = """
        import resource
        from vattention.memory import open_driver
        from vattention.errors import OutOfMemoryError
        driver = open_driver("cpu")
        resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
        try:
            driver.reserve(2**40)
        except OutOfMemoryError as error:
            print(error.needed_nbytes, 0 < error.available_nbytes < 8 * 2**30, error)
        driver.reserve(2**20)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith(f"{2**40} True")
    assert "ulimit -v" in done.stdout


def test_more_addresses_than_the_machine_has_are_refused() -> None:
    driver = HostDriver()
    with pytest.raises(OutOfMemoryError, match="max_num_seqs"):
        driver.reserve(2**60)
    assert driver.reserve(2**20)
    driver.close()


@pytest.mark.parametrize("page_nbytes", [0, 1000, PAGE + 1, -PAGE])
def test_page_sizes_are_multiples_of_the_systems(page_nbytes: int) -> None:
    with pytest.raises(ConfigError, match="page_size"):
        HostDriver(page_nbytes)


def test_other_systems_get_one_clear_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ConfigError, match=r"needs Linux.*darwin"):
        HostDriver()


def test_large_pages_are_aligned_and_whole() -> None:
    page = 2 * 2**20
    driver = HostDriver(page)
    backend = Backend(driver, lambda: os.fstat(driver._file.fd).st_blocks * 512)
    start = driver.reserve(8 * page)
    assert start % page == 0
    addresses, handles = backend.mapped(start, [1, 2, 5])
    backend.write(addresses, [1, 2, 3])
    backend.check_used(3)
    assert backend.read(addresses) == [1, 2, 3]
    driver.unmap(addresses)
    driver.release(handles)
    backend.check_used(0)
    driver.close()


def test_a_forgotten_driver_gives_everything_back() -> None:
    gc.collect()
    before = kernel_mappings(), set(os.listdir("/proc/self/fd"))
    driver = HostDriver()
    region = Region(driver, PagePool(driver, 2**20), 2**20)
    region.commit(at(0, 4))
    assert len(kernel_mappings()) == len(before[0]) + 1
    del driver, region
    gc.collect()
    assert (kernel_mappings(), set(os.listdir("/proc/self/fd"))) == before


class Trap:
    """Lets the nth call of a system call fail, and counts."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str, nth: int, code: int) -> None:
        self.real = getattr(libc, name)
        self.calls, self.nth, self.code = 0, nth, code
        monkeypatch.setattr(libc, name, self)

    def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.calls == self.nth:
            raise OSError(self.code, os.strerror(self.code))
        return self.real(*arguments)


@pytest.mark.parametrize("code", [errno.ENOMEM, errno.EFAULT, errno.EIO])
@pytest.mark.parametrize("nth", [1, 2, 3])
@pytest.mark.parametrize("populates", [True, False])
def test_committing_that_fails_half_way_gives_its_memory_back(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, populates: bool, nth: int, code: int
) -> None:
    bench.driver._file._populates = populates
    bench.region.commit(at(5))
    bench.write(at(5), [1])
    trap = Trap(monkeypatch, "madvise" if populates else "allocate", nth, code)
    with pytest.raises(DriverError if code == errno.EIO else OutOfMemoryError):
        bench.region.commit(at(0, 1, 4, 6, 9))
    assert trap.calls == nth
    bench.backend.check_used(1)
    assert bench.pool.in_use_nbytes == PAGE
    bench.region.commit(at(0, 1, 4, 6, 9))
    assert bench.read(at(5, 6)) == [1, 0]


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_making_resident_is_all_or_nothing(bench: Bench, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    bench.region.commit(at(5))
    bench.write(at(5), [1])
    addresses = bench.addresses(at(0, 1, 6, 9))
    bench.driver.map(addresses, bench.driver.create(addresses))
    Trap(monkeypatch, "madvise", nth, errno.ENOMEM)
    with pytest.raises(OutOfMemoryError):
        bench.driver.set_access(bench.addresses(at(0, 1, 5, 9)))
    bench.backend.check_used(1)
    bench.driver.set_access(bench.addresses(at(0, 1, 5, 6, 9)))
    bench.backend.check_used(5)
    assert bench.read(at(0, 5)) == [0, 1]


@pytest.mark.parametrize("name", ["mmap", "madvise"])
@pytest.mark.parametrize("nth", [1, 2, 3, 4])
def test_sharing_that_fails_half_way_is_undone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str, nth: int
) -> None:
    bench.region.commit(np.arange(8))
    bench.write(np.arange(8), list(range(1, 9)))
    trap = Trap(monkeypatch, name, nth, errno.ENOMEM)
    with pytest.raises(OutOfMemoryError):
        bench.region.alias(at(20, 21, 30, 40, 50), bench.region.pages(at(2, 3, 4, 5, 5)))
    assert trap.calls >= nth
    monkeypatch.undo()
    bench.backend.check_used(8)
    assert len(kernel_mappings()) == bench.driver.num_mappings == 1
    bench.region.commit(at(20, 21))
    assert bench.read(at(2, 20, 21)) == [3, 0, 0]


@pytest.mark.parametrize("nth", [1, 2])
def test_unsharing_that_fails_half_way_is_undone(bench: Bench, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    bench.region.commit(np.arange(8))
    bench.write(np.arange(8), list(range(1, 9)))
    bench.region.alias(at(20, 30), bench.region.pages(at(2, 4)))
    mappings = bench.driver.num_mappings
    Trap(monkeypatch, "mmap", nth, errno.ENOMEM)
    with pytest.raises(OutOfMemoryError):
        bench.region.unmap(at(20, 30))
    monkeypatch.undo()
    assert bench.read(at(20, 30)) == [3, 5]
    assert len(kernel_mappings()) == bench.driver.num_mappings == mappings
    bench.region.unmap(at(20, 30))
    assert len(kernel_mappings()) == 1


@pytest.mark.parametrize("name", ["mmap", "madvise", "munmap"])
def test_reserving_that_fails_leaves_nothing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    gc.collect()
    driver = HostDriver(64 * 2**10)
    before = status_nbytes("VmSize")
    for nth in (1, 2):
        with monkeypatch.context() as patch:
            Trap(patch, name, nth, errno.ENOMEM)
            try:
                start = driver.reserve(2**32)
            except OutOfMemoryError:
                start = None
        if start is not None:
            driver.free(start)
        assert status_nbytes("VmSize") - before < 2**32
    driver.close()
