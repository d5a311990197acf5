"""The engine on a thread of its own, for callers on an event loop.

The thread sleeps while there is nothing to do. What callers want done on it enters as orders, which it carries out
between two steps, first come first served; outputs leave through one stream per request. Outputs are cumulative, so
a stream keeps the newest only: a slow reader costs no memory.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from vattention.config import EngineConfig
from vattention.core import Prompt
from vattention.engine.engine import LLMEngine
from vattention.engine.orders import Order
from vattention.engine.stats import EngineStatistics, StatsListener
from vattention.engine.stream import RequestStream, Streams
from vattention.errors import EngineStoppedError
from vattention.garbage import loading
from vattention.model.tokenizer import Tokenizer
from vattention.outputs import RequestOutput
from vattention.sampling_params import SamplingParams

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

IDLE_KEEP_S, IDLE_KEEP_CACHED_S = 10.0, 600.0
"""Warm memory goes back to the system after so long without a request; the latter where it is a prefix cache."""

IDLE_LOOK_S = 5.0
"""How often an idle engine that still keeps memory looks whether the machine can spare it."""


class AsyncEngine:
    """Serves requests from any number of tasks on one engine thread."""

    def __init__(self, engine: LLMEngine) -> None:
        self._engine = engine
        self._wake = threading.Condition()
        self._orders: deque[Order] = deque()
        self._streams = Streams(engine.config.max_num_seqs, engine.config.max_queue)
        self._ids = itertools.count()
        self._refusing = False
        self._stopping = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vattention-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_config(cls, config: EngineConfig) -> AsyncEngine:
        """Load the model and start the engine's thread. Blocks; raises as `LLMEngine.from_config`."""
        with loading():
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
        return not self._refusing and self._failure is None and self._thread.is_alive()

    def add_listener(self, listener: StatsListener) -> None:
        self._engine.add_listener(listener)

    def statistics(self) -> EngineStatistics:
        return self._engine.statistics()

    async def make_ready(self, params: SamplingParams) -> None:
        """Read beforehand what `submit` would hold up the event loop with: the first grammar takes seconds.

        Raises:
            RequestError: this model cannot follow grammars.
        """
        if (read := self._engine.to_read(params)) is not None:
            await asyncio.to_thread(read)

    def submit(
        self, prompt: Prompt, params: SamplingParams, *, request_id: str | None = None, priority: int = 0
    ) -> RequestStream:
        """Start a request. Must be called on an event loop.

        Raises:
            RequestError: the request cannot be served as it is.
            QueueFullError: as many requests wait as may.
            EngineStoppedError: the engine drains, has stopped or died.
        """
        self._check_serving()
        request = self._engine.prepare(request_id or self._new_id(), prompt, params, priority)
        with self._wake:
            stream = self._open(request.id)
            self._give(Order(partial(self._engine.start, request)))
        return stream

    async def generate(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None, *, priority: int = 0
    ) -> AsyncIterator[RequestOutput]:
        """`submit` as an async generator, as vLLM's `AsyncLLM.generate`. Raises as `submit`."""
        await self.make_ready(params)
        stream = self.submit(prompt, params, request_id=request_id, priority=priority)
        try:
            async for output in stream:
                yield output
        finally:
            await stream.aclose()

    def abort(self, request_id: str) -> None:
        """Stop a request and end its stream; its memory is free before the next step. An unknown id is no error."""
        with self._wake:
            self._streams.end(request_id)
            self._give(Order(partial(self._engine.abort, request_id)))

    async def suspend(self, request_id: str, path: str | Path) -> None:
        """Write a running or waiting request to a file and end it here, so that `resume` goes on with it.

        Its stream ends without a finished output. Works while the engine drains, too. No step is computed while the
        file is written. Whoever is cancelled meanwhile finds the request either suspended or running on.

        Raises:
            RequestError: no such request runs, or it is a beam search.
            OSError, DriverError: the file cannot be written; the request runs on.
            EngineStoppedError: the engine has stopped or died.
        """
        await self._have_done(partial(self._suspend, request_id, path))

    async def suspend_finished(self, output: RequestOutput, path: str | Path, cache_salt: str = "") -> None:
        """Write a finished conversation to a file, with what the prefix cache still has of it.

        Raises:
            OSError, DriverError: the file cannot be written.
            OutOfMemoryError: no slot is free to look into the cache.
            EngineStoppedError: the engine has stopped or died.
        """
        await self._have_done(partial(self._engine.suspend_finished, output, path, cache_salt))

    async def resume(self, path: str | Path, *, request_id: str | None = None, priority: int = 0) -> RequestStream:
        """Take in a file of `suspend` or `suspend_finished`: a request that was running goes on with the next step.

        Returns:
            The request's stream. It begins with the conversation as it was suspended, or with something newer.

        Raises:
            OSError: the file cannot be read.
            RequestError: it is damaged, of another model, or does not fit this engine's context.
            OutOfMemoryError: no slot or no memory is free for what goes into the prefix cache.
            QueueFullError, EngineStoppedError: as `submit`.
        """
        with self._wake:
            stream = self._open(request_id or self._new_id())
        try:
            await self._have_done(partial(self._resume, stream.request_id, path, priority))
        except BaseException:
            self._leave(stream)
            raise
        return stream

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

    def _new_id(self) -> str:
        return f"request-{next(self._ids)}"

    def _open(self, request_id: str) -> RequestStream:
        self._check_serving()
        return self._streams.open(request_id, self._leave)

    def _leave(self, stream: RequestStream) -> None:
        """Abort the request of a stream that nobody reads any more."""
        with self._wake:
            if stream in self._streams:
                self.abort(stream.request_id)

    def _give(self, order: Order) -> None:
        """Have the engine's thread carry out an order."""
        self._orders.append(order)
        self._wake.notify_all()

    async def _have_done(self, work: Callable[[], Result]) -> Result:
        """Have the engine's thread do something, and wait for what comes of it."""
        promise: Future[Result] = Future()
        with self._wake:
            if self._stopping or self._failure is not None or not self._thread.is_alive():
                raise self._stopped()
            self._give(Order(work, promise))
        return await asyncio.wrap_future(promise)

    def _suspend(self, request_id: str, path: str | Path) -> None:
        """The engine's thread's part of `suspend`."""
        self._engine.suspend(request_id, path)
        with self._wake:
            self._streams.end(request_id)

    def _resume(self, request_id: str, path: str | Path, priority: int) -> None:
        """The engine's thread's part of `resume`."""
        output = self._engine.resume(path, request_id, priority)
        with self._wake:
            self._streams.deliver(output)

    def _stopped(self) -> EngineStoppedError:
        died = self._failure is not None
        error = EngineStoppedError("the engine has died" if died else "the engine has been shut down")
        error.__cause__ = self._failure
        return error

    def _check_serving(self) -> None:
        if self._failure is not None:
            raise self._stopped()
        if self._refusing:
            raise EngineStoppedError("the engine is shutting down and takes no more requests")
        if not self._thread.is_alive():
            raise EngineStoppedError(
                "the engine runs in the process that this one was forked from; load the model in the process that "
                "uses it, or start processes with the method 'spawn'"
            )

    def _run(self) -> None:
        try:
            while self._take_orders():
                outputs = self._engine.step()
                with self._wake:
                    for output in outputs:
                        self._streams.deliver(output)
        except BaseException as error:
            logger.exception("the engine died")
            self._failure = error
        finally:
            with self._wake:
                self._refusing = True
                self._streams.fail(self._failure)
                while self._orders:
                    self._orders.popleft().refuse(self._stopped())
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
            num_orders = len(self._orders)
        for _ in range(num_orders):
            self._orders.popleft().carry_out()
        return True

    def _has_work(self) -> bool:
        return bool(self._stopping or self._orders or self._engine.has_unfinished_requests())
