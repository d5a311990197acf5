from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import BOS
from tests.server.test_responses import CLOCK, WEATHER, streamed
from tests.server.tools.families import HERMES_TEMPLATE, engine_of

CONVERSATIONS: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
    ({"input": "Hello"}, [{"role": "user", "content": "Hello"}]),
    (
        {"input": "Hello", "instructions": "Be brief."},
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}],
    ),
    (
        {
            "input": [
                {"role": "developer", "content": "Be brief."},
                {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hel"}]},
                {
                    "type": "message",
                    "id": "msg_1",
                    "role": "assistant",
                    "status": "completed",
                    "content": [{"type": "output_text", "text": "lo", "annotations": [], "logprobs": []}],
                },
                {"role": "user", "content": [{"type": "input_text", "text": t} for t in ("a", "b")]},
            ]
        },
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hel"},
            {"role": "assistant", "content": "lo"},
            {"role": "user", "content": "a\nb"},
        ],
    ),
    (
        {
            "input": [
                {"role": "user", "content": "Weather?"},
                {"role": "assistant", "content": "Let me see."},
                {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Bern"}'},
                {"type": "function_call", "call_id": "c2", "name": "clock", "arguments": "{}", "id": "fc_1"},
                {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "noon"}],
                },
            ],
            "tools": [WEATHER, CLOCK],
        },
        [
            {"role": "user", "content": "Weather?"},
            {
                "role": "assistant",
                "content": "Let me see.",
                "tool_calls": [
                    {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "Bern"}'}},
                    {"id": "c2", "function": {"name": "clock", "arguments": "{}"}},
                ],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
            {"role": "tool", "tool_call_id": "c2", "content": "noon"},
        ],
    ),
]


@pytest.mark.parametrize(("body", "messages"), CONVERSATIONS)
def test_the_model_is_told_what_a_chat_tells_it(
    serve_app: Serve, body: dict[str, Any], messages: list[dict[str, Any]]
) -> None:
    server = serve_app(engine_of(HERMES_TEMPLATE))
    sampling = {"temperature": 0.3, "top_p": 0.5, "top_k": 4, "seed": 5, "stop": ["x"], "cache_salt": "s"}
    tools = [
        {"type": "function", "function": {k: v for k, v in t.items() if k != "type"}} for t in body.get("tools", [])
    ]
    asked = httpx.post(f"{server.url}/v1/responses", json={**body, **sampling, "max_output_tokens": 3})
    same = httpx.post(
        f"{server.url}/v1/chat/completions",
        json={"messages": messages, "tools": tools, **sampling, "max_tokens": 3},
    )
    assert asked.status_code == same.status_code == 200, asked.text
    one, other = server.engine.submitted
    assert one.prompt[0] == BOS
    assert bytes(one.prompt[1:]) == bytes(other.prompt[1:])
    assert one.params == other.params


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["message.output_text.logprobs"]}, "include"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].name"),
        ({"tools": [{"type": "function", "name": "a", "parameters": {"type": "array"}}]}, "tools[0].parameters"),
        ({"tools": [CLOCK, CLOCK]}, "tools[1].name"),
        ({"tools": [CLOCK]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "name": "b"}, "tools": [CLOCK]}, "tool_choice"),
        ({"tool_choice": {"type": "web_search"}, "tools": [CLOCK]}, "tool_choice"),
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [{"role": "user"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type"),
        ({"input": [{"type": "function_call", "call_id": "a", "name": "b"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": "a", "output": "b"}]}, "input[0]"),
        (
            {"input": [{"type": "function_call", "call_id": "a", "name": "b", "arguments": "["}]},
            "input[0].arguments",
        ),
        ({"input": "refuse me"}, "input"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"text": {"format": {"type": "xml"}}}, "text.format.type"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"seed": "x"}, "seed"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_output_tokens": 10_000}, "max_output_tokens"),
        ({"messages": []}, "messages"),
        ({"n": 2}, "n"),
        ({"model": "other"}, "model"),
    ],
)
@streamed
def test_what_is_refused(server: Live, body: dict[str, Any], param: str, stream: bool) -> None:
    response = httpx.post(f"{server.url}/v1/responses", json={"input": "Hello", "stream": stream, **body})
    assert response.status_code == (404 if param == "model" else 400), response.text
    error = response.json()["error"]
    assert error["param"] == param
    assert "max_completion_tokens" not in error["message"]
    assert not server.engine.submitted


def test_what_asks_for_nothing_is_let_through(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="fake",
        input="say(Hi)",
        store=True,
        background=False,
        include=["reasoning.encrypted_content"],
        truncation="disabled",
        text={"format": {"type": "text"}, "verbosity": "medium"},
        service_tier="auto",
        prompt_cache_key="k",
        reasoning={"effort": None, "summary": None},
    )
    assert response.output_text == "Hi"
    assert response.store is False  # type: ignore[attr-defined]
