from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import openai
import pytest

import vattention
from tests.server.conftest import Live, Serve
from tests.server.fake_engine import FakeEngine


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


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_finds_its_server_in_a_browser(server: Live, tmp_path: Path) -> None:
    dom = dom_of(server.url, tmp_path)
    assert "fake, context of 512 tokens" in dom
    assert "1.0 TiB of addresses" in dom


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
def test_the_page_chats_in_a_browser(serve_app: Serve, tmp_path: Path) -> None:
    """Type a question, wait for the answer, and read both off the page."""
    server = serve_app(FakeEngine(step_s=0.002))
    # A copy of the page from a file, which asks the server across origins, with a user's keystrokes in its script.
    driver = """
      $("prompt").value = "say(Hello from a browser)";
      $("prompt").dispatchEvent(new KeyboardEvent("keydown", {key: "Enter", bubbles: true, cancelable: true}));
    """
    html = httpx.get(server.url).text.replace("connect();\nwatchMemory();", f"connect();\nwatchMemory();{driver}")
    page = tmp_path / "driven.html"
    page.write_text(html.replace("<head>", f'<head><base href="{server.url}/">'))
    dom = dom_of(page.as_uri(), tmp_path, "--disable-web-security")
    assert '<div class="message user">say(Hello from a browser)</div>' in dom
    assert '<div class="message assistant">Hello from a browser<div class="note">21 tokens' in dom
    assert server.engine.submitted[0].params.max_tokens == 256


def dom_of(url: str, folder: Path, *options: str) -> str:
    """What a page has become after five seconds of its own time."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder}/profile"]
    command = [CHROMIUM, *flags, *options, "--virtual-time-budget=5000", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
