"""Mapping ahead, at moments of our choosing: no thread's timing is in the figures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from vattention.errors import OutOfMemoryError
from vattention.kv.manager import KVManager


class Ahead:
    """A `KVManager` that does what another does, but maps nothing ahead until `map_ahead`.

    Use `as_manager` where a manager is asked for.
    """

    def __init__(self, manager: KVManager) -> None:
        self._manager = manager
        self._wants: dict[int, tuple[int, int]] = {}

    @property
    def as_manager(self) -> KVManager:
        return cast(KVManager, self)  # everything that is not here is the other's

    def __getattr__(self, name: str) -> Any:
        return getattr(self._manager, name)

    def prefetch(self, wants: Sequence[tuple[int, int, int]]) -> None:
        """Keep in mind what the next forward will need."""
        self._wants = {slot: (start, end) for slot, start, end in wants}

    def release(self, slot: int, token_ids: Sequence[int] | None = None) -> None:
        self._wants.pop(slot, None)
        self._manager.release(slot, token_ids)

    def held_nbytes(self) -> int:
        """All memory mapped for running sequences, with what is mapped ahead for their next forward.

        It is what stays mapped once everything that the manager calls warm has been dropped, which it is by this.
        """
        self.map_ahead()
        self._manager.drop_warm()
        return self._manager.accounts().mapped_nbytes

    def map_ahead(self) -> None:
        """Provide now, as far as there is memory, what the mapper would have provided during the latest forward."""
        try:
            for slot, (start, end) in self._wants.items():
                self._manager.ensure(slot, start, end)
        except OutOfMemoryError:
            pass
        finally:
            self._wants = {}
