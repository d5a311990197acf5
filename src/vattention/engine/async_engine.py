"""The engine on a thread of its own, for callers on an event loop.

The thread sleeps while there is nothing to do. Requests enter through an inbox, outputs leave through one stream
per request. Outputs are cumulative, so a stream keeps the newest only: a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import AsyncIterator, Mapping
from typing import Any, Self

from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.engine import LLMEngine
from vattention.engine.request import Request
from vattention.engine.stats import EngineStatistics, StatsListener
from vattention.errors import EngineStoppedError, QueueFullError
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

IDLE_KEEP_S, IDLE_KEEP_CACHED_S = 10.0, 600.0
"""Warm memory goes back to the system after so long without a request; the latter where it is a prefix cache."""

IDLE_LOOK_S = 5.0
"""How often an idle engine that still keeps memory looks whether the machine can spare it."""


class RequestStream:
    """The outputs of one request, as an async iterator that always yields the newest.

    Leaving it early with `aclose` aborts the request and frees its memory.
    """

    def __init__(self, engine: AsyncEngine, request_id: str) -> None:
        self.request_id = request_id
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._news = asyncio.Event()
        self._latest: RequestOutput | None = None
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
        self._news.clear()
        if self._latest is None:
            self._finished = True
            raise EngineStoppedError("the engine stopped before the request ended") from self._failure
        output, self._latest = self._latest, None
        self._finished = output.finished
        return output

    async def aclose(self) -> None:
        """Abort the request unless it has finished."""
        if not self._finished:
            self._finished = True
            self._engine.abort(self.request_id)

    def _deliver(self, output: RequestOutput) -> None:
        self._latest = output
        self._news.set()

    def _fail(self, error: BaseException | None) -> None:
        self._failure = error
        self._latest = None
        self._news.set()


class AsyncEngine:
    """Serves requests from any number of tasks on one engine thread."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._inbox: list[Request] = []
        self._aborts: list[str] = []
        self._streams: dict[str, RequestStream] = {}
        self._ids = itertools.count()
        self._refusing = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._mean_duration_s = 1.0
        self._thread = threading.Thread(target=self._run, name="vattention-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        """Load the model and start the engine's thread. Blocks; raises as `LLMEngine.from_config`."""
        return cls(LLMEngine.from_config(config))

    @property
    def config(self) -> EngineConfig:
        return self._engine.config

    @property
    def model_name(self) -> str:
        return self._engine.model_name

    @property
    def max_model_len(self) -> int:
        return self._engine.max_model_len

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._engine.tokenizer

    @property
    def default_sampling(self) -> Mapping[str, Any]:
        return self._engine.default_sampling

    @property
    def healthy(self) -> bool:
        """Whether requests are served; False once the engine drains, stops or has died."""
        return not self._refusing and self._failure is None

    def add_listener(self, listener: StatsListener) -> None:
        self._engine.add_listener(listener)

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

    def submit(
        self,
        prompt: Prompt,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Start a request. Must be called on an event loop.

        Raises:
            RequestError: the request cannot be served as it is.
            QueueFullError: as many requests wait as may.
            EngineStoppedError: the engine drains, has stopped or died.
        """
        self._check_serving()
        request = self._engine.prepare(request_id or f"request-{next(self._ids)}", prompt, params, priority)
        stream = RequestStream(self, request.id)
        with self._wake:
            self._check_serving()
            if request.id in self._streams:
                raise ValueError(f"request id {request.id!r} is in use")
            # Those beyond the free slots wait; a request that starts at once is never refused.
            excess = len(self._streams) - self.config.max_num_seqs
            if excess >= self.config.max_queue:
                raise QueueFullError(
                    f"{excess} requests wait already (max_queue={self.config.max_queue})",
                    retry_after_s=max(1.0, self._mean_duration_s),
                )
            self._streams[request.id] = stream
            self._inbox.append(request)
            self._wake.notify_all()
        return stream

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
    ) -> AsyncIterator[RequestOutput]:
        """`submit` as an async generator, as vLLM's `AsyncLLM.generate`. Raises as `submit`."""
        stream = self.submit(prompt, params, request_id=request_id, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    def abort(self, request_id: str) -> None:
        """Stop a request; its memory is free before the next step. An unknown id is no error."""
        with self._wake:
            self._streams.pop(request_id, None)
            self._aborts.append(request_id)
            self._wake.notify_all()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new requests, and wait until the running ones have finished or the time is over."""
        self._refusing = True
        deadline = time.monotonic() + timeout_s
        while self._streams and self._failure is None and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    def shutdown(self) -> None:
        """Stop the thread, end all streams, give all memory back. Calling it again does nothing."""
        self._refusing = True
        with self._wake:
            self._stopping = True
            self._wake.notify_all()
        self._thread.join()

    def _check_serving(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError("the engine has died") from self._failure
        if self._refusing:
            raise EngineStoppedError("the engine is shutting down and takes no more requests")

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._deliver(self._engine.step())
        except BaseException as error:
            logger.exception("the engine died")
            self._failure = error
        finally:
            with self._wake:
                self._refusing = True
                streams, self._streams = self._streams, {}
            for stream in streams.values():
                _on_loop_of(stream, stream._fail, self._failure)
            self._engine.close()

    def _sleep(self) -> None:
        """Wait for work; meanwhile keep no memory that others need, and in the end none."""
        manager = self._engine.manager
        until = time.monotonic() + (IDLE_KEEP_CACHED_S if self.config.caches_prefixes else IDLE_KEEP_S)
        while (left := until - time.monotonic()) > 0:
            if self._wake.wait_for(self._has_work, timeout=min(left, IDLE_LOOK_S)):
                return
            manager.refresh_limit()
        manager.drop_warm()
        self._wake.wait_for(self._has_work)

    def _take_orders(self) -> bool:
        """Sleep until there is work, then take in what has come. False once the engine is to stop."""
        with self._wake:
            self._sleep()
            if self._stopping:
                return False
            arrived, self._inbox = self._inbox, []
            aborted, self._aborts = self._aborts, []
        for request in arrived:
            self._engine.start(request)
        for request_id in aborted:
            self._engine.abort(request_id)
        return True

    def _has_work(self) -> bool:
        return bool(self._stopping or self._inbox or self._aborts or self._engine.has_unfinished_requests())

    def _deliver(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if output.finished:
                with self._wake:
                    self._streams.pop(output.request_id, None)
                self._learn_duration(output)
            _on_loop_of(stream, stream._deliver, output)

    def _learn_duration(self, output: RequestOutput) -> None:
        metrics = output.metrics
        if metrics is not None and metrics.finished_time is not None:
            self._mean_duration_s += 0.1 * (metrics.finished_time - metrics.arrival_time - self._mean_duration_s)


def _on_loop_of(stream: RequestStream, function: Any, argument: object) -> None:
    """Call on the stream's event loop, unless that loop has gone with its readers."""
    try:
        stream._loop.call_soon_threadsafe(function, argument)
    except RuntimeError:
        if not stream._loop.is_closed():
            raise
