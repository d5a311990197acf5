"""The server on the real engine with a tiny random model: what the scripted engine cannot show."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from pydantic import BaseModel, ConfigDict

from tests.engine.beam_reference import model_logits, search
from tests.model.tiny import byte_level, tiny_folder, tiny_llama
from tests.server.conftest import LiveServer, live, wait_until
from vattention.config import EngineConfig
from vattention.engine.async_engine import AsyncEngine
from vattention.model.grammar import Grammars
from vattention.server import create_app

Real = LiveServer[AsyncEngine]

STEADY: dict[str, Any] = {"temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Real]:
    folder = tiny_folder(tmp_path_factory.mktemp("model"))
    engine = AsyncEngine.from_config(EngineConfig(model=str(folder), max_num_seqs=8, kv_memory="16MiB"))
    try:
        with live(create_app(engine, served_model_name="tiny"), engine) as server:
            yield server
    finally:
        engine.shutdown()


@pytest.fixture
def client(real: Real) -> Iterator[openai.OpenAI]:
    with real.client() as made:
        yield made


def is_idle(real: Real) -> bool:
    now = real.engine.statistics()
    return now.num_running == now.num_waiting == now.accounts.live_nbytes == 0


def test_says_what_transformers_says(client: openai.OpenAI) -> None:
    tokenizer = byte_level()
    prompt = tokenizer("hello world", return_tensors="pt")["input_ids"]
    expected = tiny_llama().generate(prompt, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    extra = {"min_tokens": 12, "return_token_ids": True}
    [choice] = client.completions.create(
        model="tiny", prompt="hello world", max_tokens=12, temperature=0, extra_body=extra
    ).choices
    assert choice.model_dump()["token_ids"] == expected[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("prompt", ["hello", "naïve café", "日本語"])
def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI, prompt: str) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": 40,
        "logprobs": 2,
        "n": 2,
        "seed": 7,
    }
    whole: Any = client.completions.create(**options)
    texts, tokens = ["", ""], [list[str](), list[str]()]
    stream: Any = client.completions.create(**options, stream=True)
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
    assert texts == [choice.text for choice in whole.choices]
    assert tokens == [choice.logprobs.tokens for choice in whole.choices]
    assert texts[0] != texts[1]


@pytest.mark.parametrize("stream", [False, True])
def test_echoes_and_scores_the_prompt_for_every_sample(client: openai.OpenAI, stream: bool) -> None:
    answer: Any = client.completions.create(
        model="tiny", prompt="hello world " * 8, max_tokens=3, logprobs=1, echo=True, n=3, stream=stream
    )
    choices = [choice for chunk in (answer if stream else [answer]) for choice in chunk.choices]
    for index in range(3):
        own = [choice for choice in choices if choice.index == index]
        assert "".join(choice.text for choice in own).startswith("hello world " * 8)
        values = [value for choice in own for value in choice.logprobs.token_logprobs]
        assert values[0] is None
        assert all(value < 0 for value in values[1:])


@pytest.mark.parametrize("extra", [{"n": 3}, {"n": 2, "best_of": 3}], ids=["width n", "width best_of"])
def test_a_beam_search(client: openai.OpenAI, extra: dict[str, int]) -> None:
    prompt = byte_level()("hello world")["input_ids"]
    expected = search(
        model_logits(tiny_llama()), prompt, width=3, max_tokens=7, ends=frozenset({2}), length_penalty=0.5
    )
    options = {"use_beam_search": True, "length_penalty": 0.5, "return_token_ids": True, **extra}
    answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=7, logprobs=1, extra_body=options)
    found = [choice.model_dump() for choice in answer.choices]
    assert [choice["index"] for choice in found] == list(range(extra["n"]))
    assert [tuple(choice["token_ids"]) for choice in found] == [best.tokens for best in expected[: extra["n"]]]
    for choice, best in zip(found, expected, strict=False):
        assert sum(choice["logprobs"]["token_logprobs"]) == pytest.approx(best.cum_logprob, abs=1e-3)


def test_a_beam_search_for_a_reply(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 5,
        "n": 2,
    }
    extra = {"use_beam_search": True, "return_token_ids": True}
    answer: Any = client.chat.completions.create(**options, extra_body=extra)
    expected = search(
        model_logits(tiny_llama()),
        answer.model_dump()["prompt_token_ids"],
        width=2,
        max_tokens=5,
        ends=frozenset({2}),
    )
    found = [choice.model_dump() for choice in answer.choices]
    assert [tuple(choice["token_ids"]) for choice in found] == [best.tokens for best in expected]
    with pytest.raises(openai.BadRequestError, match="beam search cannot be streamed"):
        client.chat.completions.create(**options, extra_body=extra, stream=True)


@pytest.mark.parametrize("chat", [False, True])
def test_the_best_of_several_samples(client: openai.OpenAI, chat: bool) -> None:
    options: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 3}

    def samples(**more: Any) -> list[str]:
        if chat:
            extra = {"best_of": more.pop("best_of", None), "ignore_eos": True}
            talk: Any = [{"role": "user", "content": "hello"}]
            made: Any = client.chat.completions.create(
                messages=talk, logprobs=True, **options, **more, extra_body=extra
            )
            entries = [(sum(e.logprob for e in c.logprobs.content), c.message.content) for c in made.choices]
        else:
            extra = {"ignore_eos": True}
            made = client.completions.create(prompt="hello", logprobs=1, **options, **more, extra_body=extra)
            entries = [(sum(c.logprobs.token_logprobs), c.text) for c in made.choices]
        assert made.usage.completion_tokens == 6 * len(entries)
        return [text for _, text in sorted(entries, reverse=True)]

    assert samples(n=2, best_of=5) == samples(n=5)[:2]


@pytest.mark.parametrize(
    ("extra", "form"),
    [
        ({"response_format": {"type": "json_object"}, "seed": 2}, r"\{.*\}"),
        ({"structured_outputs": {"choice": ["good", "bad"]}}, "good|bad"),
        ({"structured_outputs": {"json": '{"type": "boolean"}'}}, "true|false"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"allowed_token_ids": [68, 69], "bad_words": ["b"]}, "a+"),
        ({"guided_choice": ["good", "bad"]}, "good|bad"),
        ({"guided_grammar": 'start: "a" "b"'}, "ab"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_structured_outputs(client: openai.OpenAI, extra: dict[str, Any], form: str, stream: bool) -> None:
    logit_bias = {"96": 20} if "seed" in extra else None  # a closing brace, before a random model forgets it
    made: Any = client.completions.create(
        model="tiny", prompt="hello", max_tokens=100, stream=stream, logit_bias=logit_bias, extra_body=extra
    )
    text = "".join(chunk.choices[0].text for chunk in made) if stream else made.choices[0].text
    assert re.fullmatch(form, text, re.DOTALL)


def test_others_are_served_while_the_vocabulary_is_read(
    real: Real, client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading, go_on = threading.Event(), threading.Event()
    read = Grammars._read

    def slow_read(self: Grammars) -> Any:
        reading.set()
        assert go_on.wait(30)
        return read(self)

    monkeypatch.setattr(Grammars, "_read", slow_read)
    monkeypatch.setattr(real.engine._engine._intake._grammars, "_vocabulary", None)
    options: dict[str, Any] = {"model": "tiny", "prompt": "hello", "max_tokens": 9}
    choice = {"structured_outputs": {"choice": ["good", "bad"]}}
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(lambda: client.completions.create(**options, extra_body=choice))
        assert reading.wait(30)
        assert client.completions.create(**options).choices
        assert not answer.done()
        go_on.set()
        assert answer.result().choices[0].text in ("good", "bad")


def test_a_reply_of_a_schema(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"]}
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "answer", "strict": True, "schema": {**schema, "additionalProperties": False}},
        },
    )
    assert json.loads(answer.choices[0].message.content or "") in ({"sure": True}, {"sure": False})
    with pytest.raises(openai.BadRequestError, match="cannot be combined with response_format"):
        client.completions.create(
            model="tiny",
            prompt="hello",
            extra_body={"response_format": {"type": "json_object"}, "guided_regex": "a"},
        )


class Answer(BaseModel):
    """What a response may be asked to be."""

    model_config = ConfigDict(extra="forbid")

    sure: bool


def test_responses_of_a_schema(client: openai.OpenAI) -> None:
    whole = client.responses.parse(model="tiny", input="hello", text_format=Answer, temperature=0)
    assert isinstance(whole.output_parsed, Answer)
    assert whole.text is not None
    assert whole.text.format is not None
    assert whole.text.format.type == "json_schema"
    with client.responses.stream(model="tiny", input="hello", text_format=Answer, temperature=0) as events:
        assert events.get_final_response().output_parsed == whole.output_parsed
    for cached in (range(1), range(64, 86)):
        answer = client.responses.parse(model="tiny", input="q" * 70, text_format=Answer, temperature=0)
        assert answer.usage is not None
        assert answer.usage.input_tokens_details.cached_tokens in cached


def test_the_chat_template_adds_one_bos_token(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "hello"}],
        max_tokens=1,
        extra_body={"return_token_ids": True},
    )
    ids = answer.model_dump()["prompt_token_ids"]
    assert ids[0] == byte_level().bos_token_id
    assert ids.count(ids[0]) == 1


def test_tokens_there_and_back(real: Real) -> None:
    ids = httpx.post(real.url + "/tokenize", json={"prompt": "naïve 日本"}).json()["tokens"]
    assert ids == byte_level()("naïve 日本")["input_ids"]
    assert httpx.post(real.url + "/detokenize", json={"tokens": ids[1:]}).json() == {"prompt": "naïve 日本"}


def test_a_prompt_beyond_the_context(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        client.completions.create(model="tiny", prompt=[5] * 128)
    assert refusal.value.code == "context_length_exceeded"


def test_metrics_add_up(real: Real, client: openai.OpenAI) -> None:
    def figure(name: str) -> float:
        lines = httpx.get(real.url + "/metrics").text.splitlines()
        return float(next(line for line in lines if line.startswith(name + "{")).split()[-1])

    names = ["vllm:prompt_tokens_total", "vllm:generation_tokens_total", "vllm:request_params_n_count"]
    before = [figure(name) for name in names]
    client.completions.create(model="tiny", prompt=[5] * 20, max_tokens=7, **STEADY)
    assert [figure(name) - past for name, past in zip(names, before, strict=True)] == [20, 7, 1]
    assert figure("vattention:kv_live_bytes") == 0
    assert figure("vattention:kv_reserved_bytes") > figure("vattention:kv_mapped_bytes") > 0


async def test_of_100_clients_a_third_hangs_up_and_nothing_stays(real: Real) -> None:
    rng = random.Random(1)

    async def stays(api: openai.AsyncOpenAI, prompt: list[int]) -> None:
        whole = await api.completions.create(model="tiny", prompt=prompt, max_tokens=10, **STEADY)
        assert whole.usage is not None
        assert whole.usage.completion_tokens == 10

    async def leaves_in_mid_stream(api: openai.AsyncOpenAI, prompt: list[int]) -> None:
        stream = await api.completions.create(model="tiny", prompt=prompt, max_tokens=90, stream=True, **STEADY)
        async with stream:
            for _ in range(rng.randint(1, 10)):
                await anext(stream, None)  # outputs that come faster than they are read are one

    async def leaves_while_waiting(api: openai.AsyncOpenAI, prompt: list[int]) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0.0, 0.5)):
                await api.completions.create(model="tiny", prompt=prompt, max_tokens=90, **STEADY)

    async with real.async_client() as api:
        kinds = (stays, leaves_in_mid_stream, stays, stays, leaves_while_waiting, stays)
        prompts = [[rng.randint(3, 399)] * rng.randint(1, 30) for _ in range(100)]
        await asyncio.gather(*(kinds[i % 6](api, prompt) for i, prompt in enumerate(prompts)))
    await asyncio.to_thread(wait_until, lambda: is_idle(real))
    real.engine._engine.manager.drop_warm()
    assert real.engine.statistics().accounts.mapped_nbytes == 0
