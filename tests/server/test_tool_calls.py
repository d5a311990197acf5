from __future__ import annotations

import json
import re
import sys
from typing import Any

import httpx
import pytest

from tests.server.conftest import Live, Serve
from tests.server.tools.families import (
    FAMILIES,
    HERMES_TEMPLATE,
    LLAMA_TEMPLATE,
    MISTRAL_TEMPLATE,
    TOOLLESS_TEMPLATE,
    TOOLS,
    Family,
    engine_of,
)
from vattention.server import call_format_named

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: dict[str, Any] = {"type": "function", "function": {"name": "clock"}}

CALLS: list[tuple[str, dict[str, Any]]] = [("weather", {"city": 'Zürich [ZH], "x" {y}'}), ("clock", {})]

families = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
streamed = pytest.mark.parametrize("stream", [False, True])


def ask(server: Live, text: str, *, stream: bool = False, **options: Any) -> Any:
    """A reply to be given by a model that says `text`; a stream is put together by the client's own helper."""
    body: dict[str, Any] = {
        "model": "fake",
        "messages": [{"role": "user", "content": f"say({text})"}],
        "tools": [WEATHER, CLOCK],
        **options,
    }
    with server.client() as client:
        if not stream:
            return client.chat.completions.create(**body)
        with client.chat.completions.stream(**body) as events:
            return events.get_final_completion()


def calls_of(message: Any) -> list[tuple[str, Any]]:
    return [(call.function.name, json.loads(call.function.arguments)) for call in message.tool_calls or ()]


def error_of(server: Live, **body: Any) -> tuple[str | None, str, str]:
    given = {"messages": [{"role": "user", "content": "say(x)"}], "tools": [WEATHER, CLOCK], **body}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=given)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert not server.engine.submitted
    return error["param"], error["message"], error["code"]


@pytest.fixture
def server(serve_app: Serve) -> Live:
    return serve_app(engine_of(HERMES_TEMPLATE))


def say(calls: list[tuple[str, dict[str, Any]]] = CALLS) -> str:
    return FAMILIES[0].write(calls)


@families
@streamed
@pytest.mark.parametrize("tokens_per_step", [1, 7, 1000])
def test_calls(serve_app: Serve, family: Family, stream: bool, tokens_per_step: int) -> None:
    server = serve_app(engine_of(family.template, tokens_per_step=tokens_per_step))
    [choice] = ask(server, family.write(CALLS), stream=stream).choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert calls_of(choice.message) == CALLS
    ids = [call.id for call in choice.message.tool_calls]
    assert len(set(ids)) == 2
    for name in ids:
        assert re.fullmatch("[a-zA-Z0-9]{9}" if "mistral" in family.name else "call_[0-9a-f]{24}", name)


@families
def test_markers_that_are_special_tokens_are_seen(serve_app: Serve, family: Family) -> None:
    server = serve_app(engine_of(family.template, special=family.format.markers))
    [choice] = ask(server, family.write(CALLS)).choices
    assert calls_of(choice.message) == CALLS
    with server.client() as client:
        messages: Any = [{"role": "user", "content": f"say({family.format.markers[0]}hello)"}]
        assert client.chat.completions.create(model="fake", messages=messages).choices[0].message.content == "hello"


def test_a_stream_tells_a_calls_name_first(server: Live) -> None:
    messages: list[Any] = [{"role": "user", "content": f"say(Well. {say()})"}]
    options: dict[str, Any] = {"messages": messages, "tools": [WEATHER, CLOCK], "stream": True}
    with server.client() as client:
        chunks: list[Any] = list(client.chat.completions.create(model="fake", **options))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == "Well."
    told = [call for delta in deltas for call in delta.tool_calls or ()]
    assert all(len(delta.tool_calls or ()) <= 1 for delta in deltas)
    assert [call.index for call in told] == sorted(call.index for call in told)
    for index, (name, arguments) in enumerate(CALLS):
        first, *rest = [call for call in told if call.index == index]
        assert first.function is not None
        assert first.id is not None
        assert (first.type, first.function.name, first.function.arguments) == ("function", name, "")
        assert all(call.id is call.type is None for call in rest)
        assert json.loads("".join(call.function.arguments for call in rest if call.function)) == arguments
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["tool_calls"]


