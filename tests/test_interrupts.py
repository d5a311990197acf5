from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from vattention.interrupts import held_interrupts


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def counted() -> Iterator[list[int]]:
    """A handler of the user's own, which raises nothing."""
    calls: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        calls.append(number)

    before = signal.signal(signal.SIGINT, note)
    yield calls
    assert signal.signal(signal.SIGINT, before) is note


def test_an_interrupt_waits_until_it_is_let_through() -> None:
    with held_interrupts() as let_through:
        let_through()
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            let_through()
        let_through()


def test_at_the_end_it_waits_no_longer() -> None:
    ended = []

    def work() -> None:
        with held_interrupts():
            interrupt()
            ended.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert ended


def test_a_second_one_does_not_wait() -> None:
    with held_interrupts():
        interrupt()
        with pytest.raises(KeyboardInterrupt):
            interrupt()


def test_the_users_own_handler_is_called_instead(counted: list[int]) -> None:
    with held_interrupts() as let_through:
        interrupt()
        assert counted == []
        let_through()
        assert counted == [signal.SIGINT]
        interrupt()
    assert counted == [signal.SIGINT] * 2


def test_other_threads_hold_nothing(counted: list[int]) -> None:
    def work() -> None:
        with held_interrupts() as let_through:
            interrupt()
            let_through()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counted == [signal.SIGINT]
