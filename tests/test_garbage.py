from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import pytest

import vattention
from vattention.garbage import loading, no_collections, staying


class Cycle:
    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def collector_as_it_was() -> Iterator[None]:
    assert gc.isenabled()
    gc.unfreeze()  # what commands run by other tests left
    yield
    gc.enable()
    gc.unfreeze()


@pytest.fixture
def collections() -> Iterator[list[str]]:
    """Beginnings and ends of collections since the test began."""
    seen: list[str] = []

    def note(phase: str, _: dict[str, int]) -> None:
        seen.append(phase)

    gc.callbacks.append(note)
    yield seen
    gc.callbacks.remove(note)


def generation_of(thing: object) -> int | None:
    return next((i for i in range(3) if any(other is thing for other in gc.get_objects(generation=i))), None)


@pytest.mark.parametrize("block", [no_collections, staying])
def test_nothing_is_collected_inside(
    block: Callable[[], AbstractContextManager[None]], collections: list[str]
) -> None:
    with block():
        cycles = [Cycle() for _ in range(5 * gc.get_threshold()[0])]
    assert not collections
    assert len(cycles) == 5 * gc.get_threshold()[0]
    assert gc.isenabled()


def test_what_comes_is_old_at_once_and_still_collected() -> None:
    with no_collections():
        cycle = Cycle()
    assert generation_of(cycle) == 2
    gone = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert gone() is None


def test_before_loading_what_nobody_refers_to_goes() -> None:
    cycle = Cycle()
    gone = weakref.ref(cycle)
    del cycle
    with loading():
        assert gone() is None
        assert not gc.isenabled()


def test_a_public_name_is_imported_once() -> None:
    vars(vattention).pop("SamplingParams", None)
    first = vattention.SamplingParams
    assert vars(vattention)["SamplingParams"] is first


def test_what_stays_is_not_searched() -> None:
    with staying():
        cycle = Cycle()
    assert generation_of(cycle) is None
    gone = weakref.ref(cycle)
    del cycle
    gc.collect()
    assert gone() is not None


def test_what_somebody_froze_stays_frozen() -> None:
    cycle = Cycle()
    gc.freeze()
    with no_collections():
        pass
    assert generation_of(cycle) is None


def test_a_collector_that_is_off_stays_off() -> None:
    gc.disable()
    with no_collections():
        assert not gc.isenabled()
    assert not gc.isenabled()


def failing() -> Cycle:
    raise ValueError("oh")


def test_an_error_turns_it_on_again() -> None:
    cycle = None
    with pytest.raises(ValueError, match="oh"), staying():
        cycle = failing()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert cycle is None
