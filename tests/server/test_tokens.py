from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import BOS, FakeEngine


def tokenize(server: Live, **body: Any) -> httpx.Response:
    return httpx.post(server.url + "/tokenize", json=body)


def test_tokenizes_a_text(server: Live) -> None:
    assert tokenize(server, prompt="Hi").json() == {"count": 3, "max_model_len": 512, "tokens": [BOS, 72, 105]}


def test_tokenizes_without_special_tokens(server: Live) -> None:
    assert tokenize(server, prompt="Hi", add_special_tokens=False).json()["tokens"] == [72, 105]


def test_names_the_tokens_on_request(server: Live) -> None:
    assert tokenize(server, prompt="Hi", return_token_strs=True).json()["token_strs"] == ["<bos>", "H", "i"]


def test_tokenizes_a_conversation(server: Live) -> None:
    messages = [{"role": "user", "content": "a"}]
    whole = tokenize(server, model="fake", messages=messages).json()["tokens"]
    assert whole == [BOS, *b"user: a\nassistant: "]
    bare = tokenize(server, messages=messages, add_generation_prompt=False).json()["tokens"]
    assert bare == [BOS, *b"user: a\n"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True}, "add_special_tokens"),
    ],
)
def test_refusals(server: Live, body: dict[str, Any], param: str) -> None:
    response = tokenize(server, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_detokenizes(server: Live) -> None:
    body = {"tokens": [BOS, 72, 105]}
    assert httpx.post(server.url + "/detokenize", json=body).json() == {"prompt": "<bos>Hi"}


@pytest.mark.parametrize("token", [-1, 258, 2**40, "a"])
def test_detokenizes_only_what_there_is(server: Live, token: Any) -> None:
    response = httpx.post(server.url + "/detokenize", json={"tokens": [72, token]})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


def test_needs_a_tokenizer(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(text=False))
    assert tokenize(server, prompt="a").status_code == 400
    assert httpx.post(server.url + "/detokenize", json={"tokens": [1]}).status_code == 400
