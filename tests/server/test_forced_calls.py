"""Calls that are forced, on the real engine with a tiny random model, which would never make any by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import pytest

from tests.model.tiny import byte_level, tiny_folder
from tests.server.conftest import LiveServer, Serve, live
from tests.server.test_tool_calls import CLOCK, WEATHER, calls_of, error_of
from tests.server.tools.families import FAMILIES, HERMES_TEMPLATE, TOOLLESS_TEMPLATE, engine_of
from vattention.config import EngineConfig
from vattention.engine.async_engine import AsyncEngine
from vattention.server import create_app

Real = LiveServer[AsyncEngine]

TRIP: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": 'plan "a" trip',
        "parameters": {
            "type": "object",
            "properties": {
                "to": {"enum": ["Zürich", "日本"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 99},
                "by": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
            },
            "required": ["to", "days", "by"],
            "additionalProperties": False,
        },
    },
}
TOOLS = [TRIP, CLOCK]
HELLO: list[Any] = [{"role": "user", "content": "hello"}]
SPECIAL = ["[TOOL_CALLS]", "<|python_tag|>"]

streamed = pytest.mark.parametrize("stream", [False, True])


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Real]]:
    """One for each family's chat template. Markers of two families are special tokens, the third's is text."""
    folder = tiny_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    tokenizer.save_pretrained(folder)
    engine = AsyncEngine.from_config(EngineConfig(model=str(folder), max_num_seqs=4, kv_memory="64MiB"))
    with ExitStack() as stack:
        stack.callback(engine.shutdown)
        yield {
            family.name: stack.enter_context(
                live(create_app(engine, served_model_name="tiny", chat_template=family.template), engine)
            )
            for family in FAMILIES
        }


@pytest.fixture(params=["hermes", "llama", "mistral"])
def server(servers: dict[str, Real], request: pytest.FixtureRequest) -> Real:
    return servers[request.param]


def ask(server: Real, *, stream: bool = False, **options: Any) -> Any:
    body: dict[str, Any] = {"model": "tiny", "messages": HELLO, "tools": TOOLS, "max_tokens": 2000, **options}
    with server.client() as client:
        if not stream:
            return client.chat.completions.create(**body)
        with client.chat.completions.stream(**body) as events:
            return events.get_final_completion()


def check_call(name: str, arguments: Any) -> None:
    if name == "clock":
        assert arguments == {}
        return
    assert name == TRIP["function"]["name"]
    assert set(arguments) == {"to", "days", "by"}
    assert arguments["to"] in {"Zürich", "日本"}
    assert isinstance(arguments["days"], int)
    assert 1 <= arguments["days"] <= 99
    assert 1 <= len(arguments["by"]) <= 3
    assert {type(value) for value in arguments["by"]} == {bool}


@streamed
@pytest.mark.parametrize("seed", range(4))
def test_required(server: Real, stream: bool, seed: int) -> None:
    [choice] = ask(server, stream=stream, seed=seed, tool_choice="required").choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    calls = calls_of(choice.message)
    assert calls
    for name, arguments in calls:
        check_call(name, arguments)


@streamed
@pytest.mark.parametrize("function", TOOLS, ids=["trip", "clock"])
def test_a_named_function_is_called_once(server: Real, stream: bool, function: Any) -> None:
    name = function["function"]["name"]
    choice = {"type": "function", "function": {"name": name}}
    answer = ask(server, stream=stream, seed=1, temperature=2.0, n=3, tool_choice=choice)
    for sample in answer.choices:
        [(called, arguments)] = calls_of(sample.message)
        assert (called, sample.finish_reason, sample.message.content or None) == (name, "tool_calls", None)
        check_call(called, arguments)


def test_one_call_where_they_may_not_be_parallel(server: Real) -> None:
    def lengths(**options: Any) -> set[int]:
        extra = {"return_token_ids": True}
        answer = ask(server, seed=3, n=8, tool_choice="required", temperature=2.0, extra_body=extra, **options)
        for choice in answer.choices:
            text = byte_level_with_markers().decode(choice.model_dump()["token_ids"])
            assert text.count('{"name": ') == len(calls_of(choice.message)), "nothing is written in vain"
        return {len(calls_of(choice.message)) for choice in answer.choices}

    assert lengths(parallel_tool_calls=False) == {1}
    assert max(lengths()) > 1


def test_left_alone_the_model_calls_nothing(server: Real) -> None:
    [choice] = ask(server, seed=0, max_tokens=100, extra_body={"ignore_eos": True}).choices
    assert (choice.message.tool_calls, choice.finish_reason) == (None, "length")


@streamed
def test_a_forced_call_that_is_cut_off_is_content(servers: dict[str, Real], stream: bool) -> None:
    messages: Any = HELLO
    with servers["hermes"].client() as client:
        options: Any = {"model": "tiny", "messages": messages, "tools": TOOLS, "tool_choice": "required"}
        answer: Any = client.chat.completions.create(**options, max_tokens=9, seed=0, stream=stream)
        choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    parts = [(choice.delta if stream else choice.message).content or "" for choice in choices]
    assert "".join(parts).startswith("<tool_")
    assert choices[-1].finish_reason == "length"


def post(server: Real, **body: Any) -> Any:
    given = {"messages": HELLO, "tools": TOOLS, "tool_choice": "required", **body}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=given, timeout=60)
    assert response.status_code == 400, response.text
    return response.json()["error"]


@streamed
@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "object", "properties": {"a": {"$ref": "#/nowhere"}}}, "nowhere"),
        ({"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}}, "regex"),
        ({"type": "object", "properties": {"a": {"not": {"type": "string"}}}}, "not"),
    ],
)
def test_a_schema_that_cannot_be_forced(server: Real, schema: Any, reason: str, stream: bool) -> None:
    tools = [CLOCK, {"type": "function", "function": {"name": "f", "parameters": schema}}]
    error = post(server, tools=tools, stream=stream)
    assert error["param"] == "tools"
    assert reason in error["message"]


@pytest.mark.parametrize("other", ["use_beam_search", "ignore_eos"])
def test_what_does_not_go_with_forced_calls(server: Real, other: str) -> None:
    error = post(server, **{other: True})
    assert error["param"] == "tool_choice"
    assert other in error["message"]


@streamed
def test_a_text_cannot_be_calls_and_something_else(server: Real, stream: bool) -> None:
    error = post(server, response_format={"type": "json_object"}, stream=stream)
    assert error["param"] == "tool_choice"


def test_a_template_that_does_not_know_functions(serve_app: Serve) -> None:
    server = serve_app(engine_of(TOOLLESS_TEMPLATE))
    for choice in ("required", {"type": "function", "function": {"name": "clock"}}):
        param, message, _ = error_of(server, tool_choice=choice)
        assert param == "tools"
        assert "--chat-template" in message


def test_others_are_not_held_to_a_grammar(serve_app: Serve) -> None:
    server = serve_app(engine_of(HERMES_TEMPLATE))
    for choice, forced in (("auto", False), ("none", False), ("required", True)):
        body = {"messages": HELLO, "tools": [WEATHER, CLOCK], "tool_choice": choice, "max_tokens": 1}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
        assert (server.engine.submitted[-1].params.grammar is not None) == forced


def test_the_forms_of_families_are_their_own(servers: dict[str, Real]) -> None:
    forms = {"hermes": "<tool_call>\n{", "llama": '{"name": "', "mistral": '[TOOL_CALLS][{"name": "'}
    for name, begins in forms.items():
        extra = {"return_token_ids": True}
        [choice] = ask(servers[name], seed=0, tool_choice="required", extra_body=extra).choices
        token_ids = choice.model_dump()["token_ids"]
        tokenizer = byte_level_with_markers()
        assert tokenizer.decode(token_ids).startswith(begins)
        assert (token_ids[0] == tokenizer.convert_tokens_to_ids("[TOOL_CALLS]")) == (name == "mistral")


def byte_level_with_markers() -> Any:
    tokenizer = byte_level()
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})
    return tokenizer
