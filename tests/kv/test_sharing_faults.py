"""Each driver call of whatever shares memory fails once, in every way: nothing is lost, and trying again works."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.kv.contents import FULL, PAGE, check, compute, recount, sharing_manager
from tests.memory.faulty import METHODS, FaultyDriver
from vattention.errors import DriverError, OutOfMemoryError
from vattention.memory.host import HostDriver

PROMPT = list(range(100, 141))


class Scene:
    """A live sequence that shares with a parked one, another parked one, and a fork that went back."""

    def __init__(self) -> None:
        self.driver = FaultyDriver(HostDriver(PAGE))
        self.cache = cache = sharing_manager(self.driver, specs=FULL, num_slots=5, num_rows=6)
        self.holds: dict[int, list[int]] = {}
        self.parked = [1, *PROMPT]
        for tokens in (PROMPT, self.parked):
            slot = cache.take(tokens).slot
            compute(cache, slot, tokens, 0, specs=FULL)
            cache.release(slot, tokens)
        self.start([*PROMPT[:30], 7, 8])
        slot = self.start([*PROMPT[:30], 9])
        self.child = cache.fork(slot, 31)
        cache.trim(self.child, 22)
        self.holds[self.child] = PROMPT[:22]

    def start(self, tokens: list[int]) -> int:
        placement = self.cache.take(tokens)
        compute(self.cache, placement.slot, tokens, placement.num_cached_tokens, specs=FULL)
        self.holds[placement.slot] = tokens
        return placement.slot

    def check(self) -> None:
        recount(self.cache)
        for slot, tokens in self.holds.items():
            check(self.cache, slot, tokens, specs=FULL)
        for record in self.cache._table.parked():
            check(self.cache, record.index, record.tokens, specs=FULL)

    def close(self) -> None:
        for slot in self.holds:
            self.cache.release(slot)
        self.cache.drop_warm()
        assert self.cache.accounts().mapped_nbytes == 0
        self.cache.close()


def hit(scene: Scene) -> None:
    placement = scene.cache.take([*PROMPT[:38], 1])
    assert placement.num_cached_tokens in (0, 38)
    scene.holds[placement.slot] = [*PROMPT[:38], 1][: placement.num_cached_tokens]


def miss(scene: Scene) -> None:
    scene.holds[scene.cache.take([99]).slot] = []


def fork(scene: Scene) -> None:
    slot = min(scene.holds)
    scene.holds[scene.cache.fork(slot, 31)] = scene.holds[slot][:31]


def own(scene: Scene) -> None:
    compute(scene.cache, scene.child, [*PROMPT[:22], 5, 6, 7], 22, specs=FULL)
    scene.holds[scene.child] = [*PROMPT[:22], 5, 6, 7]


def trim(scene: Scene) -> None:
    scene.cache.trim(scene.child, 17)
    scene.holds[scene.child] = PROMPT[:17]


def release(scene: Scene) -> None:
    scene.cache.release(scene.child)
    del scene.holds[scene.child]


def grow_under_pressure(scene: Scene) -> None:
    scene.cache.set_limit(scene.cache.accounts().live_nbytes + 4 * PAGE)
    slot = min(scene.holds)
    tokens = [*scene.holds[slot], 3]
    compute(scene.cache, slot, tokens, len(tokens) - 1, specs=FULL)
    scene.holds[slot] = tokens


def drop_warm(scene: Scene) -> None:
    scene.cache.drop_warm()


OPERATIONS: list[Callable[[Scene], None]] = [hit, miss, fork, own, trim, release, grow_under_pressure, drop_warm]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_whatever_fails_nothing_is_lost(operation: Callable[[Scene], None], method: str) -> None:
    for nth in range(1, 20):
        fired = False
        for shortage, half_way in ((False, True), (True, False)):
            scene = Scene()
            scene.driver.fail(method, nth, half_way=half_way, shortage=shortage)
            try:
                operation(scene)
            except (DriverError, OutOfMemoryError):
                scene.check()
                operation(scene)
            fired |= not scene.driver._countdown
            scene.driver.heal()
            scene.check()
            scene.close()
        if not fired:
            return
    raise AssertionError(f"{operation.__name__} calls {method} more than {nth} times")