@streamed
def test_text_beside_calls(server: Live, stream: bool) -> None:
    [choice] = ask(server, f"Let me look.\n{say()}", stream=stream).choices
    assert choice.message.content == "Let me look."
    assert calls_of(choice.message) == CALLS


@streamed
@pytest.mark.parametrize(
    "text",
    [
        "No call is needed.\n",
        '<tool_call>{"name": "missile", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "clock", "arguments": {</tool_call>',
        "<tool_call> is a tag",
    ],
)
def test_text_without_calls(server: Live, text: str, stream: bool) -> None:
    [choice] = ask(server, text, stream=stream).choices
    assert (choice.message.content, choice.finish_reason) == (text, "stop")
    assert not choice.message.tool_calls


@streamed
def test_a_call_that_is_cut_off_is_content(server: Live, stream: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": f"say({say()})"}]
    with server.client() as client:
        options: Any = {"model": "fake", "messages": messages, "tools": [WEATHER, CLOCK], "max_tokens": 40}
        if stream:
            chunks = list(client.chat.completions.create(**options, stream=True))
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            [choice] = client.chat.completions.create(**options).choices
            text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == (say()[:40], "length")


@streamed
def test_each_sample_has_its_own_calls(server: Live, stream: bool) -> None:
    choices = ask(server, f" {say()}", n=3, stream=stream).choices
    assert [calls_of(choice.message) for choice in choices] == [CALLS, CALLS, CALLS[1:]]
    assert [choice.finish_reason for choice in choices] == ["tool_calls"] * 3
    assert choices[2].message.content.startswith("tool_call>")


@families
@streamed
def test_no_calls_in_parallel(serve_app: Serve, family: Family, stream: bool) -> None:
    server = serve_app(engine_of(family.template))
    [choice] = ask(server, family.write(CALLS), stream=stream, parallel_tool_calls=False).choices
    assert calls_of(choice.message) == CALLS[:1]
    assert choice.finish_reason == "tool_calls"


@streamed
def test_logprobs_and_token_ids_beside_calls_are_complete(server: Live, stream: bool) -> None:
    text = f"Well. {say()}"
    messages: list[Any] = [{"role": "user", "content": f"say({text})"}]
    options: Any = {"logprobs": True, "extra_body": {"return_token_ids": True}, "tools": [WEATHER, CLOCK]}
    with server.client() as client:
        answer: Any = client.chat.completions.create(model="fake", messages=messages, stream=stream, **options)
        choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    tokens = [t for choice in choices if choice.logprobs for t in choice.logprobs.content]
    ids = [t for choice in choices for t in choice.model_dump().get("token_ids") or ()]
    assert len(tokens) == len(ids) == len(text.encode()) + 1
    assert bytes(ids[:-1]).decode() == text


def prompt_of(server: Live) -> str:
    return bytes(server.engine.submitted[-1].prompt[1:]).decode()


@pytest.mark.parametrize("choice", ["none", "auto", None])
def test_the_prompt_tells_of_functions_unless_none_may_be_called(server: Live, choice: str | None) -> None:
    extra: dict[str, Any] = {} if choice is None else {"tool_choice": choice}
    [reply] = ask(server, say(), **extra).choices
    assert calls_of(reply.message) == ([] if choice == "none" else CALLS)
    if choice == "none":
        assert (reply.message.content, reply.finish_reason) == (say(), "stop")
        assert "The weather" not in prompt_of(server)
    else:
        shown = prompt_of(server).partition("<|user|>")[0]
        assert shown == json.dumps(WEATHER) + json.dumps(CLOCK)


@families
def test_calls_and_results_go_back_in(serve_app: Serve, family: Family) -> None:
    server = serve_app(engine_of(family.template))
    message = ask(server, family.write(CALLS)).choices[0].message
    ids = [call.id for call in message.tool_calls]
    with server.client() as client:
        for reply in (message, message.model_dump(), {**message.model_dump(), "content": ""}):
            messages: list[Any] = [
                {"role": "user", "content": "Hello"},
                reply,
                {"role": "tool", "tool_call_id": ids[0], "content": "sunny"},
                {"role": "tool", "tool_call_id": ids[1], "content": [{"type": "text", "text": "noon"}]},
            ]
            client.chat.completions.create(model="fake", messages=messages, tools=[WEATHER, CLOCK], max_tokens=1)  # type: ignore[list-item]
            told = prompt_of(server).partition("Hello")[2]
            # Templates get arguments as objects; as texts they would be quoted twice.
            assert '"city": "Zürich [ZH], \\"x\\" {y}"' in told
            assert f"<|tool|>sunny({ids[0]})" in told
            assert told.endswith(f"<|tool|>noon({ids[1]})<|assistant|>")


def test_a_call_put_together_from_a_stream_goes_back_in(server: Live) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "clock", "arguments": ""}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}, {"role": "user", "content": "say(x)"}]
    ask(server, "x", messages=messages)
    assert '{"name": "clock", "arguments": {}}' in prompt_of(server)


