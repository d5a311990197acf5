from __future__ import annotations

import re

import httpx
import openai
import pytest

import vattention
from tests.server.browser import Browser
from tests.server.conftest import Live, Serve, wait_until
from tests.server.fake_engine import FakeEngine

OUTAGE = "the server failed to answer this request; its log says why"


def test_lists_its_model(client: openai.OpenAI) -> None:
    [card] = client.models.list().data
    assert (card.id, card.object, card.owned_by) == ("fake", "model", "vattention")
    assert card.model_dump()["root"] == "fake-folder"
    assert card.model_dump()["max_model_len"] == 512
    assert client.models.retrieve("fake") == card


def test_another_model_is_not_there(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other/model")


def test_the_model_may_be_served_under_another_name(serve_app: Serve) -> None:
    server = serve_app(served_model_name="org/name")
    with server.client() as client:
        assert client.models.retrieve("org/name").id == "org/name"
        assert client.completions.create(model="org/name", prompt="a", max_tokens=1).model == "org/name"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="fake", prompt="a")


def test_a_request_need_not_name_the_model(server: Live) -> None:
    response = httpx.post(server.url + "/v1/completions", json={"prompt": "a"})
    assert response.json()["model"] == "fake"


def test_what_vllms_users_poll(server: Live) -> None:
    for ask in (httpx.get, httpx.post):
        assert ask(server.url + "/ping").status_code == 200
    assert httpx.get(server.url + "/load").json() == {"server_load": 0}
    server.engine.healthy = False
    assert httpx.get(server.url + "/ping").status_code == 503


def test_health_falls_when_the_engine_stops(serve_app: Serve) -> None:
    server = serve_app(FakeEngine())
    assert httpx.get(server.url + "/health").status_code == 200
    server.engine.healthy = False
    response = httpx.get(server.url + "/health")
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_stopped"


def test_version(server: Live) -> None:
    assert httpx.get(server.url + "/version").json() == {"version": vattention.__version__}


def test_describes_itself(server: Live) -> None:
    paths = httpx.get(server.url + "/openapi.json").json()["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/tokenize", "/health"} <= set(paths)


def test_the_page_needs_nothing_from_elsewhere(server: Live) -> None:
    response = httpx.get(server.url)
    assert response.headers["Content-Type"].startswith("text/html")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//|@import|url\(", response.text)


def test_the_page_chats_in_a_browser(serve_app: Serve, browser: Browser) -> None:
    server = serve_app(FakeEngine(step_s=0.002))
    browser.open(server.url)
    browser.wait_for("document.querySelector('#model').textContent", "fake, context of 512 tokens")
    browser.wait_for("document.querySelector('#reserved').textContent", "1.0 TiB of addresses")
    browser.type("say(Hello from a browser)")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.note')?.textContent.split(' in ')[0]", "21 tokens")
    assert browser.texts(".message") == ["say(Hello from a browser)", "Hello from a browser"]
    browser.type("fail(2)")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.error')?.textContent", OUTAGE)
    assert server.engine.submitted[0].params.max_tokens == 256


def test_escape_stops_a_reply_and_frees_its_memory(serve_app: Serve, browser: Browser) -> None:
    server = serve_app(FakeEngine(step_s=0.02))
    browser.open(server.url)
    browser.type("go on")
    browser.press("Enter")
    browser.wait_for("document.querySelector('.assistant')?.textContent.slice(0, 4)", "Once")
    browser.press("Escape")
    browser.wait_for("document.querySelector('#send').textContent", "Send")
    wait_until(lambda: not server.engine.running)
    assert server.engine.aborted == 1


def test_the_page_asks_for_the_key(serve_app: Serve, browser: Browser) -> None:
    browser.open(serve_app(api_key="s3cret").url)
    browser.wait_for("document.querySelector('#details').open", True)
    browser.evaluate("document.querySelector('#key').focus()")
    browser.type("s3cret")
    browser.press("Tab")
    browser.wait_for("document.querySelector('#model').textContent", "fake, context of 512 tokens")
