from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import FakeEngine
from vattention.errors import OutOfMemoryError

HELLO = [{"role": "user", "content": "Hello"}]
BOTH = pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
STREAMED = pytest.mark.parametrize("stream", [False, True])


def body_for(path: str, text: str = "Hello", **more: Any) -> dict[str, Any]:
    if path == "/v1/completions":
        return {"model": "fake", "prompt": text, **more}
    return {"model": "fake", "messages": [{"role": "user", "content": text}], **more}


def post(server: Live, path: str, body: Any, **options: Any) -> httpx.Response:
    return httpx.post(server.url + path, json=body, **options)


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    return dict(body["error"])


@BOTH
@pytest.mark.parametrize(
    ("field", "value", "param", "code"),
    [
        ("temperature", -1, "temperature", None),
        ("temperature", "hot", "temperature", "invalid_type"),
        ("temperature", float("nan"), "temperature", None),
        ("top_p", 0, "top_p", None),
        ("n", 0, "n", "invalid_value"),
        ("n", 10**9, "n", "invalid_value"),
        ("n", True, "n", "invalid_type"),
        ("max_tokens", 2.5, "max_tokens", "invalid_type"),
        ("seed", 2**63, "seed", "invalid_value"),
        ("stop", [""], "stop", None),
        ("stop", [1], "stop[0]", "invalid_type"),
        ("logit_bias", {"x": 1}, "logit_bias", "invalid_value"),
        ("logit_bias", {"5": "x"}, "logit_bias.5", "invalid_type"),
        ("stream_options", {"include_usage": True}, "stream_options", "invalid_value"),
        ("cache_salt", 3, "cache_salt", "invalid_type"),
        ("response_format", {"type": "json_schema"}, "response_format", "invalid_value"),
        ("response_format", {"type": "xml"}, "response_format.type", "invalid_value"),
        ("structured_outputs", {"structural_tag": "x"}, "structural_tag", "unsupported_parameter"),
        ("structured_outputs", {}, "structured_outputs", None),
        ("structured_outputs", {"regex": "a", "choice": ["b"]}, "structured_outputs", None),
        ("guided_json", "{", "structured_outputs", None),
        ("guided_choice", "yes", "guided_choice", "invalid_type"),
        ("temperatur", 1, "temperatur", "unknown_parameter"),
    ],
)
def test_a_wrong_field_is_named(
    server: Live, path: str, field: str, value: Any, param: str, code: str | None
) -> None:
    content = json.dumps(body_for(path, **{field: value}))
    response = httpx.post(server.url + path, content=content, headers={"Content-Type": "application/json"})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert (error["param"], error["code"]) == (param, code)
    assert not server.engine.submitted


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 3, "stream": True}, "stream"),
        ({"use_beam_search": True, "n": 2, "stream": True}, "stream"),
        ({"length_penalty": 2.0}, "length_penalty"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logprobs": 21}, "logprobs"),
        ({"stream": True, "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", [1]]}, "prompt"),
        ({"prompt": [1.5]}, "prompt"),
        ({"prompt": {"text": "a"}}, "prompt"),
        ({"prompt": [300]}, "prompt"),
        ({"prompt": [300], "echo": True}, "prompt"),
        ({"prompt": "\ud800"}, "prompt"),
    ],
)
def test_refusals_of_completions(server: Live, more: dict[str, Any], param: str) -> None:
    content = json.dumps(body_for("/v1/completions", **more))
    response = httpx.post(
        server.url + "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert error_of(response, 400)["param"] == param


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{}]}, "functions"),
        ({"audio": {}}, "audio"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens"),
        ({"chat_template": "{{ x }}"}, "chat_template"),
        ({"chat_template_kwargs": {"template": "x"}}, "chat_template_kwargs"),
        ({"add_special_tokens": True}, "add_special_tokens"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": "x", "colour": 1}]}, "messages[0].colour"),
        ({"messages": [{"role": "assistant", "function_call": {}}]}, "function_call"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
        ),
        ({"messages": [{"role": "user", "content": "refuse me"}]}, "messages"),
    ],
)
def test_refusals_of_chat(server: Live, more: dict[str, Any], param: str) -> None:
    path = "/v1/chat/completions"
    assert error_of(post(server, path, body_for(path, **more)), 400)["param"] == param


@BOTH
@STREAMED
def test_a_prompt_beyond_the_context(server: Live, path: str, stream: bool) -> None:
    error = error_of(post(server, path, body_for(path, "x" * 600, stream=stream)), 400)
    assert error["code"] == "context_length_exceeded"


@BOTH
@STREAMED
def test_prompt_and_tokens_beyond_the_context(server: Live, path: str, stream: bool) -> None:
    error = error_of(post(server, path, body_for(path, max_tokens=510, stream=stream)), 400)
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "512" in error["message"]