def test_a_template_of_its_own_for_tools(serve_app: Serve) -> None:
    server = serve_app(engine_of({"default": TOOLLESS_TEMPLATE, "tool_use": HERMES_TEMPLATE}))
    assert calls_of(ask(server, say()).choices[0].message) == CALLS
    assert "The weather" in prompt_of(server)
    assert not calls_of(ask(server, say(), tools=[]).choices[0].message)


@pytest.mark.parametrize(
    ("template", "name"), [(MISTRAL_TEMPLATE, "hermes"), (TOOLS + TOOLLESS_TEMPLATE, "hermes")]
)
def test_the_format_can_be_chosen(serve_app: Serve, template: str, name: str) -> None:
    server = serve_app(engine_of(template), call_format=call_format_named(name))
    assert calls_of(ask(server, say()).choices[0].message) == CALLS


def test_the_servers_template_counts(serve_app: Serve) -> None:
    server = serve_app(engine_of(TOOLLESS_TEMPLATE), chat_template=LLAMA_TEMPLATE)
    assert calls_of(ask(server, FAMILIES[1].write(CALLS)).choices[0].message) == CALLS


def test_a_template_that_does_not_know_functions(serve_app: Serve) -> None:
    server = serve_app(engine_of(TOOLLESS_TEMPLATE))
    for extra in ({}, {"tool_choice": "auto"}):
        param, message, _ = error_of(server, **extra)
        assert param == "tools"
        assert "--chat-template" in message
    assert ask(server, "as ever", tool_choice="none").choices[0].message.content == "as ever"


def test_a_template_that_would_drop_calls(serve_app: Serve) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    server = serve_app(engine_of(TOOLLESS_TEMPLATE))
    param, message, _ = error_of(server, tools=None, messages=[{"role": "assistant", "tool_calls": [call]}])
    assert param == "messages"
    assert "tool_calls" in message


def test_a_template_in_an_unknown_format(serve_app: Serve) -> None:
    param, message, _ = error_of(serve_app(engine_of(TOOLS + TOOLLESS_TEMPLATE)))
    assert param == "tools"
    assert "--tool-call-parser (hermes, llama3_json, mistral)" in message


