"""The null driver finds what breaks the contract."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.driver import IntArray
from vattention.memory.null import NullDriver

PAGE = 64


class Bench:
    """A range of 8 pages; 0 and 1 are mapped, a third page exists and is mapped nowhere."""

    def __init__(self) -> None:
        self.driver = NullDriver(PAGE, total_nbytes=4 * PAGE)
        self.start = self.driver.reserve(8 * PAGE)
        self.handles = self.driver.create(self.at(0, 1, 2))
        self.driver.map(self.at(0, 1), self.handles[:2])

    def at(self, *indices: int) -> IntArray:
        return self.start + np.array(indices, np.int64) * PAGE


VIOLATIONS: dict[str, tuple[Callable[[Bench], object], str]] = {
    "map over a mapped page": (lambda b: b.driver.map(b.at(1, 2), b.handles[[2, 2]]), "mapped at .* already"),
    "map an unknown handle": (lambda b: b.driver.map(b.at(2), np.array([99])), "99 does not exist"),
    "map at an odd address": (lambda b: b.driver.map(b.at(2) + 1, b.handles[2:]), "no multiple"),
    "map outside of the range": (lambda b: b.driver.map(b.at(8), b.handles[2:]), "not reserved"),
    "map too few handles": (lambda b: b.driver.map(b.at(2, 3), b.handles[2:]), "2 addresses for 1"),
    "map out of order": (lambda b: b.driver.map(b.at(3, 2), b.handles[[2, 2]]), "not sorted"),
    "map as int32": (lambda b: b.driver.map(b.at(2).astype(np.int32), b.handles[2:]), "not int64"),
    "unmap nothing": (lambda b: b.driver.unmap(b.at(1, 2)), "nothing is mapped"),
    "unmap twice in one call": (lambda b: b.driver.unmap(b.at(1, 1)), "stands there twice"),
    "access to nothing": (lambda b: b.driver.set_access(b.at(1, 2)), "nothing is mapped"),
    "release what is mapped": (lambda b: b.driver.release(b.handles[[2, 1]]), "still mapped"),
    "release an unknown handle": (lambda b: b.driver.release(np.array([99])), "99 does not exist"),
    "release twice in one call": (lambda b: b.driver.release(b.handles[[2, 2]]), "twice"),
    "free what is mapped": (lambda b: b.driver.free(b.start), "still mapped"),
}


@pytest.mark.parametrize("violation", VIOLATIONS)
def test_violations_are_refused_and_change_nothing(violation: str) -> None:
    bench = Bench()
    act, message = VIOLATIONS[violation]
    with pytest.raises(DriverError, match=message):
        act(bench)
    bench.driver.unmap(bench.at(0, 1))
    bench.driver.release(bench.handles)
    bench.driver.free(bench.start)
    assert bench.driver.memory_info().available_nbytes == 4 * PAGE


def test_a_released_handle_is_gone() -> None:
    bench = Bench()
    bench.driver.release(bench.handles[2:])
    with pytest.raises(DriverError, match="does not exist"):
        bench.driver.release(bench.handles[2:])


def test_memory_ends() -> None:
    bench = Bench()
    with pytest.raises(OutOfMemoryError) as caught:
        bench.driver.create(bench.at(4, 5))
    assert (caught.value.needed_nbytes, caught.value.available_nbytes) == (2 * PAGE, PAGE)
    bench.driver.create(bench.at(4))
