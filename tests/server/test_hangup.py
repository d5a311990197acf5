from __future__ import annotations

import asyncio
import contextlib
import json
import random
from contextlib import closing
from http.client import HTTPConnection
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.server.conftest import Live, Serve, wait_until
from tests.server.fake_engine import STORY, FakeEngine
from vattention.server.hangup import ClientGoneError, until_hangup

NUM_SERVER_TASKS = 3
"""Tasks of a server that does nothing: the test's own, uvicorn's and its lifespan's."""


@pytest.fixture
def slow(serve_app: Serve) -> Live:
    return serve_app(FakeEngine(step_s=0.01))


def request_for(path: str, *, stream: bool, text: str = "Hello", **more: object) -> dict[str, object]:
    if path == "/v1/completions":
        return {"prompt": text, "max_tokens": 400, "stream": stream, **more}
    return {"messages": [{"role": "user", "content": text}], "stream": stream, **more}


def sent(url: str, path: str, body: dict[str, Any]) -> HTTPConnection:
    """A request whose answer nobody reads."""
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_client_that_leaves_its_stream_is_not_served_on(slow: Live, path: str) -> None:
    with httpx.stream("POST", slow.url + path, json=request_for(path, stream=True)) as response:
        lines = response.iter_lines()
        next(lines)
        assert slow.engine.running
    wait_until(lambda: not slow.engine.running)
    assert slow.engine.aborted == 1
    assert slow.engine.statistics().accounts.live_nbytes == 0


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_the_first_token(slow: Live, path: str, stream: bool) -> None:
    slow.on_loop(slow.engine.gate.clear)
    with closing(sent(slow.url, path, request_for(path, stream=stream))):
        wait_until(lambda: len(slow.engine.running) == 1)
    wait_until(lambda: slow.engine.aborted == 1)
    assert not slow.engine.running


def test_all_prompts_of_a_request_end_with_its_client(slow: Live) -> None:
    body = {"prompt": ["a", "b", "c"], "n": 2, "max_tokens": 400}
    with closing(sent(slow.url, "/v1/completions", body)):
        wait_until(lambda: len(slow.engine.running) == 3)
    wait_until(lambda: slow.engine.aborted == 3)
    assert not slow.engine.running


async def test_of_100_clients_a_third_hangs_up_and_nothing_stays(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(step_s=0.005))
    rng = random.Random(0)

    async def stays(api: openai.AsyncOpenAI, prompt: str) -> None:
        limit = rng.randint(10, 50)
        whole = await api.completions.create(model="fake", prompt=prompt, max_tokens=limit)
        assert whole.choices[0].text == STORY[:limit]

    async def leaves_in_mid_stream(api: openai.AsyncOpenAI, prompt: str) -> None:
        stream = await api.completions.create(model="fake", prompt=prompt, max_tokens=450, stream=True)
        async with stream:
            for _ in range(rng.randint(1, 20)):
                await anext(stream)

    async def leaves_while_waiting(api: openai.AsyncOpenAI, prompt: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, 1.0)):
                await api.completions.create(model="fake", prompt=prompt, max_tokens=450)

    async with server.async_client() as api:
        kinds = (stays, leaves_in_mid_stream, stays, stays, leaves_while_waiting, stays)
        await asyncio.gather(*(kinds[i % 6](api, "x" * rng.randint(1, 60)) for i in range(100)))
    await asyncio.to_thread(wait_until, lambda: not server.engine.running)
    assert server.engine.aborted >= 17
    assert server.engine.statistics().accounts.live_nbytes == 0
    wait_until(lambda: len(asyncio.all_tasks(server.loop)) <= NUM_SERVER_TASKS)


async def test_work_that_ends_first_is_returned() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> int:
        return 5

    assert await until_hangup(receive, work()) == 5
    assert len(asyncio.all_tasks()) == 1


async def test_work_has_cleaned_up_when_the_hangup_is_told() -> None:
    cleaned = []

    async def receive() -> dict[str, str]:
        await asyncio.sleep(0.01)
        return {"type": "http.disconnect"}

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(True)

    with pytest.raises(ClientGoneError):
        await until_hangup(receive, work())
    assert cleaned
    assert len(asyncio.all_tasks()) == 1


async def test_an_error_of_the_work_comes_through() -> None:
    async def receive() -> dict[str, str]:
        await asyncio.Event().wait()
        raise AssertionError

    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await until_hangup(receive, work())