def function(**fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": fields}


def parameters(schema: Any) -> dict[str, Any]:
    return {"tools": [function(name="f", parameters=schema)]}


def called(**fields: Any) -> dict[str, Any]:
    return {
        "messages": [{"role": "assistant", "tool_calls": [{"id": "x", "type": "function", "function": fields}]}]
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [WEATHER, CLOCK, WEATHER]}, "tools[2].function.name"),
        ({"tools": [function(name="")]}, "tools[0].function.name"),
        ({"tools": [function(description="x")]}, "tools[0].function.name"),
        ({"tools": [function(name="f", colour=1)]}, "tools[0].function.colour"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].type"),
        ({"tools": {}}, "tools"),
        (parameters([]), "tools[0].function.parameters"),
        (parameters({"type": "string"}), "tools[0].function.parameters"),
        (parameters({"type": "object", "properties": []}), "tools[0].function.parameters"),
        (parameters({"properties": {"a": {"type": "text"}}}), "tools[0].function.parameters"),
        (
            parameters({"properties": {"a": {"properties": {"b": {"type": ["null", 1]}}}}}),
            "tools[0].function.parameters",
        ),
        (parameters({"properties": {"a": 1}}), "tools[0].function.parameters"),
        (parameters({"required": "city"}), "tools[0].function.parameters"),
        (parameters({"required": [1]}), "tools[0].function.parameters"),
        (parameters({"description": "\ud800"}), "tools[0].function.parameters"),
        ({"tool_choice": {"type": "function", "function": {"name": "missile"}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {}}}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "clock"}}, "tool_choice"),
        ({"tool_choice": "clock"}, "tool_choice"),
        ({"tool_choice": 1}, "tool_choice"),
        ({"tool_choice": "auto", "tools": []}, "tool_choice"),
        ({"tool_choice": "required", "tools": None}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "clock"}}, "tools": []}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        (called(name="clock", arguments="{"), "messages[0].tool_calls[0].function.arguments"),
        (called(name="clock", arguments="[]"), "messages[0].tool_calls[0].function.arguments"),
        (called(name="clock", arguments={}), "messages[0].tool_calls[0].function.arguments"),
        (called(name="clock", arguments='{"a": "\\ud800"}'), "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls[0].id"),
    ],
)
def test_refusals(server: Live, body: dict[str, Any], param: str) -> None:
    given = {"messages": [{"role": "user", "content": "say(x)"}], "tools": [WEATHER, CLOCK], **body}
    response = httpx.post(
        f"{server.url}/v1/chat/completions", content=json.dumps(given), headers={"Content-Type": "application/json"}
    )
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not server.engine.submitted


def test_only_the_assistant_calls(server: Live) -> None:
    call = {"id": "x", "type": "function", "function": {"name": "clock"}}
    param, message, _ = error_of(server, messages=[{"role": "user", "content": "x", "tool_calls": [call]}])
    assert param == "messages"
    assert "role user" in message


@pytest.mark.parametrize("depth", [300, 1200])
def test_a_schema_too_deep_to_render(depth: int, server: Live) -> None:
    mark = "a schema"
    given = {"messages": [{"role": "user", "content": "say(x)"}], **parameters(mark)}
    deep = '{"properties": {"a": ' * depth + "{}" + "}}" * depth
    response = httpx.post(
        f"{server.url}/v1/chat/completions",
        content=json.dumps(given).replace(json.dumps(mark), deep),
        headers={"Content-Type": "application/json"},
    )
    if depth == 300 and sys.version_info >= (3, 12):  # JSON in C has a limit of its own since then
        assert response.status_code == 200
        return
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["param"] in {None, "messages", "tools[0].function.parameters"}
    assert "recursion" in error["message"] or "deep" in error["message"]
    assert not server.engine.submitted


def test_what_clients_send_besides(server: Live) -> None:
    strict = {**WEATHER, "function": {**WEATHER["function"], "strict": True}}
    assert calls_of(ask(server, say(CALLS[:1]), tools=[strict]).choices[0].message) == CALLS[:1]
    assert "strict" not in prompt_of(server)


def test_tokenize_counts_functions(server: Live) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    plain, more = (
        httpx.post(f"{server.url}/tokenize", json={**body, "tools": tools}).json()["count"]
        for tools in ([], [WEATHER])
    )
    assert more == plain + len(json.dumps(WEATHER))
