from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Live, Serve, wait_until
from tests.server.fake_engine import STORY, FakeEngine
from tests.server.tools.families import FAMILIES, HERMES_TEMPLATE, Family, engine_of

WEATHER: dict[str, Any] = {
    "type": "function",
    "name": "weather",
    "description": "The weather in a city.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    "strict": True,
}
CLOCK: dict[str, Any] = {"type": "function", "name": "clock"}
CALLS: list[tuple[str, dict[str, Any]]] = [("weather", {"city": "Zürich"}), ("clock", {})]

streamed = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture
def slow(serve_app: Serve) -> Live:
    return serve_app(FakeEngine(step_s=0.01))


def ask(server: Live, text: str, *, stream: bool = False, **options: Any) -> Any:
    """A stream is put together from its last event, once its other events have been held against it."""
    with server.client() as client:
        if not stream:
            return client.responses.create(model="fake", input=text, **options)
        events = list(client.responses.create(model="fake", input=text, stream=True, **options))
    check_events(events)
    return events[-1].response


def check_events(events: list[Any]) -> None:
    """They come in OpenAI's order, and what they say bit by bit is what the last one says."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    first, second, *middle, last = events
    assert (first.type, second.type) == ("response.created", "response.in_progress")
    assert first.response.status == second.response.status == "in_progress"
    assert first.response.id == second.response.id == last.response.id
    assert not first.response.output
    assert last.type == f"response.{last.response.status}"
    for index, item in enumerate(last.response.output):
        own = [event for event in middle if event.output_index == index]
        assert own[0].type == "response.output_item.added"
        assert own[0].item.status == "in_progress"
        assert own[-1].type == "response.output_item.done"
        assert own[-1].item == item
        assert {event.item_id for event in own[1:-1]} == {item.id}
        if item.type == "message":
            kinds = ["content_part.added", *["output_text.delta"] * (len(own) - 5)]
            kinds += ["output_text.done", "content_part.done"]
            assert "".join(event.delta for event in own[2:-3]) == own[-3].text == item.content[0].text
            assert own[-2].part == item.content[0]
        else:
            kinds = ["function_call_arguments.delta"] * (len(own) - 3) + ["function_call_arguments.done"]
            assert "".join(event.delta for event in own[1:-2]) == own[-2].arguments == item.arguments
        assert [event.type for event in own[1:-1]] == [f"response.{kind}" for kind in kinds]
    assert len(middle) == sum(event.output_index < len(last.response.output) for event in middle)
    assert [event.output_index for event in middle] == sorted(event.output_index for event in middle)


@streamed
def test_text(server: Live, stream: bool) -> None:
    response = ask(server, "say(Hi there)", stream=stream, metadata={"a": "b"}, temperature=0.5, user="me")
    assert response.id.startswith("resp_")
    assert (response.object, response.status, response.error) == ("response", "completed", None)
    assert response.output_text == "Hi there"
    [item] = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert (response.model, response.metadata, response.temperature) == ("fake", {"a": "b"}, 0.5)
    assert response.usage.input_tokens == len("_user: say(Hi there)\nassistant: ")
    assert response.usage.output_tokens == 9
    assert response.usage.total_tokens == response.usage.input_tokens + 9
    assert response.usage.input_tokens_details.cached_tokens == 0
    assert response.usage.output_tokens_details.reasoning_tokens == 0


@streamed
def test_text_that_is_cut_off(server: Live, stream: bool) -> None:
    response = ask(server, "Hello", stream=stream, max_output_tokens=9)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert response.output_text == STORY[:9]
    assert response.output[0].status == "incomplete"


@streamed
def test_no_text_at_all(server: Live, stream: bool) -> None:
    response = ask(server, "say()", stream=stream)
    assert response.status == "completed"
    assert [item.type for item in response.output] == ["message"]
    assert response.output_text == ""


def test_the_clients_own_helper_for_streams(server: Live) -> None:
    with server.client() as client, client.responses.stream(model="fake", input="say(Hi)") as events:
        kinds = [event.type for event in events]
        assert events.get_final_response().output_text == "Hi"
    assert kinds[-1] == "response.completed"


def test_events_have_names_and_no_end_mark(server: Live) -> None:
    response = httpx.post(f"{server.url}/v1/responses", json={"input": "say(Hi)", "stream": True})
    assert response.headers["Content-Type"].startswith("text/event-stream")
    for block in response.text.strip().split("\n\n"):
        name, data = block.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


@streamed
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("tokens_per_step", [1, 1000])
def test_calls(serve_app: Serve, family: Family, tokens_per_step: int, stream: bool) -> None:
    server = serve_app(engine_of(family.template, tokens_per_step=tokens_per_step))
    response = ask(server, f"say({family.write(CALLS)})", stream=stream, tools=[WEATHER, CLOCK])
    assert response.status == "completed"
    assert [(item.name, json.loads(item.arguments)) for item in response.output] == CALLS
    assert {(item.type, item.status) for item in response.output} == {("function_call", "completed")}
    assert len({item.call_id for item in response.output}) == 2
    assert [tool.name for tool in response.tools] == ["weather", "clock"]


@streamed
def test_text_beside_calls(serve_app: Serve, stream: bool) -> None:
    server = serve_app(engine_of(HERMES_TEMPLATE))
    text = f"say(Well. {FAMILIES[0].write(CALLS[:1])})"
    response = ask(server, text, stream=stream, tools=[WEATHER, CLOCK])
    assert [item.type for item in response.output] == ["message", "function_call"]
    assert response.output_text.strip() == "Well."


def test_what_came_out_goes_back_in(serve_app: Serve) -> None:
    server = serve_app(engine_of(HERMES_TEMPLATE))
    question: Any = {"role": "user", "content": f"say({FAMILIES[0].write(CALLS[:1])})"}
    with server.client() as client:
        tools: Any = [WEATHER]
        first: Any = client.responses.create(model="fake", input=[question], tools=tools)
        [call] = first.output
        assert call.type == "function_call"
        result = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
        conversation: Any = [question, *(item.model_dump() for item in first.output), result]
        client.responses.create(model="fake", input=conversation, tools=tools)
    prompt = bytes(server.engine.submitted[-1].prompt[1:]).decode()
    assert f"sunny({call.call_id})" in prompt


@pytest.mark.parametrize(
    ("choice", "shown"),
    [("none", False), ("auto", True), ("required", True), ({"type": "function", "name": "clock"}, True)],
)
def test_choice_of_tools(serve_app: Serve, choice: Any, shown: bool) -> None:
    server = serve_app(engine_of(HERMES_TEMPLATE))
    response = ask(server, "say(no)", tools=[WEATHER, CLOCK], tool_choice=choice)
    [stream] = server.engine.submitted
    assert (b'"clock"' in bytes(stream.prompt[1:])) == shown
    assert (stream.params.grammar is not None) == (choice not in ("none", "auto"))
    assert json.loads(response.model_dump_json())["tool_choice"] == choice


def test_an_error_before_the_first_token_is_no_stream(server: Live) -> None:
    response = httpx.post(f"{server.url}/v1/responses", json={"input": "fail(0)", "stream": True})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"


def test_an_error_in_mid_stream_is_its_last_event(server: Live) -> None:
    with server.client() as client:
        events: list[Any] = list(client.responses.create(model="fake", input="fail(2)", stream=True))
    assert events[-1].type == "error"
    assert events[-1].sequence_number == len(events) - 1
    assert "log says why" in events[-1].message


def test_a_client_that_leaves_its_stream_is_not_served_on(slow: Live) -> None:
    with slow.client() as client, client.responses.create(model="fake", input="Hello", stream=True) as events:
        assert next(events).type == "response.created"
    wait_until(lambda: slow.engine.aborted == 1)
    assert not slow.engine.running


def test_a_client_that_does_not_wait_is_not_served_on(slow: Live) -> None:
    with slow.client(timeout=0.3) as client, pytest.raises(openai.APITimeoutError):
        client.responses.create(model="fake", input="Hello")
    wait_until(lambda: slow.engine.aborted == 1)
    assert not slow.engine.running
