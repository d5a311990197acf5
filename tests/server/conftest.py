from __future__ import annotations

import asyncio
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import openai
import pytest
import uvicorn
from fastapi import FastAPI

from tests.server.browser import Browser
from tests.server.fake_engine import FakeEngine
from vattention.server import bind, create_app
from vattention.server.engine import ServedEngine
from vattention.server.lifecycle import url_of


def wait_until(holds: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


E = TypeVar("E", bound=ServedEngine)


@dataclass(frozen=True)
class LiveServer(Generic[E]):
    """A server that listens, and the engine behind it."""

    url: str
    engine: E
    loop: asyncio.AbstractEventLoop

    def client(self, api_key: str = "none", **options: Any) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=api_key, max_retries=0, **options)

    def async_client(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def on_loop(self, function: Callable[[], object]) -> None:
        self.loop.call_soon_threadsafe(function)


Live = LiveServer[FakeEngine]


@contextmanager
def live(app: FastAPI, engine: E) -> Iterator[LiveServer[E]]:
    """Run `app` in a thread on a free port."""
    listener = bind("127.0.0.1", 0)
    server = uvicorn.Server(
        uvicorn.Config(app, lifespan="on", log_config=None, access_log=False, timeout_graceful_shutdown=2)
    )
    loops: list[asyncio.AbstractEventLoop] = []
    started = threading.Event()

    async def run() -> None:
        loops.append(asyncio.get_running_loop())
        task = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started:
            await asyncio.sleep(0.005)
        started.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    try:
        assert started.wait(10)
        yield LiveServer(url_of(listener), engine, loops[0])
    finally:
        server.should_exit = True
        thread.join()


Serve = Callable[..., Live]


@pytest.fixture
def serve_app() -> Iterator[Serve]:
    """Starts servers: serve_app(engine, **options of create_app)."""
    with ExitStack() as stack:

        def start(engine: FakeEngine | None = None, **options: Any) -> Live:
            engine = engine or FakeEngine()
            return stack.enter_context(live(create_app(engine, **options), engine))

        yield start


@pytest.fixture
def server(serve_app: Serve) -> Live:
    return serve_app()


@pytest.fixture
def client(server: Live) -> Iterator[openai.OpenAI]:
    with server.client() as made:
        yield made


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine")
    with Browser(path, tmp_path) as made:
        yield made
