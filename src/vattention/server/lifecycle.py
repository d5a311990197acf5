"""From a socket to a drained shutdown: uvicorn around the application, with signals of our own."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import uvicorn

from vattention.errors import ConfigError
from vattention.server.app import ALL_ORIGINS, create_app
from vattention.server.engine import ServedEngine
from vattention.server.tools import CallFormat

logger = logging.getLogger(__name__)

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)

FLUSH_S = 5.0
"""How long responses may take to reach their clients once the engine has stopped."""

CLOSE_S = 5
"""How long requests may take to end once their connections are gone; none should take any time."""

TICK_S = 1.0

MAX_PORT = 65_535


def bind(host: str, port: int) -> socket.socket:
    """A socket for `serve`. Bind before the model is loaded, so that a port in use is found out at once.

    Args:
        port: 0 for one that is free.

    Raises:
        ConfigError: the address cannot be had.
    """
    if not 0 <= port <= MAX_PORT:  # getaddrinfo takes the last 16 bits
        raise ConfigError(f"--port must be 0 to {MAX_PORT}, not {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}: {error.strerror}; choose another --host") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return listener


def url_of(listener: socket.socket) -> str:
    """Where a client on this machine finds the server."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    engine: ServedEngine,
    listener: socket.socket,
    *,
    served_model_name: str | None = None,
    api_key: str | None = None,
    chat_template: str | None = None,
    call_format: CallFormat | None = None,
    allowed_origins: Sequence[str] = ALL_ORIGINS,
    drain_timeout_s: float = 30.0,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `engine` until SIGTERM or SIGINT, and shut it down. Must run on the main thread.

    The first signal drains: new requests get 503, running ones go on for at most `drain_timeout_s`. A second one
    ends the process at once.

    Args:
        listener: from `bind`; closed at the end.
        served_model_name, api_key, chat_template, call_format, allowed_origins: as for `create_app`.
        on_ready: called with the server's URL once it answers.
    """
    try:
        app = create_app(
            engine,
            served_model_name=served_model_name,
            api_key=api_key,
            chat_template=chat_template,
            call_format=call_format,
            allowed_origins=allowed_origins,
        )
        config = uvicorn.Config(
            app,
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=math.ceil(FLUSH_S) + CLOSE_S,
        )
        url = url_of(listener)
        server = _Server(config, engine, drain_timeout_s, on_ready=lambda: on_ready(url) if on_ready else None)
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        listener.close()
        engine.shutdown()


class _Server(uvicorn.Server):
    """uvicorn, which on a signal would close its socket first, made to drain the engine before."""

    def __init__(
        self,
        config: uvicorn.Config,
        engine: ServedEngine,
        drain_timeout_s: float,
        on_ready: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self._engine = engine
        self._drain_timeout_s = drain_timeout_s
        self._on_ready = on_ready
        self._stopped = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    async def main_loop(self) -> None:
        """Wait for the end. uvicorn's own wakes ten times a second to look for it; the Date header needs one."""
        while not await self.on_tick(0):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopped.wait(), TICK_S)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Let responses reach their clients, but wait for none that has stopped reading.

        uvicorn would cancel the requests of those, and log a traceback for each.
        """
        hanging_up = asyncio.get_running_loop().call_later(FLUSH_S, self._hang_up)
        try:
            await super().shutdown(sockets)
        finally:
            hanging_up.cancel()

    def _hang_up(self) -> None:
        connections = list(self.server_state.connections)
        logger.warning("%d connections are cut: their clients did not read in %g s", len(connections), FLUSH_S)
        for connection in connections:
            connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._on_signal, number)
        try:
            yield
        finally:
            for number in STOP_SIGNALS:
                loop.remove_signal_handler(number)

    def _on_signal(self, number: signal.Signals) -> None:
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain(number))
            return
        # The kernel frees everything faster than we could.
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    async def _drain(self, number: signal.Signals) -> None:
        logger.info(
            "%s: running requests have %g s to finish; once more stops at once", number.name, self._drain_timeout_s
        )
        try:
            await self._engine.drain(self._drain_timeout_s)
            # What still runs ends with an error that its clients are told.
            await asyncio.to_thread(self._engine.shutdown)
        finally:
            self.should_exit = True
            self._stopped.set()
