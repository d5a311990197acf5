"""The requests that run or wait, from their start to the end of their last sequence."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator

from vattention.engine.request import Request
from vattention.engine.scheduler import Scheduler
from vattention.engine.sequence import Sequence
from vattention.engine.stats import Stats


class Requests:
    """By their ids; what begins here is in the scheduler's queues until it ends."""

    def __init__(self, scheduler: Scheduler, stats: Stats) -> None:
        self._scheduler = scheduler
        self._stats = stats
        self._by_id: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._by_id.values())

    def get(self, request_id: str) -> Request | None:
        return self._by_id.get(request_id)

    def start(self, request: Request) -> None:
        """Queue its first sample, from which the others fork once the prompt is computed."""
        self._by_id[request.id] = request
        first, *request.unforked = request.sequences
        self._scheduler.add(first)

    def go_on(self, request: Request) -> None:
        """Queue what is unfinished of a request that was running elsewhere."""
        self._by_id[request.id] = request
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._scheduler.add(sequence)

    def forget(self, request: Request) -> None:
        """Give back what its sequences have, as they are: it neither ends nor goes on here."""
        for sequence in request.sequences:
            if sequence.finish_reason is None:
                self._scheduler.remove(sequence)
        del self._by_id[request.id]

    def end(self, sequences: list[Sequence], reason: str, error: Exception | None = None) -> list[Sequence]:
        """Finish sequences before their time, and with them those that cannot go on without: samples that were to
        fork from them, the other beams of a search. Returns all of them.
        """
        others = (other for sequence in sequences for other in sequence.request.take_dependants())
        sequences = list(dict.fromkeys([*sequences, *others]))
        for sequence in sequences:
            sequence.finish(reason)
            if error is not None:
                sequence.request.error = error
        self.retire(sequences)
        return sequences

    def retire(self, sequences: Iterable[Sequence]) -> None:
        """Release finished sequences, and requests with the last of their sequences."""
        for sequence in sequences:
            self._scheduler.remove(sequence)
            request = sequence.request
            if request.finished and self._by_id.pop(request.id, None) is not None:
                request.metrics.finished_time = time.monotonic()
                self._stats.finished(request)
