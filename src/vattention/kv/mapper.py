"""One persistent thread that maps memory for the next iterations while the model computes this one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from vattention.errors import DriverError, OutOfMemoryError

Want = tuple[int, int, int, int]
"""Slot, start, end, tenancy: memory for tokens [start, end) of the slot's present owner."""


class Mapper:
    """Runs `provide(slot, start, end, tenancy)` for everything submitted, in order, on its own thread.

    Mapping ahead is an optimisation: whoever needs the memory asks for it again and will see the same error, so an
    iteration's wants end where memory is short or the driver refuses. Any other failure is kept and raised by the
    next `submit`.
    """

    def __init__(self, provide: Callable[[int, int, int, int], None]) -> None:
        self._provide = provide
        self._wants: list[Want] = []
        self._failure: BaseException | None = None
        self._wake = threading.Condition()
        self._closed = False
        self._busy = False
        self._thread = threading.Thread(target=self._run, name="vattention-mapper", daemon=True)
        self._thread.start()

    def submit(self, wants: Sequence[Want]) -> None:
        """Replace what is still queued: an older iteration's wants are worth nothing now."""
        with self._wake:
            if self._failure is not None:
                raise self._failure
            self._wants = list(wants)
            self._wake.notify_all()

    def wait_idle(self) -> None:
        """Block until everything submitted is done."""
        with self._wake:
            self._wake.wait_for(lambda: not self._busy and not self._wants)

    def close(self) -> None:
        with self._wake:
            self._closed = True
            self._wants = []
            self._wake.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._wake:
                self._busy = False
                self._wake.notify_all()
                self._wake.wait_for(lambda: self._closed or self._wants)
                if self._closed:
                    return
                wants, self._wants = self._wants, []
                self._busy = True
            try:
                for want in wants:
                    self._provide(*want)
            except (OutOfMemoryError, DriverError):
                continue
            except BaseException as error:
                with self._wake:
                    self._failure = error
