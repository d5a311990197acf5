"""What callers on other threads want done on the engine's thread, between two steps."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Order:
    """One thing to do.

    Attributes:
        work: does it.
        promise: of what comes of it, for somebody who waits for that; None where an error means that the engine is
            broken.
    """

    work: Callable[[], Any]
    promise: Future[Any] | None = None

    def carry_out(self) -> None:
        """Do it, unless who waited for it has gone."""
        if self.promise is None:
            self.work()
        elif self.promise.set_running_or_notify_cancel():
            try:
                self.promise.set_result(self.work())
            except Exception as error:
                self.promise.set_exception(error)

    def refuse(self, error: Exception) -> None:
        """It will not be done."""
        if self.promise is not None and self.promise.set_running_or_notify_cancel():
            self.promise.set_exception(error)
