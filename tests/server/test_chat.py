from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import BOS, EOS, STORY, FakeEngine

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def chat(client: openai.OpenAI, messages: list[Any], **options: Any) -> Any:
    return client.chat.completions.create(model="fake", messages=messages, **options)


def sent(server: Live) -> str:
    """The prompt the engine got last, without its first token."""
    first, *rest = server.engine.submitted[-1].prompt
    assert first == BOS
    return bytes(rest).decode()


def test_replies(client: openai.OpenAI) -> None:
    completion = chat(client, HELLO, max_tokens=9)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    [choice] = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert (choice.message.role, choice.message.content) == ("assistant", STORY[:9])
    assert completion.usage.prompt_tokens == len("_user: Hello\nassistant: ")
    assert completion.usage.completion_tokens == 9
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


def test_goes_on_to_the_contexts_end_unless_told_otherwise(server: Live) -> None:
    with server.client() as client:
        completion = chat(client, HELLO)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.total_tokens == server.engine.max_model_len


def test_the_models_own_limit_holds_where_the_request_names_none(serve_app: Serve) -> None:
    engine = FakeEngine()
    engine.default_sampling = {"max_tokens": 7}
    with serve_app(engine).client() as client:
        assert chat(client, HELLO).usage.completion_tokens == 7
        assert chat(client, HELLO, max_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_token_limit(client: openai.OpenAI, name: str) -> None:
    assert chat(client, HELLO, **{name: 3}).choices[0].message.content == "Onc"


def test_streams_what_it_would_return_whole(client: openai.OpenAI) -> None:
    chunks = list(chat(client, HELLO, max_tokens=20, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[0].object == "chat.completion.chunk"
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert all(delta.role is None for delta in deltas[1:])
    assert "".join(delta.content or "" for delta in deltas) == STORY[:20]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]


def test_the_stream_helper_of_the_client_understands_the_stream(client: openai.OpenAI) -> None:
    messages: list[Any] = [{"role": "user", "content": "say(Hi)"}]
    with client.chat.completions.stream(model="fake", messages=messages) as stream:
        assert stream.get_final_completion().choices[0].message.content == "Hi"


def test_streams_usage_in_a_last_chunk(client: openai.OpenAI) -> None:
    options = {"include_usage": True}
    *chunks, last = chat(client, HELLO, max_tokens=5, stream=True, stream_options=options)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == 5


@pytest.mark.parametrize("stream", [False, True])
def test_several_samples(client: openai.OpenAI, stream: bool) -> None:
    answer = chat(client, [{"role": "user", "content": "say(Cat)"}], n=3, stream=stream)
    texts = {0: "", 1: "", 2: ""}
    reasons = {}
    for choice in [c for chunk in answer for c in chunk.choices] if stream else answer.choices:
        texts[choice.index] += (choice.delta if stream else choice.message).content or ""
        reasons[choice.index] = choice.finish_reason
    assert texts == {0: "Cat", 1: "at", 2: "t"}
    assert reasons == {0: "stop", 1: "stop", 2: "stop"}


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    message = {"role": "user", "content": "say(é)"}
    answer = chat(client, [message], logprobs=True, top_logprobs=3, stream=stream)
    choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert [token.token for token in tokens] == ["\ufffd", "\ufffd", "<eos>"]
    assert [token.bytes for token in tokens] == [None, None, list(b"<eos>")]
    assert [token.logprob for token in tokens] == [-0.5] * 3
    assert [top.logprob for top in tokens[0].top_logprobs] == [-0.5, -1.0, -9999.0]


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    report = chat(client, HELLO, max_tokens=1, logprobs=True).choices[0].logprobs
    assert [(t.token, t.bytes, t.top_logprobs) for t in report.content] == [("O", [79], [])]


def test_messages_reach_the_template_in_its_terms(server: Live) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "three"},
    ]
    with server.client() as client:
        chat(client, messages, max_tokens=1)
    assert sent(server) == "system: Be brief.\nuser: one\ntwo\nassistant: \nuser: three\nassistant: "


def test_a_reply_can_go_back_in_as_the_client_got_it(client: openai.OpenAI) -> None:
    reply = chat(client, HELLO, max_tokens=1).choices[0].message
    chat(client, [*HELLO, reply, *HELLO], max_tokens=1)
    chat(client, [*HELLO, reply.model_dump(), *HELLO], max_tokens=1)


@pytest.mark.parametrize("stream", [False, True])
def test_continues_a_message_and_echoes_it(server: Live, stream: bool) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "say(so)"}]
    extra = {"continue_final_message": True, "echo": True}
    with server.client() as client:
        answer = chat(client, messages, extra_body=extra, stream=stream)
        if stream:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        else:
            text = answer.choices[0].message.content
    assert sent(server) == "user: Hello\nassistant: say(so)"
    assert text == "say(so)so"


def test_can_leave_the_replys_opening_out(server: Live) -> None:
    with server.client() as client:
        answer = chat(client, HELLO, max_tokens=1, extra_body={"add_generation_prompt": False})
    assert sent(server) == "user: Hello\n"
    assert answer.choices[0].message.role == "user"


def test_template_of_the_server_and_arguments_of_the_request(serve_app: Serve) -> None:
    server = serve_app(chat_template="<T>")
    with server.client() as client:
        chat(client, HELLO, max_tokens=1, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert sent(server) == "<T>user: Hello\nassistant: enable_thinking=False;"


def test_without_a_template_of_its_own_a_reply_ends_before_the_next_turn(server: Live) -> None:
    with server.client() as client:
        [choice] = chat(client, [{"role": "user", "content": "say(Hi.\nuser: Ho)"}], stop=["x"]).choices
    assert (choice.message.content, choice.finish_reason) == ("Hi.", "stop")
    assert server.engine.submitted[0].params.stop_strings == ("x", "\nuser:")


@pytest.mark.parametrize("stream", [False, True])
def test_returns_token_ids_on_request(client: openai.OpenAI, stream: bool) -> None:
    message = {"role": "user", "content": "say(Hi)"}
    answer = chat(client, [message], extra_body={"return_token_ids": True}, stream=stream)
    parts = list(answer) if stream else [answer]
    tokens = [t for part in parts for c in part.choices for t in getattr(c, "token_ids", None) or ()]
    assert tokens == [72, 105, EOS]
    assert parts[0].prompt_token_ids[0] == BOS


def test_prompt_logprobs(client: openai.OpenAI) -> None:
    answer = chat(client, HELLO, max_tokens=1, extra_body={"prompt_logprobs": 0})
    assert answer.prompt_logprobs[0] is None
    assert answer.prompt_logprobs[1] == {"117": {"logprob": -0.5, "rank": 1, "decoded_token": "u"}}


def test_what_changes_nothing_is_let_through(client: openai.OpenAI) -> None:
    chat(
        client,
        HELLO,
        max_tokens=1,
        user="me",
        store=True,
        metadata={"a": "b"},
        safety_identifier="x",
        prompt_cache_key="y",
        service_tier="auto",
        parallel_tool_calls=True,
        tools=[],
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
    )


def test_takes_the_id_from_the_client(client: openai.OpenAI) -> None:
    assert chat(client, HELLO, max_tokens=1, extra_body={"request_id": "mine"}).id == "chatcmpl-mine"


def test_needs_a_tokenizer(serve_app: Serve) -> None:
    with (
        serve_app(FakeEngine(text=False)).client() as client,
        pytest.raises(openai.BadRequestError, match="no tokenizer"),
    ):
        chat(client, HELLO)
