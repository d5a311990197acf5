from __future__ import annotations

import httpx
import pytest

from tests.server.conftest import Live, Serve


@pytest.fixture
def locked(serve_app: Serve) -> Live:
    return serve_app(api_key="s3cret")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer wrong", "Bearer s3cret2", "Basic s3cret", "s3cret", "Bearer \xff"]
)
@pytest.mark.parametrize("path", ["/v1/models", "/v1/completions", "/tokenize", "/version", "/openapi.json", "/x"])
def test_without_the_key_there_is_nothing_to_see(locked: Live, path: str, header: str | None) -> None:
    headers = [] if header is None else [(b"Authorization", header.encode("latin-1"))]
    response = httpx.get(locked.url + path, headers=headers)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_the_key_opens(locked: Live, scheme: str) -> None:
    response = httpx.get(locked.url + "/v1/models", headers={"Authorization": f"{scheme} s3cret"})
    assert response.status_code == 200


@pytest.mark.parametrize("path", ["/", "/health", "/load", "/metrics", "/ping"])
def test_probes_and_the_page_need_no_key(locked: Live, path: str) -> None:
    assert httpx.get(locked.url + path).status_code == 200


def test_without_a_key_set_none_is_needed(server: Live) -> None:
    assert httpx.get(server.url + "/v1/models").status_code == 200
