from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.server.conftest import Live, Serve
from tests.server.fake_engine import BOS, EOS, STORY, FakeEngine


def complete(client: openai.OpenAI, prompt: Any, **options: Any) -> Any:
    return client.completions.create(model="fake", prompt=prompt, **options)


def test_completes_a_text(client: openai.OpenAI) -> None:
    response = complete(client, "Hello", max_tokens=9)
    assert response.object == "text_completion"
    assert response.model == "fake"
    assert response.id.startswith("cmpl-")
    [choice] = response.choices
    assert (choice.index, choice.text, choice.finish_reason, choice.logprobs) == (0, STORY[:9], "length", None)
    assert response.usage.prompt_tokens == 6
    assert response.usage.completion_tokens == 9
    assert response.usage.total_tokens == 15
    assert response.usage.prompt_tokens_details.cached_tokens == 0


def test_generates_sixteen_tokens_unless_told_otherwise(client: openai.OpenAI) -> None:
    assert complete(client, "Hello").choices[0].text == STORY[:16]


def test_ends_at_the_end_token(client: openai.OpenAI) -> None:
    [choice] = complete(client, "say(Hi)").choices
    assert (choice.text, choice.finish_reason) == ("Hi", "stop")


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("ab", [[BOS, 97, 98]]),
        (["ab", "c"], [[BOS, 97, 98], [BOS, 99]]),
        ([97, 98], [[97, 98]]),
        ([[97, 98], [99]], [[97, 98], [99]]),
    ],
)
def test_takes_prompts_in_four_forms(server: Live, prompt: Any, sent: list[list[int]]) -> None:
    with server.client() as client:
        response = complete(client, prompt, max_tokens=1)
    assert [stream.prompt for stream in server.engine.submitted] == sent
    assert [choice.index for choice in response.choices] == list(range(len(sent)))


def test_can_leave_special_tokens_out(server: Live) -> None:
    with server.client() as client:
        complete(client, "ab", extra_body={"add_special_tokens": False})
    assert server.engine.submitted[0].prompt == [97, 98]


@pytest.mark.parametrize("stream", [False, True])
def test_samples_of_several_prompts_are_numbered_through(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, ["say(Hat)", "say(Cow)"], n=2, stream=stream)
    texts = dict.fromkeys(range(4), "")
    for choice in [c for chunk in response for c in chunk.choices] if stream else response.choices:
        texts[choice.index] += choice.text
    assert texts == {0: "Hat", 1: "at", 2: "Cow", 3: "ow"}


def test_streams_what_it_would_return_whole(client: openai.OpenAI) -> None:
    whole = complete(client, "Hello", max_tokens=30)
    chunks = list(complete(client, "Hello", max_tokens=30, stream=True))
    assert len(chunks) > 5
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)