@BOTH
def test_another_model(server: Live, path: str) -> None:
    error = error_of(post(server, path, {**body_for(path), "model": "gpt-4"}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")


@BOTH
@pytest.mark.parametrize("content", [b"{", b'["a"]', b"null", b"", b"\xff", b'{"a":' * 100000])
def test_a_body_that_is_no_json_object(server: Live, path: str, content: bytes) -> None:
    response = httpx.post(
        server.url + path, content=content, headers={"Content-Type": "application/json"}, timeout=30
    )
    assert error_of(response, 400)["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"prompt": "é"}'.encode("latin-1"), "not UTF-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", "4300 digits"),
    ],
    ids=["latin-1", "deep", "long"],
)
def test_a_body_that_the_parser_gives_up_on(server: Live, content: bytes, reason: str) -> None:
    headers = {"Content-Type": "application/json"}
    response = httpx.post(server.url + "/v1/completions", content=content, headers=headers, timeout=30)
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, "invalid_json")
    assert reason in error["message"]


def test_unknown_paths_and_methods(server: Live) -> None:
    error_of(httpx.get(server.url + "/v1/nothing"), 404)
    response = httpx.get(server.url + "/v1/completions")
    error_of(response, 405)
    assert response.headers["Allow"] == "POST"


@BOTH
@STREAMED
def test_a_full_queue(serve_app: Serve, path: str, stream: bool) -> None:
    server = serve_app(FakeEngine(max_queue=1, step_s=0.02))
    with server.client() as client:
        running = client.completions.create(model="fake", prompt="a", max_tokens=400, stream=True)
        response = post(server, path, body_for(path, stream=stream))
        running.close()
    assert error_of(response, 429)["code"] == "rate_limit_exceeded"
    assert response.headers["Retry-After"] == "2"


def test_more_prompts_than_any_queue_holds_are_not_sent_again(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(max_queue=2))
    error = error_of(post(server, "/v1/completions", {"prompt": ["a"] * 131}), 400)
    assert error["param"] == "prompt"
    assert "131 prompts is more than run and wait at a time, which is 130" in error["message"]


def test_a_queue_that_fills_midway_frees_the_prompts_before(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(max_queue=2))
    error_of(post(server, "/v1/completions", {"prompt": ["a", "b", "c"]}), 429)
    assert not server.engine.running
    assert server.engine.aborted == 2


@BOTH
@STREAMED
def test_memory_that_runs_out_before_the_first_token(serve_app: Serve, path: str, stream: bool) -> None:
    engine = FakeEngine()
    engine.error = OutOfMemoryError(10, 5, "the sequence does not fit")
    error = error_of(post(serve_app(engine), path, body_for(path, "fail(0)", stream=stream)), 503)
    assert error["code"] == "out_of_memory"


@BOTH
def test_a_failure_in_mid_stream_is_an_event_and_the_end(serve_app: Serve, path: str) -> None:
    engine = FakeEngine()
    engine.error = OutOfMemoryError(10, 5, "the sequence does not fit")
    response = post(serve_app(engine), path, body_for(path, "fail(2)", stream=True))
    assert response.status_code == 200
    events = [json.loads(line[6:]) for line in response.text.splitlines() if line]
    assert events[-1]["error"]["code"] == "out_of_memory"
    assert all("error" not in event for event in events[:-1])
    assert "[DONE]" not in response.text


def test_the_client_raises_on_a_failure_in_mid_stream(server: Live) -> None:
    with server.client() as client:
        stream = client.completions.create(model="fake", prompt="fail(2)", stream=True)
        with pytest.raises(openai.APIError, match="its log says why"):
            list(stream)


@BOTH
def test_an_unforeseen_failure_tells_no_secrets(server: Live, path: str) -> None:
    server.engine.error = RuntimeError("password is swordfish")
    error = error_of(post(server, path, body_for(path, "fail(0)")), 500)
    assert error["type"] == "server_error"
    assert "swordfish" not in json.dumps(error)


@BOTH
@STREAMED
def test_a_stopped_engine(server: Live, path: str, stream: bool) -> None:
    server.engine.shutdown()
    assert error_of(post(server, path, body_for(path, stream=stream)), 503)["code"] == "engine_stopped"


def test_an_engine_that_stops_in_mid_stream(serve_app: Serve) -> None:
    server = serve_app(FakeEngine(step_s=0.01))
    with server.client() as client:
        stream = client.completions.create(model="fake", prompt="a", max_tokens=300, stream=True)
        next(stream)
        server.engine.shutdown()
        with pytest.raises(openai.APIError, match="stopped before"):
            list(stream)


def test_the_client_sees_each_kind_as_its_own_exception(serve_app: Serve) -> None:
    server = serve_app(api_key="right")
    with server.client("wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with server.client("right") as client:
        with pytest.raises(openai.NotFoundError) as missing:
            client.completions.create(model="other", prompt="a")
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError) as invalid:
            client.completions.create(model="fake", prompt="a", temperature=-1)
        assert invalid.value.param == "temperature"
