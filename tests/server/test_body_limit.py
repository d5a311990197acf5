from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPResponse
from typing import Any

import httpx
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import FakeEngine
from vattention.server import app
from vattention.server.body_limit import max_body_nbytes

LIMIT = max_body_nbytes(FakeEngine.max_model_len)
PATHS = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/nothing"])


def body_of(nbytes: int) -> bytes:
    """A valid request of so many bytes: most of them are blanks between two fields."""
    start, end = b'{"max_tokens": 1,', b'"prompt": "a"}'
    return start + b" " * (nbytes - len(start) - len(end)) + end


def pieces(body: bytes, nbytes: int = 2**20) -> Iterator[bytes]:
    for start in range(0, len(body), nbytes):
        yield body[start : start + nbytes]


def is_refusal(status: int, body: Any) -> bool:
    error = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return status == 413 and error["type"] == "invalid_request_error" and f"{LIMIT:,}" in error["message"]


def post(server: Live, content: bytes | Iterator[bytes], path: str = "/v1/completions") -> httpx.Response:
    return httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=60)


def connect(server: Live) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=60)


def head(framing: str, path: str = "/v1/completions") -> bytes:
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{framing}\r\n\r\n".encode()


def answer(connection: socket.socket) -> tuple[int, Any]:
    response = HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


@pytest.mark.parametrize("framed", [bytes, pieces], ids=["length", "chunked"])
def test_what_fits_is_taken_and_one_byte_more_is_not(
    server: Live, framed: Callable[[bytes], bytes | Iterator[bytes]]
) -> None:
    assert post(server, framed(body_of(LIMIT))).status_code == 200
    response = post(server, framed(body_of(LIMIT + 1)))
    assert is_refusal(response.status_code, response.json())
    assert len(server.engine.submitted) == 1


@PATHS
def test_a_declared_length_is_refused_before_the_body_comes(server: Live, path: str) -> None:
    with connect(server) as connection:
        connection.sendall(head(f"Content-Length: {10 * LIMIT}", path))
        assert is_refusal(*answer(connection))


def test_chunks_without_an_end_are_refused_once_they_are_too_many(server: Live) -> None:
    with connect(server) as connection:
        connection.sendall(head("Transfer-Encoding: chunked"))
        for piece in pieces(body_of(LIMIT + 1)):
            connection.sendall(chunk(piece))
        assert is_refusal(*answer(connection))


def test_a_client_that_asks_first_never_sends_the_body(server: Live) -> None:
    with connect(server) as connection:
        connection.sendall(head(f"Content-Length: {LIMIT + 1}\r\nExpect: 100-continue"))
        assert is_refusal(*answer(connection))


@pytest.mark.parametrize("chunked", [False, True])
def test_the_connection_goes_on(server: Live, chunked: bool) -> None:
    body, small = body_of(LIMIT + 2**20), body_of(100)
    with connect(server) as connection:
        connection.sendall(head("Transfer-Encoding: chunked" if chunked else f"Content-Length: {len(body)}"))
        for piece in pieces(body):
            connection.sendall(chunk(piece) if chunked else piece)
        if chunked:
            connection.sendall(chunk(b""))
        assert is_refusal(*answer(connection))
        connection.sendall(head(f"Content-Length: {len(small)}") + small)
        status, completion = answer(connection)
    assert (status, completion["object"]) == (200, "text_completion")


def test_others_are_not_disturbed(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(step_s=0.005))
    with server.client() as client:
        stream = client.completions.create(model="fake", prompt="a", max_tokens=100, stream=True)
        next(stream)
        assert post(server, pieces(body_of(LIMIT + 1))).status_code == 413
        assert len(list(stream)) > 1
        assert client.completions.create(model="fake", prompt="a", max_tokens=1).choices[0].text == "O"


def test_a_streamed_reply_is_refused_as_any_other(server: Live) -> None:
    body = b'{"stream": true,' + body_of(LIMIT)[1:]
    assert post(server, body).status_code == post(server, pieces(body)).status_code == 413


@pytest.fixture
def hurried(serve_app: Serve, monkeypatch: pytest.MonkeyPatch) -> Live:
    monkeypatch.setattr(app, "BODY_TIMEOUT_S", 0.3)
    return serve_app(FakeEngine(step_s=0.01))


@pytest.mark.parametrize("framing", ["Content-Length: 99", "Transfer-Encoding: chunked"])
@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_body_that_does_not_come_is_not_waited_for(hurried: Live, path: str, framing: str) -> None:
    with connect(hurried) as connection:
        connection.sendall(head(framing, path))
        status, body = answer(connection)
        assert connection.recv(1) == b""
    assert status == 408
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert "within 0.3 s" in body["error"]["message"]


def test_nor_one_that_comes_by_and_by(hurried: Live) -> None:
    with connect(hurried) as connection:
        connection.sendall(head("Content-Length: 9999"))
        connection.settimeout(0.05)
        for _ in range(200):
            connection.sendall(b" ")
            with suppress(TimeoutError):
                assert connection.recv(2**16).startswith(b"HTTP/1.1 408 ")
                break
        else:
            pytest.fail("no answer")


@pytest.mark.parametrize("stream", [False, True])
def test_what_takes_long_once_the_body_is_there_may_do_so(hurried: Live, stream: bool) -> None:
    body = b'{"prompt": "a", "max_tokens": 100, "stream": %s}' % (b"true" if stream else b"false")
    start = time.monotonic()
    assert post(hurried, body).status_code == 200
    assert time.monotonic() - start > 0.9
    assert hurried.engine.aborted == 0


def test_without_the_key_nothing_is_said_about_sizes(serve_app: Serve) -> None:
    server = serve_app(api_key="s3cret")
    connection = HTTPConnection(server.url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/v1/completions", headers={"Content-Length": str(LIMIT + 1)})
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.parametrize(
    "prompt", [[2**31 - 1] * 10_000, "\u00e9" * 50_000], ids=["token ids", "escaped letters, five a token"]
)
def test_sixteen_prompts_that_fill_the_context_fit(prompt: Any) -> None:
    assert len(json.dumps({"prompt": [prompt] * 16})) < max_body_nbytes(10_000) - max_body_nbytes(0)


def test_a_bias_for_every_token_fits() -> None:
    bias = {str(token): -99.99 for token in range(262_144)}
    assert len(json.dumps({"logit_bias": bias})) < max_body_nbytes(0)