def test_streams_usage_in_a_last_chunk(client: openai.OpenAI) -> None:
    *chunks, last = complete(client, "Hello", max_tokens=5, stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (6, 5)


def test_streams_usage_in_every_chunk_when_asked_to(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = list(complete(client, "Hello", max_tokens=5, stream=True, stream_options=options))
    assert [chunk.usage.completion_tokens for chunk in chunks] == [1, 2, 3, 4, 5, 5]


@pytest.mark.parametrize("stream", [False, True])
def test_characters_of_several_tokens_arrive_whole(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, "say(né 🙂 日本)", max_tokens=40, stream=stream)
    chunks = list(response) if stream else [response]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "né 🙂 日本"
    assert not any("\ufffd" in chunk.choices[0].text for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_stops_before_a_stop_string_and_says_which(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, "Hello", max_tokens=60, stop=["nobody", "mapped"], stream=stream)
    chunks = list(response) if stream else [response]
    assert "".join(chunk.choices[0].text for chunk in chunks) == "Once upon a time a page was "
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert chunks[-1].choices[0].stop_reason == "mapped"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, "Hello", max_tokens=3, logprobs=3, stream=stream)
    parts = [choice.logprobs for chunk in (response if stream else [response]) for choice in chunk.choices]
    assert [token for part in parts for token in part.tokens] == ["O", "n", "c"]
    assert [value for part in parts for value in part.token_logprobs] == [-0.5] * 3
    assert [offset for part in parts for offset in part.text_offset] == [0, 1, 2]
    assert parts[0].top_logprobs[0] == {"O": -0.5, "P": -1.0, "Q": -9999.0}


def test_logprobs_of_zero_alternatives(client: openai.OpenAI) -> None:
    report = complete(client, "Hello", max_tokens=2, logprobs=0).choices[0].logprobs
    assert report.token_logprobs == [-0.5, -0.5]
    assert report.top_logprobs is None


@pytest.mark.parametrize("stream", [False, True])
def test_echo_begins_with_the_prompt_and_its_logprobs(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, "He", max_tokens=2, logprobs=1, echo=True, stream=stream)
    choices = [choice for chunk in (response if stream else [response]) for choice in chunk.choices]
    assert "".join(choice.text for choice in choices) == "HeOn"
    tokens = [token for choice in choices for token in choice.logprobs.tokens]
    offsets = [offset for choice in choices for offset in choice.logprobs.text_offset]
    values = [value for choice in choices for value in choice.logprobs.token_logprobs]
    assert tokens == ["<bos>", "H", "e", "O", "n"]
    assert offsets == [0, 0, 1, 2, 3]
    assert values == [None, -0.5, -0.5, -0.5, -0.5]


def test_scores_a_prompt_without_generating(client: openai.OpenAI) -> None:
    response = complete(client, "He", max_tokens=0, logprobs=1, echo=True)
    [choice] = response.choices
    assert (choice.text, choice.finish_reason) == ("He", "length")
    assert choice.logprobs.tokens == ["<bos>", "H", "e"]
    assert response.usage.completion_tokens == 0


def test_echoes_token_ids_as_text(client: openai.OpenAI) -> None:
    assert complete(client, [BOS, 72, 101], max_tokens=1, echo=True).choices[0].text == "HeO"


def test_prompt_logprobs_as_vllm_reports_them(client: openai.OpenAI) -> None:
    [choice] = complete(client, "He", max_tokens=1, extra_body={"prompt_logprobs": 1}).choices
    assert choice.prompt_logprobs == [
        None,
        {"72": {"logprob": -0.5, "rank": 1, "decoded_token": "H"}},
        {"101": {"logprob": -0.5, "rank": 1, "decoded_token": "e"}},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_returns_token_ids_on_request(client: openai.OpenAI, stream: bool) -> None:
    response = complete(client, "say(Hi)", extra_body={"return_token_ids": True}, stream=stream)
    choices = [choice for chunk in (response if stream else [response]) for choice in chunk.choices]
    assert [token for choice in choices for token in choice.token_ids] == [72, 105, EOS]
    assert choices[0].prompt_token_ids == [BOS, *b"say(Hi)"]
    assert all(getattr(choice, "prompt_token_ids", None) is None for choice in choices[1:])


def test_names_tokens_by_id_on_request(client: openai.OpenAI) -> None:
    extra = {"return_tokens_as_token_ids": True}
    [choice] = complete(client, "say(Hi)", logprobs=1, extra_body=extra).choices
    assert choice.logprobs.tokens == ["token_id:72", "token_id:105", f"token_id:{EOS}"]


def test_every_sampling_parameter_reaches_the_engine(server: Live) -> None:
    openai_fields: dict[str, Any] = {
        "max_tokens": 5,
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": -3,
        "stop": ["x"],
        "presence_penalty": 0.1,
        "frequency_penalty": 0.2,
        "logit_bias": {"5": -1.0},
        "logprobs": 2,
    }
    vllm_fields = {
        "top_k": 7,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "min_tokens": 2,
        "prompt_logprobs": 1,
        "skip_special_tokens": False,
    }
    with server.client() as client:
        complete(client, "a", **openai_fields, extra_body={**vllm_fields, "priority": -4})
    [stream] = server.engine.submitted
    for name, value in {**openai_fields, **vllm_fields}.items():
        expected = {5: -1.0} if name == "logit_bias" else value
        got = getattr(stream.params, name)
        assert (list(got) if isinstance(got, tuple) else got) == expected, name
    assert stream.priority == -4


def test_the_models_defaults_hold_where_the_request_says_nothing(serve_app: Serve) -> None:
    engine = FakeEngine()
    engine.default_sampling = {"temperature": 0.3, "top_k": 64, "top_p": 0.95}
    with serve_app(engine).client() as client:
        complete(client, "a", top_p=0.5, extra_body={"temperature": None})
    params = engine.submitted[0].params
    assert (params.temperature, params.top_k, params.top_p) == (0.3, 64, 0.5)


def test_without_a_tokenizer_it_completes_token_ids(serve_app: Serve) -> None:
    with serve_app(FakeEngine(text=False)).client() as client:
        extra = {"return_token_ids": True}
        [choice] = complete(client, [97], max_tokens=2, logprobs=1, extra_body=extra).choices
        assert choice.token_ids == list(b"On")
        assert choice.logprobs.tokens == ["token_id:79", "token_id:110"]
        with pytest.raises(openai.BadRequestError, match="no tokenizer"):
            complete(client, "text")


def test_several_tokens_of_one_step_arrive_together(serve_app: Serve) -> None:
    with serve_app(FakeEngine(tokens_per_step=4)).client() as client:
        chunks = list(complete(client, "Hello", max_tokens=12, logprobs=1, stream=True))
    assert [chunk.choices[0].text for chunk in chunks] == ["Once", " upo", "n a "]
    assert [len(chunk.choices[0].logprobs.tokens) for chunk in chunks] == [4, 4, 4]
    assert chunks[1].choices[0].logprobs.text_offset == [4, 5, 6, 7]
