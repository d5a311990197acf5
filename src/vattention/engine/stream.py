"""What a reader on an event loop sees of one request, while the engine's thread computes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Self

from vattention.errors import EngineStoppedError, QueueFullError
from vattention.outputs import RequestOutput


class RequestStream:
    """The outputs of one request, as an async iterator that always yields the newest.

    It ends behind an output that is `finished`. A request that is suspended or aborted by others ends it without
    one: the last output is then what came before that. Leaving it early with `aclose` aborts the request and frees
    its memory.

    Made on the event loop that reads it. `deliver`, `end` and `fail` are for any thread.

    Args:
        leave: called on the loop when the reader goes before the end.
    """

    def __init__(self, request_id: str, leave: Callable[[RequestStream], None]) -> None:
        self.request_id = request_id
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._latest: RequestOutput | None = None
        self._ended = False
        self._failure: BaseException | None = None
        self._finished = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RequestOutput:
        if self._finished:
            raise StopAsyncIteration
        try:
            await self._news.wait()
        except asyncio.CancelledError:
            await self.aclose()
            raise
        if self._latest is None:
            self._finished = True
            if self._ended:
                raise StopAsyncIteration
            raise EngineStoppedError("the engine stopped before the request ended") from self._failure
        output, self._latest = self._latest, None
        self._finished = output.finished
        if not self._ended:
            self._news.clear()
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has finished."""
        if not self._finished:
            self._finished = True
            self._leave(self)

    def deliver(self, output: RequestOutput) -> None:
        """There is a newer output."""
        self._on_loop(self._take, output)

    def end(self) -> None:
        """There will be no more outputs, and nothing is wrong."""
        self._on_loop(self._close)

    def fail(self, error: BaseException | None) -> None:
        """The engine has stopped; with an error if it died."""
        self._on_loop(self._break, error)

    def _take(self, output: RequestOutput) -> None:
        self._latest = output
        self._news.set()

    def _close(self) -> None:
        self._ended = True
        self._news.set()

    def _break(self, error: BaseException | None) -> None:
        self._failure = error
        self._latest = None
        self._news.set()

    def _on_loop(self, function: Callable[..., None], *arguments: object) -> None:
        """Call on the reader's event loop, unless that loop has gone with its readers."""
        try:
            self._loop.call_soon_threadsafe(function, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise


class Streams:
    """The streams of all requests that wait or run. Not thread-safe.

    Args:
        max_num_seqs: requests beyond so many wait; one that starts at once is never refused.
        max_queue: most that wait.
    """

    def __init__(self, max_num_seqs: int, max_queue: int) -> None:
        self._max_num_seqs = max_num_seqs
        self._max_queue = max_queue
        self._streams: dict[str, RequestStream] = {}
        self._mean_duration_s = 1.0

    def __len__(self) -> int:
        return len(self._streams)

    def __contains__(self, stream: RequestStream) -> bool:
        """Whether its request has not ended; the id may be another request's by now."""
        return self._streams.get(stream.request_id) is stream

    def open(self, request_id: str, leave: Callable[[RequestStream], None]) -> RequestStream:
        """The stream of a request to come. Must be called on its reader's event loop.

        Raises:
            ValueError: the id is in use.
            QueueFullError: as many requests wait as may.
        """
        if request_id in self._streams:
            raise ValueError(f"request id {request_id!r} is in use")
        excess = len(self._streams) - self._max_num_seqs
        if excess >= self._max_queue:
            raise QueueFullError(
                f"{excess} requests wait already (max_queue={self._max_queue})",
                retry_after_s=max(1.0, self._mean_duration_s),
            )
        stream = self._streams[request_id] = RequestStream(request_id, leave)
        return stream

    def deliver(self, output: RequestOutput) -> None:
        """Give an output to whoever reads it; a finished one ends its stream."""
        stream = self._streams.get(output.request_id)
        if stream is None:
            return
        if output.finished:
            del self._streams[output.request_id]
            self._learn_duration(output)
        stream.deliver(output)

    def end(self, request_id: str) -> None:
        """End a stream without a finished output, if there is one."""
        stream = self._streams.pop(request_id, None)
        if stream is not None:
            stream.end()

    def fail(self, error: BaseException | None) -> None:
        """The engine has stopped: end all streams with an error."""
        while self._streams:
            self._streams.popitem()[1].fail(error)

    def _learn_duration(self, output: RequestOutput) -> None:
        metrics = output.metrics
        if metrics is not None and metrics.finished_time is not None:
            self._mean_duration_s += 0.1 * (metrics.finished_time - metrics.arrival_time - self._mean_duration_s)
