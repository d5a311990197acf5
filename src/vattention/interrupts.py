"""Ctrl-C between two steps of the engine, and never in the middle of one. A leaf."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def held_interrupts() -> Iterator[Callable[[], None]]:
    """Inside the block SIGINT waits until the function that it yields is called, or the block ends. A second one
    that comes while the first waits does not.

    An exception in the middle of a step would leave the engine half-way. On other threads than the main one, which
    no signal interrupts, nothing is held.
    """
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield lambda: None
        return
    handle = before
    held: list[FrameType | None] = []

    def hold(number: int, frame: FrameType | None) -> None:
        held.append(frame)
        if len(held) > 1:
            let_through()

    def let_through() -> None:
        if held:
            frame = held[-1]
            held.clear()
            handle(signal.SIGINT, frame)

    signal.signal(signal.SIGINT, hold)
    try:
        yield let_through
    finally:
        signal.signal(signal.SIGINT, before)
        let_through()
