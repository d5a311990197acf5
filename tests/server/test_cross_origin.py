from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import FakeEngine
from vattention.server.body_limit import max_body_nbytes

PAGE = "https://page.example"
KEY = {"Authorization": "Bearer s3cret"}
ALLOWED = "Access-Control-Allow-Origin"


def preflight(server: Live, *, origin: str = PAGE, path: str = "/v1/chat/completions") -> httpx.Response:
    """What a browser asks before it sends a request with a key and a JSON body."""
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    return httpx.options(server.url + path, headers=headers)


def complete(
    server: Live, origin: str = PAGE, headers: dict[str, str] | None = None, **body: Any
) -> httpx.Response:
    return httpx.post(
        server.url + "/v1/completions",
        json={"prompt": "a", "max_tokens": 1, **body},
        headers={"Origin": origin, **(headers or {})},
        timeout=60,
    )


@pytest.mark.parametrize("api_key", [None, "s3cret"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/tokenize", "/health"])
def test_a_preflight_needs_no_key(serve_app: Serve, api_key: str | None, path: str) -> None:
    response = preflight(serve_app(api_key=api_key), path=path)
    assert response.status_code == 200
    assert response.headers[ALLOWED] == "*"
    assert "POST" in response.headers["Access-Control-Allow-Methods"]
    assert response.headers["Access-Control-Allow-Headers"] == "authorization,content-type,x-stainless-lang"
    assert "Access-Control-Allow-Credentials" not in response.headers


def test_what_only_looks_like_a_preflight_does(serve_app: Serve) -> None:
    url = serve_app(api_key="s3cret").url + "/v1/models"
    assert httpx.options(url).status_code == 401
    assert httpx.options(url, headers={"Origin": PAGE}).status_code == 401


@pytest.mark.parametrize("stream", [False, True])
def test_every_page_reads_replies(server: Live, stream: bool) -> None:
    response = complete(server, stream=stream)
    assert response.status_code == 200
    assert response.headers[ALLOWED] == "*"
    assert ("[DONE]" in response.text) == stream


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"temperature": -1}, 400),
        ({"model": "other"}, 404),
        ({"prompt": "x" * max_body_nbytes(FakeEngine.max_model_len)}, 413),
        ({"prompt": ["a", "b"]}, 429),
        ({"prompt": "fail(0)", "max_tokens": 9}, 500),
        ({"prompt": "fail(0)", "max_tokens": 9, "stream": True}, 500),
    ],
)
def test_pages_read_errors_too(serve_app: Serve, body: dict[str, Any], status: int) -> None:
    response = complete(serve_app(FakeEngine(max_queue=1)), **body)
    assert response.status_code == status
    assert response.headers[ALLOWED] == "*"
    assert response.headers["Access-Control-Expose-Headers"] == "Retry-After"
    assert set(response.json()) == {"error"}


def test_a_page_without_the_key_reads_that_it_needs_one(serve_app: Serve) -> None:
    server = serve_app(api_key="s3cret")
    refused = complete(server)
    assert (refused.status_code, refused.headers[ALLOWED]) == (401, "*")
    assert complete(server, headers=KEY).status_code == 200


def test_named_origins_alone_are_let_in(serve_app: Serve) -> None:
    server = serve_app(allowed_origins=[PAGE, "http://localhost:3000"])
    for origin in (PAGE, "http://localhost:3000"):
        assert preflight(server, origin=origin).headers[ALLOWED] == origin
        response = complete(server, origin)
        assert response.headers[ALLOWED] == origin
        assert "Origin" in response.headers["Vary"]
    for origin in ("https://other.example", "http://localhost:3001", "null"):
        assert ALLOWED not in preflight(server, origin=origin).headers
        assert ALLOWED not in complete(server, origin).headers


def test_no_origins_no_headers(serve_app: Serve) -> None:
    server = serve_app(allowed_origins=())
    assert preflight(server).status_code == 405
    assert ALLOWED not in complete(server).headers


def test_those_who_are_no_browsers_see_no_headers(server: Live) -> None:
    response = httpx.get(server.url + "/v1/models")
    assert not [name for name in response.headers if name.lower().startswith("access-control")]
